"""The pages: every public name and every figure is there, and no link leads nowhere."""

import importlib
import re
from pathlib import Path

import pytest

import numbanorm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
MODULES = ["numbanorm", *re.findall(r"``(numbanorm\.\w+)``", str(numbanorm.__doc__))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def documented():
    """Return the names of each module that api.md lists."""
    names, module = {}, None
    for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\.\. (?:current)?module:: (\S+)", line):
            module = heading[1]
        elif entry := re.fullmatch(r"   (\w+)", line):
            names.setdefault(module, []).append(entry[1])
    return names


@pytest.mark.parametrize("name", MODULES)
def test_the_api_has_every_public_name(name):
    if name in ("numbanorm.dask", "numbanorm.sklearn", "numbanorm.torch"):
        pytest.importorskip(name.rpartition(".")[2])
    public = set(importlib.import_module(name).__all__)
    # Modules have a heading of their own.
    public -= {module.rpartition(".")[2] for module in MODULES}
    assert sorted(documented()[name]) == sorted(public)


@pages
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    for target in targets:
        assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_gallery_has_every_example_and_figure():
    shown = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        # What the examples share is none.
        if script.stem not in ("figures", "nn"):
            assert script.name in shown
    for figure in (ROOT / "examples" / "gallery").glob("*.png"):
        assert f"(../examples/gallery/{figure.name})" in shown


def test_every_page_has_a_place_in_the_contents():
    entries = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)
    assert sorted(entries) == sorted(p.stem for p in DOCS.glob("*.md") if p.stem != "index")
