"""`python -m benchmarks speed --launches`: what every recipe launches, beside the public libraries' flows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import flowpost
from benchmarks.files import Content
from benchmarks.filling import origin
from benchmarks.peers import here
from benchmarks.run import Run, terminal
from benchmarks.speed.flows import Flow
from benchmarks.speed.launches import launched, launches
from benchmarks.speed.peers import PEERS
from benchmarks.speed.sizes import SMALL, Size
from benchmarks.table import Table
from flowpost.density import standard_normal_log_prob
from flowpost.objectives import elbo
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, VAEOutput

MARK = "launches"
SIZE = replace(SMALL, dim=16)  # of twice the variables a search takes twice as long to count
PIXELS = 784
USES = ("sample", "with gradients", "log_prob", "with gradients", "VAE step")
CAPTION = (
    "Operations that a device would run, counted on the meta device in float32; views are not counted, an operator of "
    "flowpost's own is one kernel. Size {size}: every recipe with its defaults otherwise, the libraries' flows at all "
    "of it. A VAE step is forward, backward and Adam, with one layer each way. –: the library reads a number back"
)

Draw = Callable[[Tensor], Sequence[Tensor]]
Score = Callable[[Tensor, Tensor], Tensor]
Counts = Mapping[str, Sequence[int | None]]
"""By name, one for each of `USES`; None where the model reads a number back on the host."""


def count(size: Size = SIZE) -> dict[bool, Counts]:
    """Of every recipe, and of the public libraries that are here: with kernels, and without."""
    own = {name: list(_ours(name, size, kernels=True)) for name in RECIPES}
    # Kernels serve the masked networks and the tanh ridges.
    without = {name: list(_ours(name, size, kernels=False)) for name in RECIPES if _has_kernels(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a library says of its own calls
        theirs = {name: _theirs(PEERS[name](size).to("meta"), size) for name in PEERS if here(name)}
    return {True: own | theirs, False: own | without | theirs}


def table(counts: Counts, size: Size = SIZE, *, kernels: bool) -> Table:
    """One row a model."""
    rows = [[name, *("–" if number is None else f"{number:,}" for number in row)] for name, row in counts.items()]
    title = f"operations launched, {'with' if kernels else 'without'} Triton's kernels"
    return Table(["model", *USES], rows, title, CAPTION.format(size=size))


def publish(run: Run) -> None:
    """Count, print, and write `launches.json`, `launches.md` and the page."""
    counts = count()
    content = run.head() | {"uses": USES, "kernels": counts[True], "no kernels": counts[False]}
    for each in tables(content):
        terminal().print(each)
    run.write("launches.json", content)
    run.write("launches.md", shown(content))
    run.publish("launches.json", shown)


def tables(content: Content) -> list[Table]:
    """With kernels, and without."""
    return [table(content[key], kernels=kernels) for key, kernels in (("kernels", True), ("no kernels", False))]


def shown(content: Content, page: str = "") -> str:
    """The page's text."""
    return "\n\n".join([origin(content), *(each.markdown() for each in tables(content))])


def _has_kernels(name: str) -> bool:
    kinds = (flowpost.Masked, flowpost.Planar, flowpost.Sylvester)
    return any(isinstance(module, kinds) for module in RECIPES[name](1, 2).modules())


def _ours(name: str, size: Size, *, kernels: bool) -> Iterator[int]:
    posterior = RECIPES[name](size.context, size.dim)
    encoder, decoder = nn.Linear(PIXELS, size.context), nn.Linear(size.dim, PIXELS)
    vae = VAE(encoder, posterior, decoder, Bernoulli()).to("meta")
    own = list(posterior.parameters())
    yield from _uses(lambda h: posterior(h)[:2], posterior.log_prob, own, size, kernels=kernels)
    yield launched(_step(vae, size), kernels=kernels)


def _theirs(flow: Flow, size: Size) -> list[int | None]:
    found: list[int | None] = []
    counts = _uses(flow.sample, flow.log_prob, list(flow.parameters()), size, kernels=True)
    try:
        found += counts
    except RuntimeError:  # from an `item` on the meta device
        found += [None] * (len(USES) - 1 - len(found))
    return [*found, launched(_step(_Around(flow, size).to("meta"), size), kernels=True)]


def _uses(draw: Draw, score: Score, own: Sequence[Tensor], size: Size, *, kernels: bool) -> Iterator[int]:
    h, z = (torch.empty(size.batch, n, device="meta", requires_grad=True) for n in (size.context, size.dim))
    yield from launches(lambda: draw(h), [h, *own], kernels=kernels)
    yield from launches(lambda: [score(z, h)], [z, h, *own], kernels=kernels)


def _step(vae: nn.Module, size: Size) -> Callable[[], None]:
    x = torch.empty(size.batch, PIXELS, device="meta")
    optimizer = torch.optim.Adam(vae.parameters(), foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        out = vae(x)
        (-elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl)).mean().backward()
        optimizer.step()

    return step


class _Around(nn.Module):
    """A library's flow as the posterior of the same VAE."""

    def __init__(self, flow: Flow, size: Size) -> None:
        super().__init__()
        self.encoder, self.flow = nn.Linear(PIXELS, size.context), flow
        self.decoder, self.likelihood = nn.Linear(size.dim, PIXELS), Bernoulli()

    def forward(self, x: Tensor) -> VAEOutput:
        z, log_q = self.flow.sample(self.encoder(x))
        log_likelihood = self.likelihood.log_prob(self.decoder(z).unsqueeze(-2), x)
        return VAEOutput(log_likelihood, standard_normal_log_prob(z), log_q, None, flowpost.Sample(z, log_q, z))
