"""What the shim and the sanitizers report: small kernels that break each rule, and ours, which break none."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.emulation.build import SANITIZED, build, read_sources
from tests.cuda.emulation.ptx_kernels import Device, Head, to_numpy
from tests.cuda.emulation.shim_kernels import EmulationError, Library, Memory, Replay
from vhead import _native
from vhead.ops import value_head

SEED = 0x9E3779B97F4A7C15 - 2**64
SUM_OF_WARPS = """
    __shared__ float sums[4];
    const float sum = shuffle_xor(load(from + threadIdx.x), 1);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    {barrier}
    if (threadIdx.x == 0) store(to, sums[0] + sums[1] + sums[2] + sums[3]);
"""
LEAK = "__shared__ float kept; if (blockIdx.x == 0) kept = 1.0f; __syncthreads(); store(to, kept);"
# What a kernel does, by the message that it earns.
BROKEN = {
    "a barrier that not every thread": "if (threadIdx.x < 64) __syncthreads(); store(to, 1.0f);",
    "a collective that not every thread": "if (threadIdx.x != 3) store(to, shuffle_xor(1.0f, 1));",
    "a collective of part of a warp": "store(to, __shfl_xor_sync(0xffff, 1.0f, 1));",
    "in different collectives": "store(to, threadIdx.x % 2 ? shuffle_xor(1.0f, 1) : 0.0f * same_in_warp(1u));",
    "different values": "store(to, 1.0f * same_in_warp(threadIdx.x));",
    "not aligned": "store(to, as_float(load(reinterpret_cast<const Quad*>(from + 1)).words[0]));",
    "outside of every allocation": "store(to, load(from + threadIdx.x + 1));",
    "a write to what is to be read": "store(const_cast<float*>(from), 1.0f);",
}
SANITIZERS_SEE = {
    "heap-buffer-overflow": "to[0] = from[threadIdx.x + 1];",
    "misaligned address": "to[0] = reinterpret_cast<const Quad*>(from + 1)->words[0];",
    "index 4 out of bounds": "__shared__ float kept[4]; kept[threadIdx.x / 8] = 1.0f; to[0] = kept[0];",
}
BODIES = [
    *BROKEN.values(), *SANITIZERS_SEE.values(), LEAK,
    SUM_OF_WARPS.replace("{barrier}", "__syncthreads();"), SUM_OF_WARPS.replace("{barrier}", ""),
]  # fmt: skip


def kernel(number: int, body: str) -> str:
    arguments = "[[maybe_unused]] const float* from, [[maybe_unused]] float* to"
    return f'extern "C" __global__ void kernel{number}({arguments}) {{{body}}}\n'


@cache
def built(*options: str) -> Path:
    """A library, or with SANITIZED a program, of one kernel for each of BODIES."""
    unit = '#include "device.cuh"\n' + "".join(kernel(number, body) for number, body in enumerate(BODIES))
    return build({**read_sources(), "broken.cu": unit}, unit="broken.cu", **({"options": options} if options else {}))


def result(body: str, runner: Library | Replay) -> np.ndarray:
    memory = Memory()
    to = memory.output("to", (1,))
    inputs = memory.input("from", np.arange(128, dtype=np.float32))
    runner.launch(f"kernel{BODIES.index(body)}", (2,), (128,), [inputs, to], memory)
    return to.array


@pytest.mark.parametrize("message", BROKEN)
def test_broken_rules_are_reported(message) -> None:
    with pytest.raises(EmulationError, match=message):
        result(BROKEN[message], Library(built()))


def test_a_missing_barrier_shows_under_some_schedule() -> None:
    whole, without = BODIES[-2:]
    assert {float(result(whole, Library(built(), seed))[0]) for seed in range(8)} == {1.0 + 33.0 + 65.0 + 97.0}
    assert len({float(result(without, Library(built(), seed))[0]) for seed in range(8)}) > 1


def test_shared_memory_holds_nothing_of_the_block_before() -> None:
    assert np.isnan(result(LEAK, Library(built()))[0])


def heads(dtype: torch.dtype) -> list[tuple[Head, bool]]:
    """Small heads that between them take every kernel of a dtype; and whether to take several rows a warp."""
    sizes = [(9, 272, 1, True), (9, 272, 1, False), (5, 264, 6, False), (6, 301, 2, False)]
    return [
        (Head(torch.randn(n, h).to(dtype), torch.randn(k, h), torch.randn(k), p, SEED), several)
        for n, h, k, several in sizes
        for p in (0.0, 0.1)
    ]


def gradients(of: Head, grad_values: torch.Tensor) -> list[np.ndarray]:
    seed = torch.tensor(of.seed) if of.dropout_p else None
    shaped = grad_values[:, 0] if of.outputs == 1 else grad_values
    found = _native.value_head_backward(shaped, of.hidden, of.weight, of.dropout_p, seed, (True, True, True))
    return [to_numpy(gradient) for gradient in found]


def values(of: Head) -> np.ndarray:
    seed = of.seed if of.dropout_p else None
    return value_head(of.hidden, of.weight, of.bias, dropout_p=of.dropout_p, seed=seed).reshape(-1, of.outputs).numpy()


@pytest.fixture(scope="module")
def sanitized():
    return build(options=SANITIZED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sanitizers_find_nothing(sanitized, dtype) -> None:
    """Every kernel of a dtype, under a schedule that starves warps, in memory with nothing around it."""
    replay, pending = Replay(sanitized, seed=5), []
    for of, several in heads(dtype):
        device, grad_values = Device(replay, of, None, Memory()), torch.randn(of.rows, of.outputs)
        forward = device.forward(several_rows=several)[0]
        both = device.backward(grad_values)
        found = [forward, both.hidden, device.add_chunks(both.partials), device.add_rows(both.grad_values)]
        device.backward(grad_values, hidden=False)
        pending += zip(found, [values(of), *gradients(of, grad_values)], strict=True)
    replay.run()
    assert all(np.array_equal(found.array.reshape(-1), wanted.reshape(-1)) for found, wanted in pending)


@pytest.mark.parametrize("message", SANITIZERS_SEE)
def test_sanitizers_find_what_is_wrong(message) -> None:
    replay = Replay(built(*SANITIZED))
    result(SANITIZERS_SEE[message], replay)
    with pytest.raises(EmulationError, match=message):
        replay.run()
