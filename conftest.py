"""What pytest does not collect."""

import importlib.util

# Their doctests need what is optional.
NEEDS = {"torch": "torch", "dask": "dask.py", "sklearn": "sklearn.py"}
collect_ignore = [
    f"numbanorm/{file}" for name, file in NEEDS.items() if not importlib.util.find_spec(name)
]


def pytest_ignore_collect(collection_path, config):
    """Leave out, with ``-m fast``, files without such a test: to import them takes longest."""
    if config.option.markexpr == "fast" and collection_path.is_file():
        return b"mark.fast" not in collection_path.read_bytes() or None
    return None
