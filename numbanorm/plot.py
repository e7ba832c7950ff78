"""Figures; matplotlib is imported when one is drawn."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"in": "#009E73", "ln": "#E69F00", "bn": "#0072B2", "gn": "#CC79A7"}


def plot_importance(
    layers: Mapping[str, Any] | Iterable[Any], path: str | os.PathLike[str]
) -> None:
    """Draw how much of each statistic every SwitchableNorm of a model uses, and save the figure.

    Parameters
    ----------
    layers : mapping of str to SwitchableNorm, or iterable of SwitchableNorm
        In the order of the model; names are shown, numbers where there are none.
    path : str or path
        The file; its ending says the format (png, svg, pdf).

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError, ValueError
        If there is no layer, or one that is no SwitchableNorm.

    References
    ----------
    Luo et al., arXiv:1806.10779, figure 1.

    Examples
    --------
    >>> import numbanorm
    >>> layers = {"stem": numbanorm.SwitchableNorm2d(8), "head": numbanorm.SwitchableNorm1d(8)}
    >>> numbanorm.plot_importance(layers, "importance.png")  # doctest: +SKIP
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: an iterable of SwitchableNorm is needed, got {layers!r}")
    named = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers, 1))
    if not named:
        raise ValueError("layers: at least one SwitchableNorm is needed, got none")
    for name, layer in named.items():
        if not hasattr(layer, "importance"):
            raise TypeError(
                f"layers: SwitchableNorm layers are needed, got {type(layer).__name__} as {name!r}"
            )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_importance needs matplotlib: pip install 'numbanorm[plot]'"
        ) from error

    importances = [layer.importance() for layer in named.values()]
    names = [name for name in COLOURS if any(name in i["mean"] for i in importances)]
    labels = [str(name) for name in named]
    width = max(5.0, 1.6 + 0.45 * len(labels))
    longest = max(map(len, labels))
    # Of a label, a letter is about 0.09 inches wide; a turned one needs that much height.
    turned = longest * 0.09 > (width - 1.2) / len(labels)
    height = 5.0 + (longest * 0.075 if turned else 0.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, 1, sharex=True)
    for axes, kind, title in zip(rows, ("mean", "var"), ("means", "variances"), strict=True):
        bottom = [0.0] * len(labels)
        for name in names:
            heights = [i[kind].get(name, 0.0) for i in importances]
            axes.bar(
                range(len(labels)), heights, 0.8, bottom,
                color=COLOURS[name], label=name.upper(), edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.set(xlim=(-0.6, len(labels) - 0.4), ylim=(0, 1), ylabel=f"share in {title}")
        axes.spines[["top", "right"]].set_visible(False)
    rows[1].set_xticks(
        range(len(labels)), labels, rotation=60 if turned else 0,
        ha="right" if turned else "center", rotation_mode="anchor" if turned else None,
    )  # fmt: skip
    rows[1].set_xlabel("SwitchableNorm layer")
    handles, texts = rows[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=150)
