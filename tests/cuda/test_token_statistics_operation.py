"""Token statistics on the emulated driver, in a process that finds it: the tests are in `tests/cuda/emulated`."""

from tests.cuda.emulation import driver


def test_under_the_emulated_driver() -> None:
    assert " passed" in driver.pytest("token_statistics.py")
