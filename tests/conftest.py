"""One thread in each process of the tests, and in those that it starts.

There are as many processes as cores. A forked child that computed with two threads would also wait for its parent's.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported


def pytest_collection_finish():
    """Let garbage collections pass over all modules and tests: tests that collect would spend their time there."""
    gc.collect()
    gc.freeze()
