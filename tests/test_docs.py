"""The pages: every public name and every figure is there, and no link leads nowhere."""

import importlib
import re
import tomllib
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


def prose(page):
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def links(page):
    """Return what a page links to and shows, in Markdown, in tags, and by a name elsewhere."""
    patterns = r"\]\(\s*<?([^)>\s]+)", r"(?:href|src)=[\"']([^\"']+)", r"^\[[^\]]+\]:\s*<?([^>\s]+)"
    return [target for pattern in patterns for target in re.findall(pattern, prose(page), re.M)]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#{1,3} +(.+?) *$", prose(page), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pages
def test_links_lead_somewhere(page):
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert ROOT in file.resolve().parents, target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_a_link_to_another_site_is_followed_from_the_documentation(page):
    """`sphinx-build -b linkcheck docs` sees the pages below docs, and what these include."""
    seen = {target for other in PAGES if other.parent == DOCS for target in links(other)}
    includes = r"```\{include\} \.\./(.+)"
    seen |= {t for other in DOCS.glob("*.md") for name in re.findall(includes, other.read_text())
             for t in links(ROOT / name)}  # fmt: skip
    assert {target for target in links(page) if "://" in target} <= seen


@pages
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    commands = re.findall(
        r"(?:python3?|pytest|bash|literalinclude\}) +([\w./-]+/[\w.-]+\.\w+)", text
    )
    # literalinclude is relative to the page, a command to the repository.
    for name in commands:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_the_address_of_the_repository_stands_in_one_place():
    """It is `Source` in pyproject.toml; what cannot refer to that says the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    source = project["project"]["urls"]["Source"]
    owner = source.removeprefix("https://github.com/")
    assert re.fullmatch(r"[\w-]+/[\w.-]+", owner)
    for url in project["project"]["urls"].values():
        assert url == source or url.startswith(f"{source}/")
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    description = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in readme["substitutions"]:
        description = re.sub(rule["pattern"], rule["replacement"], description)
    for target in links(ROOT / "README.md"):
        if "://" not in target:
            raw = f"https://raw.githubusercontent.com/{owner}/main/"
            start = raw if target.endswith(".png") else f"{source}/blob/main/"
            assert f"]({start}{target})" in description
    config = (ROOT / "asv_benchmarks" / "asv.conf.json").read_text(encoding="utf-8")
    assert re.search(r'"project_url": "(.+)"', config)[1] == source
    assert re.search(r'"show_commit_url": "(.+)"', config)[1] == f"{source}/commit/"


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
