"""Whether a layer gives the same with another class: a trial of copies on small random inputs."""

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from numbanorm.torch.base import NormLayer, can_take

# Whatever PyTorch's defaults are.
LIKE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
# Of x: where eps is most of the variance, and where it is nearly nothing of it.
SCALES = 1e-3, 1.0
# Of y, and of gradients and buffers, by the largest: what rounding to float32 may make of it.
TOLERANCES = 1e-4, 1e-3


def agrees(layer: nn.Module, cls: type) -> bool:
    """Tell whether a layer would give the same, in both modes, if it were of that class.

    Copies are compared, without hooks and with random parameters; random numbers stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        try:
            theirs = _copy(layer, generator)
            ours: Any = copy.deepcopy(theirs)
            ours.__class__ = cls
            tried = [
                _agree_for(theirs.train(training), ours.train(training), shape, scale, generator)
                for training in (True, False)
                for shape in ours._examples()
                for scale in SCALES
            ]
        except Exception:  # whatever a layer may raise that is not what it was taken for
            return False
    # None is a shape that the layer does not take; the second half is of evaluation.
    half = len(tried) // 2
    return False not in tried and True in tried[:half] and True in tried[half:]


def _copy(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy on the CPU without hooks, with random parameters and buffers."""
    known: dict[int, Any] = {}
    for module in layer.modules():
        hooks = (value for name, value in vars(module).items() if name.endswith("_hooks"))
        known |= {id(value): type(value)() for value in hooks if isinstance(value, dict)}
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        new = tensor.detach().cpu().clone()
        if tensor.is_floating_point():
            # Between these any of them may be a weight, a mean or a variance.
            new = torch.empty(tensor.shape, **LIKE).uniform_(0.5, 1.5, generator=generator)
        known[id(tensor)] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(layer, known)


def _agree_for(
    theirs: nn.Module,
    ours: NormLayer,
    shape: tuple[int, ...],
    scale: float,
    generator: torch.Generator,
) -> bool | None:
    """Compare y, gradients and buffers for an x of that shape; None if there is none of it."""
    x = scale * (torch.empty(shape, **LIKE).normal_(generator=generator) + 0.5)
    dy = torch.empty(shape, **LIKE).normal_(generator=generator)
    random = torch.get_rng_state()
    try:
        expected = _run(theirs, x, dy)
    except Exception:  # as it is of another number of axes
        return None
    if not can_take(x, *ours._tensors()) or ours._plan(x, None) is None:
        return False  # it would only be compared with itself
    torch.set_rng_state(random)
    found = _run(ours, x, dy)
    tolerances = itertools.chain(TOLERANCES[:1], itertools.repeat(TOLERANCES[1]))
    return len(found) == len(expected) and all(map(_are_close, found, expected, tolerances))


def _run(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    y = layer.forward(x)  # the layer's own, without hooks of all modules
    inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    return [y.detach(), *gradients, *(b.clone() for b in layer.buffers())]


def _are_close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    if found is None or expected is None:
        return found is expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    size = expected.abs().amax() if expected.numel() else 0
    return bool(((found - expected).abs() <= tolerance * size).all())
