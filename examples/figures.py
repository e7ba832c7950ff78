"""What the figures of these examples have in common: a colour for each method, and a bare frame."""

from matplotlib.figure import Figure

from numbanorm.plot import COLOURS as STATISTICS

# A method has the colour of the statistics it stands on, in every figure.
COLOURS = {
    "none": "#7F7F7F",
    "batch": STATISTICS["bn"],
    "layer": STATISTICS["ln"],
    "instance": STATISTICS["in"],
    "group": STATISTICS["gn"],
    "switchable": "#000000",
}


def grid(rows, columns, *, size, **options):
    """Return a figure of that size in inches, and its axes as a (rows, columns) array.

    `options` are those of `Figure.subplots`. It is not one of pyplot's: it needs no display.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
