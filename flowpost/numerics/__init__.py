"""Arithmetic that knows no flow: bounds, roots, ridges, reflections, triangular matrices, argument checks."""
