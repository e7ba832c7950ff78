"""What processes that share statistics tell each other: once in a forward, once in a backward.

A reduction of MPI need not have the same bits everywhere. So each process gathers what all have,
in the order of their ranks, and merges it itself. What is sent starts with whether something is
wrong and with the sizes of the kept axes, so that what is wrong in one process is an error in all.
"""

import zlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from numbanorm.core.types import Float64

# Rows of a value for each group: count, mean, m2, rest in forward; dmean, dvar in backward.
FORWARD_ROWS, BACKWARD_ROWS = 4, 2
# Before them: whether something is wrong, the size of a group, and a digest of the sizes.
HEADER = 3


class Processes(ABC):
    """The processes that share something, one of which is this one."""

    comm: Any = None

    @abstractmethod
    def gather(self, values: Float64) -> Float64:
        """Return the arrays of all processes, of equal shapes, in the order of their ranks."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Return a small object of each process."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    @property
    def name(self) -> str | None:
        """What stands for them in a pickle, or None."""
        return None


class Report(NamedTuple):
    """What a process tells of its error."""

    is_type: bool
    text: str


class Communicator(Processes):
    """The processes of an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    @property
    def name(self) -> str | None:
        """What stands for them in a pickle: the name of those that every program has, or None."""
        from mpi4py import MPI

        names = ("COMM_WORLD", "COMM_SELF")
        return next((name for name in names if getattr(MPI, name) == self.comm), None)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.comm.Get_size())

    def gather(self, values: Float64) -> Float64:
        """Return the arrays of all processes."""
        gathered = np.empty((self.count, *values.shape))
        self.comm.Allgather(np.ascontiguousarray(values), gathered)
        return gathered

    def gather_objects(self, value: Any) -> list[Any]:
        """Return a small object of each process."""
        result: list[Any] = self.comm.allgather(value)
        return result


class Exchange:
    """What one layer exchanges, in all processes at the same time.

    Attributes
    ----------
    processes : Processes
        Who takes part.
    shape : tuple of int or None
        Sizes of the groups that all processes had the last time, or that they were made with.
    several : bool
        Whether a group of a single value in all of them together is an error.
    needed : str
        What has to be the same in all processes, for the error where it is not.
    """

    needed = "x: equal sizes of the kept axes"

    def __init__(
        self, processes: Processes, shape: tuple[Any, ...] | None = None, several: bool = False
    ) -> None:
        self.processes, self.shape, self.several = processes, shape, several
        self._rows = 0  # of this turn, or 0 where the others wait for nothing

    @property
    def has_others(self) -> bool:
        """Whether there are several processes."""
        return self.processes.count > 1

    def turn(self, rows: int) -> Self:
        """Return the context of a forward or backward that gathers so many rows.

        The others hear of an error before that.
        """
        self._rows = rows
        return self

    def __enter__(self) -> Self:
        """Begin a turn."""
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error that they wait with."""
        rows, self._rows = self._rows, 0
        if rows and isinstance(error, Exception):
            if self.shape is not None:
                self._gather(rows, None, 0, None)
            self.processes.gather_objects(Report(isinstance(error, TypeError), str(error)))

    def gather(self, rows: Float64, shape: tuple[Any, ...], size: int) -> tuple[Float64, Float64]:
        """Return each process's ``size`` (n,), and its rows (n, rows, groups).

        Parameters
        ----------
        rows : array (rows, groups)
            A value for each group.
        shape : tuple
            The sizes of the groups, which have to be the same in all processes.
        size : int
            How many elements a group has in this process.
        """
        self._rows = 0
        if self.shape is None:  # nobody knows how long the others' are
            told = self.processes.gather_objects((shape, size, rows))
            self._compare([one if isinstance(one, Report) else one[0] for one in told])
            self.shape = shape
            return np.array([one[1] for one in told]), np.stack([one[2] for one in told])
        everyone = self._gather(len(rows), shape, size, rows)
        failed, sizes, digests = everyone[:, :HEADER].T
        if failed.any() or (digests != digests[0]).any():
            self._compare(self.processes.gather_objects(shape))
        if shape == self.shape:
            gathered = everyone[:, HEADER:].reshape(-1, *rows.shape)
        else:
            gathered, self.shape = self.processes.gather(rows), shape
        return sizes, gathered

    def _gather(self, n_rows: int, shape: tuple[Any, ...] | None, size: int, rows: Any) -> Float64:
        """Send a header, and rows where all know how long they are."""
        assert self.shape is not None
        n_groups = int(np.prod(self.shape))
        sent = np.zeros(HEADER + n_rows * n_groups)
        sent[:HEADER] = shape is None, size, zlib.crc32(repr(shape).encode())
        if shape is not None and shape == self.shape:
            sent[HEADER:] = rows.ravel()
        return self.processes.gather(sent)

    def _compare(self, told: list[Any]) -> None:
        """Raise the error that a process reports, or if the shapes of all are not the same."""
        for rank, one in enumerate(told):
            if isinstance(one, Report):
                error = TypeError if one.is_type else ValueError
                raise error(f"in process {rank}, {one.text}")
        if len(set(told)) > 1:
            shapes = ", ".join(f"{shape} in process {rank}" for rank, shape in enumerate(told))
            raise ValueError(f"{self.needed} are needed in all processes, got {shapes}")

    def __deepcopy__(self, memo: object) -> "Exchange":
        """Return one of the same processes: they cannot be copied."""
        return Exchange(self.processes, self.shape, self.several)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the processes by name."""
        return _named, (self.processes.name, self.shape, self.several)


def _named(name: str | None, shape: tuple[Any, ...] | None, several: bool) -> Exchange | None:
    """Return an exchange that was pickled, or None where there are no such processes."""
    if name is None:
        return None
    try:
        from mpi4py import MPI
    except ImportError:  # without MPI, this process is all there is
        return None
    return Exchange(Communicator(getattr(MPI, name)), shape, several)


def check_comm(comm: Any) -> Communicator | None:
    """Return the processes of an mpi4py communicator, or None."""
    if comm is None:
        return None
    # What does the same will do as well; a null communicator is False.
    methods = [getattr(comm, name, None) for name in ("Get_size", "Allgather", "allgather")]
    if not all(map(callable, methods)) or not comm or getattr(comm, "is_inter", False):
        raise TypeError(
            "comm: an intracommunicator of mpi4py, such as MPI.COMM_WORLD, or None is needed, "
            f"got {comm!r}"
        )
    return Communicator(comm)
