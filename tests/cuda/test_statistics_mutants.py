"""Broken token statistics: each kernel's barriers, bounds tests and terms, taken away one by one, must show."""

from collections.abc import Iterator

import pytest
import torch
from emulation import ptx_images
from emulation.ptx import Module, PtxError
from emulation.statistics_kernels import BLOCK, Case, Kernels, Ptx, bits, differing

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
    ("peaks of half the lanes", "half = LOGITS_LANES / 2; half > 0", "half = LOGITS_LANES / 4; half > 0"),
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
SOURCE = "statistics.cu"


def judge(emulator: Ptx) -> str | None:
    """What is wrong: a result that is not rust/core's, or what the interpreter will not do."""
    try:
        return next(wrong(emulator), None)
    except PtxError as error:
        return type(error).__name__


def wrong(emulator: Ptx) -> Iterator[str]:
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


def emulator(broken: str = "", instead: str = "") -> Ptx:
    """The kernels of the token statistics alone, as they are or broken."""
    sources = ptx_images.tool("cuda_images").read_sources()
    if broken:
        text = sources[SOURCE].decode()
        assert text.count(broken) == 1, "a mutant's text has to stand in the source once"
        sources[SOURCE] = text.replace(broken, instead).encode()
    sources["vhead.cu"] = f'#include "{SOURCE}"\n'.encode()
    return Ptx(Module(ptx_images.compiled(sources, ptx_images.ARCHITECTURE).decode()))


def test_whole_kernels_are_right() -> None:
    assert judge(emulator()) is None


@pytest.mark.parametrize(("broken", "instead"), [row[1:] for row in MUTANTS], ids=[row[0] for row in MUTANTS])
def test_mutants_are_caught(broken, instead) -> None:
    assert judge(emulator(broken, instead))
