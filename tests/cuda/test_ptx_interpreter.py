"""The PTX interpreter itself: exact arithmetic, and that it sees what a GPU would do wrong without a word."""

import ctypes
from ctypes.util import find_library

import numpy as np
import pytest
import torch

from tests.cuda.emulation.ptx import (
    AccessError,
    BarrierError,
    LaunchError,
    Memory,
    Module,
    PtxSyntaxError,
    RaceError,
    ShuffleError,
    UnknownInstructionError,
)
from tests.cuda.emulation.ptx.floats import fma32, to_bfloat16, to_float16

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>;"
SHARED = ".shared .align 4 .b8 shared[512];"


def module(body: str, parameters: str = ".param .u64 out, .param .u64 in") -> Module:
    return Module(f".version 8.8\n.visible .entry kernel({parameters})\n{{ {REGISTERS} {SHARED}\n{body}\nret;\n}}")


# %rd2 is the thread's place in `out`, %rd4 in `in`, both arrays of 32-bit words.
ADDRESSES = """
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd3, [in];
    mov.u32 %r1, %tid.x; mov.u32 %r7, %ctaid.x; mov.u32 %r8, %ntid.x; mad.lo.s32 %r0, %r7, %r8, %r1;
    mul.wide.u32 %rd0, %r0, 4; add.s64 %rd2, %rd1, %rd0; add.s64 %rd4, %rd3, %rd0;
"""


def run(body: str, given: np.ndarray, *, threads: int = 32, blocks: int = 1, addresses: str = ADDRESSES) -> np.ndarray:
    memory = Memory()
    out = memory.output("out", (threads * blocks,), given.dtype)
    args = [out, memory.input("in", given)]
    module(addresses + body).launch("kernel", (blocks,), (threads,), args, memory)
    return out.array


def floats(count: int) -> np.ndarray:
    """Numbers of every magnitude, with the halves and the ends of the range among them."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, count, np.uint64).astype(np.uint32)
    bits[: count // 4] &= 0xFFFF8000  # few digits, so that sums often end halfway
    numbers = np.where(np.isnan(bits.view(np.float32)), np.float32(0.5), bits.view(np.float32))
    numbers[: count // 2] = np.ldexp(np.frexp(numbers[: count // 2])[0], generator.integers(-4, 5, count // 2))
    return numbers.astype(np.float32)


def test_fma_is_rounded_once() -> None:
    library = ctypes.CDLL(find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = floats(3 * 8000).reshape(3, -1)
    # Sums that end just above and just below halfway between two float32 numbers, where two roundings go wrong.
    a[-2:], b[-2:], c[-2:] = 1 + 2**-12, 1 + 2**-12, [2**-60, -(2**-60)]
    with np.errstate(all="ignore"):
        found, twice = fma32(a, b, c), (a.astype(np.float64) * b + c).astype(np.float32)
    expected = np.array([library.fmaf(*numbers) for numbers in zip(a, b, c, strict=True)], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert not np.array_equal(twice, expected, equal_nan=True), "no number here needs care"


def test_halves_are_rounded_to_even() -> None:
    edges = np.array([65519.996, 65520, 1e-8, np.inf, -np.inf], np.float32)
    numbers = np.concatenate((floats(4000), edges))
    by_torch = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
    with np.errstate(all="ignore"):
        assert np.array_equal(to_bfloat16(numbers), by_torch)
        assert np.array_equal(to_float16(numbers), numbers.astype(np.float16).view(np.uint16))
        not_a_number = np.array([-np.nan], np.float32)
        assert to_bfloat16(not_a_number) == to_float16(not_a_number) == 0x7FFF


INTEGERS = np.random.default_rng(1).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
ARITHMETIC = [
    ("mul.hi.u32 %r3, %r2, -766435501;", lambda x: (x * 0xD2511F53) >> 32),
    ("mul.wide.u32 %rd5, %r2, -766435501; cvt.u32.u64 %r3, %rd5;", lambda x: x * 0xD2511F53),
    ("mul.wide.s32 %rd5, %r2, -3; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r3, %rd5;", lambda x: signed(x) * -3 >> 32),
    ("mov.b64 %rd5, {%r2, %r1}; mul.hi.u64 %rd5, %rd5, -5; cvt.u32.u64 %r3, %rd5;", None),
    ("shr.s32 %r3, %r2, 40;", lambda x: signed(x) >> 31),
    ("shr.u32 %r3, %r2, 32;", lambda _: 0),
    ("shl.b32 %r3, %r2, 7;", lambda x: x << 7),
    ("bfi.b32 %r3, %r2, -1, 8, 12;", lambda x: 0xFFF000FF | (x & 0xFFF) << 8),
    ("cvt.u16.u32 %rs1, %r2; cvt.u32.u16 %r3, %rs1;", lambda x: x & 0xFFFF),
    ("cvt.s64.s32 %rd5, %r2; shr.s64 %rd5, %rd5, 8; cvt.u32.u64 %r3, %rd5;", lambda x: signed(x) >> 8),
    ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda x: (x >> 16) | (x << 16)),
    ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 7, %r2, %p1;", lambda x: 7 if signed(x) < 0 else x),
    ("setp.lt.u32 %p1, %r2, 5; @!%p1 bra $L1; mov.u32 %r2, 1; $L1: not.b32 %r3, %r2;", lambda x: ~(1 if x < 5 else x)),
    ("div.u32 %r3, %r2, 7; rem.u32 %r4, %r2, 7; mad.lo.s32 %r3, %r3, 7, %r4;", lambda x: x),
    ("shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;", None),
]


def signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@pytest.mark.parametrize(("instructions", "expected"), ARITHMETIC, ids=[row[0].split(";")[0] for row in ARITHMETIC])
def test_integers(instructions, expected) -> None:
    found = run(f"ld.global.u32 %r2, [%rd4]; {instructions} st.global.u32 [%rd2], %r3;", INTEGERS)
    by_thread = {"mul.hi.u64": high_product, "shfl": lambda x: [x[i ^ 5] for i in range(32)]}
    special = [of_all for name, of_all in by_thread.items() if name in instructions]
    words = [int(x) for x in INTEGERS]
    wanted = special[0](words) if special else [expected(x) for x in words]
    assert found.tolist() == [x % 2**32 for x in wanted]


def high_product(words: list[int]) -> list[int]:
    return [((word + (thread << 32)) * (2**64 - 5)) >> 64 for thread, word in enumerate(words)]


def test_divergent_loops_meet_again() -> None:
    body = """
        mov.u32 %r3, 0; mov.u32 %r4, 0;
        $loop: add.s32 %r3, %r3, %r4; add.s32 %r4, %r4, 1; setp.le.u32 %p1, %r4, %r1; @%p1 bra $loop;
        shfl.sync.idx.b32 %r5, %r3, 31, 31, -1; sub.s32 %r5, %r5, %r3; st.global.u32 [%rd2], %r5;
    """
    assert run(body, INTEGERS).tolist() == [31 * 32 // 2 - t * (t + 1) // 2 for t in range(32)]


# Each thread writes its number to shared memory and reads its neighbour's.
NEIGHBOUR = """
    shl.b32 %r2, %r1, 2; mov.u32 %r3, shared; add.s32 %r2, %r2, %r3; st.shared.u32 [%r2], %r0; {barrier}
    xor.b32 %r4, %r2, 4; ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd2], %r5;
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_a_barrier_orders_shared_memory(barrier) -> None:
    found = run(NEIGHBOUR.format(barrier=barrier), np.zeros(192, np.uint32), threads=64, blocks=3)
    assert found.tolist() == [number ^ 1 for number in range(192)]


