"""Laws that hold for any data, shown on examples that Hypothesis chooses."""

import numpy as np
from cases import assert_close, fill, normal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import numbanorm as nn
from numbanorm import Moments

# Squares of what is left have room below them as well.
numbers = st.floats(-1e6, 1e6).map(lambda v: v if abs(v) > 1e-50 else 0.0)
small_shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)
seeds = st.integers(0, 2**16)


def arrays(shape=small_shapes, dtype=np.float64):
    return hnp.arrays(dtype, shape, elements=numbers)


def vectors(min_side=1, max_side=40):
    return arrays(st.tuples(st.integers(min_side, max_side)))


def assert_same_moments(a, b, x):
    """Compare to the rounding of x, of its squares, and of the differences of means."""
    eps, n, size = np.finfo(np.float64).eps, max(x.size, 1), np.abs(x).max(initial=0)
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=16 * eps * size)
    m2 = np.max(b.m2)
    bound = 16 * eps * (m2 + size * np.sqrt(n * m2)) + n * (16 * eps * size) ** 2
    np.testing.assert_allclose(a.m2, b.m2, rtol=0, atol=bound)


# -- moments -------------------------------------------------------------------------------------


@given(vectors(0), vectors(0))
def test_merge_is_commutative(x, y):
    a, b = nn.moments(x), nn.moments(y)
    assert_same_moments(a + b, b + a, np.concatenate([x, y]))


@given(vectors(0), vectors(0), vectors(0))
def test_merge_is_associative(x, y, z):
    a, b, c = nn.moments(x), nn.moments(y), nn.moments(z)
    assert_same_moments((a + b) + c, a + (b + c), np.concatenate([x, y, z]))


@given(arrays(), st.data())
def test_any_split_gives_the_same_moments(x, data):
    axis = data.draw(st.integers(0, x.ndim - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[axis]), max_size=4)))
    parts = [nn.moments(p, axis) for p in np.split(x, cuts, axis)]
    assert_same_moments(Moments.merge(parts), nn.moments(x, axis), x)
    one_by_one = Moments.empty(parts[0].mean.shape)
    for part in data.draw(st.permutations(parts)):
        one_by_one = one_by_one + part
    assert_same_moments(one_by_one, nn.moments(x, axis), x)


@given(arrays(), st.data())
def test_any_mask_splits_too(x, data):
    mask = data.draw(hnp.arrays(bool, x.shape))
    axis = data.draw(st.integers(0, x.ndim - 1))
    a, b = nn.moments(x, axis, mask=mask), nn.moments(x, axis, mask=~mask)
    assert_same_moments(a + b, nn.moments(x, axis, mask=np.ones_like(mask)), x)


@given(arrays(), st.data())
def test_reducing_step_by_step(x, data):
    axis = data.draw(st.integers(0, x.ndim - 1))
    parts = nn.moments(x, axis)
    count = np.broadcast_to(parts.count, parts.mean.shape)
    pieces = [Moments(count[i], parts.mean[i], parts.m2[i]) for i in np.ndindex(parts.mean.shape)]
    assert_same_moments(Moments.merge(pieces), nn.moments(x), x)


@given(vectors(), st.integers(-10, 10), st.integers(-20, 20), seeds)
def test_moments_scale_and_ignore_order(x, power, shift, seed):
    a = nn.moments(x)
    by_two = nn.moments(x * 2.0**power)  # exact
    np.testing.assert_array_equal(by_two.mean, a.mean * 2.0**power)
    np.testing.assert_array_equal(by_two.m2, a.m2 * 4.0**power)
    np.testing.assert_array_equal(nn.moments(-x).m2, a.m2)
    assert_same_moments(nn.moments(np.random.default_rng(seed).permutation(x)), a, x)
    moved = nn.moments(x + shift)
    assert_same_moments(Moments(moved.count, moved.mean - shift, moved.m2), a, np.abs(x) + 20)


@given(arrays(), st.data())
def test_the_order_of_the_axes_does_not_matter(x, data):
    order = data.draw(st.permutations(range(x.ndim)))
    reduced = data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))
    a = nn.moments(x, tuple(reduced))
    b = nn.moments(x.transpose(order), tuple(order.index(axis) for axis in reduced))
    back = np.argsort([axis for axis in order if axis not in reduced])
    b = Moments(b.count, b.mean.transpose(back), b.m2.transpose(back))
    assert_same_moments(b, a, x)


