"""PyTorch's private names: used here alone, each with a road for where it is missing.

The names that are in each release from 2.6 to 2.14, by its wheel for macOS; 2.13 alone was run:

================================================  ===================================
name                                              releases
================================================  ===================================
``_C._storage_Use_Count``                         2.8 to 2.14; before, where CUDA is
``UntypedStorage._cdata``, ``Tensor._use_count``  2.6 to 2.14
``_C._are_functorch_transforms_active``           2.6 to 2.14
``_C._functorch.is_legacy_batchedtensor``         2.6 to 2.14
``_C._functorch.get_interpreter_stack``           2.6 to 2.14
``_C._len_torch_dispatch_stack``                  2.6 to 2.14
``autograd.forward_ad._current_level``            2.6 to 2.14
``autograd.function._SingleLevelFunction.apply``  2.6 to 2.14, where it is Function's
``distributed_c10d._resolve_process_group``       2.6 to 2.14
================================================  ===================================

Without a name, or where it fails a test, there is one warning and more time, and never another
number: calls go through PyTorch's dispatcher, and results have memory of their own. Counts and
``apply`` are tested at first use. Whether a transform or a mode is active is not: if that were
wrong, a tensor without memory would raise.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

STORAGE_COUNT = "_C._storage_Use_Count"
STORAGE_ADDRESS = "UntypedStorage._cdata"
TENSOR_COUNT = "Tensor._use_count"
TRANSFORMS = "_C._are_functorch_transforms_active"
BATCHED = "_C._functorch.is_legacy_batchedtensor"
INTERPRETERS = "_C._functorch.get_interpreter_stack"
MODES = "_C._len_torch_dispatch_stack"
FORWARD_LEVEL = "autograd.forward_ad._current_level"
APPLY = "autograd.function._SingleLevelFunction.apply"
PROCESS_GROUP = "distributed.distributed_c10d._resolve_process_group"

# What is slower without a name.
_FRESH = "outputs have fresh memory, and gradients of x memory of their own"
_DISPATCHED = "all layers are called through PyTorch's dispatcher"
NAMES = {
    STORAGE_COUNT: _FRESH,
    STORAGE_ADDRESS: _FRESH,
    TENSOR_COUNT: "gradients of x have memory of their own",
    TRANSFORMS: _DISPATCHED,
    BATCHED: _DISPATCHED,
    INTERPRETERS: "layers are PyTorch's own inside transforms of torch.func",
    MODES: _DISPATCHED,
    FORWARD_LEVEL: "each tensor is asked whether it has a tangent",
    APPLY: "small layers take longer to call",
    PROCESS_GROUP: "process groups are known by the layers that were called",
}

_found: dict[str, Any] = {}
# What torch.compile sees has names of its own.
_has_level = True
_transforms_active: Callable[[], bool] | None = None
_watchers: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None = None


def _find(name: str) -> Any:
    """Return what PyTorch has under a name, or None."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return None


def _warn(name: str, what: str) -> None:
    warnings.warn(
        f"numbanorm.torch: torch.{name} {what} in PyTorch {torch.__version__}; results are the "
        f"same, but {NAMES[name]}",
        RuntimeWarning,
        stacklevel=2,
    )


def look_up(find: Callable[[str], Any] = _find) -> None:
    """Look up all names, and warn of each that is missing or answers otherwise."""
    global _has_level, _transforms_active, _watchers
    for name in NAMES:
        _found[name] = found = find(name)
        if found is None and (name != PROCESS_GROUP or dist.is_available()):
            _warn(name, "is missing")
        test = _ANSWERS.get(name)
        if found is not None and test is not None and not _works(name, test, found):
            _found[name] = None
    _has_level = _found[FORWARD_LEVEL] is not None
    _transforms_active = _found[TRANSFORMS]
    watchers = _found[TRANSFORMS], _found[BATCHED], _found[MODES]
    _watchers = None if None in watchers else watchers
    for answer in (can_count_storages, _can_count_tensors, sole_owner_counts, apply_of):
        answer.cache_clear()


def _works(name: str, test: Callable[..., bool], *args: Any) -> bool:
    """Tell whether a name passes a test; warn if it does not."""
    try:
        passed = test(*args)
    except Exception:  # whatever a changed function may raise
        passed = False
    if not passed:
        _warn(name, "behaves otherwise")
    return passed


# -- Who sees what is done with a tensor ---------------------------------------------------------

# Releases that do not tell export from compile have PyTorch's operators in both.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exported() -> bool:
    """Tell whether a program is being made that is to run where numbanorm need not be."""
    return bool(torch.jit.is_tracing() or _is_exporting())


def is_mapped() -> bool:
    """Tell whether torch.func.vmap or functionalize is active.

    PyTorch maps its own layers in a third of the time of an autograd.Function, and does not
    functionalize such functions.
    """
    if torch.compiler.is_compiling() or not may_be_transformed():
        return False
    interpreters = _found[INTERPRETERS]
    if interpreters is None:
        return True
    return any(each.key().name in ("Vmap", "Functionalize") for each in interpreters() or ())


def _follows_level(level: int) -> bool:
    """Tell whether the level of forward mode changes with it."""
    if level >= 0:
        return True
    with forward_ad.dual_level():
        inside: int = forward_ad._current_level
    return inside == level + 1


