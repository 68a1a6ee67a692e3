"""Files: what is saved comes back to the bit, and nothing else comes back at all."""

import copy
import errno
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flowpost
from flowpost import CorruptFileError, FlowPosterior
from flowpost.bijectors import Permute
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli

SMALL: dict[str, dict] = {"iaf": {"steps": 2, "hidden": (8, 6), "context_size": 3}, "planar": {"steps": 3}}
BUILDS = [
    pytest.param(
        *(name, features, dim, dtype),
        marks=[] if dtype == torch.float32 else pytest.mark.full,
        id=f"{name}-{features}-{dim}-{str(dtype).removeprefix('torch.')}",
    )
    for name in RECIPES
    for features, dim, dtype in (
        (0, 1, torch.float32),
        (4, 3, torch.float32),
        (0, 3, torch.float64),
        (4, 1, torch.float64),
    )
]


def build(name: str = "planar", features: int = 4, dim: int = 3, *, pushed: bool = True) -> FlowPosterior:
    posterior = RECIPES[name](features, dim, **SMALL.get(name, {}))
    for parameter in posterior.parameters() if pushed else ():
        nn.init.normal_(parameter)
    return posterior


def bits(module: nn.Module) -> dict[str, tuple]:
    """A module's state, comparable to the last bit, nan included."""
    return {name: identity(tensor) for name, tensor in module.state_dict().items()}


def identity(tensor: Tensor) -> tuple:
    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(data.numpy())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    flowpost.save(build(), path)
    return path


def refused(path: Path, match: str, error: type[Exception] = CorruptFileError) -> str:
    """Both ways of loading refuse the file, and the module to load into keeps every bit."""
    into = build()
    before = bits(into)
    with pytest.raises(error, match=match):
        flowpost.load(path, into=into)
    assert bits(into) == before
    with pytest.raises(error, match=match) as info:
        flowpost.load(path)
    return str(info.value)


