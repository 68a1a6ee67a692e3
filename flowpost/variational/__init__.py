"""Variational inference on a user's log joint: parameters with constraints, and the density of their coordinates."""
