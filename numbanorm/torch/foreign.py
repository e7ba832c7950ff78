"""The norm layers of other libraries: the class that each becomes, if it agrees with ours.

A converted layer is the same object with another class, made from two: what a layer of ours adds
to PyTorch's, and then the class of before, which does what numbanorm cannot. That class is kept for
the way back, so that the layer itself has nothing new in it.
"""

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from numbanorm.torch import layers, rows
from numbanorm.torch.base import NormLayer
from numbanorm.torch.method import Inputs, Method
from numbanorm.torch.trial import agrees

# How classes of a user's mapping make a layer of ours for one of theirs.
Classes = Mapping[type, Callable[[Any], nn.Module]]

OURS: dict[type, type] = {
    getattr(nn, ours.__name__): ours
    for ours in (
        layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, layers.SyncBatchNorm,
        layers.InstanceNorm1d, layers.InstanceNorm2d, layers.InstanceNorm3d,
        layers.GroupNorm, rows.LayerNorm, rows.RMSNorm,
    )
}  # fmt: skip
# The class of before for each class that a layer may be given.
ORIGINS: dict[type, type] = {ours: theirs for theirs, ours in OURS.items()}

# Whose norm layers are tried, and names by which they are copied into other code.
LIBRARIES = {"diffusers", "timm", "torchvision", "transformers", "transformers_modules"}
COPIED = {"LayerNorm2d", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "T5LayerNorm"}
# What they call eps; some have it as a number in their code.
EPS = ("eps", "variance_epsilon", "epsilon", "variance_eps", "norm_eps")
# What PyTorch's forward calls: where one of these is another, so is forward.
CALLED = (
    "__call__", "_check_input_dim", "_get_no_batch_dim", "_handle_no_batch_input",
    "_apply_instance_norm",
)  # fmt: skip


class FrozenBatchNorm2d(NormLayer):
    """BatchNorm2d with all of its tensors fixed, as detection models have it."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    eps: float

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        if x.dim() != 4 or not self._have_shape(x.shape[1:2]) or x.numel() == 0:
            return None
        running = self.running_mean, self.running_var
        mean, var = running
        inputs = Inputs(x, self.weight, self.bias, running_mean=mean, running_var=var, mask=mask)
        return inputs, Method(("bn",), self.eps)

    def _examples(self) -> list[tuple[int, ...]]:
        return [(2, *self.weight.shape, 3, 2)]


# -- Classes of converted layers -------------------------------------------------------------------

# What a layer of ours needs under its own name: a path from the layer, or a value.
Names = tuple[tuple[str, Any], ...]


class Path(str):
    """The way from a layer to an attribute, with dots."""

    __slots__ = ()


@functools.cache
def converted_class(origin: Any, ours: Any, names: Names = (), then: tuple[str, ...] = ()) -> type:
    """Return the class that a layer of ``origin`` gets to be normalised as one of ``ours``.

    Then it runs the modules in it that ``then`` names.
    """
    theirs = ORIGINS.get(ours)
    if theirs is None:
        added = ours.__bases__[0] if issubclass(ours, nn.LayerNorm) else ours
    else:
        added = ours if issubclass(origin, theirs) else ours.__bases__[0]
    namespace: dict[str, Any] = {
        key: vars(ours)[key] for key in ("_ranks", "_over", "_group_name") if key in vars(ours)
    }
    # What the class of before says of itself goes before what a generic layer would.
    own = [cls for cls in origin.__mro__ if cls not in nn.Module.__mro__]
    for key in ("__init__", "extra_repr", "reset_parameters", "reset_running_stats"):
        found = next((vars(cls)[key] for cls in own if key in vars(cls)), None)
        if found is not None:
            namespace[key] = found
    for key, value in names:
        namespace[key] = _property(value) if isinstance(value, Path) else value
    if origin.__repr__ is not nn.Module.__repr__:
        shown: Any = origin.__repr__
        namespace["__repr__"] = lambda self: f"numbanorm.{shown(self)}"
    _, argument = inspect.signature(origin.forward).parameters
    if argument != "input":
        namespace["forward"] = _forward_of(argument, added)
    namespace |= {
        "_then": then,
        "__module__": __name__,
        "__qualname__": origin.__name__,
        "__doc__": f":class:`{origin.__module__}.{origin.__qualname__}`, computed by numbanorm.",
        "__reduce_ex__": _reduce,
    }
    made = type(origin.__name__, (added, origin), namespace)
    _RECIPES[made] = origin, ours, names, then
    ORIGINS[made] = origin
    return made


_RECIPES: dict[type, tuple[type, type, Names, tuple[str, ...]]] = {}


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle and copy a layer by what its class is made of."""
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    _, (cls, *rest), *state = reduced
    return _new, (_RECIPES.get(cls, (cls,)), *rest), *state