def forge(
    path: Path,
    edit: Callable[[dict, dict], object] = lambda table, config: None,
    body: bytes | None = None,
    text: Callable[[str], str] = lambda text: text,
) -> Path:
    """Change a saved file's header or tensors and make the digests true again: what an attacker would write."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    table, body = json.loads(data[8:end]), data[end:] if body is None else body
    config = json.loads(table["__metadata__"]["flowpost"])
    edit(table, config)
    for name, entry in table.items():
        if name in config.get("sha256", {}):
            start, stop = map(int, entry["data_offsets"][:2])
            config["sha256"][name] = hashlib.sha256(body[start:stop]).hexdigest()
    table["__metadata__"] = {"flowpost": json.dumps(config), "sha256": "0" * 64}
    raw = text(json.dumps(table, separators=(",", ":"))).encode()
    raw = struct.pack("<Q", len(raw)) + raw
    digest = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest) + body)
    return path


# What comes back


@pytest.mark.parametrize(("name", "features", "dim", "dtype"), BUILDS)
def test_every_recipe_comes_back_to_the_bit(path: Path, name: str, features: int, dim: int, dtype: torch.dtype) -> None:
    posterior = build(name, features, dim).to(dtype)
    flowpost.save(posterior, path)
    state = torch.get_rng_state()
    loaded = flowpost.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is FlowPosterior
    assert bits(loaded) == bits(posterior)
    assert vars(loaded)["recipe"] == vars(posterior)["recipe"]
    h = torch.randn(5, features, dtype=dtype) if features else None
    noise = torch.randn(5 if features else 1, dim, dtype=dtype)
    shape = () if features else (1,)
    for mine, theirs in zip(posterior(h, shape, noise), loaded(h, shape, noise), strict=True):
        assert torch.equal(mine, theirs)
    assert all(p.requires_grad and p.is_leaf and p.dtype == dtype for p in loaded.parameters())


def test_default_arguments_are_saved(path: Path) -> None:
    posterior = flowpost.iaf(2, 3)
    flowpost.save(posterior, path)
    sizes = {"features": 2, "dim": 3, "steps": 4, "hidden": [320, 320], "context_size": 64}
    arguments = {**sizes, "gain": 1 + math.exp(-2)}
    for module in (posterior, flowpost.load(path)):
        assert vars(module)["recipe"] == {"name": "iaf", "arguments": arguments}


def test_an_option_that_a_file_does_not_name_has_its_default(path: Path) -> None:  # as in a file of an older release
    posterior = flowpost.planar(4, 3)
    flowpost.save(posterior, path)
    forge(path, lambda table, config: config["recipes"][""]["arguments"].pop("steps"))
    assert bits(flowpost.load(path)) == bits(posterior)


def test_a_record_without_a_gain_is_of_gates_that_had_none(path: Path) -> None:
    posterior = flowpost.iaf(4, 3, steps=2, hidden=(8,), context_size=3, gain=1.0)
    flowpost.save(posterior, path)
    forge(path, lambda table, config: config["recipes"][""]["arguments"].pop("gain"))
    loaded = flowpost.load(path)
    h, noise = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.equal(loaded(h, noise=noise).z, posterior(h, noise=noise).z)
    assert vars(loaded)["recipe"]["arguments"]["gain"] == 1
    flowpost.save(loaded, path)  # from now on the file says so
    assert vars(flowpost.load(path, into=posterior))["recipe"]["arguments"]["gain"] == 1
    forge(path, lambda table, config: config["recipes"][""]["arguments"].update(gain=1.5))
    with pytest.raises(ValueError, match=r"\(file != into\): gain 1.5 != 1.0$"):
        flowpost.load(path, into=posterior)


def _another_rate(posterior: FlowPosterior) -> None:
    vars(posterior.get_submodule("flow.steps.1.steps.0.net"))["rate"] = 0.3


def _another_activation(posterior: FlowPosterior) -> None:
    vars(posterior.get_submodule("flow.steps.1.steps.0.net"))["activation"] = torch.tanh


def _another_step(posterior: FlowPosterior) -> None:
    posterior.get_submodule("flow.steps.1.steps").register_module("0", Permute([0, 2, 1]))


def _another_head(posterior: FlowPosterior) -> None:
    class Doubled(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            return 2 * super().forward(h)

    posterior.head = Doubled(4, posterior.flow.context_size)


def _a_deeper_head(posterior: FlowPosterior) -> None:
    posterior.head = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, posterior.flow.context_size))


def _another_map(posterior: FlowPosterior) -> None:
    first = posterior.get_submodule("flow.steps.0")
    vars(first)["_forward"] = lambda z, context: (z + 1, z.new_zeros(z.shape[:-1]))


def _a_hook(posterior: FlowPosterior) -> None:
    posterior.get_submodule("head").register_forward_hook(lambda _, args, context: 2 * context)  # pyright: ignore[reportOperatorIssue]


def _a_hook_before(posterior: FlowPosterior) -> None:
    posterior.get_submodule("flow.steps.1").register_forward_pre_hook(lambda _, args: (args[0] / 2, *args[1:]))


@pytest.mark.parametrize(
    "alter",
    [
        _another_rate,
        _another_activation,
        _another_step,
        _another_head,
        _a_deeper_head,
        _another_map,
        _a_hook,
        _a_hook_before,
    ],
)
def test_a_posterior_that_was_altered_is_not_built_anew(path: Path, alter: Callable[[FlowPosterior], None]) -> None:
    posterior, into = (flowpost.affine_iaf(4, 3, steps=2, hidden=(8,), context_size=3) for _ in range(2))
    for module in (posterior, into):
        alter(module)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    flowpost.save(posterior, path)
    with pytest.raises(ValueError, match=r"or of one that was altered before it was saved, got None$"):
        flowpost.load(path)
    h, noise = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.equal(flowpost.load(path, into=into)(h, noise=noise).z, posterior(h, noise=noise).z)


def test_a_posterior_whose_record_is_too_old_for_an_option_is_built_anew(path: Path) -> None:
    """As one that an older release pickled: what the record does not name was 1 then."""
    posterior = flowpost.maf(4, 3, steps=2, hidden=(64,), rate=1.0)
    vars(posterior)["recipe"]["arguments"].pop("rate")
    flowpost.save(posterior, path)
    assert bits(flowpost.load(path)) == bits(posterior)


@pytest.mark.parametrize("name", RECIPES)
def test_a_posterior_in_use_is_built_anew(path: Path, name: str) -> None:
    posterior = build(name).eval().double()
    vars(posterior)["note"] = [1, 2]  # what a user writes on a module is no alteration
    posterior.compile(backend="eager")
    flowpost.save(copy.deepcopy(posterior), path)
    assert bits(flowpost.load(path)) == bits(posterior)


@pytest.mark.parametrize("gain", [0, 0.0, -1.5, "1.0", [1.0], None, {}, 10**18])
def test_a_gain_that_is_none_is_refused(path: Path, gain: object) -> None:
    flowpost.save(build("iaf"), path)
    forge(path, _arguments(gain=gain))
    with pytest.raises(CorruptFileError, match="is not of its recipe"):
        flowpost.load(path)


@pytest.mark.parametrize("name", RECIPES)
def test_the_record_is_a_plain_attribute(name: str) -> None:
    posterior = build(name)
    record = vars(posterior)["recipe"]
    assert record["name"] == name
    assert record["arguments"]["dim"] == 3
    for other in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert vars(other)["recipe"] == record
    assert not any("recipe" in key for key in posterior.state_dict())
    assert list(inspect.signature(RECIPES[name]).parameters)[:2] == ["features", "dim"]
    assert RECIPES[name].__name__ == name
    assert "Args:" in (RECIPES[name].__doc__ or "")


def test_the_record_does_not_change_with_the_callers_list() -> None:
    hidden = [8, 8]
    posterior = flowpost.iaf(2, 3, hidden=hidden)
    hidden.append(9)
    assert vars(posterior)["recipe"]["arguments"]["hidden"] == [8, 8]


def test_a_vae_comes_back_into_another(path: Path) -> None:
    def make() -> VAE:
        encoder = nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))
        return VAE(encoder, build("iaf"), nn.Linear(3, 9), Bernoulli())

    vae, into = make(), make()
    vae(torch.rand(7, 9))
    flowpost.save(vae, path)
    assert bits(into) != bits(vae)
    assert flowpost.load(path, into=into) is into
    assert bits(into) == bits(vae)
    with pytest.raises(ValueError, match="into: expected a module, since .*, got None"):
        flowpost.load(path)


class Odd(nn.Module):
    """Every kind of tensor that a module may hold."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4))
        self.second = self.first if tied else nn.Parameter(torch.randn(3, 4))
        self.transposed = nn.Parameter(torch.randn(2, 5).double().t())
        flat = torch.randn(10)
        self.left, self.right = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
        self.scalar, self.empty = nn.Parameter(torch.randn(())), nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("order", torch.randperm(7))
        self.register_buffer("mask", torch.rand(2, 3) > 0.5)
        self.register_buffer("count", torch.tensor(2**62 + 1))
        for dtype in (torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8):
            self.register_buffer("a_" + str(dtype)[6:], (100 * torch.rand(3)).to(dtype))
        self.register_buffer("hollow", torch.zeros(0, dtype=torch.bool))
        for name in ('sha256":"' + "0" * 64 + '" é\n/', '"sha256":"' + "0" * 64 + '"', "sha256", "flowpost"):
            self.register_parameter(name, nn.Parameter(torch.randn(1)))


