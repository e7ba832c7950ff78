"""Without a private name of Numba, results are the same, and one warning says what is worse."""

import json

import numba
import pytest
import without
from children import run

from numbanorm.numba_ext import private

NAMES = [(feature, name) for feature, names in private.NAMES.items() for name in names]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a folder that all processes share: what they compile is kept apart."""
    return str(tmp_path_factory.mktemp("cache"))


def result_of(cache, *args):
    *_, last = run(without.check, *args, NUMBA_CACHE_DIR=cache).splitlines()
    warnings, (compiled, loaded) = json.loads(last)
    return warnings, compiled, loaded


def test_nothing_is_missing(cache):
    warnings, compiled, loaded = result_of(cache)
    assert (warnings, loaded) == ([], 0)
    assert compiled > 1
    assert result_of(cache) == ([], 0, compiled)


# The features without which this process of pytest has compiled: there may be several.
_compiled = set()


@pytest.mark.parametrize(("feature", "name"), NAMES, ids=[name for _, name in NAMES])
def test_without_a_name(cache, feature, name):
    # Without another name of a feature, the road is the same.
    first = private.NAMES[feature][0]
    layer = name == first
    if not layer and feature not in _compiled:
        result_of(cache, first)
    _compiled.add(feature)
    (warning,), compiled, loaded = result_of(cache, name, None, layer)
    assert name.replace(":", ".") in warning
    assert numba.__version__ in warning
    assert private.WITHOUT[feature] in warning
    if feature != "count":  # it is found out when threads start, after some kernels were loaded
        assert compiled == 0 if not layer and feature != "disk" else loaded == 0


@pytest.mark.parametrize("feature", ["launch", "disk"])
def test_on_disk_without_a_feature(cache, feature):
    # What a process has compiled without it is read by a process without it alone.
    (name, *_) = private.NAMES[feature]
    _, compiled, loaded = result_of(cache, name, None, False)
    _, compiled_again, loaded_again = result_of(cache, name, None, False)
    if feature == "disk":
        assert (compiled_again, loaded, loaded_again) == (compiled, 0, 0)
    else:
        assert (compiled_again, loaded_again) == (0, compiled + loaded)


@pytest.mark.parametrize("feature", private._self_tests)
def test_a_self_test_fails(tmp_path, feature):
    (warning,), compiled, loaded = result_of(str(tmp_path), None, feature, False)
    assert f"self-test of {feature}" in warning
    assert private.WITHOUT[feature] in warning
    assert compiled > 0 == loaded
