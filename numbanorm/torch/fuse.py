"""Norm, addition and activation of a model as one layer each."""

import itertools
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from numbanorm.core.checks import ActivationLike
from numbanorm.torch.base import NormLayer
from numbanorm.torch.convert import convert, modules_of

_MODULES: dict[type, ActivationLike] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_FUNCTIONS: dict[Any, ActivationLike] = {
    functional.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    functional.relu6: "relu6",
    functional.silu: "silu",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    "tanh": "tanh",
    "tanh_": "tanh",
}
_ADDITIONS = operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"
# Hooks see what goes into and comes out of a module, which is another thing afterwards.
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def fuse(module: nn.Module) -> nn.Module:
    """Have norm and activation, and norm, addition and activation, done in one pass over memory.

    The model is converted first. Then neighbours in :class:`torch.nn.Sequential` are fused in
    place, an activation becoming :class:`torch.nn.Identity`; and the rest by :mod:`torch.fx` where
    that can trace the model. Keys, shapes and order of parameters, numbers and gradients are as
    before (with 16 bits up to rounding). Modules with hooks, and those whose trace depends on the
    mode, as one with a functional dropout, stay modules of their own, in which the same is done.

    Parameters
    ----------
    module : torch.nn.Module
        A model.

    Returns
    -------
    torch.nn.Module
        The same object, or a :class:`torch.fx.GraphModule` with the same modules in it, whose norms
        have activations: the one that was given is not to be called then.

    Raises
    ------
    TypeError
        If ``module`` is no module.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> model = torch.nn.Sequential(torch.nn.GroupNorm(1, 4), torch.nn.ReLU())
    >>> numbanorm.torch.fuse(model)[0].activation, model[1]
    ('relu', Identity())
    """
    convert(module)
    times = Counter(id(child) for parent in modules_of(module) for child in _children(parent))
    # Elsewhere a layer that is in several places would have its activation twice.
    once = {key for key, n in times.items() if n == 1} | {id(module)}
    for layer in modules_of(module):
        if isinstance(layer, NormLayer):
            _fuse_own(layer)
        elif isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
            _fuse_neighbours(layer, once)
    return _fuse_traced(module, once)


def _children(module: nn.Module) -> Iterable[nn.Module]:
    """Return what is in a module, again wherever it is again."""
    return (child for child in module._modules.values() if child is not None)


def activation_of(module: nn.Module) -> ActivationLike:
    """Return what an activation module is to numbanorm, or None."""
    if _has_hooks(module):
        return None
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _MODULES.get(type(module))


def _has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody sees what goes into a module, or comes out."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _is_open(layer: object, once: set[int]) -> bool:
    """Tell whether a module is a norm layer, in one place, that nothing follows yet."""
    return (
        isinstance(layer, NormLayer)
        and id(layer) in once
        and layer.activation is None
        and not layer._then
        and not _has_hooks(layer)
    )


def _fuse_own(layer: NormLayer) -> None:
    """Fuse the activation that a layer carries itself, as timm's do."""
    modules = [getattr(layer, name) for name in layer._then]
    rest = [child for child in modules if type(child) is not nn.Identity]
    if layer.activation is None and len(rest) == 1:
        activation = activation_of(rest[0])
        if activation is not None:
            layer.activation, layer._then = activation, ()


def _fuse_neighbours(sequential: nn.Sequential, once: set[int]) -> None:
    for (_, norm), (name, follower) in itertools.pairwise(list(sequential._modules.items())):
        if _is_open(norm, once):
            assert isinstance(norm, NormLayer)
            activation = None if follower is None else activation_of(follower)
            if activation is not None:
                norm.activation = activation
                setattr(sequential, name, nn.Identity())


# -- By torch.fx -----------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _traces(module: nn.Module, leaves: set[int]) -> fx.Graph | None:
    """Return the graph of a module, or None if it has none, or another one in the other mode."""
    graphs, modes = [], [(child, child.training) for child in module.modules()]
    try:
        for training in (not module.training, module.training):
            module.train(training)
            graphs.append(_Tracer(leaves).trace(module))
    except Exception:  # whatever a model does that a proxy cannot
        return None
    finally:
        for child, training in modes:
            child.training = training
    return graphs[1] if str(graphs[0]) == str(graphs[1]) else None


