"""What the emulated devices leave behind."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def frozen_kernels() -> Iterator[None]:
    """Takes the parsed kernels, millions of objects that stay to the end, out of the garbage collector's sight.

    Transformers before 5 collects garbage with every model that it loads, which would take it most of a minute.
    """
    yield
    gc.collect()
    gc.freeze()
