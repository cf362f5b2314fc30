"""The comparison that `vhead bench` makes, on the emulated driver: the tests are in `tests/cuda/emulated`."""

from tests.cuda.emulation import driver


def test_under_the_emulated_driver() -> None:
    assert " passed" in driver.pytest("comparison.py")
