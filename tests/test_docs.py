"""The documentation: links lead somewhere, papers are listed, outputs and figures are no older than their page."""

import importlib
import inspect
import json
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

import flowpost

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_site"))
import runner  # noqa: E402

PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0][0] != "_")
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------------------- pages


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_every_page_is_on_the_site_once() -> None:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"}
    assert sorted(listed) == sorted(pages)


def test_every_public_name_is_in_the_reference() -> None:
    """Recipes and pure functions are there by their module."""
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    for name in ("annealed_estimate", "sandwich", "refine", "decompose_elbo"):  # no automodule shows them
        assert f"autofunction:: flowpost.evaluation.{name}\n" in text, name
    for name in vars(flowpost)["__all__"]:
        if inspect.isclass(getattr(flowpost, name)) or name in ("wrap", "save", "load", "fit", "checking"):
            assert re.search(rf"\bflowpost\.{name}\n", text), name
    for module in ("recipes", "functional", "objectives", "evaluation", "gaps", "calibration", "schedules", "training"):
        assert f"automodule:: flowpost.{module}\n" in text, module


# ------------------------------------------------------------------------------------------------------ references

NAME = r"(?:van den )?[A-Z][\w-]+"
CITED = re.compile(rf"({NAME})(?:(?:, {NAME})*,? (?:&|and) {NAME}| et al\.)?,? \(?(\d{{4}})\b")


def cited(text: str) -> set[tuple[str, str]]:
    """First author and year of each paper that a text names as in Kingma & Welling (2014), or without the brackets."""
    return {(author, year) for author, year in CITED.findall(" ".join(text.split()))}


def listed() -> set[tuple[str, str]]:
    entries = re.split(r"^- ", (DOCS / "references.md").read_text(), flags=re.MULTILINE)[1:]
    return {(entry.partition(",")[0], found[1]) for entry in entries if (found := re.search(r"\((\d{4})\)", entry))}


def test_citations_are_read() -> None:
    assert cited("van den Berg, Hasenclever, Tomczak & Welling (2018), and Kingma et al. 2016") == {
        ("van den Berg", "2018"),
        ("Kingma", "2016"),
    }
    assert ("Dinh", "2015") in listed()


@pytest.mark.parametrize("name", sorted(info.name for info in pkgutil.walk_packages(flowpost.__path__, "flowpost.")))
def test_papers_of_docstrings_are_listed(name: str) -> None:
    path = ROOT / f"{name.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    assert cited(path.read_text()) <= listed()


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "references"], ids=name_of)
def test_papers_of_pages_are_listed(page: Path) -> None:
    assert {paper for paper in cited(FENCED.sub("", page.read_text())) if paper[1] < "2026"} <= listed()


# --------------------------------------------------------------------------------------------------------- running


def test_a_page_is_run_block_by_block() -> None:
    drawing = "import matplotlib.pyplot as plt\nplt.plot([a])\nprint(a)"
    text = f"```python\na = 2\n```\nwords\n```python picture\n{drawing}\n```\n"
    first, second = runner.run("page", text)
    assert (first.text, first.pictures, second.text) == ("", [], "2\n")
    assert second.pictures[0].startswith(b"\x89PNG")


def test_a_picture_has_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    executed = importlib.import_module("executed")
    monkeypatch.setattr(executed, "PICTURES", tmp_path)
    outputs = [runner.Output("", [b"PNG"]), runner.Output("", [b"PNG"])]
    page = executed.shown("a/page", "```python picture Two arcs\npass\n```\n```python\npass\n```\n", outputs, "")
    assert f"![Two arcs](/{tmp_path.name}/a-page-0.png)" in page
    assert f"![{executed.UNSEEN}](/{tmp_path.name}/a-page-1.png)" in page
    assert page.count("<details") == 1


def test_every_folded_picture_of_a_page_has_words() -> None:
    for page in PAGES:
        assert not re.search(r"^```python picture *$", page.read_text(), re.MULTILINE), page


def test_a_page_that_warns_fails() -> None:
    with pytest.raises(UserWarning, match="stop"):
        runner.run("page", "```python\nimport warnings\nwarnings.warn('stop')\n```\n")


def test_smoke_mode_takes_the_other_value() -> None:
    text = "steps = 500  # smoke: 5\nrun(steps=3,  # smoke: 1,\n)\n"
    assert runner.smoked(text, smoke=True) == "steps = 5\nrun(steps=1,\n)\n"
    assert runner.smoked(text, smoke=False) == "steps = 500\nrun(steps=3,\n)\n"


@pytest.mark.parametrize("file", sorted((DOCS / "_outputs").glob("*.json")), ids=lambda file: file.stem)
def test_committed_outputs_are_of_the_page_s_code(file: Path) -> None:
    pages = {page.relative_to(DOCS).with_suffix("").as_posix().replace("/", "-"): page for page in PAGES}
    record, blocks = json.loads(file.read_text()), runner.blocks(pages[file.stem].read_text())
    assert record["code"] == runner.digest(*blocks), "run `make docs-full`"
    assert len(record["texts"]) == len(blocks)


def test_pages_that_need_a_library_have_outputs() -> None:
    needy = {page for page in PAGES if any(runner.needs(block) for block in runner.blocks(page.read_text()))}
    names = {page.relative_to(DOCS).with_suffix("").as_posix().replace("/", "-") for page in needy}
    assert names == {file.stem for file in (DOCS / "_outputs").glob("*.json")}


def test_the_vae_from_scratch_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(DOCS / "examples" / "vae.py"))
    vae, history = example["train"](2)
    assert history[-1] > history[0] + 10
    example["report"](vae)
    assert "k-hat is above 0.7" in capsys.readouterr().out


def test_llms_txt_has_every_page() -> None:
    pytest.importorskip("sphinx")
    text = importlib.import_module("llms").written(DOCS)
    assert text.startswith("# flowpost\n\n> Flexible posteriors")
    assert len(re.findall(r"^- \[.+\]\(_sources/.+\.md\.txt\): \S", text, re.MULTILINE)) == len(PAGES) - 1
    assert "```" not in text  # a page is described by its prose


# --------------------------------------------------------------------------------------------------------- results

RESULTS = [
    "speed",
    "targets",
    "reliability",
    "posteriors",
    "posteriors-exact",
    "evidence",
    "images",
    "encoders",
    "own-data",
]


@pytest.mark.parametrize("name", RESULTS)
def test_results_say_where_they_are_from(name: str) -> None:
    tables = re.findall(r"^<!-- (.+) -->$(.*?)^<!-- end of \1 -->", (DOCS / f"{name}.md").read_text(), re.M | re.DOTALL)
    assert tables
    for _, table in tables:
        assert re.search(r"Measured on \d{4}-\d\d-\d\d.*commit [0-9a-f]{7,}", table)
        assert re.search(r"^```bash\npython -m benchmarks\b", table, re.MULTILINE)


def rows(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_of_known_evidence_has_the_gaussians_of_the_collection() -> None:
    """The best ones known, whose gaps stand in `figures.json`; that file may not change without the page."""
    figures = json.loads((ROOT / "benchmarks" / "posteriors" / "data" / "figures.json").read_text())
    known = {key.rpartition("-")[2]: figure for key, figure in figures.items()}
    tables = rows(DOCS / "posteriors-exact.md")
    shown = {row[0]: row[2:4] for row in tables if row[0] in known and row[1].isdecimal()}  # the table with a dimension
    assert len(shown) > 20
    for name, gaps in shown.items():
        assert gaps == [f"{known[name][family]['gap']:.3f}" for family in ("mean_field", "full_rank")], name
