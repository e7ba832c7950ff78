"""What pytest does not collect."""

import importlib.util
import re
from pathlib import Path

DOCS = Path(__file__).parent / "docs"
# Their doctests need what is optional.
NEEDS = {"torch": "torch", "dask": "dask.py", "sklearn": "sklearn.py"}


def missing(page):
    """Tell whether the examples of a page import something optional that is not installed."""
    names = re.findall(r"^ *>>> (?:import|from) (\w+)", page.read_text(encoding="utf-8"), re.M)
    return any(importlib.util.find_spec(name) is None for name in names)


collect_ignore = [DOCS / "conf.py", DOCS / "_build", *filter(missing, DOCS.glob("*.md"))]
collect_ignore += [
    f"numbanorm/{file}" for name, file in NEEDS.items() if not importlib.util.find_spec(name)
]


def pytest_report_header():
    """Say at once what a first run waits for."""
    return "numbanorm: where nothing is compiled yet, the first tests take some minutes"


def pytest_ignore_collect(collection_path, config):
    """Leave out, with ``-m fast``, files without such a test: to import them takes longest."""
    if config.option.markexpr == "fast" and collection_path.is_file():
        return b"mark.fast" not in collection_path.read_bytes() or None
    return None
