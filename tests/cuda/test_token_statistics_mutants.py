"""Broken token statistics: each kernel's barriers, bounds tests and terms, taken away one by one, must show."""

from collections.abc import Iterator

import pytest
import torch

from tests.cuda.emulation import build, ptx_images
from tests.cuda.emulation.ptx import Module, PtxError
from tests.cuda.emulation.shim_kernels import EmulationError
from tests.cuda.emulation.token_statistics_kernels import (
    BLOCK,
    Case,
    Emulator,
    Kernels,
    bits,
    differing,
    ptx,
    shim,
    wrongly_selected,
)

# (what is broken, a text of the source that occurs once, what stands there instead)
MUTANTS = [
    ("no rescaling of the sum", "state.sums[0] = state.sums[0] * factor;", ""),
    ("no shift of the weighted sum", "state.sums[1] + state.sums[0] * delta", "state.sums[1]"),
    ("squares rescaled once", "state.sums[2] * factor * factor", "state.sums[2] * factor"),
    ("no reference for minus infinity", "if (reference == minus_infinity()) reference = 0.0f;", ""),
    (
        "no barrier after the first peak",
        "    __syncthreads();\n    float peak = memory.peak;",
        "    float peak = memory.peak;",
    ),
    ("no barrier after the peaks", "__syncthreads();\n\n        float reference = peak,", "float reference = peak,"),
    (
        "no barrier after the lanes",
        "        __syncthreads();\n\n        if (threadIdx.x < WARP)",
        "        if (threadIdx.x < WARP)",
    ),
    ("no barrier of the warp", "            __syncwarp();\n", ""),
    ("one buffer of peaks", "memory.peaks[round % 2]", "memory.peaks[0]"),
    ("peaks of single lanes", "const float other = shuffle_xor(peak, half);", "const float other = peak;"),
    ("no end of a row", "if (i < count) z = logit", "if (true) z = logit"),
    ("no end of the rows", "if (row >= rows) return;", ""),
    ("no end of a row of gradients", "if (column >= tile.columns) return;", ""),
    ("the place of a tile forgotten", "load(targets + blockIdx.x) - tile.first_column", "load(targets + blockIdx.x)"),
    ("ties unnoticed", "ties |= share.line[i] == peak", "ties |= 0"),
    ("ties with those before unnoticed", "state.is_top1 = rises && ", "state.is_top1 = "),
    ("top 1 kept for good", "if (rises) state.is_top1 = 0;", ""),
    ("no weights of the entropy", "sums[1] = fmaf(e, clamped, sums[1]);", "sums[1] += e;"),
    (
        "lanes in falling order",
        "line[group * LOGITS_LANES] - reference",
        "line[(groups - 1 - group) * LOGITS_LANES] - reference",
    ),
    ("no bias", "(product + bias) * rule.inner;\n    return", "product * rule.inner;\n    return"),
    ("no slope of the cap", "(1.0f - t * t) * (rule.inner * rule.outer)", "rule.inner * rule.outer"),
    ("no pull of the entropy", "fmaf(row.grad_entropy, clamped + row.entropy, row.grad_logprob)", "row.grad_logprob"),
    ("the target in each tile", "target == column + j", "load(rows.targets + n) == column + j"),
]
SOURCE, SELECTION = "token_statistics.cu", "token_selection.cuh"
# The same of the selection.
SELECTION_MUTANTS = [
    (
        "no candidates",
        "if (place < count) store(selection.candidate_logits",
        "if (false) store(selection.candidate_logits",
    ),
    ("no end of the candidates' round", "if (place < count) store(selection", "if (place < 8192) store(selection"),
    (
        "the round of a candidate forgotten",
        "load(selection.candidates + start + i) - round",
        "load(selection.candidates + start + i)",
    ),
    ("candidates of another row", "static_cast<u64>(blockIdx.x) * selection.candidate_count", "0"),
    ("candidates that nothing begins", "store(logits + i, not_a_number())", "store(logits + i, 0.0f)"),
    ("candidates begun in each tile", "if (is_first) {", "if (true) {"),
    ("a list begun in each tile", "const bool is_known = !is_first &&", "const bool is_known = false &&"),
    ("a list never begun", "const bool is_known = !is_first &&", "const bool is_known ="),
    ("a list that is not kept", "store(selection.top_logits + entry, memory.logits[threadIdx.x]);", ""),
    ("the larger id first", "a.place < b.place", "a.place > b.place"),
    ("the smaller logit first", "a.logit > b.logit ||", "a.logit < b.logit ||"),
    ("equals go before those in the list", "return !(entry >= logit);", "return !(entry > logit);"),
    ("entries without a token stay", "return !(entry >= logit);", "return entry < logit;"),
    (
        "offers of single threads",
        "const Ranked other = {shuffle_xor(first.logit, half), shuffle_xor(first.place, half)};",
        "const Ranked other = first;",
    ),
    ("offers of one warp", "const Ranked other = memory.offers[warp];", "const Ranked other = memory.offers[0];"),
    (
        "offers of a warp's second thread",
        "if (threadIdx.x % WARP == 0) memory.offers",
        "if (threadIdx.x % WARP == 1) memory.offers[0] = memory.offers",
    ),
    ("no barrier before the offers are read", "= first;\n    __syncthreads();\n", "= first;\n"),
    (
        "no barrier before the list moves",
        "count, lane);\n        __syncthreads();\n        memory",
        "count, lane);\n        memory",
    ),
    ("one token of a round", "#pragma unroll 1\n    while (true) {", "for (u32 once = 0; once < 1; ++once) {"),
    ("only the list's first entry moves", "const bool follows = entry > 0 &&", "const bool follows = false &&"),
    ("tokens that stay", "const u64 token = follows ? memory.tokens[before] :", "const u64 token ="),
    ("the round of a token forgotten", "round + first.place", "first.place"),
    (
        "rounds passed over",
        "if (!displaces(peak, memory.logits[top - 1])) return;",
        "if (displaces(peak, memory.logits[top - 1])) return;",
    ),
    ("a block's places", "threadIdx.x / LOGITS_LANES * LOGITS_BLOCK", "0"),
    ("no next offer", "if (offer.place == first.place) offer =", "if (false) offer ="),
    ("a thread's last logit left out", "i < count; i += LOGITS_LANES", "i + LOGITS_LANES < count; i += LOGITS_LANES"),
]
SELECTION_MUTANTS_OF_THE_KERNELS = [
    ("candidates past the tile's end", "left < most ? left : most", "most"),
    (
        "the round's largest of one block",
        "largest = peaks[block] > largest ? peaks[block] : largest;",
        "largest = peaks[0];",
    ),
    (
        "the tile of a selection forgotten",
        "const u64 round_start = tile.first_column + first;",
        "const u64 round_start = first;",
    ),
    (
        "tokens of rows that are not known",
        "is_known ? load_written(selection.top_tokens + place) : NO_TOKEN",
        "load_written(selection.top_tokens + place)",
    ),
    (
        "log-probabilities of rows that are not known",
        "is_known ? static_cast<float>(logprob_of(logit, state, log_sum)) : not_a_number()",
        "static_cast<float>(logprob_of(logit, state, log_sum))",
    ),
    ("logits for log-probabilities", "static_cast<float>(logprob_of(logit, state, log_sum)) :", "logit :"),
]


