import numpy as np
import pytest

from vhead.candle import CandleValueHead


def random_floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bits(array: np.ndarray) -> list:
    """Bit patterns: NaN equals itself, and -0 is not 0."""
    assert array.dtype == np.float32
    return array.view(np.uint32).tolist()


@pytest.fixture
def head() -> CandleValueHead:
    """Random weights for 96 columns: not a multiple of any vector width that matters, yet several vectors."""
    return make_head(outputs=1, columns=96)


def make_head(outputs: int, columns: int, *, bias: bool = True, **arguments) -> CandleValueHead:
    weight, b = random_floats(outputs, columns, seed=1), random_floats(outputs, seed=2)
    return CandleValueHead(weight, b if bias else None, **arguments)