def test_a_missing_barrier_is_a_race() -> None:
    with pytest.raises(RaceError, match=r"^shared memory: thread 0 reads what thread 1 wrote, with no barrier$"):
        run(NEIGHBOUR.format(barrier=""), np.zeros(64, np.uint32), threads=64)


def test_a_warp_s_barrier_orders_no_other_warp() -> None:
    body = NEIGHBOUR.format(barrier="bar.warp.sync -1;").replace("xor.b32 %r4, %r2, 4", "xor.b32 %r4, %r2, 128")
    with pytest.raises(RaceError, match="thread 0 reads what thread 32 wrote"):
        run(body, np.zeros(64, np.uint32), threads=64)


def test_a_store_over_what_others_still_read_is_a_race() -> None:
    body = NEIGHBOUR.format(barrier="bar.sync 0;") + "st.shared.u32 [%r2], %r5;"
    with pytest.raises(RaceError, match="thread 0 writes where thread 1 read"):
        run(body, np.zeros(64, np.uint32), threads=64)


def test_readers_of_two_warps_are_both_remembered() -> None:
    """The second warp reads later by its own count of barriers, which says nothing of the first warp's read."""
    body = """
        mov.u32 %r2, shared; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 32; setp.gt.u32 %p3, %r1, 31;
        @%p1 st.shared.u32 [%r2], %r1; bar.sync 0; @%p1 ld.shared.u32 %r3, [%r2];
        @!%p3 bra $L1; bar.warp.sync -1; $L1: @%p2 ld.shared.u32 %r3, [%r2]; @%p2 st.shared.u32 [%r2], %r1;
    """
    with pytest.raises(RaceError, match="thread 32 writes where several threads read"):
        run(body, np.zeros(64, np.uint32), threads=64)


