"""The oracle is checked as well: its gradients against central differences of its own forward."""

import numpy as np
import pytest
import reference as ref


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


SHAPE = (3, 4, 2, 3)
KINDS = [("bn",), ("in",), ("ln",), ("gn",), ("in", "ln", "bn"), ("bn", "gn", "ln", "in")]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("center", [True, False], ids=["", "rms"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_gradients(kinds, center, masked):
    x, dy = normal(*SHAPE), normal(*SHAPE, seed=1)
    mask = normal(*SHAPE, seed=2) < 0.4 if masked else None
    given = {"weight": normal(4, seed=3), "bias": normal(4, seed=4)}
    if len(kinds) > 1:
        given |= {"mean_weight": normal(len(kinds)), "var_weight": normal(len(kinds), seed=5)}
    stats = [ref.channel_statistic(k, SHAPE, groups=2) for k in kinds]

    def forward():
        return ref.Naive(x, stats, **given, feature_axes=(1,), center=center, mask=mask)

    gradients = forward().backward(dy)
    for name, value in (given | {"dx": x}).items():
        expected = ref.central_difference(lambda: np.sum(forward().y * dy), value)
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-7, atol=1e-7, err_msg=name)


def test_groups_are_numbered_by_hand():
    stat = ref.statistic((2, 4, 3), (1, 2), groups=2)
    assert stat.sizes == (2, 2)
    np.testing.assert_array_equal(stat.ids[:, :, 0], [[0, 0, 1, 1], [2, 2, 3, 3]])
    stat = ref.statistic((2, 3), (-2,))
    assert stat.sizes == (3,)
    np.testing.assert_array_equal(stat.ids, [[0, 1, 2], [0, 1, 2]])


def test_moments_are_numpys():
    x = normal(5, 3, 4, 2)
    n, mean, var = ref.moments(x, ref.channel_statistic("bn", x.shape))
    np.testing.assert_array_equal(n, 40)
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(var, x.var((0, 2, 3)), rtol=1e-13)
    mask = normal(5, 3, 4, 2, seed=1) < 0
    n, mean, var = ref.moments(x, ref.channel_statistic("in", x.shape), mask)
    np.testing.assert_array_equal(n, mask.sum((2, 3)).ravel())
    np.testing.assert_allclose(mean, x.mean((2, 3), where=mask).ravel(), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(var, x.var((2, 3), where=mask).ravel(), rtol=1e-13)


def test_a_group_with_nothing_in_it():
    x = normal(2, 2, 3)
    mask = np.ones((2, 2, 1), dtype=bool)
    mask[0, 1] = False
    naive = ref.Naive(x, [ref.channel_statistic("in", x.shape)], bias=[5, 6], feature_axes=(1,),
                      mask=mask)  # fmt: skip
    np.testing.assert_array_equal(naive.y[0, 1], 6)
    before = np.array([7.0, 8.0])
    mean, _ = ref.track(before, before, naive)
    np.testing.assert_allclose(mean[0], 6.3 + 0.1 * x[:, 0].mean())
    np.testing.assert_allclose(mean[1], 7.2 + 0.1 * x[1, 1].mean())  # of the other sample alone
