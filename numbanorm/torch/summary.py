"""What became of the norm layers of a model, as a table."""

import torch
from torch import nn

from numbanorm.torch.base import NormLayer, TrackingLayer, can_take
from numbanorm.torch.convert import modules_of
from numbanorm.torch.foreign import Finder, is_norm


def summary(module: nn.Module) -> str:
    """Return a table of all norm layers of a model: which numbanorm runs, and why not the others.

    What numbanorm does not run PyTorch does, or the layer's own code, as before.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.

    Returns
    -------
    str
        A line for each layer: its name, its class, yes or no, its activation, and why not.

    Raises
    ------
    TypeError
        If ``module`` is no module.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> model = numbanorm.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(4)))
    >>> print(numbanorm.torch.summary(model))
    layer  class                      numbanorm  activation  why not
    0      numbanorm.torch.LayerNorm  yes
    numbanorm runs 1 of 1 norm layers
    """
    finder, rows = Finder(), [("layer", "class", "numbanorm", "activation", "why not")]
    modules_of(module)
    for name, layer in module.named_modules():
        if is_norm(layer):
            reason = _why_not(layer, finder)
            cls = type(layer)
            shown = f"{cls.__module__}.{cls.__qualname__}"
            follows = getattr(layer, "activation", None) if isinstance(layer, NormLayer) else None
            activation = "" if follows is None else str(follows)
            runs = "no" if reason else "yes"
            rows.append((name or "(itself)", shown, runs, activation, reason))
    n = sum(row[2] == "yes" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([*lines, f"numbanorm runs {n} of {len(rows) - 1} norm layers"])


def _why_not(layer: nn.Module, finder: Finder) -> str:
    """Return why numbanorm does not run a norm layer, or ""."""
    if not isinstance(layer, NormLayer):
        found = finder.find(layer)
        return found if isinstance(found, str) else "convert() would take it"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if isinstance(layer, TrackingLayer) and layer.is_odd:
        return "its running statistics are PyTorch's to judge"
    tensors = [t for t in layer._tensors() if t is not None]
    dtype = next((t.dtype for t in tensors), torch.float32)
    if can_take(torch.empty(0, dtype=dtype, device="cpu"), *tensors):
        return ""
    kinds = {f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors}
    return f"its tensors are {' and '.join(sorted(kinds))}"
