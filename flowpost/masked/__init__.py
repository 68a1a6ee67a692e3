"""The masked autoregressive network, and how it is made fast; it knows no bijector."""