def _fuse_traced(root: nn.Module, once: set[int]) -> nn.Module:
    """Return the module with what its graph has fused; modules without a graph have it in them."""
    if fx.Tracer().is_leaf_module(root, "") or isinstance(root, NormLayer):
        return root
    leaves: set[int] = set()
    for child in reversed(modules_of(root)[1:]):  # from the innermost on
        is_plain = fx.Tracer().is_leaf_module(child, "") or isinstance(child, NormLayer)
        if not is_plain and (_has_hooks(child) or _traces(child, leaves) is None):
            leaves.add(id(child))
    for parent in modules_of(root):
        for name, child in list(parent.named_children()):
            if id(child) in leaves & once:
                setattr(parent, name, _fuse_children(child, once))
    graph = _traces(root, leaves)
    if graph is None:
        return _fuse_children(root, once)
    if not any([_fuse_node(graph, node, root, once) for node in list(graph.nodes)]):
        return root
    return _with_graph(root, graph)


def _fuse_children(module: nn.Module, once: set[int]) -> nn.Module:
    """Fuse what is in a module that has no graph itself, and nowhere else: there it would stay."""
    for name, child in list(module.named_children()):
        if id(child) in once:
            setattr(module, name, _fuse_traced(child, once))
    return module


def _with_graph(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a module that runs a graph, with all that was in the one it is of, in its order."""
    traced = fx.GraphModule(root, graph, type(root).__name__)
    kept = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
    for name, value in vars(root).items():
        if name in kept or name.endswith("_hooks") or name not in vars(traced):
            vars(traced)[name] = value
    return traced


def _activation_of_node(node: fx.Node, root: nn.Module) -> ActivationLike:
    """Return which activation a node is, or None."""
    if node.op == "call_module":
        return activation_of(root.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.target is functional.gelu and len(node.args) == 1:
        approximate = options.pop("approximate", "none")
        return None if options else "gelu" if approximate == "none" else "gelu_tanh"
    if node.target is functional.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else options.pop("negative_slope", 0.01)
        return ("leaky_relu", slope) if isinstance(slope, float) and not options else None
    # The last argument of some is whether they work in place.
    is_plain = not options and all(isinstance(arg, bool) for arg in node.args[1:])
    return _FUNCTIONS.get(node.target) if is_plain and node.args else None


def _other_operand(node: fx.Node, norm: fx.Node) -> fx.Node | None:
    """Return what a node adds to a norm's output, or None if it is no such addition."""
    if node.target not in _ADDITIONS or len(node.args) != 2:
        return None
    if any(key != "alpha" or value != 1 for key, value in node.kwargs.items()):
        return None
    other = node.args[1] if node.args[0] is norm else node.args[0]
    return other if isinstance(other, fx.Node) and other is not norm else None


def _changes(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether a node may write over its first argument."""
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(name), "inplace", False))
    in_place = name.rstrip("_") != name and not name.startswith("__")
    return in_place or name in ("iadd", "isub", "imul", "__iadd__") or node.kwargs.get("inplace")


def _fuse_node(graph: fx.Graph, node: fx.Node, root: nn.Module, once: set[int]) -> bool:
    """Fuse a norm with what follows; return whether there was something."""
    if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
        return False
    layer = root.get_submodule(str(node.target))
    calls = [other for other in graph.nodes if other.op == "call_module"]
    same = [other for other in calls if root.get_submodule(str(other.target)) is layer]
    if not _is_open(layer, once) or len(same) > 1:
        return False
    assert isinstance(layer, NormLayer)
    (follower,) = node.users
    other = _other_operand(follower, node)
    x = node.args[0]
    if other is not None and isinstance(x, fx.Node) and not any(_changes(u, root) for u in x.users):
        # A residual of another shape, or type, takes PyTorch's steps.
        layer._any_residual = True
        with graph.inserting_before(follower):
            fused = graph.call_module(str(node.target), (x,), {"residual": other})
        follower.replace_all_uses_with(fused)
        graph.erase_node(follower)
        graph.erase_node(node)
        if len(fused.users) == 1:
            (follower,) = fused.users
            _fuse_activation(graph, fused, follower, layer, root)
        return True
    return _fuse_activation(graph, node, follower, layer, root)


def _fuse_activation(
    graph: fx.Graph, node: fx.Node, follower: fx.Node, layer: NormLayer, root: nn.Module
) -> bool:
    activation = _activation_of_node(follower, root)
    if activation is None or follower.args[:1] != (node,):
        return False
    layer.activation = activation
    follower.replace_all_uses_with(node)
    graph.erase_node(follower)
    return True
