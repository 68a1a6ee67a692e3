"""Pages of results: each is what the figures beside it say, and nothing on it is typed."""

import json
import re
from pathlib import Path

import pytest

import benchmarks.__main__ as cli
from benchmarks import pages
from benchmarks.filling import FIGURES, page_of
from benchmarks.report import Report

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARK = re.compile(r"^<!-- end of (.+) -->$", re.MULTILINE)


@pytest.mark.parametrize("figures", pages.kept(DOCS), ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_a_page_is_as_new_as_its_figures(figures: Path) -> None:
    there = page_of(figures).read_text(encoding="utf-8")
    assert pages.text(figures) == there, "python -m benchmarks pages fills it anew"


def test_every_mark_has_its_figures() -> None:
    marked = {(page.stem, mark) for page in DOCS.glob("*.md") for mark in MARK.findall(page.read_text("utf-8"))}
    kept = {(path.parent.name, path.stem) for path in pages.kept(DOCS)}
    assert marked == kept


def test_every_page_says_on_what_it_was_measured() -> None:
    for path in pages.kept(DOCS):
        content = json.loads(path.read_text(encoding="utf-8"))
        several = "environment" not in content
        for run in content["runs"] if several else [content]:
            there, text = run["environment"], page_of(path).read_text(encoding="utf-8")
            assert f"commit {there['commit']}." in text
            assert f"```bash\n{run['command']}\n```" in text
            assert not there["commit"].endswith("-dirty")
        assert "site-packages" not in path.read_text(encoding="utf-8")  # where things lie is nobody's business


def test_the_readme_s_table_is_of_the_main_job() -> None:
    """Some of its columns, rows by what can be trusted, and the commit that made them."""
    report = Report.of(json.loads((DOCS / FIGURES / "posteriors" / "tables.json").read_text("utf-8")), Path())
    whole = report.table()
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = readme[readme.index("| posterior |") :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    columns = [whole.header.index(name) for name in header]
    assert rows == [[row[column] for column in columns] for row in whole.rows]
    assert f"commit {report.run.environment['commit'][:7]}," in readme


def test_posteriors_are_ranked_by_what_can_be_trusted() -> None:
    """In every table, unless a row has no such figure."""
    text = (DOCS / "posteriors.md").read_text("utf-8")
    ranked = 0
    for lines in re.findall(r"^\| posterior \|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines())
        found = [row[header.index("trusted")] for row in rows] if "trusted" in header else ["-"]
        if "-" not in found:
            assert found == sorted(found, key=float)
            ranked += 1
    assert ranked == 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = (path for path in pages.kept(DOCS) if path.stem == "launches")
    copy = tmp_path / FIGURES / "speed" / "launches.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(source.read_bytes())
    page = tmp_path / "speed.md"
    page.write_text("above\n<!-- launches -->\nstale\n<!-- end of launches -->\n")
    assert cli.main(["pages", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{page}: launches\n"
    assert "stale" not in page.read_text()
    assert "Operations launched, with Triton's kernels" in page.read_text()
    assert cli.main(["pages", str(tmp_path / "none")]) == 2
    assert "docs: expected a folder with _figures, got" in capsys.readouterr().err