def judge(emulator: Emulator) -> str | None:
    """What is wrong: a result that is not rust/core's, or what an emulator refuses."""
    try:
        return next(wrong(emulator), None)
    except (PtxError, EmulationError) as error:
        return type(error).__name__


def judge_selection(emulator: Emulator) -> str | None:
    """The same of what is selected."""
    try:
        return next(wrong_selection(emulator), None)
    except (PtxError, EmulationError) as error:
        return type(error).__name__


def wrong_selection(emulator: Emulator) -> Iterator[str]:
    """Ties, rising peaks, rows of which nothing is known; rounds, tiles and candidates anywhere and nowhere."""
    torch.manual_seed(0)
    products = torch.randn(4, 9500) + torch.arange(9500) / 3000
    products[0] = torch.randint(500, (9500,)).float()  # ties of the largest: some twenty
    products[1, 8 * BLOCK : 9 * BLOCK] = -9.0  # the second round's largest are in its second block
    products[1, [1023, 8191, 9499]] = torch.tensor([20.0, 21.0, 22.0])  # the last of a lane, a block, a round, the row
    products[2, 7] = torch.nan
    products[3, 3:] = -torch.inf
    candidates = torch.cat([torch.tensor([[0, 9499, 1023, 1024, 8191, 8192]] * 4), torch.randint(9500, (4, 130))], 1)
    # First, quickly, what a mutant that takes every equal logit would go through for minutes in the row of -inf.
    small = Case(products[:1, :1100], torch.tensor([70]), candidates=candidates[:1, 6:] % 1100, top=12)
    yield from wrongly_selected(emulator, small)
    case = Case(products, torch.tensor([1400, 9200, 5000, 1]), candidates=candidates, top=12)
    for columns in (None, 8 * BLOCK):
        yield from wrongly_selected(emulator, case, columns=columns)
    # rust/core refuses the last of these.
    beside = Case(products[:2, :2100], torch.tensor([5, 6]), candidates=torch.tensor([[2100], [-1]]), top=1)
    yield from (["outside"] if not Kernels(emulator, beside).selected(BLOCK)[1][0].isnan().all() else [])


