"""PyTorch and NumPy at the same: no commit changes them, but the machine may."""

from . import accuracy, by, moments, small

OTHERS = ("torch", "numpy")


class Images(by.Images):
    """Layers of images by shape."""

    param_names = (*by.Images.param_names, "library")
    params = (*by.Images.params, OTHERS)
    time_train_and_backward = by.timed("PyTorch, NumPy: images", "train", "backward")


class Rows(by.Rows):
    """Layers of rows by shape."""

    param_names = (*by.Rows.param_names, "library")
    params = (*by.Rows.params, OTHERS)
    time_train_and_backward = by.timed("PyTorch, NumPy: rows", "train", "backward")


class Dtypes(by.Dtypes):
    """Layers by dtype."""

    param_names = (*by.Dtypes.param_names, "library")
    params = (*by.Dtypes.params, ("torch",))
    time_train_and_backward = by.timed("PyTorch: by dtype", "train", "backward")


class Fused(by.Fused):
    """Norm, residual and activation."""

    param_names = (*by.Fused.param_names, "library")
    params = (*by.Fused.params, ("torch",))
    time_train_and_backward = by.timed("PyTorch: norm, residual, activation", "train", "backward")


class Small(small.Small):
    """A hundred calls."""

    param_names = (*small.Small.param_names, "library")
    params = (*small.Small.params, ("torch",))
    version = "2"
    time_evaluate_100 = by.timed(
        "PyTorch: small arrays, 100 evaluations", *("evaluate",) * small.CALLS
    )
    time_train_and_backward_100 = by.timed(
        "PyTorch: small arrays, 100 steps",
        *("train", "backward") * small.CALLS,
    )


class Moments(moments.Images):
    """Mean and variance of images by shape."""

    param_names = (*moments.Images.param_names, "library")
    params = (*moments.Images.params, OTHERS)
    time_moments = moments.timed("PyTorch, NumPy: moments of images")


class MomentsOfRows(moments.Rows):
    """Mean and variance of rows by shape."""

    param_names = (*moments.Rows.param_names, "library")
    params = (*moments.Rows.params, OTHERS)
    time_moments = moments.timed("PyTorch, NumPy: moments of rows")


class Offset(accuracy.Offset):
    """The largest error of y."""

    param_names = (*accuracy.Offset.param_names, "library")
    params = (*accuracy.Offset.params, OTHERS)

    def track_largest_error(self, _: str, library: str = "torch") -> float:
        """Return it."""
        return super().track_largest_error(_, library)

    track_largest_error.pretty_name = "PyTorch, NumPy: error around a million"
