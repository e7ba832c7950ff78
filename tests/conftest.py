import os

# More threads than cores are allowed: whether results are the same for 1, 2 and 4 of them must not
# depend on the machine. Read when Numba is imported, hence before everything else.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")

import numba
import pytest
from hypothesis import settings

settings.register_profile("numbanorm", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("numbanorm")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_core():
    import numbanorm

    most = numba.config.NUMBA_NUM_THREADS
    numbanorm.set_num_threads(min(most, max(2, os.cpu_count() or 1)))


@pytest.fixture
def restore_threads():
    import numbanorm

    before = numbanorm.get_num_threads()
    yield
    numbanorm.set_num_threads(before)