def test_odd_tensors_come_back(path: Path) -> None:
    module, into = Odd(), Odd()
    flowpost.save(module, path)
    flowpost.load(path, into=into)
    assert bits(into) == bits(module)
    assert into.first is into.second
    assert not into.transposed.is_contiguous()
    untied = Odd(tied=False)
    assert bits(flowpost.load(path, into=untied)) == bits(module)
    flowpost.save(Odd(tied=False), path)
    before = bits(into)
    with pytest.raises(ValueError, match="'first' and 'second': two tensors != one shared tensor"):
        flowpost.load(path, into=into)
    assert bits(into) == before


def test_a_module_without_tensors(path: Path) -> None:
    flowpost.save(nn.Identity(), path)
    assert isinstance(flowpost.load(path, into=nn.Identity()), nn.Identity)


class Versioned(nn.Linear):
    """Reads a state without its version as one of an older release, as torch's own modules do."""

    _version = 2

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *args: object) -> None:
        if metadata.get("version") != 2:
            state = {key: 2 * value for key, value in state.items()}
        super()._load_from_state_dict(state, prefix, metadata, *args)  # pyright: ignore[reportArgumentType]


def test_the_modules_versions_are_kept(path: Path) -> None:
    module, into = Versioned(3, 4), Versioned(3, 4)
    flowpost.save(module, path)
    assert bits(flowpost.load(path, into=into)) == bits(module)


def test_another_process_loads_it(path: Path, python: Run) -> None:
    posterior = build("iaf")
    flowpost.save(posterior, path)
    code = """
        import sys, flowpost
        assert "safetensors" not in sys.modules
        print(repr([p.tolist() for p in flowpost.load(sys.argv[1]).parameters()]))
    """
    done = python(code, path)
    assert done.stdout.strip() == repr([p.tolist() for p in posterior.parameters()]), done.stderr


def test_any_safetensors_reader_opens_it(saved: Path) -> None:
    assert load_file(saved).keys() == build().state_dict().keys()


def test_device_is_checked_before_anything_is_touched(saved: Path) -> None:
    into = build()
    before = bits(into)
    assert flowpost.load(saved, device="cpu").flow is not None
    assert flowpost.load(saved, device="meta").state_dict()["head.bias"].is_meta
    with pytest.raises(RuntimeError):
        flowpost.load(saved, into=into, device="nowhere")
    assert bits(into) == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_and_from_cuda(path: Path) -> None:
    posterior = build("iaf")
    flowpost.save(copy.deepcopy(posterior).cuda(), path)
    assert bits(flowpost.load(path)) == bits(posterior)
    assert flowpost.load(path, device="cuda").state_dict()["head.bias"].is_cuda
    into = build("iaf").cuda()
    assert bits(flowpost.load(path, into=into)) == bits(posterior)
    assert into.state_dict()["head.bias"].is_cuda


