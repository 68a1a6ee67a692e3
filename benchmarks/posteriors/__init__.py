"""Bayesian posteriors of known evidence: 24 log joints, their reference draws, what Gaussians lose."""