# -- layers --------------------------------------------------------------------------------------

shapes = hnp.array_shapes(min_dims=3, max_dims=5, min_side=2, max_side=6)


def draws(shape, seed):
    return normal(*shape, seed=seed), normal(*shape, seed=seed + 1)


def steepest(x):
    """Bound 1 / std of any statistic: where two values are close, every gradient is big."""
    return 1 / x.std(axis=tuple(range(2, x.ndim))).min()


def pair(make_a, make_b, x, dy):
    """Run both forward and backward, with the same parameters where they have any."""
    results = []
    for make in (make_a, make_b):
        layer = make()
        results.append((layer(x), layer.backward(dy), layer.gradients()))
    return results


def assert_same_layer(make_a, make_b, shape, seed):
    x, dy = draws(shape, seed)
    (y, dx, gradients), (other_y, other_dx, other) = pair(make_a, make_b, x, dy)
    steep = steepest(x)
    assert_close(y, other_y, scale=10 * steep)
    assert_close(dx, other_dx, scale=10 * steep**2)
    for name in gradients.keys() & other.keys():
        assert_close(gradients[name], other[name], scale=np.sqrt(x.size) * 10 * steep, what=name)


@given(shapes, seeds)
def test_group_norm_of_all_channels_is_instance_norm(shape, seed):
    assert_same_layer(
        lambda: fill(nn.GroupNorm(shape[1], shape[1], dtype=np.float64)),
        lambda: fill(nn.InstanceNorm(shape[1], affine=True, dtype=np.float64)),
        shape,
        seed,
    )


@given(shapes, seeds)
def test_group_norm_of_one_group_is_layer_norm(shape, seed):
    assert_same_layer(
        lambda: nn.GroupNorm(1, shape[1], affine=False, dtype=np.float64),
        lambda: nn.LayerNorm(shape[1:], elementwise_affine=False, dtype=np.float64),
        shape,
        seed,
    )


@given(shapes, seeds, st.sampled_from(["in", "ln", "bn", "gn"]), st.permutations(range(4)))
def test_a_huge_logit_leaves_one_norm(shape, seed, kind, order):
    channels = shape[1]
    groups = 2 if channels % 2 == 0 else 1
    over = [("in", "ln", "bn", "gn")[i] for i in order]

    def switchable():
        layer = nn.SwitchableNorm(channels, over=over, num_groups=groups, dtype=np.float64)
        layer.mean_weight[over.index(kind)] = layer.var_weight[over.index(kind)] = 1e4
        return layer

    assert_same_layer(
        switchable,
        {
            "in": lambda: nn.InstanceNorm(channels, affine=True, dtype=np.float64),
            "ln": lambda: nn.GroupNorm(1, channels, dtype=np.float64),
            "bn": lambda: nn.BatchNorm(channels, dtype=np.float64),
            "gn": lambda: nn.GroupNorm(groups, channels, dtype=np.float64),
        }[kind],
        shape,
        seed,
    )


@given(shapes, seeds)
def test_channels_last_is_channels_first(shape, seed):
    x, dy = draws(shape, seed)
    steep = steepest(x)
    last = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy)]
    for make in (nn.BatchNorm, nn.InstanceNorm, nn.SwitchableNorm):
        layers = [fill(make(shape[1], affine=True, axis=a, dtype=np.float64)) for a in (1, -1)]
        assert_close(np.moveaxis(layers[1](last[0]), -1, 1), layers[0](x), scale=10 * steep)
        dx = np.moveaxis(layers[1].backward(last[1]), -1, 1)
        assert_close(dx, layers[0].backward(dy), scale=10 * steep**2)
        for name, gradient in layers[0].gradients().items():
            other = layers[1].gradients()[name]
            assert_close(gradient, other, scale=np.sqrt(x.size) * 10 * steep, what=name)