WRONG = {
    "outside": ("ld.global.u32 %r3, [%rd4+4];", AccessError, "a load of 4 bytes at byte 128 of in, which has 128"),
    "far outside": ("ld.global.u32 %r3, [0];", AccessError, "a load of 4 bytes at 0x0, below every allocation"),
    "misaligned": (
        "ld.global.u32 %r3, [%rd4+2];",
        AccessError,
        "a load of 4 bytes at byte 2 of in, which has 128, which is",
    ),
    "an input": ("st.global.u32 [%rd4], %r1;", AccessError, "a store to in, which is an input"),
    "shared outside": (
        "ld.shared.u32 %r3, [shared+512];",
        AccessError,
        "a load of 4 bytes at byte 512 of shared memory",
    ),
    "shared unwritten": (
        "ld.shared.u32 %r3, [shared];",
        AccessError,
        "a load from byte 0 of shared memory, which nobody",
    ),
    "parameters": ("ld.param.u32 %r3, [in+8];", AccessError, "a load of 4 bytes at byte 16 of 16 bytes of parameters"),
    "two writers": ("st.global.u32 [%rd1], %r1;", RaceError, "out: thread 0 writes where thread 31 writes"),
    "write and read": (
        "st.global.u32 [%rd2], %r1; ld.global.u32 %r3, [%rd1];",
        RaceError,
        "out: thread 1 reads what thread 0 wrote in the same launch",
    ),
    "part of a warp": (
        "setp.lt.u32 %p1, %r1, 30; @!%p1 bra $L1; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; $L1:",
        ShuffleError,
        "kernel: `shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1` without lanes [30, 31] of warp 0",
    ),
    "a barrier in a branch": (
        "setp.lt.u32 %p1, %r1, 30; @!%p1 bra $L1; bar.sync 0; $L1:",
        BarrierError,
        "kernel: 30 of 32 threads of block 0 wait at `bar.sync 0`, 2 have exited",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r1, 30; @!%p1 bra $L1; bar.sync 0; ret; $L1: bar.sync 0;",
        BarrierError,
        "kernel: 30 of 32 threads of block 0 wait at `bar.sync 0`, the others wait at another barrier",
    ),
    "may be fused": ("mul.f32 %f1, %f2, %f3;", UnknownInstructionError, "has no defined rounding: ptxas may fuse it"),
    "approximate": ("ex2.approx.f32 %f1, %f2;", UnknownInstructionError, "is not known"),
    "atomic": ("red.global.add.f32 [%rd2], %f1;", UnknownInstructionError, "is not known"),
    "flush to zero": ("fma.rn.ftz.f32 %f1, %f1, %f1, %f1;", UnknownInstructionError, "is not known"),
    "undeclared": ("mov.u32 %x1, 0;", PtxSyntaxError, "kernel: register %x1 is not declared"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case) -> None:
    body, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        run(body, np.zeros(32, np.uint32))
    assert message in str(caught.value)


def test_bytes_are_counted() -> None:
    memory = Memory()
    out, given = memory.output("out", (64,), np.uint32), memory.input("in", np.arange(64, dtype=np.uint32))
    body = ADDRESSES + "ld.global.u32 %r3, [%rd4]; ld.global.u32 %r4, [%rd3]; st.global.u32 [%rd2], %r3;"
    launch = module(body).launch("kernel", (2,), (32,), [out, given], memory)
    assert (given.bytes_read, given.distinct_bytes_read, out.bytes_written, out.distinct_bytes_written) == (
        512,
        256,
        256,
        256,
    )
    assert launch.instructions["ld.global.u32"] == 2
    assert out.array.tolist() == list(range(64))


def test_launches_that_do_not_fit() -> None:
    memory = Memory()
    out = memory.output("out", (32,), np.uint32)
    whole = module("")
    for grid, block, args in (((1,), (48,), [out, out]), ((1,), (2048,), [out, out]), ((1, 70000), (32,), [out, out])):
        with pytest.raises(LaunchError, match="expected"):
            whole.launch("kernel", grid, block, args, memory)
    with pytest.raises(LaunchError, match="expected 2 arguments, got 1"):
        whole.launch("kernel", (1,), (32,), [out], memory)
    with pytest.raises(LaunchError, match="in: expected 8 bytes, got 4"):
        whole.launch("kernel", (1,), (32,), [out, np.uint32(0)], memory)
    with pytest.raises(LaunchError, match="no kernel other: there are kernel"):
        whole.launch("other", (1,), (32,), [out, out], memory)


def test_nobody_s_memory_is_noticed() -> None:
    """An output that a kernel skips is NaN, and a register that it never wrote is no zero."""
    assert np.isnan(run("", np.zeros(32, np.float32))).all()
    assert run("st.global.u32 [%rd2], %r5;", np.zeros(32, np.uint32)).all()
