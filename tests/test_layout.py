"""The package's shape: imports that go one way, an import without side effects, and examples that run as printed."""

import ast
import doctest
import graphlib
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path
from types import GenericAlias

import pytest
import torch
from forked import Run
from registry import ENTRIES
from torch import nn

import flowpost
from flowpost import Bijector, evaluation, objectives, vae

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "flowpost").rglob("*.py"))
MODULES = sorted(info.name for info in pkgutil.walk_packages(flowpost.__path__, "flowpost."))
PUBLIC: list[str] = vars(flowpost)["__all__"]
ROOMS = ["numerics", "masked", "bijectors", "posterior", "recipes"]
"""From the ground up: none knows those above it. What a user calls, and what tests bijectors, stands above all."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in whole}
    return found


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "flowpost"}


GRAPH = {module_name(path): own_imports(path) for path in FILES}


def reached(name: str) -> set[str]:
    """All that an import of the module brings in."""
    found, new = set[str](), {name}
    while new:
        found |= new
        new = set[str]().union(*(GRAPH[each] for each in new)) - found
    return found


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in GRAPH if room(name) in ROOMS])
def test_no_room_knows_those_above_it(name: str) -> None:
    above = ROOMS[ROOMS.index(room(name)) + 1 :]
    assert not [other for other in reached(name) if room(other) in above]


@pytest.mark.parametrize("name", [name for name in GRAPH if room(name) in ROOMS[:3]])
def test_the_three_rooms_stand_on_themselves(name: str) -> None:
    """And on `checks`, which says what a user has asked for."""
    assert {room(other) for other in GRAPH[name]} <= {"checks", *ROOMS[: ROOMS.index(room(name)) + 1]}


ENGINES = {"engine", "host", "device"}


@pytest.mark.parametrize("path", [p for p in FILES if room(module_name(p)) == "masked"], ids=module_name)
def test_only_the_engines_ask_about_devices_compilers_and_numpy(path: Path) -> None:
    """Of the masked networks' files; the others give two forms of what a compiler cannot follow, by one function."""
    if not ENGINES & set(module_name(path).split(".")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"device", "is_cuda", "is_meta", "is_compiling"}
        assert not imports(path) & {"numpy", "triton"}
        watched = re.findall(r"^from flowpost.numerics.watchers import (.*)", path.read_text(), re.MULTILINE)
        assert set(watched) <= {"unless_compiled", "hooked"}


def test_recipes_need_no_more_than_steps_and_the_posterior() -> None:
    others = {name for name in reached("flowpost.recipes") if room(name) not in ROOMS}
    assert others <= reached("flowpost.posterior")


def test_no_imports_go_round() -> None:
    """From file to file of the package, where a room counts as one."""
    between: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        between.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    graphlib.TopologicalSorter(between).prepare()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_families_never_import_each_other(path: Path) -> None:
    """A family stands on the contract and on the rooms below; `wrappers` and `chain` are made of any."""
    name = module_name(path)
    if name.startswith("flowpost.bijectors."):
        families = {other for other in imports(path) if other.startswith("flowpost.bijectors.")}
        assert families <= {"flowpost.bijectors.base", "flowpost.bijectors.gate"} | {
            other for other in families if other.startswith("flowpost.bijectors._")
        }


EXTRAS = {
    "flowpost._format": {"safetensors"},  # pip install 'flowpost[files]'
    # Triton comes with torch for GPUs.
    **{f"flowpost.masked.device.{name}": {"triton"} for name in ("kernels", "maps", "solves", "sweeps", "tiles")},
    **{f"flowpost.numerics.{name}": {"triton"} for name in ("fusing", "root_kernels")},
    "flowpost.interop.pyro": {"pyro"},
    "flowpost.interop.arviz": {"arviz_base", "xarray"},
}


@pytest.mark.parametrize("path", [p for p in FILES if "testing" not in module_name(p)], ids=module_name)
def test_only_torch_and_numpy_are_needed(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "flowpost"} | EXTRAS.get(module_name(path), set())


