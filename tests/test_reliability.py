"""The scoreboard: flowpost survives every hard use, and the judge has teeth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from forked import Run
from rich.console import Console
from torch import Tensor, nn

import flowpost
from benchmarks import __main__ as cli
from benchmarks.filling import fill
from benchmarks.reliability import command
from benchmarks.reliability.board import Library, count, markdown, tables
from benchmarks.reliability.judge import NOT_APPLICABLE, RAW, SILENT, SURVIVED, Model, Pair, is_clear, judge
from benchmarks.reliability.own import flowpost_models
from benchmarks.reliability.worker import load, placeless, uses
from flowpost import bijectors
from flowpost.recipes import RECIPES

ROOT = Path(__file__).parents[1]
USES = {use.name: use for use in uses(quick=False)}
MODELS = {model.name: model for model in flowpost_models()}
SLOW = ("Spline", "DeepSigmoid", "Sylvester", "Inverse(Sylvester)", "naf()", "spline_autoregressive()")
"""Ten seconds a model and more, for they search or split: asked by `make test-deep`, and by the scoreboard itself."""
EARLY = [f"{name}(), amortized" for name in ("planar", "iaf")] + ["Coupling ×2"]
ASKED = [name for name in MODELS if "FLOWPOST_DEEP" in os.environ or not name.startswith(SLOW)]


def _by_level() -> list:
    marks = {True: pytest.mark.full, False: pytest.mark.long}
    return [pytest.param(name, marks=marks[name in EARLY]) for name in ASKED]


@pytest.mark.parametrize("name", _by_level())
def test_flowpost_survives(name: str) -> None:
    verdicts = {use.name: judge(use, MODELS[name]) for use in uses(quick=True)}
    wrong = {use: verdict for use, verdict in verdicts.items() if verdict.outcome in (RAW, SILENT)}
    assert not wrong
    assert sum(verdict.outcome == SURVIVED for verdict in verdicts.values()) > 30


@pytest.mark.full
def test_one_model_compiles() -> None:
    for use in set(USES) - {use.name for use in uses(quick=True)}:
        assert judge(USES[use], MODELS["Autoregressive ×2, amortized"]).outcome == SURVIVED


def test_importing_flowpost_changes_nothing() -> None:
    assert judge(USES["import leaves torch as it was"], load("flowpost")[0]).outcome == SURVIVED


@pytest.mark.full
def test_what_importing_flowpost_does_is_watched(python: Run) -> None:
    """It is imported when its models are asked for, and not before: else nobody would see what that changes."""
    code = "import sys, benchmarks.reliability.worker; sys.exit('flowpost' in sys.modules)"
    assert python(code).returncode == 0


def test_every_family_and_recipe_is_asked() -> None:
    public = {getattr(bijectors, name) for name in bijectors.__all__}
    families = {c for c in public if isinstance(c, type) and issubclass(c, flowpost.Bijector)} - {flowpost.Bijector}
    modules = [module for model in MODELS.values() for module in model.build(4, model.plain(4)).modules()]
    missing = families - {type(module) for module in modules}
    assert not missing, "add a line to benchmarks/reliability/own.py"
    for recipe in RECIPES:
        assert {f"{recipe}(), amortized", f"{recipe}(), learned"} <= set(MODELS)


# ---- the judge: toys that are broken in one way each -------------------------------------------------------------


class Toy(nn.Module):
    """``z' = exp(w) z + v c``, right and without a single check."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w, self.kept = nn.Parameter(torch.randn(dim)), {}
        self.v = nn.Parameter(torch.randn(width, dim)) if width else None


