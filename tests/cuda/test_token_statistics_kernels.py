"""The token statistics' kernels, executed from their PTX and from their source: the bits of `rust/core`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulation import build, ptx_images
from tests.cuda.emulation.token_statistics_kernels import (
    Case,
    Emulator,
    Kernels,
    bits,
    differing,
    ptx,
    random_case,
    sanitized,
    shim,
)

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"rule": (1.0, None, 0.7)},
    "scaled": {"bias": True, "rule": (0.0625, None, 1.5)},
    "capped": {"rule": (1.0, 5.0, 1.0)},
    "capped, scaled, with a bias": {"bias": True, "rule": (1.5, 5.0, 0.8)},
}
SOURCE = "token_statistics.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["ptx", "shim"])
def emulator(request) -> Emulator:
    return ptx(ptx_images.module()) if request.param == "ptx" else shim(build.build(unit=SOURCE))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_same(emulator, case: Case, **tiles) -> None:
    assert differing(Kernels(emulator, case).statistics(**tiles), case.core()) == []


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_statistics_have_the_core_s_bits(emulator, rule) -> None:
    case = random_case(3, 5000, **rule)
    assert_same(emulator, case)
    other = Kernels(emulator, replace(case, products=case.products.roll(1, 0))).statistics()
    assert len(differing(other, case.core())) >= 5, "the check can fail"


# Within a block, whole blocks, within a round of blocks, and beyond it; a lane's last column there or not.
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1000, 1024, 1025, 2048, 7936, 8192, 9300])
def test_any_vocabulary(emulator, vocabulary) -> None:
    assert_same(emulator, random_case(2, vocabulary, bias=True, rule=(1.0, None, 0.7)))
    assert_same(emulator, random_case(1, vocabulary))


@pytest.mark.parametrize("padding", [0, 4, 3])
@pytest.mark.parametrize("tiles", [{"columns": 1024}, {"columns": 3072, "rows": 1}, {"columns": 8192}])
def test_tiles_do_not_matter(emulator, tiles, padding) -> None:
    """Nor do strides: by 4 elements rows are still read 16 bytes at a time, by 3 they are not."""
    assert_same(emulator, random_case(2, 9500 - 5300 * (padding > 0), rule=(1.5, None, 0.8)), padding=padding, **tiles)


def test_many_rows(emulator) -> None:
    assert_same(emulator, random_case(131, 40), rows=130)


# First and last of the vocabulary, of a block, of a round, of a tile.
PLACES = [0, 15, 1023, 1024, 3071, 3072, 8191, 8192, 9499]


@pytest.mark.parametrize("columns", [None, 3072])
def test_targets_anywhere(emulator, columns) -> None:
    products = torch.randn(1, 9500).repeat(len(PLACES), 1)
    case = Case(products, torch.tensor(PLACES))
    found = Kernels(emulator, case).statistics(columns=columns)
    assert differing(found, case.core()) == []
    assert len(set(found[0].tolist())) == len(PLACES), "each target has its own log-probability"


@pytest.mark.parametrize("columns", [None, 1024])
def test_the_first_of_the_largest_is_top_1(emulator, columns) -> None:
    """Ties within a lane, between lanes, between blocks, between rounds."""
    places = [(100, 116), (100, 101), (1023, 1024), (5, 8192), (9000, 9499)]
    products = torch.randn(2 * len(places), 9500)
    targets = []
    for row, (first, second) in enumerate(places):
        products[2 * row : 2 * row + 2, [first, second]] = 9.0
        targets += [first, second]
    case = Case(products, torch.tensor(targets))
    found = Kernels(emulator, case).statistics(columns=columns)
    assert differing(found, case.core()) == []
    assert found[3].tolist() == [1.0, 0.0] * len(places)


def rising(vocabulary: int) -> Tensor:
    """Each block's largest logit is above those before it, so that sums are rescaled again and again."""
    return torch.randn(1, vocabulary) + torch.arange(vocabulary) / 600


@pytest.mark.parametrize("columns", [None, 2048])
def test_rising_and_falling_peaks(emulator, columns) -> None:
    products = torch.cat([rising(9500), rising(9500).flip(1), rising(9500) * 90])
    assert_same(emulator, Case(products, torch.tensor([9400, 5, 9400])), columns=columns)


NUMBERS = [torch.nan, -torch.nan, torch.inf, -torch.inf, -1e38, 1e38, -80.0, -90.0, 0.0, -0.0]