def wrong(emulator: Emulator) -> Iterator[str]:
    """One thing after the other: rising peaks, ties, minus infinity, a row's uneven end, the second round and tile."""
    torch.manual_seed(0)
    products = torch.randn(3, 9500) + torch.arange(9500) / 1000
    products[0, 1400] = 7.0
    products[1, [9100, 9200]] = products[1].max() + 1
    products[2, :BLOCK] = -torch.inf
    products[2, [1500, 5000]] = products[2].max() + 1
    wide = Case(products, torch.tensor([1400, 9200, 5000]))
    capped = Case(products[:, 2500:4000], torch.tensor([1499, 70, 1100]), torch.randn(1500), (1.5, 20.0, 0.8))
    for case, columns in ((capped, BLOCK), (wide, None), (wide, 8 * BLOCK)):
        yield from differing(Kernels(emulator, case).statistics(columns), case.core())
    above = (torch.linspace(-1, 2, 3), torch.linspace(3, -2, 3))
    gradients = Kernels(emulator, capped).gradients(above, columns=BLOCK)
    if not torch.equal(bits(gradients), bits(capped.core_gradients(above))):
        yield "gradients"


def sources(broken: str = "", instead: str = "", file: str = SOURCE) -> dict[str, str]:
    """The kernels' files, as they are or broken."""
    files = build.read_sources()
    if broken:
        assert files[file].count(broken) == 1, "a mutant's text has to stand in the source once"
        files[file] = files[file].replace(broken, instead)
    return files


def compiled(files: dict[str, str]) -> Emulator:
    """The kernels of the token statistics alone, as PTX."""
    unit = {name: text.encode() for name, text in {**files, "vhead.cu": f'#include "{SOURCE}"\n'}.items()}
    return ptx(Module(ptx_images.compiled(unit, ptx_images.ARCHITECTURE).decode()))


@ptx_images.needs_compiler
def test_whole_kernels_are_right() -> None:
    assert judge(compiled(sources())) is None


@ptx_images.needs_compiler
@pytest.mark.parametrize(("broken", "instead"), [row[1:] for row in MUTANTS], ids=[row[0] for row in MUTANTS])
def test_mutants_are_caught(broken, instead) -> None:
    assert judge(compiled(sources(broken, instead)))


@ptx_images.needs_compiler
def test_the_whole_selection_is_right() -> None:
    assert judge_selection(compiled(sources())) is None


OF_THE_SELECTION = [
    *((name, *texts, SELECTION) for name, *texts in SELECTION_MUTANTS),
    *((name, *texts, SOURCE) for name, *texts in SELECTION_MUTANTS_OF_THE_KERNELS),
]


@ptx_images.needs_compiler
@pytest.mark.parametrize("mutant", OF_THE_SELECTION, ids=lambda mutant: mutant[0])
def test_mutants_of_the_selection_are_caught(mutant) -> None:
    assert judge_selection(compiled(sources(*mutant[1:])))


# What a device would do with threads in another order, the shim does as well.
OF_THE_ORDER = [row for row in MUTANTS if "barrier" in row[0] or "buffer" in row[0]]


@pytest.mark.parametrize(("broken", "instead"), [row[1:] for row in OF_THE_ORDER], ids=[row[0] for row in OF_THE_ORDER])
def test_threads_in_another_order_find_missing_barriers(broken, instead) -> None:
    library = build.build(sources(broken, instead), unit=SOURCE)
    assert any(judge(shim(library, seed)) for seed in range(1, 20))


def test_threads_in_another_order_find_nothing_else() -> None:
    library = build.build(unit=SOURCE)
    assert not any(judge(shim(library, seed)) for seed in range(3))
