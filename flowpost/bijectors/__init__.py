"""Invertible maps with exact log-determinants, one family a file."""
