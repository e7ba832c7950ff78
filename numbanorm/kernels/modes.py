"""Records of numbers that kernels take: how statistics are used, and how work is cut.

They are handed over as plain tuples, and are records again inside: a named tuple takes 0.5 us to
unbox, a third of what a kernel of a few elements takes.
"""

from typing import NamedTuple


class Mode(NamedTuple):
    """How statistics are taken and used.

    Attributes
    ----------
    eps : float
        Added to the variance.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square.
    use_batch_stats : bool
        Whether the statistics come from x; if not, they are given.
    """

    eps: float
    center: bool
    use_batch_stats: bool


class PieceTiles(NamedTuple):
    """Parts of ``part`` elements along L; ``block`` parts of rows, or columns, are a task."""

    part: int
    block: int


class ElementTiles(NamedTuple):
    """``block`` rows are handled at once; ``run`` rows of a sample for all samples in turn.

    ``overlap`` says whether the next block is reduced while one is written.
    """

    run: int
    block: int
    overlap: bool


class GroupTiles(NamedTuple):
    """``block`` groups are handled at once; see ElementTiles about ``overlap``."""

    block: int
    overlap: bool


class ColumnTiles(NamedTuple):
    """A task has ``width`` columns, of which ``span`` next to each other share a weight."""

    width: int
    span: int