# What save refuses


class Extra(nn.Linear):
    def get_extra_state(self) -> dict:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def _named(name: str) -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, torch.zeros(1))
    return module


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Extra(2, 2), "module: expected dense tensors of floats, ints or bools, got a dict in '_extra_state'"),
        (nn.Linear(2, 2, dtype=torch.complex64), "got torch.complex64"),
        (nn.Linear(2, 2, device="meta"), "got a tensor without values, on the meta device in 'weight'"),
        (nn.LazyLinear(2), "got a parameter that is not initialized; run the module once in 'weight'"),
        (_named("__metadata__"), "in '__metadata__'"),
        (_named("x" * 600_000), "module: expected names and shapes that fit 1000000 bytes, got 1200"),
    ],
)
def test_save_refuses(path: Path, module: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        flowpost.save(module, path)
    assert not path.exists()


def test_what_is_no_module_is_a_type_error(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got dict"):
        flowpost.save({}, saved)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"into: expected a torch.nn.Module, got dict"):
        flowpost.load(saved, into={})  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="path: expected a file, got a directory"):
        flowpost.save(nn.Identity(), tmp_path)
    with pytest.raises(ValueError, match="into: expected dense tensors.* meta device"):
        flowpost.load(saved, into=nn.Linear(2, 2, device="meta"))


def test_missing_safetensors_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowpost.save(build(), path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: flowpost.save(build(), path), lambda: flowpost.load(path)):
        with pytest.raises(ImportError, match=r"pip install 'flowpost\[files\]'"):
            call()


# Damage


def test_a_flipped_bit_in_any_byte_is_found(saved: Path) -> None:
    data, into = saved.read_bytes(), build()
    before = bits(into)
    for at in range(len(data)):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(CorruptFileError, match="model.safetensors"):
            flowpost.load(saved, into=into)
    assert bits(into) == before


@settings(max_examples=max(200, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_found(saved: Path, faults: list[tuple[float, int]]) -> None:
    data = saved.read_bytes()
    changed = bytearray(data)
    for where, byte in faults:
        changed[int(where * len(data))] = byte
    if changed == data:
        return
    broken = saved.with_name("broken")
    broken.write_bytes(changed)
    refused(broken, "broken")


def test_a_damaged_tensor_is_named_with_both_digests(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 0x80  # the sign of the last weight
    saved.write_bytes(data)
    refused(
        saved, r"model.safetensors' is damaged: tensor 'head\..*: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}$"
    )
    data = bytearray(saved.read_bytes())
    data[data.index(b"steps")] ^= 1
    saved.write_bytes(data)
    refused(saved, "is damaged: the header: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}$")


def test_every_truncation_is_found(saved: Path) -> None:
    data, into = saved.read_bytes(), build()
    before = bits(into)
    for size in [*range(0, len(data), 13), len(data) - 1]:
        saved.write_bytes(data[:size])
        with pytest.raises(CorruptFileError, match="model.safetensors"):
            flowpost.load(saved, into=into)
    assert bits(into) == before


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda data: b"", "got an empty file"),
        (lambda data: data + b"\0", r"expected \d+ bytes of tensors, got"),
        (lambda data: data + data, r"expected \d+ bytes of tensors, got"),
        (lambda data: data[:-16] + bytes(16), "is damaged: tensor"),
        (lambda data: data[:100] + bytes(len(data) - 100), "damaged"),
        (lambda data: b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40, "got an HTML or XML page"),
        (lambda data: struct.pack("<Q", 2**62) + data[8:], "damaged or cut"),
        (lambda data: struct.pack("<Q", 1_000_001) + bytes(2_000_000), "other bytes"),
        (lambda data: pickle.dumps({"a": 1}), "got a pickle, .* flowpost reads no pickle"),
    ],
)
def test_other_bytes_are_refused(saved: Path, make: Callable[[bytes], bytes], match: str) -> None:
    saved.write_bytes(make(saved.read_bytes()))
    refused(saved, match)


@pytest.mark.parametrize("length", [0x480, 0x43C, 0x420])
def test_a_damaged_header_of_any_length_is_no_pickle(path: Path, length: int) -> None:
    """The first byte of the length may be one with which a pickle or a page begins."""
    path.write_bytes(struct.pack("<Q", length) + b'{"__metadata__":{"flowpost":' + bytes(2000))
    refused(path, "got other bytes, or a header that is damaged or cut")


def test_foreign_files_are_named(path: Path, tmp_path: Path) -> None:
    save_file(build().state_dict(), path)
    refused(path, "got a plain safetensors file, without flowpost's digests")
    torch.save(build().state_dict(), path)
    refused(path, "got a zip archive, as torch.save writes it; flowpost reads no pickle")
    refused(tmp_path, "got a directory")
    refused(Path("/dev/null"), "got no regular file")
    refused(tmp_path / "nothing", "nothing", FileNotFoundError)


