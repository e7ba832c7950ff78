"""numbanorm.sklearn.Standardizer: exact for any split, and at home in scikit-learn."""

import pickle

import numpy as np
import pytest
from cases import assert_close, normal

sklearn = pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn is not installed")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from numbanorm.sklearn import Standardizer  # noqa: E402


@pytest.mark.filterwarnings("ignore:Skipping check:UserWarning")
@parametrize_with_checks([Standardizer()])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def data(dtype=np.float32, offset=1e6, n=200):
    return (normal(n, 4) * [1, 10, 0.5, 0] + offset).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("split", [[], [1], [100], [1, 2, 3], range(1, 200)], ids=str)
def test_any_split_is_exact(dtype, offset, split):
    X = data(dtype, offset)
    scaler = Standardizer()
    for part in np.split(X, split):
        assert scaler.partial_fit(part) is scaler
    wide = X.astype(np.longdouble)
    assert scaler.n_samples_seen_ == 200
    assert_close(scaler.mean_, wide.mean(0).astype(float), scale=1)
    assert_close(scaler.var_, wide.var(0).astype(float), scale=1e-3)
    assert scaler.var_[3] == 0
    assert scaler.scale_[3] == 1
    y = scaler.transform(X)
    assert y.dtype == dtype
    expected = (wide - wide.mean(0)) / np.where(wide.std(0) > 0, wide.std(0), 1)
    # A mean is rounded to float64.
    scale = 10 + (offset if dtype == np.float64 else 0)
    assert_close(y, expected.astype(float), scale=scale, dtype=dtype)
    back = scaler.inverse_transform(y)
    assert back.dtype == dtype
    assert_close(back, X.astype(float))


def test_as_standard_scaler_where_that_is_exact():
    X = data(np.float64, 0)
    ours, theirs = Standardizer().fit(X), StandardScaler().fit(X)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_
    for name in "mean_", "var_", "scale_":
        assert_close(getattr(ours, name), getattr(theirs, name), scale=1, what=name)
    new = data(np.float64, 3)
    assert_close(ours.transform(new), theirs.transform(new), scale=10)
    assert_close(ours.inverse_transform(new), theirs.inverse_transform(new), scale=10)


def test_fit_begins_anew():
    X = data()
    scaler = Standardizer().fit(X[:10]).fit(X[10:])
    np.testing.assert_array_equal(scaler.mean_, Standardizer().fit(X[10:]).mean_)


def test_masks():
    X = data(np.float64, 0)
    samples = np.random.default_rng(0).random(len(X)) < 0.5
    X[~samples, 1] = np.nan
    scaler = Standardizer().fit(X, mask=samples)
    assert_close(scaler.mean_, X[samples].mean(0), scale=1)
    assert_close(scaler.var_, X[samples].var(0), scale=1)
    elements = np.isfinite(X)
    elements[:, 2] = False
    scaler = Standardizer()
    for part in range(0, 200, 50):
        scaler.partial_fit(X[part : part + 50], mask=elements[part : part + 50])
    assert_close(scaler.mean_[1], X[samples, 1].mean(), scale=1)
    np.testing.assert_array_equal(scaler.n_samples_seen_, elements.sum(0))
    # A feature that nothing is known of stays as it is.
    assert (scaler.mean_[2], scaler.scale_[2]) == (0, 1)


@pytest.mark.parametrize(
    ("X", "mask", "error", "text"),
    [
        ([[1.0, np.nan]], None, ValueError, "NaN"),
        ([[1.0, np.nan]], [True], ValueError, "X: finite numbers are needed"),
        ([[1.0, np.inf]], [[True, True]], ValueError, "X: finite numbers are needed"),
        ([[1.0, 2.0]], [1], TypeError, "mask: an array of bool"),
        ([[1.0, 2.0]], [True, False, True], ValueError, "mask: a shape that broadcasts"),
        ([1.0, 2.0], None, ValueError, "2D"),
    ],
)
def test_errors(X, mask, error, text):
    scaler = Standardizer().fit([[1.0, 2.0], [2.0, 5.0]])
    before = pickle.dumps(scaler)
    with pytest.raises(error, match=text):
        scaler.partial_fit(X, mask=mask)
    assert pickle.dumps(scaler) == before


def test_not_fitted():
    for method in "transform", "inverse_transform":
        with pytest.raises(NotFittedError):
            getattr(Standardizer(), method)([[1.0]])


def test_names_of_features():
    scaler = Standardizer().fit([[1.0, 2.0], [3.0, 5.0]])
    assert list(scaler.get_feature_names_out()) == ["x0", "x1"]
    assert list(scaler.get_feature_names_out(["a", "b"])) == ["a", "b"]


def test_in_a_pipeline_copied_and_pickled():
    X = data(np.float32, 0)
    model = make_pipeline(Standardizer(), StandardScaler()).fit(X)
    y = model.transform(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(X), y)
    assert not hasattr(clone(model)[0], "mean_")
    assert repr(Standardizer()) == "Standardizer()"


def test_data_frames():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 5.0]})
    scaler = Standardizer().set_output(transform="pandas").fit(frame)
    assert list(scaler.transform(frame).columns) == ["a", "b"]
    assert list(scaler.feature_names_in_) == ["a", "b"]
