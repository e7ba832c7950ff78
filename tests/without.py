"""Use layers in a process whose Numba lacks a name: for test_numba_private.

Nothing of the library is imported before the name is gone.
"""

import importlib
import json
import sys
import types
import warnings


def without(real, attributes):
    """Return a module, class or object without an attribute; Numba itself has the real one."""
    gone, *rest = attributes

    def get(name):
        if name == gone and not rest:
            raise AttributeError(name)
        return without(getattr(real, name), rest) if name == gone else getattr(real, name)

    if isinstance(real, type):

        class WithoutInClass(type(real)):
            def __getattribute__(cls, name):
                return get(name) if name == gone else super().__getattribute__(name)

        return WithoutInClass(real.__name__, (real,), {})

    class WithoutInObject(types.ModuleType):
        def __getattr__(self, name):
            return get(name)

    return WithoutInObject(str(real))


def check(name=None, self_test=None, layer=True):
    """Compute without a name, or where a self-test fails; print warnings and what was compiled."""
    import numba

    numba.njit(lambda x: x + 1)(1)  # now it has imported all of itself
    if name is not None:
        module, _, attributes = name.partition(":")
        sys.modules[module] = without(importlib.import_module(module), attributes.split("."))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if self_test is not None:
            from numbanorm.numba_ext import private, threads  # noqa: F401

            private._self_tests[self_test] = lambda: False
        compute(layer)
    from children import compiled

    texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
    print(json.dumps([texts, compiled()]))


def compute(layer):
    """Check moments, and a layer, against their definitions: on one thread and on several."""
    import numpy as np

    import numbanorm
    from numbanorm.tuning import use

    numbanorm.set_num_threads(3)
    x = np.random.default_rng(0).standard_normal((50, 4))
    for parallel_from in (1 << 16, 0):
        with use(parallel_from=parallel_from):
            found = numbanorm.moments(x, 1)
            np.testing.assert_allclose(found.mean, x.mean(1), rtol=1e-12)
            if layer:
                from cases import by_id

                case = by_id["RMSNorm"]
                args = case.input(np.float32), case.input(np.float32, 1)
                case.check(case.layer(np.float32), *args)
