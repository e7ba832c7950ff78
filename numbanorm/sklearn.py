"""A transformer for scikit-learn on the library's statistics."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from numbanorm import functional
from numbanorm.core.types import Array
from numbanorm.moments import Moments, moments

__all__ = ["Standardizer"]


# scikit-learn's classes have no types.
class Standardizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Take off each feature's mean and divide by its standard deviation.

    y = (x - mean) / scale, where scale is the standard deviation (divided by n), and 1 for a
    constant feature, as in :class:`sklearn.preprocessing.StandardScaler`. The statistics are in
    float64 whatever the type of X, also where values are large and deviations small; those of parts
    that :meth:`partial_fit` was given are those of the whole. X keeps its type, float32 or float64.

    Attributes
    ----------
    mean_, var_, scale_ : array of float64, (n_features,)
        Of what was counted so far.
    n_samples_seen_ : int, or array of int, (n_features,)
        How many values of each feature were counted; an array once there was a mask.
    n_features_in_ : int
        The number of features.
    feature_names_in_ : array of str
        Where X had names for all.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.sklearn import Standardizer
    >>> X = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> Standardizer().fit_transform(X)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> Standardizer().partial_fit(X[:1]).partial_fit(X[1:]).mean_
    array([ 2., 20.])
    """

    def fit(self, X: ArrayLike, y: object = None, *, mask: ArrayLike | None = None) -> Self:
        """Take the statistics of X; return the transformer.

        Parameters
        ----------
        X : array (n_samples, n_features)
            NaN and Inf are allowed only where the mask is False.
        y : object
            Not used.
        mask : array of bool, optional
            (n_samples,), or what broadcasts to X: True where a sample, or an element, counts.

        Examples
        --------
        >>> from numbanorm.sklearn import Standardizer
        >>> Standardizer().fit([[1.0], [2.0], [60.0]], mask=[True, True, False]).mean_
        array([1.5])
        """
        return self._add(X, mask, first=True)

    def partial_fit(self, X: ArrayLike, y: object = None, *, mask: ArrayLike | None = None) -> Self:
        """Add X to what the statistics are taken of; return the transformer.

        Parameters
        ----------
        X, y, mask
            As in :meth:`fit`.

        Examples
        --------
        >>> from numbanorm.sklearn import Standardizer
        >>> scaler = Standardizer()
        >>> for X in [[1.0]], [[2.0], [3.0]]:
        ...     scaler = scaler.partial_fit(X)
        >>> scaler.n_samples_seen_, scaler.mean_
        (3, array([2.]))
        """
        return self._add(X, mask, first=not hasattr(self, "_moments"))

    def _add(self, X: ArrayLike, mask: ArrayLike | None, first: bool) -> Self:
        array = self._check(X, reset=first, finite=mask is None)
        counts = None
        if mask is not None:
            given = np.asarray(mask)
            counts = given[:, None] if given.shape == array.shape[:1] else given
        found = moments(array, 0, mask=counts)
        if not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
            raise ValueError("X: finite numbers are needed where the mask is True, got NaN or Inf")
        merged = found if first else self._moments + found
        self._moments: Moments = merged
        self.mean_, self.var_ = merged.mean, merged.var()
        self.scale_ = np.where(self.var_ > 0, np.sqrt(self.var_), 1.0)
        self.n_samples_seen_ = merged.count
        return self

    def transform(self, X: ArrayLike) -> Array:
        """Return (X - mean) / scale.

        Parameters
        ----------
        X : array (n_samples, n_features)
            As in :meth:`fit`.

        Examples
        --------
        >>> from numbanorm.sklearn import Standardizer
        >>> Standardizer().fit([[1.0], [3.0]]).transform([[5.0]])
        array([[3.]])
        """
        check_is_fitted(self)
        array = self._check(X)
        one = np.ones_like(self.scale_)
        return functional.batch_norm(array, self.mean_, one, 1 / self.scale_, eps=0.0)

    def inverse_transform(self, X: ArrayLike) -> Array:
        """Return X * scale + mean.

        Parameters
        ----------
        X : array (n_samples, n_features)
            What :meth:`transform` may return.

        Examples
        --------
        >>> from numbanorm.sklearn import Standardizer
        >>> Standardizer().fit([[1.0], [3.0]]).inverse_transform([[3.0]])
        array([[5.]])
        """
        check_is_fitted(self)
        array = self._check(X)
        zero, one = np.zeros_like(self.scale_), np.ones_like(self.scale_)
        return functional.batch_norm(array, zero, one, self.scale_, self.mean_, eps=0.0)

    def _check(self, X: ArrayLike, reset: bool = False, finite: bool = True) -> Array:
        """Return X as an array of floats, or say as scikit-learn does what is wrong with it."""
        dtypes = [np.float64, np.float32]
        array: Array = validate_data(
            self, X, reset=reset, dtype=dtypes, ensure_all_finite=finite, ensure_min_samples=1
        )
        return array
