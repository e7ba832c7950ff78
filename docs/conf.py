"""How Sphinx makes a site of these pages: ``sphinx-build -W docs docs/_build``."""

import contextlib
import re
from pathlib import Path
from urllib.request import urlopen

from sphinx.util.inspect import TypeAliasForwardRef

import numbanorm

HERE = Path(__file__).parent

project = "numbanorm"
author = "The numbanorm developers"
copyright = f"2026, {author}"
version = release = numbanorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Fences without a language are text.
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Docstrings say which shapes and dtypes an array has; the aliases keep their short names.
autodoc_type_aliases = {
    name: name for name in ("ActivationLike", "Array", "ArrayLike", "DTypeLike", "Float64")
}
TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # in unions as well
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def inventory(name: str, url: str) -> Path:
    """Return the file with the names that a site documents; without a network there is none."""
    path = HERE / "_build" / "inventories" / f"{name}.inv"
    if not path.exists():
        with contextlib.suppress(OSError), urlopen(f"{url}objects.inv", timeout=5) as answer:
            names = answer.read()
            if names.startswith(b"# Sphinx inventory"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(names)
    return path


SITES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = {
    name: (url, str(inventory(name, url)))
    for name, url in SITES.items()
    if inventory(name, url).exists()
}

html_theme = "furo"
html_title = f"numbanorm {release}"
html_static_path = ["_static"]
html_css_files = ["numbanorm.css"]


def without_last_line(app, name, source):
    """Drop the empty line that ends the output of a doctest before its fence."""
    source[0] = re.sub(r"\n\n( *```\n)", r"\n\1", source[0])


def without_requests(app, what, name, *others):
    """Leave out what scikit-learn makes of the arguments of ``fit``: it refers to its own site."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def setup(app):
    """Register them."""
    app.connect("source-read", without_last_line)
    app.connect("autodoc-skip-member", without_requests)