@pytest.mark.parametrize("columns", [None, 1024])
@pytest.mark.parametrize("rule", [{}, {"rule": (1.0, 5.0, 1.0)}], ids=["plain", "capped"])
def test_numbers_at_the_end_of_the_range(emulator, columns, rule) -> None:
    """In the target's place, before it, and after it."""
    products = torch.randn(3 * len(NUMBERS), 3000)
    for row, number in enumerate(NUMBERS):
        for turn, place in enumerate([1500, 70, 2999]):
            products[3 * row + turn, place] = number
    assert_same(emulator, Case(products, torch.full((len(products),), 1500), **rule), columns=columns)


@pytest.mark.parametrize("columns", [None, 1024])
def test_whole_blocks_of_minus_infinity(emulator, columns) -> None:
    products = torch.randn(3, 3000)
    products[0, :1024], products[1, 1024:], products[2] = -torch.inf, -torch.inf, -torch.inf
    case = Case(products, torch.tensor([5, 2000, 7]))
    found = Kernels(emulator, case).statistics(columns=columns)
    assert differing(found, case.core()) == []
    assert found[0][0] == -torch.inf
    assert found[1].isnan().tolist() == [False, False, True]


def test_targets_outside_the_vocabulary_have_no_probability(emulator) -> None:
    """rust/core refuses them; on a device they must not be read through."""
    case = replace(random_case(5, 3000), targets=torch.tensor([-1, -100, 3000, 2**63 - 1, -(2**63)]))
    found = Kernels(emulator, case).statistics(columns=1024)
    assert found[0].isnan().all()
    assert not found[3].any()
    expected = replace(case, targets=torch.zeros(5, dtype=torch.int64)).core()
    assert set(differing(found, expected)) <= {"logprobs", "is_top1"}, "the rest does not depend on the target"


def upstream(case: Case) -> tuple[Tensor, Tensor]:
    return torch.randn(len(case.targets)), torch.randn(len(case.targets))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_core_s_bits(emulator, dtype, rule) -> None:
    case = random_case(3, 2100, **rule)
    above = upstream(case)
    expected = case.core_gradients(above).to(dtype)
    for tiles in ({}, {"columns": 1024}, {"columns": 1024, "padding": 4}, {"padding": 3}):
        assert torch.equal(bits(Kernels(emulator, case).gradients(above, dtype, **tiles)), bits(expected))
    other = Kernels(emulator, case).gradients((above[0], above[1] + 1e-2), dtype)
    assert not torch.equal(bits(other), bits(expected)), "the check can fail"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 1023, 1024, 1032])
def test_gradients_of_any_vocabulary(emulator, dtype, vocabulary) -> None:
    case = random_case(2, vocabulary)
    above = upstream(case)
    assert torch.equal(
        bits(Kernels(emulator, case).gradients(above, dtype)), bits(case.core_gradients(above).to(dtype))
    )


def test_gradients_at_the_end_of_the_range(emulator) -> None:
    products = torch.randn(len(NUMBERS), 1500)
    products[torch.arange(len(NUMBERS)), 70] = torch.tensor(NUMBERS)
    case = Case(products, torch.full((len(products),), 70))
    above = upstream(case)
    assert torch.equal(bits(Kernels(emulator, case).gradients(above)), bits(case.core_gradients(above)))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(seed) -> None:
    case = Case(torch.cat([rising(20000), torch.randn(1, 20000)]), torch.tensor([19000, 12000]))
    emulator, above = shim(build.build(unit=SOURCE), seed), upstream(case)
    assert_same(emulator, case, columns=12288)
    assert torch.equal(bits(Kernels(emulator, case).gradients(above)), bits(case.core_gradients(above)))


@pytest.mark.parametrize(("dtype", "rule"), [(DTYPES[0], "plain"), (DTYPES[1], "bias"), (DTYPES[2], "capped")])
def test_sanitizers_find_nothing(dtype, rule) -> None:
    """An address that is nobody's, an access that is not aligned, arithmetic that C++ leaves undefined."""
    program, case = build.build(unit=SOURCE, options=build.SANITIZED), random_case(2, 2100, **RULES[rule])
    above = upstream(case)
    assert_same(sanitized(program), case, columns=1024, padding=3)
    gradients = Kernels(sanitized(program), case).gradients(above, dtype, columns=1024)
    assert torch.equal(bits(gradients), bits(case.core_gradients(above).to(dtype)))
