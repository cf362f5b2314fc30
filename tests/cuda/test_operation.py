"""The value head on the emulated driver, in processes that find it: the tests are in `tests/cuda/emulated`."""

from emulation import driver


def test_under_the_emulated_driver() -> None:
    assert " passed" in driver.pytest("values.py", "transforms.py", "streams.py", "failures.py")


def test_by_attributes_and_whatever_the_order_of_threads() -> None:
    assert " passed" in driver.pytest("values.py", "streams.py", VHEAD_TENSOR_VIEW="attributes", VHEAD_MOCK_SEED="5")