# Malice: files whose digests are true


def _alias(table: dict, config: dict) -> None:
    table["head.bias"]["data_offsets"] = table["head.weight"]["data_offsets"]
    table["head.bias"]["shape"] = table["head.weight"]["shape"]


def _arguments(**arguments: object) -> Callable[[dict, dict], object]:
    return lambda table, config: config["recipes"][""]["arguments"].update(arguments)


def _tensor(**fields: object) -> Callable[[dict, dict], object]:
    return lambda table, config: table["head.bias"].update(fields)


LIES: dict[str, Callable[[dict, dict], object]] = {
    "overlapping offsets": _alias,
    "offsets out of range": _tensor(data_offsets=[2**40, 2**40 + 108]),
    "negative offsets": _tensor(data_offsets=[-108, 0]),
    "offsets that are floats": _tensor(data_offsets=[0.0, 108.0]),
    "three offsets": _tensor(data_offsets=[0, 54, 108]),
    "a shape that is larger": _tensor(shape=[2**61]),
    "a shape that overflows": _tensor(shape=[2**62, 2**62]),
    "a shape of truths": _tensor(shape=[True, 27]),
    "a shape that is text": _tensor(shape="27"),
    "a dtype of another size": _tensor(dtype="F64"),
    "a dtype that is none": _tensor(dtype="__import__('os')"),
    "a field more": _tensor(file="/etc/passwd"),
    "no digest": lambda table, config: config["sha256"].pop("head.bias"),
    "a digest more": lambda table, config: config["sha256"].update(x="0" * 64),
    "a later format": lambda table, config: config.update(format=2),
    "no format": lambda table, config: config.pop("format"),
    "no recipes": lambda table, config: config.pop("recipes"),
    "recipes that are a list": lambda table, config: config.update(recipes=["os.system"]),
    "a recipe that is a list": lambda table, config: config["recipes"].update({"": ["os.system", "true"]}),
    "a name that is a list": lambda table, config: config["recipes"][""].update(name=["planar"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_header_is_refused(saved: Path, lie: str) -> None:
    assert bits(flowpost.load(forge(saved)))  # the forger's own files are good
    refused(forge(saved, LIES[lie]), "is cut, altered or not of flowpost.save")


BAD_RECIPES: dict[str, Callable[[dict, dict], object]] = {
    "another function": lambda table, config: config["recipes"][""].update(name="os.system"),
    "a dunder": lambda table, config: config["recipes"][""].update(name="__class__"),
    "an argument more": _arguments(command="true"),
    "an argument less": lambda table, config: config["recipes"][""]["arguments"].pop("dim"),
    "other sizes": _arguments(dim=2),
    "huge dim": _arguments(dim=2**62),
    "huge features": _arguments(features=10**9, dim=10**9),
    "huge steps": _arguments(steps=10**9),
    "many steps": _arguments(steps=5000, dim=1),
    "negative steps": _arguments(steps=-1),
    "steps that are true": _arguments(steps=True),
    "dim that is text": _arguments(dim="3"),
    "dim that is a list": _arguments(dim=[3]),
    "dim that is null": _arguments(dim=None),
    "dim that is a float": _arguments(dim=3.0),
}


@pytest.mark.parametrize("lie", BAD_RECIPES)
def test_a_recipe_of_other_tensors_is_refused(saved: Path, lie: str) -> None:
    forge(saved, BAD_RECIPES[lie])
    start = time.perf_counter()
    with pytest.raises(CorruptFileError, match="is not of its recipe"):
        flowpost.load(saved)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "arguments",
    [{"hidden": [10**6, 10**6]}, {"hidden": [10**9]}, {"dim": 10**6, "hidden": []}, {"hidden": ["8"]}, {"hidden": 8}]
    + [{"hidden": [[8]]}, {"context_size": 10**9}, {"steps": 4000}, {"hidden": [1] * 10**6}, {"hidden": None}],
)
def test_huge_layers_are_refused_before_they_are_built(path: Path, arguments: dict) -> None:
    flowpost.save(build("iaf"), path)
    # Bytes are cheap to claim: a million of them must not buy a matrix of a million rows and columns.
    forge(path, _arguments(**arguments))
    start = time.perf_counter()
    with pytest.raises(CorruptFileError, match="is not of its recipe|damaged or cut"):
        flowpost.load(path)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        ("iaf", {"dim": 10**6, "steps": 1, "hidden": [10**6], "context_size": 1}, 1),
        ("iaf", {"dim": 10**6, "steps": 1, "context_size": 1}, 1),  # the default layers, then
        ("iaf", {"dim": 1, "steps": 10**5, "hidden": []}, 10**5),
        ("planar", {"dim": 1, "steps": 10**5}, 10**5),
    ],
)
def test_a_million_bytes_do_not_buy_a_matrix(saved: Path, name: str, arguments: dict, steps: int) -> None:
    def swell(table: dict, config: dict) -> None:
        config["recipes"] = {"": {"name": name, "arguments": {"features": 1, **arguments}}}
        table["head.bias"] = {"dtype": "U8", "shape": [10**6], "data_offsets": [0, 10**6]}
        table.pop("head.weight")
        config["sha256"].pop("head.weight")

    forge(saved, swell, bytes(10**6))
    match = f"is not of its recipe .*numbers in {steps} steps, and the file has 1000000"
    with pytest.raises(CorruptFileError, match=match):
        flowpost.load(saved)