LAYERS = {
    "batch": lambda c, **k: nn.BatchNorm(c, **k),
    "instance": lambda c, **k: nn.InstanceNorm(c, **k),
    "group": lambda c, **k: nn.GroupNorm(1, c, **k),
    "switchable": lambda c, **k: nn.SwitchableNorm(c, **k),
}
layer_makers = st.sampled_from(list(LAYERS.values()))


@given(layer_makers, shapes, seeds, st.floats(-100, 100))
def test_a_shift_of_x_changes_nothing(make, shape, seed, shift):
    x, dy = draws(shape, seed)
    layer = make(shape[1], dtype=np.float64)
    y, dx = layer(x), layer.backward(dy)
    # x + shift is rounded to some 1e-14, which 1 / std multiplies.
    np.testing.assert_allclose(layer(x + shift), y, rtol=0, atol=1e-10)
    np.testing.assert_allclose(layer.backward(dy), dx, rtol=1e-8, atol=1e-8)


@given(layer_makers, shapes, seeds, st.integers(-30, 30))
def test_a_scale_of_x_changes_only_the_gradient(make, shape, seed, power):
    # With a power of two and no eps nothing is rounded otherwise: the same bits.
    x, dy = draws(shape, seed)
    layer = make(shape[1], eps=0.0, dtype=np.float64)
    y, dx = layer(x), layer.backward(dy)
    np.testing.assert_array_equal(layer(x * 4.0**power), y)
    np.testing.assert_array_equal(layer.backward(dy), dx / 4.0**power)
    np.testing.assert_array_equal(layer(-x), -y)


@given(layer_makers, shapes, seeds)
def test_dx_is_orthogonal_to_what_the_layer_ignores(make, shape, seed):
    # y does not change when x is shifted or (eps = 0) scaled, so neither direction has a slope.
    x, dy = draws(shape, seed)
    layer = make(shape[1], eps=0.0, dtype=np.float64)
    layer(x)
    dx = layer.backward(dy)
    bound = 1e-12 * np.abs(dy).sum() * steepest(x)
    assert abs(dx.sum()) <= bound
    assert abs((dx * x).sum()) <= 10 * bound


@given(shapes, seeds, st.randoms(use_true_random=False))
def test_batch_norm_does_not_see_the_order_of_samples(shape, seed, random):
    x, _ = draws(shape, seed)
    order = list(range(shape[0]))
    random.shuffle(order)
    layer = nn.BatchNorm(shape[1], dtype=np.float64)
    assert_close(layer(x[order]), layer(x)[order], scale=10)


@given(shapes, seeds)
def test_all_but_batch_norm_take_each_sample_alone(shape, seed):
    x, dy = draws(shape, seed)
    steep = steepest(x)
    for layer in (
        nn.InstanceNorm(shape[1], dtype=np.float64),
        nn.GroupNorm(1, shape[1], dtype=np.float64),
        nn.LayerNorm(shape[1:], dtype=np.float64),
        nn.SwitchableNorm(shape[1], over=("in", "ln"), dtype=np.float64),
    ):
        y, dx = layer(x), layer.backward(dy)
        for i in range(shape[0]):
            assert_close(layer(x[i : i + 1])[0], y[i], scale=10 * steep)
            assert_close(layer.backward(dy[i : i + 1])[0], dx[i], scale=10 * steep**2)


@given(shapes, seeds, st.integers(1, 5))
def test_masked_padding_is_not_there(shape, seed, extra):
    x, dy = draws(shape, seed)
    steep = steepest(x)
    wider = (*shape[:-1], shape[-1] + extra)
    padded, padded_dy = np.full(wider, np.nan), np.zeros(wider)
    padded[..., : shape[-1]], padded_dy[..., : shape[-1]] = x, dy
    mask = np.arange(wider[-1]) < shape[-1]
    for make in LAYERS.values():
        layer, other = (fill(make(shape[1], dtype=np.float64)) for _ in range(2))
        assert_close(other(padded, mask=mask)[..., : shape[-1]], layer(x), scale=10 * steep)
        dx = other.backward(padded_dy)
        assert_close(dx[..., : shape[-1]], layer.backward(dy), scale=10 * steep**2)
        np.testing.assert_array_equal(dx[..., shape[-1] :], 0)
