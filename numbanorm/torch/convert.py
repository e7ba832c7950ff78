"""Whole models: their layers become those of this package, in place."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from numbanorm.core import checks
from numbanorm.torch import layers, switchable
from numbanorm.torch.base import NormLayer
from numbanorm.torch.foreign import ORIGINS, OURS, Classes, Finder, is_norm
from numbanorm.torch.memory import outputs

_SWITCHABLE: dict[type, type] = {
    batch: ours
    for theirs, converted, ours in (
        (nn.BatchNorm1d, layers.BatchNorm1d, switchable.SwitchableNorm1d),
        (nn.BatchNorm2d, layers.BatchNorm2d, switchable.SwitchableNorm2d),
        (nn.BatchNorm3d, layers.BatchNorm3d, switchable.SwitchableNorm3d),
    )
    for batch in (theirs, converted)
}


def convert(module: nn.Module, *, classes: Classes | None = None) -> nn.Module:
    """Let numbanorm do the normalising of a model, in place.

    Layers become those of this module and stay the same objects: parameters, buffers, hooks and
    mode are untouched, and so is an optimiser. :func:`summary` says what became of each layer,
    :func:`revert` undoes it.

    Taken are layers of exactly PyTorch's classes, and of subclasses that add nothing; those of
    timm, torchvision, diffusers and Hugging Face's transformers; and what ``classes`` maps. All but
    the first are tried before, as copies on small random inputs, without their hooks: what does not
    give the same in both modes, gradients and all, is left. A class that carries an activation or
    dropout of its own keeps it, as a second step. A subclass of PyTorch's with a forward of its own
    is left. Lazy ones follow once they know their size.

    Outputs of a MiB and more are written where earlier ones of their size were that nobody has any
    more. So some memory is kept, no more than was in use at one time, until all layers are gone.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.
    classes : mapping of class to callable, optional
        What else to take: for a class of modules, a function that makes a layer of this module for
        one of them. It has its parameters by their name, or by their shape.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        If ``module`` is no module, or if ``classes`` does not fit.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> type(numbanorm.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(4)))[0])
    <class 'numbanorm.torch.LayerNorm'>
    """
    finder = Finder(classes)
    for layer in modules_of(module):
        if isinstance(layer, LazyModuleMixin) and layer.cls_to_become in OURS:
            layer.cls_to_become = OURS[layer.cls_to_become]
        elif finder.may_take(layer):
            found = finder.find(layer)
            if not isinstance(found, str):
                layer.__class__ = found
    return module


def revert(module: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: layers have the classes of before.

    Parameters, buffers, hooks and mode are untouched, so that nothing is left of the conversion.
    A layer that was made as one of this module becomes PyTorch's of the same name; those that
    PyTorch has no class for, as SwitchableNorm, stay.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        If ``module`` is no module.
    ValueError
        If a layer has an activation, which PyTorch's class would not apply.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> model = numbanorm.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(4)))
    >>> type(numbanorm.torch.revert(model)[0])
    <class 'torch.nn.modules.normalization.LayerNorm'>
    """
    for name, layer in module.named_modules() if isinstance(module, nn.Module) else ():
        if isinstance(layer, NormLayer) and layer.activation is not None:
            raise ValueError(
                f"module: {name or 'the layer'} has activation={layer.activation!r}, which "
                "PyTorch's class would not apply; take the model as it was before fuse()"
            )
    for layer in modules_of(module):
        # A lazy layer is told in itself what to become, and remembers that.
        if vars(layer).get("cls_to_become") in ORIGINS:
            del layer.cls_to_become
        if type(layer) in ORIGINS:
            layer.__class__ = ORIGINS[type(layer)]
            outputs.not_used_by(layer)
    return module


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all that are in it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: a torch.nn.Module is needed, got {type(module).__name__}")
    return list(module.modules())


def convert_switchable(
    module: nn.Module, *, over: Iterable[str] | None = None, num_groups: int | None = None
) -> nn.Module:
    """Turn BatchNorm layers into SwitchableNorm, in place.

    Weight, bias, running statistics, hooks and mode are kept. The logits are new parameters, 1
    each, so that an optimiser has to be made afterwards.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.
    over : sequence of str, optional
        Any choice of "in", "ln", "bn" and "gn"; by default IN, LN and BN, and LN and BN in 1d.
    num_groups : int, optional
        The number of groups for "gn".

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError, ValueError
        If ``over`` and ``num_groups`` do not fit, if a lazy BatchNorm has no size yet, or if there
        is no BatchNorm layer.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> numbanorm.torch.convert_switchable(torch.nn.BatchNorm2d(8), over=("ln", "bn")).importance()
    {'mean': {'ln': 0.5, 'bn': 0.5}, 'var': {'ln': 0.5, 'bn': 0.5}}
    """
    names = None if over is None else checks.check_over(over, num_groups)
    layers = modules_of(module)
    for layer in layers:
        if getattr(layer, "cls_to_become", None) in _SWITCHABLE:
            raise ValueError(f"module: {layer} has no size yet; run the model once before")
        if type(layer) in _SWITCHABLE:
            switchable.check_groups(layer.num_features, num_groups)
    possible = *_SWITCHABLE, *_SWITCHABLE.values()
    if not any(type(layer) in possible for layer in layers):
        others = {type(layer).__name__ for layer in layers if is_norm(layer)}
        raise ValueError(
            "module: a BatchNorm layer of PyTorch's or numbanorm's own class is needed, got "
            + (f"only {', '.join(sorted(others))}" if others else "no norm layer")
        )
    for layer in layers:
        if type(layer) in _SWITCHABLE:
            layer.__class__ = _SWITCHABLE[type(layer)]
            layer._switch(names, num_groups)
    return module
