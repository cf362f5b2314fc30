"""The kernels' Philox, which is cut into an octet's part and a row's, for rows that no tensor here could have."""

import numpy as np
import pytest

from tests.cuda.emulation.build import build, read_sources
from tests.cuda.emulation.shim_kernels import Library, Memory

UNIT = """
#include "dropout.cuh"
extern "C" __global__ void draws(u64 seed, const u64* rows, u32 first_octet, u32* words) {
    const Philox philox(seed);
    const u64 row = load(rows + blockIdx.x);
    const Bits128 bits = philox.draw(philox.octet(first_octet + threadIdx.x), philox.upper(row), philox.row(row));
    for (u32 i = 0; i < 4; ++i) store(words + (blockIdx.x * WARP + threadIdx.x) * 4 + i, bits.words[i]);
}
"""
ROWS = [0, 7, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**64 - 1]
WORD = 2**32 - 1


def philox4x32_10(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """As the paper has it, round by round."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def test_the_reference_is_philox() -> None:
    """Known-answer vectors of Random123's `kat_vectors`, philox4x32 10."""
    assert philox4x32_10((0,) * 4, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32_10((WORD,) * 4, 2**64 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF, 2**64 - 1])
@pytest.mark.parametrize("first_octet", [0, 2**20])
def test_every_word_of_the_counter_and_the_seed_counts(seed, first_octet) -> None:
    memory = Memory()
    rows, words = memory.input("rows", np.array(ROWS, np.uint64)), memory.output("words", (len(ROWS), 32, 4), np.uint32)
    library = Library(build({**read_sources(), "philox.cu": UNIT}, unit="philox.cu"))
    library.launch("draws", (len(ROWS),), (32,), [seed, rows, first_octet, words], memory)
    expected = [
        [philox4x32_10((octet, row & WORD, row >> 32, 0), seed) for octet in range(first_octet, first_octet + 32)]
        for row in ROWS
    ]
    assert np.array_equal(words.array, np.array(expected, np.uint32))
    assert len(np.unique(words.array.reshape(-1, 4), axis=0)) == len(ROWS) * 32