def test_bytes_that_no_digest_covers_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]

    def shift(table: dict, config: dict) -> None:
        del config
        last = max((entry for name, entry in table.items() if name[0] != "_"), key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]

    refused(forge(saved, shift, data[end:] + bytes(8)), r"should start at byte \d+, and is said to start at \d+")


def test_a_long_header_is_not_read(saved: Path) -> None:
    refused(forge(saved, text=lambda text: text + " " * 1_000_000), "got other bytes, or a header that is damaged")


def test_names_are_names(saved: Path, tmp_path: Path) -> None:
    def rename(table: dict, config: dict) -> None:
        for name in ("../../../../etc/cron.d/x", "/etc/passwd", "\x1b[2J"):
            table[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            config["sha256"][name] = ""

    forge(saved, rename)
    message = refused(saved, "/etc/cron.d/x", ValueError)
    assert "\x1b" not in message
    assert [*tmp_path.iterdir()] == [saved]


@pytest.mark.parametrize(
    "text",
    [
        lambda text: text[:-1] + ',"head.bias":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        lambda text: text.replace('"dtype":"F32"', '"dtype":"F64","dtype":"F32"', 1),
        lambda text: "[" * 500_000 + text,
        lambda text: text.replace('"shape":[27]', '"shape":[' + "9" * 100_000 + "]"),
        lambda text: text + "\x00",
        lambda text: "\n" + text + "x",
    ],
    ids=["key twice", "field twice", "deep", "long number", "nul", "tail"],
)
def test_json_that_save_does_not_write_is_refused(saved: Path, text: Callable[[str], str]) -> None:
    refused(forge(saved, text=text), "is cut, altered or not of flowpost.save")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "9" * 5000])
def test_numbers_of_a_header_are_64_bit_ints(saved: Path, number: str) -> None:
    refused(forge(saved, text=lambda text: text.replace('"shape":[27]', f'"shape":[{number}]')), "no 64-bit number")


def test_what_only_safetensors_refuses(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> None:
        raise SafetensorError("no")

    monkeypatch.setattr("safetensors.torch.load", refuse)
    refused(saved, "safetensors refuses it: no")


def test_bools_are_bools(path: Path) -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.ones(1, dtype=torch.bool))
    flowpost.save(module, path)
    with pytest.raises(CorruptFileError, match="tensor 'mask': expected bools"):
        flowpost.load(forge(path, body=b"\x02"), into=module)


def test_tensors_are_not_read_before_the_header_is_known_to_fit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> dict:
        raise AssertionError("read")

    monkeypatch.setattr("flowpost.files.read_tensors", read)
    with pytest.raises(ValueError, match="dim 3 != 2"):
        flowpost.load(saved, into=build(dim=2))
    forge(saved, _arguments(dim=2))
    with pytest.raises(CorruptFileError, match="recipe"):
        flowpost.load(saved)


AUDIT = """
    import glob, sys
    import torch, flowpost
    seen = []
    def hook(event, args):
        if armed and event.split(".")[0] in ("exec", "compile", "import", "os", "subprocess", "pickle", "socket"):
            seen.append((event, args))
    armed = False
    into = flowpost.planar(4, 3, 3)
    flowpost.save(into, sys.argv[1] + "/good")
    paths = sorted(glob.glob(sys.argv[1] + "/bad*"))
    def attempt():
        for path in paths:
            for kwargs in ({}, {"into": into}):
                try:
                    flowpost.load(path, **kwargs)
                except ValueError:
                    continue
                if not kwargs:
                    raise SystemExit(f"loaded {path}")
    flowpost.load(sys.argv[1] + "/good")
    attempt()  # what torch and json import on their first use
    sys.addaudithook(hook)
    armed = True
    attempt()
    armed = False
    print(len(paths), seen)
"""


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/flowpost-was-here",)


