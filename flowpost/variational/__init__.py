"""Variational inference on a user's log joint: the parts of `flowpost.fit`.

- constrained parameters as one vector of real coordinates: `maps`, `matrices`, `constraints`, `parameters`
- how a log joint takes many draws, and its density over the coordinates: `draws`, `calling`, `target`
- in which dtype, and whether its gradient is that of its values: `precision`, `slopes`
- Gaussians that climb to its modes, where a fit starts: `gaussian`, `starts`
- what is fitted, and its ELBO with a path gradient: `standard`, `mixture`, `bound`, `families`
- the fit under way, and modes that it misses: `ascent`, `mirrors`, `mirrored`, `missed`, `running`
- what came of it, by draws that p/q weighs: `weighing`, `far`, `summary`, `verdict`, `refining`, `stored`, `fitted`
"""