def test_functional_re_exports_and_nothing_else() -> None:
    tree = ast.parse((ROOT / "flowpost" / "functional.py").read_text())
    assert all(isinstance(node, ast.ImportFrom) for node in tree.body[1:])
    for name in vars(flowpost.functional):
        if not name.startswith("__"):
            assert callable(getattr(flowpost.functional, name))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_input_is_never_checked_by_assert(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_public_names() -> None:
    assert PUBLIC == sorted(set(PUBLIC), key=lambda name: (name[0].islower(), name))
    for name in PUBLIC:
        assert getattr(flowpost, name).__doc__, name
    assert flowpost.planar.__module__ == "flowpost.recipes.amortized"


@pytest.mark.parametrize("path", sorted((ROOT / "flowpost" / "bijectors").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_step_is_exported(path: Path) -> None:
    module = importlib.import_module(f"flowpost.bijectors.{path.stem}")
    for name, value in vars(module).items():
        if isinstance(value, GenericAlias):  # is a type to Python 3.10
            continue
        if isinstance(value, type) and issubclass(value, Bijector) and name[0] != "_" and name != "Networked":
            assert getattr(flowpost.bijectors, name) is value
            assert name in flowpost.bijectors.__all__
            assert getattr(flowpost, name) is value


def test_every_step_is_in_the_registry() -> None:
    tried = {type(part) for entry in ENTRIES for part in entry.make(3, 0).modules()}
    steps = {getattr(flowpost, name) for name in flowpost.bijectors.__all__} - {Bijector}
    assert steps <= tried


def test_the_recipes_are_the_public_functions_of_their_room() -> None:
    """A type checker sees those where Python sees `RECIPES`."""
    seen = []
    for name in ("gaussian", "amortized", "autoregressive", "coupling"):
        tree = ast.parse((ROOT / "flowpost" / "recipes" / f"{name}.py").read_text())
        seen += [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert seen == [*flowpost.recipes.RECIPES] == vars(flowpost.recipes)["__all__"]
    for name in seen:
        assert getattr(flowpost, name) is flowpost.recipes.RECIPES[name]
    assert seen[0] == "diagonal"


def printed(done: subprocess.CompletedProcess[str]) -> str:
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_import_changes_no_global(python: Run) -> None:
    code = """
import random, sys, warnings
import numpy as np
import torch

def world():
    return [
        torch.get_default_dtype(), torch.get_default_device(), torch.distributions.Distribution._validate_args,
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), list(warnings.filters),
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(), torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32,
        torch._dynamo.config.cache_size_limit, sys.getrecursionlimit(), sys.excepthook,
    ]

import torch._dynamo
before = world()
import flowpost, flowpost.vae, flowpost.evaluation, flowpost.objectives
after = world()
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    assert printed(python(code)) == "[]"


def test_import_brings_in_nothing_heavy(python: Run) -> None:
    """Beyond what torch itself imports."""
    code = """
import sys
import torch
before = set(sys.modules)
import flowpost, flowpost.vae, flowpost.evaluation, flowpost.objectives
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    loaded = set(ast.literal_eval(printed(python(code))))
    assert "flowpost" in loaded
    assert not loaded & {"matplotlib", "rich", "typer", "pooch", "scipy", "safetensors", "hypothesis", "pytest", "zuko"}
    assert not loaded & {"pyro", "arviz_base", "xarray", "lightning", "benchmarks"}
    assert loaded <= {"flowpost", "numpy", "torch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"}


# ---------------------------------------------------------------------------------------------------- examples


def test_readme_s_python_runs_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    capsys.readouterr()


OTHERS = {"pyro": "pyro", "arviz": "arviz_base", "lightning": "lightning"}
"""What a block of a page may import, itself or by `flowpost.interop`, and the package that it then needs."""


@pytest.mark.long  # `make docs` runs them, and all other pages
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_docs_run_as_pasted(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All blocks but those whose library is not installed; where there are such, the test says so by a skip."""
    monkeypatch.chdir(tmp_path)  # where a page writes its files
    module = types.ModuleType(f"page_{page.stem}")  # where pickle finds the classes that a page defines
    monkeypatch.setitem(sys.modules, module.__name__, module)
    missing = set()
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        named = {name for name in OTHERS if re.search(rf"^(import|from) (flowpost\.interop\.)?{name}\b", block, re.M)}
        absent = {OTHERS[name] for name in named if importlib.util.find_spec(OTHERS[name]) is None}
        if not absent:
            exec(compile(block, page.name, "exec"), vars(module))
        missing |= absent
    if missing:
        pytest.skip(f"the rest of the page needs {', '.join(sorted(missing))}")


def test_contributing_shows_what_is_there() -> None:
    """Each of its blocks names a file in its first line and stands in that file, letter by letter."""
    blocks = re.findall(
        r"^```python\n# (\S+)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 6
    for name, block in blocks:
        assert block in (ROOT / name).read_text(), name


def test_contributing_names_the_commands_that_there_are() -> None:
    named = set(re.findall(r"^\| `make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets
    assert {target for target in targets if target.startswith("test")} <= named


def test_readme_s_shapes_are_true() -> None:
    """Each comment of the form `name (1, 2)` beside a line that makes `name`."""
    text = (ROOT / "README.md").read_text()
    block = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    namespace: dict[str, object] = {}
    checked = 0
    for line in block.splitlines():
        exec(line, namespace)
        comment = line.partition("#")[2]
        for name, shape in re.findall(r"(\bz|log q\(z\|x\)) (\([\d, ]+\))", comment):
            value = namespace["z" if name == "z" else "log_q"]
            assert isinstance(value, torch.Tensor)
            assert tuple(value.shape) == ast.literal_eval(shape)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", [name for name in MODULES if "testing" not in name])
def test_docstring_examples_run(name: str) -> None:
    for extra in EXTRAS.get(name, set()) - {"safetensors"}:  # that one is imported where it is called
        pytest.importorskip(extra)
    module = importlib.import_module(name)
    public = {key: getattr(flowpost, key) for key in PUBLIC}
    helpers = {key: value for part in (vae, objectives, evaluation) for key, value in vars(part).items()}
    namespace = {**helpers, **public, "torch": torch, "nn": nn, "flowpost": flowpost}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, extraglobs={**namespace, **vars(module)}, optionflags=flags)
    assert failed == 0


def test_every_public_name_has_an_example() -> None:
    plain = {"Bijector", "FlowDistribution", "Sample"}  # made by others, or by a subclass
    for name in PUBLIC:
        value = getattr(flowpost, name)
        error = isinstance(value, type) and issubclass(value, Exception)
        if callable(value) and not error and name not in plain:
            assert ">>> " in (value.__doc__ or ""), name
