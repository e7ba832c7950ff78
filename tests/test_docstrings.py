"""Every public name says what it does, what it takes, and shows it."""

import importlib
import inspect
import pydoc
import re

import pytest

import numbanorm

# What recalibrate asks of a layer: their argument is the library's own.
PROTOCOL = {"begin_pooling", "end_pooling", "adopt_pool"}


def public(module):
    """Yield name and object of the public functions and classes, and the methods of classes."""
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.ismodule(found):
            continue
        yield name, found
        # Methods also of bases that are not public.
        bases = found.__mro__[:-1] if inspect.isclass(found) else ()
        own = (b for b in bases if b.__module__.startswith("numbanorm"))
        for base in (b for b in own if b is found or b.__name__ not in module.__all__):
            for method, value in vars(base).items():
                function = getattr(value, "__func__", value)
                # Those that scikit-learn gives a class of ours are its own.
                ours = str(getattr(function, "__module__", "")).startswith("numbanorm")
                if not method.startswith("_") and inspect.isfunction(function) and ours:
                    yield f"{name}.{method}", function


def names(module):
    return pytest.mark.parametrize(
        ("name", "found"), [pytest.param(n, o, id=n) for n, o in public(module)]
    )


def check(name, found):
    # Inspect would give a class without a docstring that of its parent.
    doc = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
    assert doc, "no docstring"
    assert doc.split("\n\n")[0].strip().endswith("."), "no sentence comes first"
    if name.rpartition(".")[2] not in PROTOCOL:
        assert ">>> " in doc, "no example"
    function = vars(found).get("__init__") if inspect.isclass(found) else found
    # BatchNorm2d and the like have the parameters of the class that they name.
    if function is None or doc.startswith(":class:"):
        return
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    described = doc.partition("Parameters\n")[2].partition("\n\n")[0]
    assert arguments <= set(re.findall(r"\w+", described)), "parameters are missing"


def check_help(name, found):
    shown = pydoc.plain(pydoc.render_doc(found))
    assert name.rpartition(".")[2] in shown.split("\n")[2]
    for long in "numpy._typing", "ndarray[":
        assert long not in shown


@names(numbanorm)
def test_public(name, found):
    check(name, found)


@names(numbanorm.functional)
def test_functional(name, found):
    check(name, found)


@names(numbanorm.jit)
def test_jit(name, found):
    check(name, found)


def test_methods_of_norm_are_looked_at():
    looked_at = {name for name, _ in public(numbanorm)}
    methods = (
        "forward backward parameters gradients zero_grad train eval state_dict load_state_dict"
    )
    assert {f"Norm.{name}" for name in methods.split()} <= looked_at


@pytest.mark.parametrize("optional", ["dask", "sklearn"])
def test_optional(optional):
    pytest.importorskip(optional)
    for name, found in public(importlib.import_module(f"numbanorm.{optional}")):
        check(name, found)
        check_help(name, found)


def test_torch():
    pytest.importorskip("torch")
    for name, found in public(importlib.import_module("numbanorm.torch")):
        if "." not in name:
            check(name, found)


def test_the_module_names_all_that_is_public():
    for name in numbanorm.__all__:
        assert f"``{name}``" in numbanorm.__doc__ or f"``numbanorm.{name}``" in numbanorm.__doc__


@pytest.mark.parametrize("layer", ["BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm"])
def test_layers_have_formula_paper_and_errors(layer):
    doc = getattr(numbanorm, layer).__doc__
    for needed in "y = (x - mean) / sqrt(var + eps)", "Raises", "arXiv:":
        assert needed in doc.replace("\n", "")


def test_help_is_readable():
    """Types have their short names, and a function its own."""
    # Python 3.14 has no quotes there.
    shown = pydoc.plain(pydoc.render_doc(numbanorm.BatchNorm2d)).replace("'", "")
    assert "forward(self, x: ArrayLike, *, mask: ArrayLike | None = None" in shown
    for module in numbanorm, numbanorm.functional, numbanorm.jit:
        for name, found in public(module):
            check_help(name, found)