# What is called before anything else, and so tested when it is looked up.
_ANSWERS: dict[str, Callable[[Any], bool]] = {
    TRANSFORMS: lambda is_active: isinstance(is_active(), bool),
    BATCHED: lambda is_batched: is_batched(torch.zeros(1, device="cpu")) is False,
    INTERPRETERS: lambda interpreters: not interpreters(),
    MODES: lambda n_modes: isinstance(n_modes(), int),
    FORWARD_LEVEL: _follows_level,
}


def is_eager(x: Tensor) -> bool:
    """Tell whether x has data, and nothing but autograd watches what is done with it."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return not is_watched(x)


def is_watched(x: Tensor) -> bool:
    """Tell whether a trace, a transform or a mode is active, or x is mapped; True if not known."""
    if _watchers is None:
        return True
    transforms_active, is_batched, n_modes = _watchers
    return bool(n_modes() or transforms_active() or is_batched(x) or torch.jit.is_tracing())


def may_be_transformed() -> bool:
    """Tell whether a transform of torch.func is active; True if that is not known."""
    if _transforms_active is None:
        return not torch.compiler.is_compiling()
    return _transforms_active()


def may_have_tangent() -> bool:
    """Tell whether some tensor may have a forward-mode derivative."""
    return not _has_level or forward_ad._current_level >= 0


def has_tangent(tensors: tuple[Tensor | None, ...]) -> bool:
    """Tell whether there may be a forward-mode derivative."""
    if _has_level:
        return bool(forward_ad._current_level >= 0)
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# -- A short cut ---------------------------------------------------------------------------------


@functools.cache
def apply_of(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` without what it does first for the wrappers of transforms.

    That takes as long as a small layer.
    """
    short = _found[APPLY] is not None and _works(APPLY, _takes_short_cut)
    owner: Any = super(torch.autograd.Function, function) if short else function
    apply: Callable[..., Any] = owner.apply
    return apply


def _takes_short_cut() -> bool:
    """Tell whether a result of the short cut has a graph."""

    class Increment(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: (x + 1, None))
        backward = staticmethod(lambda ctx, dx, _: dx)

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        y, nothing = super(torch.autograd.Function, Increment).apply(x)
    return nothing is None and y.item() == 1 and type(y.grad_fn).__name__ == "IncrementBackward"


# -- Who has a tensor ----------------------------------------------------------------------------


def storage_owner_counts(storage: Any) -> tuple[int, int]:
    """Return how many have a memory: in PyTorch, and in Python."""
    return _found[STORAGE_COUNT](storage._cdata), sys.getrefcount(storage)


def owner_counts(gradient: Tensor) -> tuple[int, int, int, int, bool]:
    """Return how many have a tensor, and its memory, and whether PyTorch made that.

    PyTorch adds up gradients in place by the same rule: if nobody else has one.
    """
    storage = gradient.untyped_storage()
    of_tensor = sys.getrefcount(gradient), _found[TENSOR_COUNT](gradient)
    return *of_tensor, *storage_owner_counts(storage), storage.resizable()


@functools.cache
def can_count_storages() -> bool:
    """Tell whether :func:`storage_owner_counts` can be had, and counts."""

    def test() -> bool:
        with torch.inference_mode(False):
            tensor = torch.zeros(1, device="cpu")
            storage = tensor.untyped_storage()
            before = storage_owner_counts(storage)
            alias = tensor.detach()
            shared = storage_owner_counts(storage)
            del alias
        return shared == (before[0] + 1, before[1]) and storage_owner_counts(storage) == before

    if _found[STORAGE_COUNT] is None or _found[STORAGE_ADDRESS] is None:
        return False
    return _works(STORAGE_COUNT, test)


@functools.cache
def _can_count_tensors() -> bool:
    """Tell whether PyTorch's own owners of a tensor can be counted."""

    def test() -> bool:
        count = _found[TENSOR_COUNT]
        with torch.inference_mode(False), torch.enable_grad():
            tensor = torch.zeros(1, device="cpu", requires_grad=True)
            before = count(tensor)
            result = tensor + 1  # whose graph has the tensor
            shared = count(tensor)
            del result
        return bool(shared > before == count(tensor))

    return _found[TENSOR_COUNT] is not None and _works(TENSOR_COUNT, test)


@functools.cache
def sole_owner_counts() -> tuple[int, int, int, int, bool] | None:
    """Return the :func:`owner_counts` of a gradient that nobody else has, if they can be had.

    Not found out before there is a backward: where there are other devices, a process that has
    started autograd's threads cannot use autograd in a fork of it.
    """
    if not (can_count_storages() and _can_count_tensors()):
        return None
    found = []

    class Function(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: (x + 1, None))

        @staticmethod
        def backward(ctx: Any, dy: Tensor, _: None) -> Tensor:
            found.append(owner_counts(dy))
            return dy

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        torch.autograd.grad(Function.apply(x)[0] * 2, x)
    return found[0]


# -- Process groups ------------------------------------------------------------------------------

# By name, where PyTorch does not tell.
_groups: dict[str, Any] = {}


def name_of_group(group: Any) -> str:
    """Return the name of a process group, by which :func:`process_group` finds it."""
    name = str(group.group_name)
    if _found[PROCESS_GROUP] is None:
        _groups[name] = group
    return name


def process_group(name: str) -> Any:
    """Return the process group of that name."""
    resolve = _found[PROCESS_GROUP]
    return _groups[name] if resolve is None else resolve(name)


look_up()