def plain(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    toy = cast("Toy", module)
    image = z * toy.w.exp()
    if toy.v is not None and context is not None:
        image = image + context @ toy.v
    return image, toy.w.sum().expand(image.shape[:-1])


def undo(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    toy = cast("Toy", module)
    return z * (-toy.w).exp(), -toy.w.sum().expand(z.shape[:-1])


def wrong_log_det(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image, 1.01 * log_det


def squeezed(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image, log_det.squeeze()


def cached(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    kept = cast("Toy", module).kept
    if kept.get("z") is not z:
        kept.update(z=z, answer=plain(module, z, context))
    return kept["answer"]


def single(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image, log_det.float()


def mixed_rows(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    return plain(module, z - z.mean(0), context)


def mutating(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    return plain(module, z.detach().mul_(2), context)


def overflowing(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image + (z - z) * z.exp(), log_det


def detached(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image + z - z.detach(), log_det


def swallowing(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    return plain(module, z.nan_to_num(0.0, 0.0, 0.0), context)


def random(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
    image, log_det = plain(module, z, context)
    return image + 1e-9 * torch.randn_like(z), log_det


TOY = Model("toy", Toy, plain, undo)


@pytest.mark.parametrize(
    ("fast", "use"),
    [
        (wrong_log_det, "log-det, fast, is the Jacobian's"),
        (wrong_log_det, "float64 exact"),
        (squeezed, "B = 1"),
        (cached, "input refilled in place"),
        (cached, "weights stepped"),
        (single, "float64 exact"),
        (mixed_rows, "one row inf or nan"),
        (mixed_rows, "result independent of batch split"),
        (mutating, "input not mutated"),
        (overflowing, "x = ±1e3"),
        (detached, "gradcheck"),
        (swallowing, "one row inf or nan"),
        (random, "repeatable, no global randomness"),
        (plain, "last dim 1"),  # the broadcast trap
        (plain, "context missing"),  # ignored
        (plain, "context given, none expected"),
        (plain, "NaN weights noticed on load"),
    ],
)
def test_broken_toys_are_silent(fast: Callable[..., Pair], use: str) -> None:
    verdict = judge(USES[use], replace(TOY, fast=fast))
    assert verdict.outcome == SILENT
    assert verdict.reason


def test_a_wrong_slow_direction_is_silent() -> None:
    def wrong(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
        image, log_det = undo(module, z, context)
        return image * 1.01, log_det

    def wrong_sign(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
        image, log_det = undo(module, z, context)
        return image, -log_det

    assert judge(USES["round trip"], replace(TOY, slow=wrong)).outcome == SILENT
    assert judge(USES["round trip"], replace(TOY, slow=wrong_sign)).outcome == SILENT
    assert judge(USES["log-det, slow, is the Jacobian's"], replace(TOY, slow=wrong_sign)).outcome == SILENT
    assert judge(USES["round trip"], replace(TOY, slow=None)).outcome == NOT_APPLICABLE


def test_the_toy_is_right_where_it_needs_no_check() -> None:
    refused = ("last dim", "context", "NaN", "import")
    for name, use in USES.items():
        if not name.startswith((*refused, "bfloat16", "compile")):
            assert judge(use, TOY).outcome in (SURVIVED, RAW), name
            assert judge(use, TOY).outcome == SURVIVED or name in ("deepcopy after use",), name


def test_errors_are_clear_or_raw() -> None:
    def raising(error: Exception) -> Model:
        def fast(module: nn.Module, z: Tensor, context: Tensor | None) -> Pair:
            raise error

        return replace(TOY, fast=fast)

    clear = ValueError("z: expected shape (*, 4), got (5, 5)")
    internal = RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x5 and 4x16)")
    assert judge(USES["last dim D + 1"], raising(clear)).outcome == SURVIVED
    assert judge(USES["last dim D + 1"], raising(internal)).outcome == RAW
    # No message makes up for a transform that is not supported.
    assert judge(USES["func.vmap"], raising(clear)).outcome == RAW


@pytest.mark.parametrize(
    ("message", "clear"),
    [
        ("context: Planar of dim 1 reads 3 numbers, got None", True),
        ("context: batch shape (3,) does not broadcast with z batch shape (6,)", True),
        ("checkpoint: parameter 'w' has 1 non-finite values; pass allow_nonfinite=True to inspect it", True),
        ("Planar.forward() got an unexpected keyword argument 'context'", True),
        ("Expected features = 4, got 5.", True),
        ("The size of tensor a (5) must match the size of tensor b (4) at non-singleton dimension 1", False),
        ("linear(): argument 'input' (position 1) must be Tensor, not NoneType", False),
        ("'NoneType' object has no attribute 'expand'", False),
        ("shape '[2, 3, 23]' is invalid for input of size 552", False),
        ("", False),
    ],
)
def test_what_makes_a_message_clear(message: str, clear: bool) -> None:  # noqa: FBT001
    assert is_clear(ValueError(message)) is clear


# ---- the board ---------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
print(json.dumps({"version": "1", "models": ["a"], "uses": ["x", "y", "z"]}), flush=True)
for use in ["x", "y", "z"][int(sys.argv[1]):]:
    if use == "y":
        print("Segmentation fault", file=sys.stderr, flush=True)
        os._exit(11)
    print(json.dumps({"model": "a", "use": use, "outcome": "survived", "reason": ""}), flush=True)
"""


def test_a_process_that_dies_costs_one_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str, skip: int, log: Any, *, quick: bool) -> subprocess.Popen[str]:  # noqa: ANN401
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(skip)], stdout=subprocess.PIPE, stderr=log, text=True
        )

    monkeypatch.setattr(command, "_start", start)
    library = command.ask("toy", Console(quiet=True))
    assert [one["outcome"] for one in library["tries"]] == [SURVIVED, RAW, SURVIVED]
    assert library["tries"][1]["reason"] == "the process ended with code 11: Segmentation fault"


def library(*outcomes: str) -> Library:
    tries: Any = [{"model": "m", "use": f"u{i}", "outcome": o, "reason": "r | s"} for i, o in enumerate(outcomes)]
    return {"version": "1.0", "models": ["m"], "uses": [one["use"] for one in tries], "tries": tries}


def test_the_command_writes_json_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ask", lambda name, console, quick: library(SURVIVED, SILENT, RAW, NOT_APPLICABLE))
    page, out = tmp_path / "page.md", tmp_path / "new"
    page.write_text("above\n<!-- tables -->\n<!-- end of tables -->\nbelow\n")
    options = ["--library", "flowpost", "--quick", "--out", str(out), "--page", str(page)]
    assert cli.main(["reliability", *options]) == 0
    content = json.loads((out / "reliability.json").read_text())
    board = content["libraries"]
    assert count(board["flowpost"]["tries"]) == {SURVIVED: 1, SILENT: 1, RAW: 1, NOT_APPLICABLE: 1, "tried": 3}
    text = page.read_text()
    assert (out / "reliability.md").read_text() in text
    assert "| flowpost 1.0 | 1 | 1 / 3 (33 %) | 1 | 1 |" in text
    assert "| flowpost | u1 | m | r \\| s |" in text
    assert len(tables(board)) == 2
    # Where it was measured is in the file, on the page and on the terminal.
    there = content["environment"]
    assert content["quick"]
    for shown in (text, capsys.readouterr().out):
        assert f"Python {there['python']}, torch {torch.__version__}, flowpost {flowpost.__version__}; commit" in shown


def test_the_committed_page_has_its_marks() -> None:
    assert "TABLES" in fill(ROOT / "docs" / "reliability.md", "TABLES")


def test_all_survived_is_one_table_and_100_percent() -> None:
    board = {"flowpost": library(SURVIVED)}
    assert len(tables(board)) == 1
    assert "(100 %)" in markdown(board)
    assert "(99 %)" in markdown({"flowpost": library(*[SURVIVED] * 999, RAW)})


def test_a_library_that_cannot_be_built_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str, skip: int, log: Any, *, quick: bool) -> subprocess.Popen[str]:  # noqa: ANN401
        command = [sys.executable, "-c", "import sys; sys.exit('ImportError: no such thing')"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    monkeypatch.setattr(command, "_start", start)
    assert cli.main(["reliability", "--library", "flowpost", "--out", str(tmp_path)]) == 1
    assert "flowpost: its models could not be built: ImportError: no such thing" in capsys.readouterr().err


def test_an_unknown_library_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reliability", "--library", "nothing"]) == 2
    assert "library: expected some of flowpost" in capsys.readouterr().err


def test_a_reason_does_not_say_where_a_library_lies() -> None:
    reason = 'File "/home/me/.venv/lib/python3.11/site-packages/nflows/transforms/base.py", line 7: 1.5/2 of /tmp'
    assert placeless(reason) == 'File "nflows/transforms/base.py", line 7: 1.5/2 of /tmp'
