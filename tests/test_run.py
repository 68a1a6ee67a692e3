"""What every command of the benchmarks shares: the run with its folder and page, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flowpost
from benchmarks import run as runs
from benchmarks.config import ConfigError
from benchmarks.filling import origin, where
from benchmarks.run import Run
from benchmarks.table import Table, grouped
from benchmarks.workers import cpu_threads

WIDE = Table(["who", "s"], [["a|b", "1"], ["[c]", "20"]], "times", "Calls", ["a: slow"])


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "new" / "folder", {})
    run.write("table.md", "before")

    def cut(path: Path, text: str, **_: object) -> int:
        path.write_bytes(text[:2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(ConfigError, match="No space left"):
        run.write("table.md", "after")
    assert (run.folder / "table.md").read_text() == "before\n"


def test_every_file_of_figures_says_where_they_are_from(tmp_path: Path) -> None:
    run = Run.begin("what", tmp_path, threads=2)
    run.write("figures.json", {"figures": [1.5], "seconds": "its own"})
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["figures"] == [1.5]
    assert content["seconds"] == "its own"  # a command may say it better
    assert datetime.fromisoformat(content["started"]).tzinfo
    there = content["environment"]
    assert (there["threads"], there["torch"], there["libraries"]) == (2, torch.__version__, {})
    assert f"2 threads); Python {there['python']}, torch {torch.__version__}, flowpost" in where(run.head())
    assert origin(run.head()).startswith(where(run.head()))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write("figures.json", {"figures": [float("nan")]})


def test_libraries_have_their_versions(tmp_path: Path) -> None:
    run = Run.begin("what", tmp_path, libraries=["torch"])
    (version,) = run.environment["libraries"].values()
    assert torch.__version__.startswith(version)  # a wheel's own number may lack the kind of its build
    assert f"flowpost {flowpost.__version__}, torch {version}; commit" in where(run.head())


def test_the_seconds_of_all_processes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, {}, seconds_before=100.0)
    later = datetime.now(timezone.utc) + timedelta(seconds=20)
    monkeypatch.setattr(runs, "_now", lambda: later)
    assert run.seconds() == pytest.approx(120, abs=1)


def test_the_folder_is_named_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Run.begin("what").folder
    assert folder.match("runs/2*-what")
    assert not folder.exists()  # before there is something to write


def test_a_page_that_cannot_be_filled_is_refused_at_once(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(ConfigError, match="^page: expected a page"):
        Run.begin("what", tmp_path, page=page)
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="^page: expected the marks"):
        Run.begin("what", tmp_path, page=page)
    page.write_text("<!-- tables --><!-- end of tables -->")
    run = Run.begin("what", tmp_path, page=page)
    run.write("figures.json", {"kl": 0.5})
    (run.folder / "plot.png").write_bytes(b"plot")
    run.publish("figures.json", lambda content, name: f"{content['kl']} of {content['what']} in {name}", "plot.png")
    assert page.read_text() == "<!-- tables -->\n\n0.5 of what in page\n\n<!-- end of tables -->"
    assert (tmp_path / "page.png").read_bytes() == b"plot"
    kept = tmp_path / "_figures" / "page" / "tables.json"
    assert kept.read_bytes() == (run.folder / "figures.json").read_bytes()


def test_figures_of_before_are_not_written_over(tmp_path: Path) -> None:
    Run.begin("speed", tmp_path).write("speed.json", {})
    Run.begin("launches", tmp_path)
    with pytest.raises(ConfigError, match=r"^out: expected a folder without figures, got .*, which has speed.json; "):
        Run.begin("speed", tmp_path)


def test_a_run_goes_on_with_what_its_folder_has(tmp_path: Path) -> None:
    assert Run.begin("targets", tmp_path, goes_on=True).resume() is None
    first = Run.begin("targets", tmp_path)
    first.started, first.seconds_before = datetime(2020, 1, 2, tzinfo=timezone.utc), 100.0
    first.write("targets.json", {"fits": [1, 2]})
    second = Run.begin("targets", tmp_path, goes_on=True)
    content = second.resume()
    assert content is not None
    assert content["fits"] == [1, 2]
    assert second.started == first.started
    assert 100 <= second.seconds() < 160


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["environment"].update(torch="1.0"), r"expected the versions .*: torch 1.0 != 2"),
        (lambda content: content.pop("environment"), "expected a folder of this command, got .*targets.json"),
        (lambda content: content.update(started="today"), "expected a folder of this command, got .*targets.json"),
    ],
)
def test_what_it_cannot_go_on_with_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    Run.begin("targets", tmp_path).write("targets.json", {})
    content = json.loads((tmp_path / "targets.json").read_text())
    change(content)
    (tmp_path / "targets.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        Run.begin("targets", tmp_path, goes_on=True).resume()


def test_threads_come_back_after_an_error() -> None:
    """Of PyTorch, and of numpy's products, which know nothing of PyTorch's."""
    info = pytest.importorskip("threadpoolctl").threadpool_info

    def numbers() -> list[int]:
        return [
            torch.get_num_threads(),
            *{pool["num_threads"] for pool in info() if pool["user_api"] == "blas"},
        ]

    before = numbers()

    @cpu_threads(1)
    def interrupted() -> None:
        raise KeyboardInterrupt(*numbers())

    with pytest.raises(KeyboardInterrupt) as raised:
        interrupted()
    assert set(raised.value.args) == {1}
    assert numbers() == before


def test_a_table_on_a_page() -> None:
    grid = "| who | s |\n| --- | ---: |\n| a\\|b | 1 |\n| [c] | 20 |"
    assert WIDE.markdown() == f"## Times\n\n{grid}\n\nCalls.\n\n- a: slow"
    legend = Table(
        ["x"], [["1"]], caption="nats; a: one (b: no word); k>0.7: two; -: not run; of equal seeds"
    ).markdown()
    assert legend.endswith("\n\nnats:\n\n- `a`: one (b: no word)\n- `k>0.7`: two\n- `-`: not run\n- of equal seeds")
    assert Table(["x", "y"], [["1", "2"]], numbers=False).markdown() == "| x | y |\n| --- | --- |\n| 1 | 2 |"


def test_a_table_on_a_terminal() -> None:
    console = Console(markup=False, width=30)
    with console.capture() as capture:
        console.print(WIDE)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[0] == "times"
    assert [line for line in lines if "a|b" in line or "[c]" in line] == ["a|b   1", "[c]  20"]  # numbers to the right
    assert lines[-1] == "Calls"


def test_no_digit_is_cut_off_by_a_narrow_terminal() -> None:
    console = Console(markup=False, width=12)
    with console.capture() as capture:
        console.print(Table(["who", "number"], [["somebody", "123456789"]]))
    shown = "".join(character for character in capture.get() if character.isdigit())
    assert shown == "123456789"


def test_groups_keep_the_order() -> None:
    assert grouped("banana", lambda letter: letter) == {"b": ["b"], "a": ["a"] * 3, "n": ["n"] * 2}
