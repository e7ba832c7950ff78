"""Every gradient against central differences of the layer's own forward, with random dy."""

import numpy as np
import pytest
import reference as ref
from cases import CASES, cases, masks, normal


def check_gradients(case, training, mask=None):
    layer, x, dy = case.layer().train(training), case.input(), normal(*case.shape, seed=1)

    def loss():
        return np.sum(layer(x, mask=mask) * dy)

    layer.zero_grad()
    loss()
    gradients = {"x": layer.backward(dy)} | layer.gradients()
    for name, value in ({"x": x} | layer.parameters()).items():
        if value.ndim == 0:
            value = value.reshape(1)
        expected = ref.central_difference(loss, value).reshape(np.shape(gradients[name]))
        # The difference is off by step² f''' / 6 and by rounding / step, 1e-10 of f each; f''' goes
        # with the cube of rstd, which is up to 30 where a mask leaves two values.
        bound = 1e-6 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=bound, err_msg=name)


@cases()
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients(case, training):
    check_gradients(case, training)


@cases(*(c.id for c in CASES if c.id != "LayerNorm-no-batch"))
@masks("full")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_with_a_mask(case, training, make_mask):
    check_gradients(case, training, make_mask(case.shape))


@cases("BatchNorm2d", "InstanceNorm2d-last", "GroupNorm", "LayerNorm-3axes", "SwitchableNorm2d-all")
@masks("by sample", "outer and inner", "padded lengths", "by inner index", "all False")
def test_gradients_with_other_masks(case, make_mask):
    check_gradients(case, True, make_mask(case.shape))
