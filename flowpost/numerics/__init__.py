"""Arithmetic that knows no flow, and what else the rooms above stand on.

- positive numbers, knots of splines, ridges: `scales`, `knots`, `rational`, `ridge`
- matrices: `products`, `multiplying`, `triangles`, `reflections`
- roots: `roots`, `tanh_roots`, `root_kernels`, `mixtures`
- running sums, and what numpy spells differently: `sums`, `arrays`
- tensors and numbers that a module keeps: `constants`, `states`, `rates`
- what is refused, and in what words: `arguments`, `owners`, `repeated`
- who else looks at the operations, and whether kernels run: `watchers`, `fusing`
- gradients along one tensor, draws of one's own, results given again: `along`, `alone`, `remembered`
"""
