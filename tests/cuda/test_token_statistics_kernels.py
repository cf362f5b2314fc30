"""The token statistics' kernels, executed from their PTX and from their source: the bits of `rust/core`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulation import build, ptx_images
from tests.cuda.emulation.token_statistics_kernels import (
    SELECTED,
    Case,
    Emulator,
    Kernels,
    bits,
    differing,
    ptx,
    random_case,
    sanitized,
    shim,
    wrongly_selected,
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


def asked(case: Case, candidates: int, top: int) -> Case:
    """The same with random candidates, of which the first is the target and the last comes twice."""
    given = torch.cat([case.targets[:, None], torch.randint(case.vocabulary, (len(case.targets), candidates))], 1)
    return replace(case, candidates=torch.cat([given, given[:, -1:]], 1), top=top)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_selected_tokens_have_the_core_s_bits(emulator, rule) -> None:
    case = asked(random_case(3, 5000, **rule), 40, 20)
    assert wrongly_selected(emulator, case) == []
    _, other = Kernels(emulator, replace(case, products=case.products.roll(1, 0))).selected()
    assert len(differing(other, case.core_selected(), SELECTED)) == 3, "the check can fail"


@pytest.mark.parametrize(
    ("vocabulary", "top"), [(1, 1), (15, 15), (17, 3), (128, 128), (1025, 128), (8192, 7), (8193, 1), (9300, 128)]
)
def test_the_likeliest_of_any_vocabulary(emulator, vocabulary, top) -> None:
    assert wrongly_selected(emulator, asked(random_case(2, vocabulary), 1, top)) == []


@pytest.mark.parametrize("tiles", [{"columns": 1024}, {"columns": 3072, "rows": 1}, {"columns": 8192, "padding": 3}])
def test_tiles_do_not_matter_to_what_is_selected(emulator, tiles) -> None:
    assert wrongly_selected(emulator, asked(random_case(2, 9500), 20, 9), **tiles) == []


def test_candidates_alone_and_the_likeliest_alone(emulator) -> None:
    case = asked(random_case(2, 2100), 150, 5)
    assert wrongly_selected(emulator, replace(case, top=0), columns=1024) == []
    assert wrongly_selected(emulator, replace(case, candidates=None), columns=1024) == []


@pytest.mark.parametrize("columns", [None, 1024])
def test_of_equals_the_smaller_id_comes_first(emulator, columns) -> None:
    """Few different logits: ties in a lane, between lanes, blocks, rounds and tiles, and with what is in the list."""
    products = torch.randint(4, (2, 9500)).float() / 4
    products[1] = 0.0
    products[1, ::2] = -0.0
    case = Case(products, torch.tensor([5, 9400]), candidates=torch.tensor([[0, 9499], [1, 2]]), top=20)
    assert wrongly_selected(emulator, case, columns=columns) == []
    _, (_, tokens, _) = Kernels(emulator, case).selected(columns=columns)
    assert tokens[1].tolist() == list(range(20))


@pytest.mark.parametrize("columns", [None, 1024])
def test_selected_tokens_at_the_end_of_the_range(emulator, columns) -> None:
    """Rows of minus infinity but for a few tokens; NaN and infinity anywhere, also in the very first place."""
    products = torch.full((len(NUMBERS) + 3, 3000), -torch.inf)
    for row, number in enumerate(NUMBERS):
        products[row, [0, 1500, 2999][row % 3]] = number
        products[row, 70] = 1.0
    products[-2] = torch.nan
    products[-1, :1024] = torch.nan
    case = Case(products, torch.full((len(products),), 70))
    case = replace(case, candidates=torch.tensor([[0, 70, 1500, 2999]]).repeat(len(products), 1), top=5)
    assert wrongly_selected(emulator, case, columns=columns) == []


def test_rising_logits_are_selected_again_and_again(emulator) -> None:
    products = torch.cat([rising(9500), rising(9500).flip(1)])
    case = Case(products, torch.tensor([5, 9400]), candidates=torch.tensor([[9499], [0]]), top=128)
    assert wrongly_selected(emulator, case, columns=8192) == []


def test_candidates_outside_the_vocabulary_have_no_probability(emulator) -> None:
    outside = [-1, 3000, 2**63 - 1, -(2**63)]
    case = asked(random_case(2, 3000), 3, 0)
    wild = replace(case, candidates=torch.cat([torch.tensor([outside, outside]), case.candidates], 1))
    _, (found, _, _) = Kernels(emulator, wild).selected(columns=1024)
    assert found[:, :4].isnan().all()
    assert torch.equal(bits(found[:, 4:]), bits(case.core_selected()[0]))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_does_not_matter_to_what_is_selected(seed) -> None:
    case = asked(Case(torch.cat([rising(20000), torch.randn(1, 20000)]), torch.tensor([19000, 12000])), 40, 30)
    assert wrongly_selected(shim(build.build(unit=SOURCE), seed), case, columns=12288) == []


def test_sanitizers_find_nothing_in_the_selection() -> None:
    program = build.build(unit=SOURCE, options=build.SANITIZED)
    assert wrongly_selected(sanitized(program), asked(random_case(2, 2100), 40, 20), columns=1024, padding=3) == []
