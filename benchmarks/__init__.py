"""Posteriors compared on data, in nats and in seconds: `python -m benchmarks`."""