@pytest.mark.full
def test_nothing_is_executed(saved: Path, tmp_path: Path, python: Run) -> None:
    data, made = saved.read_bytes(), 0
    for edit in [*LIES.values(), *BAD_RECIPES.values()]:
        saved.write_bytes(data)
        (tmp_path / f"bad{made}").write_bytes(forge(saved, edit).read_bytes())
        made += 1
    bomb = io.BytesIO()
    torch.save({"a": Bomb()}, bomb)
    for payload in (pickle.dumps(Bomb()), bomb.getvalue(), pickle.dumps(Bomb()) + data):
        (tmp_path / f"bad{made}").write_bytes(payload)
        made += 1
    done = python(AUDIT, tmp_path)
    assert done.stdout.strip() == f"{made} []", done.stderr
    assert not Path("/tmp/flowpost-was-here").exists()


# Another architecture, and values that are not numbers


def test_another_architecture_is_named(saved: Path) -> None:
    into = flowpost.planar(4, 2, steps=5)
    before = bits(into)
    with pytest.raises(ValueError, match="^into: ") as info:
        flowpost.load(saved, into=into)
    first, *keys = str(info.value).splitlines()
    assert first.endswith("got another (file != into): dim 3 != 2, steps 3 != 5")
    assert str(saved) in first
    assert keys[0].strip() == "'head.bias': (27,) torch.float32 != (29,) torch.float32"
    assert len(keys) == 2
    assert bits(into) == before
    assert not isinstance(info.value, CorruptFileError)


def test_equal_tensors_of_another_recipe_are_refused(path: Path) -> None:  # 20 numbers a row, both
    module = nn.ModuleDict({"q": flowpost.diagonal(4, 10)})
    flowpost.save(module, path)
    into = nn.ModuleDict({"q": flowpost.full_covariance(4, 5, rate=1.0)})
    with pytest.raises(ValueError, match=r"\(file != into\): q.recipe 'diagonal' != 'full_covariance'$"):
        flowpost.load(path, into=into)
    plain = nn.ModuleDict({"q": nn.ModuleDict({"head": nn.Linear(4, 20)})})
    assert bits(flowpost.load(path, into=plain)) == bits(module)  # what has no recipe is known by its tensors


@pytest.mark.parametrize(
    ("into", "match"),
    [
        (
            nn.Linear(3, 2),
            r"'bias': nothing != \(2,\) torch.float32, 'head.bias': \(27,\) torch.float32 != nothing",
        ),
        (build().double(), r"'head.bias': \(27,\) torch.float32 != \(27,\) torch.float64"),
    ],
)
def test_other_tensors_are_named(saved: Path, into: nn.Module, match: str) -> None:
    before = bits(into)
    with pytest.raises(ValueError, match=match):
        flowpost.load(saved, into=into)
    assert bits(into) == before


def test_a_long_list_of_keys_is_cut(saved: Path) -> None:
    with pytest.raises(ValueError, match="and 40 more$"):
        flowpost.load(saved, into=nn.Sequential(*[nn.Linear(1, 1) for _ in range(29)]))


def test_values_that_are_not_finite_are_refused(path: Path) -> None:
    posterior = build("iaf")
    with torch.no_grad():
        posterior.get_parameter("flow.steps.1.steps.1.net.layers.0.weight").view(-1)[:12] = torch.nan
    flowpost.save(posterior, path)
    into = build("iaf")
    before = bits(into)
    said = "^checkpoint: parameter 'flow.steps.1.steps.1.net.layers.0.weight' has 12 non-finite values; "
    for target in (into, None):
        with pytest.raises(ValueError, match=said + "pass allow_nonfinite=True to inspect it$"):
            flowpost.load(path, into=target)
    assert bits(into) == before
    assert bits(flowpost.load(path, into=into, allow_nonfinite=True)) == bits(posterior)
    assert bits(flowpost.load(path, allow_nonfinite=True)) == bits(posterior)
    norm = nn.BatchNorm1d(2)
    nn.init.constant_(norm.get_buffer("running_var"), -torch.inf)
    flowpost.save(norm, path)
    with pytest.raises(ValueError, match="checkpoint: buffer 'running_var' has 2 non-finite values"):
        flowpost.load(path, into=norm)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_module_that_refuses_half_way_is_left_as_it_was(path: Path, error: type[BaseException]) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args: object) -> None:
            super()._load_from_state_dict(*args)
            raise error("no")

    flowpost.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), path)
    into = nn.Sequential(nn.Linear(2, 2), Refuses(2, 2))
    before = bits(into)
    with pytest.raises(error, match="no"):
        flowpost.load(path, into=into)
    assert bits(into) == before


# The disk