def _new(recipe: tuple[Any, ...], *args: Any) -> nn.Module:
    cls = recipe[0] if len(recipe) == 1 else converted_class(*recipe)
    layer: nn.Module = cls.__new__(cls, *args)
    return layer


def _property(path: Path) -> property:
    first, *rest = path.split(".")

    def get(layer: nn.Module) -> Any:
        value = getattr(layer, first)
        for name in rest:
            value = getattr(value, name)
        return value

    return property(get)


def _forward_of(argument: str, added: Any) -> Callable[..., Tensor]:
    """Return a forward that takes x by another name, too."""

    def forward(self: nn.Module, *args: Any, **options: Any) -> Tensor:
        if not args:
            args = (options.pop(argument),)
        y: Tensor = added.forward(self, *args, **options)
        return y

    return forward


# -- Which class -----------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm layer, not one that has some."""
    if isinstance(module, (NormLayer, *OURS)):
        return True
    has_tensors = any(True for _ in (*module.parameters(False), *module.buffers(False)))
    named = "norm" in type(module).__name__.lower()
    utility = type(module).__module__.startswith("torch.nn.utils")
    return named and not utility and (has_tensors or not any(True for _ in module.children()))


class Finder:
    """Finds the class for each layer of a model; like layers are tried once."""

    def __init__(self, classes: Classes | None = None) -> None:
        self.classes = {} if classes is None else _checked(classes)
        self.found: dict[Any, type | str] = {}

    def may_take(self, layer: nn.Module) -> bool:
        """Tell whether a module is one that is looked at."""
        return type(layer) in self.classes or (is_norm(layer) and not isinstance(layer, NormLayer))

    def find(self, layer: nn.Module) -> type | str:
        """Return the class that a layer should get, or why it is left."""
        cls = type(layer)
        if "forward" in vars(layer):
            return "its forward was replaced"
        if cls in OURS and cls not in self.classes:
            return OURS[cls]
        if isinstance(layer, LazyModuleMixin):
            return "it is lazy, and has no size yet"
        if parametrize.is_parametrized(layer):
            return "it is parametrized; convert it before"
        if any(t.is_meta for t in (*layer.parameters(), *layer.buffers())):
            return "it is on the meta device, where no output can be compared"
        key = _likeness(layer)
        if key not in self.found:
            self.found[key] = self._try(layer)
        return self.found[key]

    def _try(self, layer: nn.Module) -> type | str:
        """Return the class that agrees with a layer, or why there is none."""
        candidates = list(self._candidates(layer))
        if not candidates:
            return "its forward is its own; classes= may map it"
        if len(inspect.signature(type(layer).forward).parameters) != 2:
            return "its forward takes more than x"
        then = tuple(name for name, child in layer.named_children() if child is not None)
        for ours, names in candidates:
            # What is in it may come afterwards, as timm's activations do.
            for modules in dict.fromkeys((then, ())):
                origin: Any = type(layer)
                made = converted_class(origin, ours, names, modules)
                if agrees(layer, made):
                    return made
        return "its output is not numbanorm's"

    def _candidates(self, layer: nn.Module) -> Iterable[tuple[type, Names]]:
        """Yield classes of ours that may agree, and where the layer has what they need."""
        cls = type(layer)
        if cls in self.classes:
            made = self.classes[cls](layer)
            if not isinstance(made, NormLayer):
                raise TypeError(
                    f"classes: a layer of numbanorm.torch is needed for {cls.__name__}, "
                    f"got {type(made).__name__}"
                )
            return [(_public(type(made)), _names_of(made, layer))]
        owner = next(c for c in cls.__mro__ if "forward" in vars(c))
        base: Any = next((c for c in cls.__mro__ if c in OURS), None)
        if base is nn.SyncBatchNorm:
            return []
        if base is not None and owner in base.__mro__:
            same = all(getattr(cls, n, None) is getattr(base, n, None) for n in CALLED)
            return [(OURS[base], ())] if same else []
        if owner.__module__.split(".")[0] not in LIBRARIES and owner.__name__ not in COPIED:
            return []
        if base is None:
            return _plain(layer)
        return [(ours, ()) for ours in (OURS[base], *CHANNELS_FIRST.get(base, ()))]


