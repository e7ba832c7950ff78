"""The one place that knows Numba's and LLVM's insides."""