def good(path: Path, posterior: nn.Module) -> None:
    assert bits(flowpost.load(path)) == bits(posterior)
    assert [*path.parent.iterdir()] == [path]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, calls: set[int]) -> list[int]:
    """Make the numbered calls of a function of `os` fail."""
    real, count = getattr(os, name), [0]

    def call(*args: object) -> object:
        count[0] += 1
        if count[0] in calls:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, name, call)
    return count


@pytest.mark.parametrize(("name", "call"), [("replace", 1), ("fsync", 1), ("fsync", 2)])
def test_one_failure_is_retried(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    count = failing(monkeypatch, name, {call})
    posterior = build()
    flowpost.save(posterior, saved)
    assert count[0] > call
    good(saved, posterior)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_two_failures_are_told_and_the_old_file_is_good(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    old = build()
    flowpost.save(old, path)
    count = failing(monkeypatch, name, {1, 2})
    with pytest.raises(OSError, match="in two tries; .* MB free on its disk; the file that was there is unch") as info:
        flowpost.save(build(), path)
    assert info.value.errno == errno.EIO
    assert str(path) in str(info.value)
    assert count[0] == 2
    good(path, old)
    path.unlink()
    failing(monkeypatch, name, {1, 2})
    with pytest.raises(OSError, match="no file was there before"):
        flowpost.save(build(), path)
    assert not [*path.parent.iterdir()]


def test_a_folder_that_does_not_sync_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "fsync", {2, 3})  # the folder's, then the file's: the new file is there by then
    posterior = build()
    with pytest.raises(OSError, match="the new file is there and whole, but may not outlast a power cut"):
        flowpost.save(posterior, saved)
    good(saved, posterior)


def test_a_file_system_without_folder_sync(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    flowpost.save(build(), saved)


def test_the_order_is_write_sync_move_sync(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.path.isdir(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append((os.path.getsize(a), Path(b))), replace(a, b)))
    flowpost.save(build(), saved)
    assert done == [False, (saved.stat().st_size, saved), True]


def test_mode_and_link_are_kept(saved: Path) -> None:
    saved.chmod(0o600)
    link = saved.with_name("latest")
    link.symlink_to(saved)
    posterior = build()
    flowpost.save(posterior, link)
    assert link.is_symlink()
    assert saved.stat().st_mode & 0o777 == 0o600
    assert bits(flowpost.load(saved)) == bits(posterior)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.* free space unknown .* no file was there before"):
        flowpost.save(build(), tmp_path / "nowhere" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(saved: Path) -> None:
    before = saved.read_bytes()
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="the file that was there is unchanged"):
            flowpost.save(build(), saved)
    finally:
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


@pytest.mark.full
def test_a_full_disk(path: Path, python: Run) -> None:
    old = build()
    flowpost.save(old, path)
    code = """
        import resource, sys, flowpost
        posterior = flowpost.planar(400, 30, 8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            flowpost.save(posterior, sys.argv[1])
        except OSError as error:
            print(type(error).__name__, error)
    """
    done = python(code, path)
    assert "File too large, in two tries" in done.stdout, done.stderr
    assert "MB free on its disk; the file that was there is unchanged" in done.stdout
    good(path, old)


@pytest.mark.full
def test_a_killed_save_loses_nothing(path: Path, python: Run) -> None:
    code = """
        import os, signal, sys, time, torch, flowpost
        torch.set_num_threads(1)
        posteriors = [flowpost.planar(64, 16, 8) for _ in range(2)]
        flowpost.save(posteriors[0], sys.argv[1])
        kinds = [p.head.bias.tolist() for p in posteriors]
        for kill in range(10):
            child = os.fork()
            while not child:
                for posterior in posteriors:
                    flowpost.save(posterior, sys.argv[1])
            time.sleep(0.05 + 0.0137 * kill)
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            assert flowpost.load(sys.argv[1]).head.bias.tolist() in kinds
            print("whole")
    """
    done = python(code, path)
    assert done.stdout.split() == ["whole"] * 10, done.stderr


@pytest.mark.parametrize("rate", [1000, 1000.0, 1])
def test_a_rate_given_as_an_int_is_no_size(tmp_path: Path, rate: float) -> None:
    posterior = flowpost.full_covariance(3, 2, rate=rate)
    flowpost.save(posterior, tmp_path / "file")
    h, noise = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(flowpost.load(tmp_path / "file")(h, noise=noise).z, posterior(h, noise=noise).z)


def test_a_load_leaves_the_draws_of_other_threads_alone(tmp_path: Path) -> None:
    """A generator that is put back would give them what they have drawn already."""
    path, drawn, over = tmp_path / "posterior.safetensors", [], threading.Event()
    flowpost.save(flowpost.iaf(4, 3, steps=2), path)

    def draw() -> None:
        while not over.is_set():
            drawn.append(torch.rand((), dtype=torch.float64).item())

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(20):
            flowpost.load(path)
    finally:
        over.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)