CHANNELS_FIRST: dict[type, list[type]] = {
    nn.LayerNorm: [rows.LayerNorm2d],
    nn.RMSNorm: [rows.RMSNorm2d],
}


def _plain(layer: nn.Module) -> Iterable[tuple[type, Names]]:
    """Yield what a Module that is no subclass of PyTorch's norm layers may be."""
    given = {name for name, value in vars(layer).items() if isinstance(value, numbers.Real)}
    eps = next((Path(name) for name in EPS if name in given), None)
    names: Names = () if eps == "eps" else (("eps", 1e-5 if eps is None else eps),)
    parameters = {name for name, _ in layer.named_parameters(recurse=False)}
    buffers = {name for name, _ in layer.named_buffers(recurse=False)}
    if {"weight", "bias", "running_mean", "running_var"} <= buffers:
        yield FrozenBatchNorm2d, names
    if eps is None or buffers or not parameters <= {"weight", "bias"}:
        return
    if "normalized_shape" not in vars(layer):
        if "weight" not in parameters:
            return
        names = *names, ("normalized_shape", Path("weight.shape"))
    missing: Names = tuple((n, None) for n in ("weight", "bias") if not hasattr(layer, n))
    if "bias" not in parameters:
        yield rows.RMSNorm, (*names, *missing)
        yield rows.RMSNorm2d, (*names, *missing)
    yield rows.LayerNorm, (*names, *missing)
    yield rows.LayerNorm2d, (*names, *missing)


def _checked(classes: Classes) -> Classes:
    """Return a user's mapping, or say what would do."""
    if not isinstance(classes, Mapping):
        raise TypeError(f"classes: a mapping is needed, got {type(classes).__name__}")
    for cls, make in classes.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and callable(make)):
            raise TypeError(
                "classes: classes of modules, and functions from such a module to a layer of "
                f"numbanorm.torch, are needed, got {cls!r}: {make!r}"
            )
    return dict(classes)


def _public(ours: type) -> type:
    """Return the class of ours that a converted layer's was made of."""
    return _RECIPES[ours][1] if ours in _RECIPES else ours


def _names_of(made: nn.Module, layer: nn.Module) -> Names:
    """Return where a layer has what a layer of ours has; an attribute of its own is not hidden."""
    names: dict[str, Any] = {}
    free = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        same = [n for n, t in free.items() if t is tensor]
        alike = [n for n, t in free.items() if t.shape == tensor.shape]
        found = next(iter([*same, *([name] if name in free else alike)]), None)
        if found is not None:
            del free[found]
            names[name] = Path(found)
    plain = {n: v for n, v in vars(made).items() if not n.startswith("_") and n != "training"}
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for name, value in ({n: None for n in tensors if n not in names} | plain).items():
        there = getattr(layer, name, _ABSENT)
        if there is _ABSENT:
            near = [n for n in EPS if name == "eps" and vars(layer).get(n) == value]
            names[name] = Path(near[0]) if near else value
    return tuple((name, value) for name, value in names.items() if value != name)


_ABSENT = object()


def _likeness(layer: nn.Module) -> Any:
    """Return what is the same for layers that give the same."""
    tensors = *layer.named_parameters(), *layer.named_buffers()
    plain = {n: v for n, v in vars(layer).items() if not n.startswith("_") and n != "training"}
    children = [repr(child) for child in layer.children()]
    shapes = [(name, tuple(t.shape)) for name, t in tensors]
    return type(layer), repr(sorted(plain.items())), repr(children), repr(shapes)
