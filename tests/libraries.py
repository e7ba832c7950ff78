"""Model libraries for tests: timm, torchvision and transformers, where they are installed."""

import importlib
import re
import sys
import warnings

import pytest


def library(name):
    """Return a module of a model library, or skip.

    Where torchvision was built for another PyTorch its operators are missing, which no norm layer
    needs: they are declared.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
    for _ in range(20):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported: {error}")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(f"torchvision::{missing[1]}", "(Tensor x) -> Tensor")
            for module in [m for m in sys.modules if m.split(".")[0] in ("timm", "torchvision")]:
                del sys.modules[module]
    raise AssertionError(f"{name} cannot be imported")
