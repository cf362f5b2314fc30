"""Broken token statistics: each kernel's barriers, bounds tests and terms, taken away one by one, must show."""

from collections.abc import Iterator

import pytest
import torch

from tests.cuda.emulation import build, ptx_images
from tests.cuda.emulation.ptx import Module, PtxError
from tests.cuda.emulation.shim_kernels import EmulationError
from tests.cuda.emulation.token_statistics_kernels import BLOCK, Case, Emulator, Kernels, bits, differing, ptx, shim

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
    ("no barrier after the peaks", "__syncthreads();\n\n        float reference = peak;", "float reference = peak;"),
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
SOURCE = "token_statistics.cu"


def judge(emulator: Emulator) -> str | None:
    """What is wrong: a result that is not rust/core's, or what an emulator refuses."""
    try:
        return next(wrong(emulator), None)
    except (PtxError, EmulationError) as error:
        return type(error).__name__


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


def sources(broken: str = "", instead: str = "") -> dict[str, str]:
    """The kernels' files, as they are or broken."""
    files = build.read_sources()
    if broken:
        assert files[SOURCE].count(broken) == 1, "a mutant's text has to stand in the source once"
        files[SOURCE] = files[SOURCE].replace(broken, instead)
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


# What a device would do with threads in another order, the shim does as well.
OF_THE_ORDER = [row for row in MUTANTS if "barrier" in row[0] or "buffer" in row[0]]


@pytest.mark.parametrize(("broken", "instead"), [row[1:] for row in OF_THE_ORDER], ids=[row[0] for row in OF_THE_ORDER])
def test_threads_in_another_order_find_missing_barriers(broken, instead) -> None:
    library = build.build(sources(broken, instead), unit=SOURCE)
    assert any(judge(shim(library, seed)) for seed in range(1, 20))


def test_threads_in_another_order_find_nothing_else() -> None:
    library = build.build(unit=SOURCE)
    assert not any(judge(shim(library, seed)) for seed in range(3))
