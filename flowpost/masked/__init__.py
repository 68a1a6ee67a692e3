"""The masked autoregressive network, and how it is made fast; it knows no bijector.

- the network: `network`, of `activations` and of products that skip zeros, `staircase`
- what is computed, several networks with their element-wise steps in sequence: `run`
- the autograd nodes, which are made of an engine's operations: `nodes`
- the engines: `engine` says what one gives and chooses `host`, on a CPU, or `device`, on a GPU
- what stands beside them: `plain`, where something must see the operations themselves; `recorded`, `layouts`
"""
