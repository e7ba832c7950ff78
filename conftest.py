"""What pytest does not collect."""

import importlib.util

# Its doctests need PyTorch, which is optional.
collect_ignore = [] if importlib.util.find_spec("torch") else ["numbanorm/torch"]


def pytest_ignore_collect(collection_path, config):
    """Leave out, with ``-m fast``, files without such a test: to import them takes longest."""
    if config.option.markexpr == "fast" and collection_path.is_file():
        return b"mark.fast" not in collection_path.read_bytes() or None
    return None
