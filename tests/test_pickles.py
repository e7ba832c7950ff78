"""Pickles that older versions made still load, and give what they gave."""

import pickle
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


def test_layers_of_version_0_1_0():
    # Each with an x and what the layer made of it in evaluation. The numbers may be another CPU's.
    layers, moments = pickle.loads((DATA / "layers-0.1.0.pickle").read_bytes())
    assert len(layers) == 9
    for layer, x, y in layers:
        assert layer.training
        np.testing.assert_allclose(layer.eval()(x), y, rtol=1e-5, atol=1e-5, err_msg=repr(layer))
        assert layer.backward(np.ones_like(x)).shape == x.shape
    assert (moments + moments).count == 6
