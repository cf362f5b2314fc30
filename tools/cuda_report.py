"""Writes the tables of docs/cuda.md from the compiled kernels: `python tools/cuda_report.py`. A test holds them equal.

Registers, memory and instructions are read from the images. What follows from them for a GPU is computed, not measured.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cuda_images
import cuda_sass

PAGE = cuda_images.ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- compiled: written by tools/cuda_report.py -->\n", "<!-- end of compiled -->\n"

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = ("float32", "bfloat16", "float16")

# Registers that a thread of a kernel may take, over its dtypes, on each architecture. They are handed out by eights.
CEILINGS = {
    "vhead_value_head_rows": (96, 96, 96, 96),
    "vhead_value_head_rows_dropout": (96, 96, 96, 96),
    "vhead_value_head_vector": (112, 112, 120, 120),
    "vhead_value_head_vector_dropout": (128, 128, 128, 128),
    "vhead_value_head_scalar": (96, 104, 128, 136),
    "vhead_value_head_scalar_dropout": (128, 128, 160, 168),
    "vhead_value_head_backward_vector": (96, 96, 80, 80),
    "vhead_value_head_backward_vector_dropout": (128, 120, 112, 112),
    "vhead_value_head_backward_scalar": (96, 96, 96, 120),
    "vhead_value_head_backward_scalar_dropout": (120, 120, 120, 120),
    "vhead_value_head_backward_weight_vector": (96, 96, 80, 80),
    "vhead_value_head_backward_weight_vector_dropout": (96, 96, 96, 96),
    "vhead_value_head_backward_weight_scalar": (80, 80, 64, 72),
    "vhead_value_head_backward_weight_scalar_dropout": (96, 96, 112, 112),
    "vhead_value_head_add_chunks": (24, 24, 32, 40),
    "vhead_value_head_add_rows": (16, 24, 32, 40),
    "vhead_token_statistics_fold": (72, 72, 80, 80),
    "vhead_token_statistics_fold_selected": (72, 72, 80, 88),
    "vhead_token_statistics_finish": (40, 40, 40, 40),
    "vhead_token_statistics_finish_selected": (40, 40, 40, 40),
    "vhead_token_statistics_differentiate": (40, 40, 40, 40),
}

# Kernels whose main loop reads hidden states, and how many times the bytes of the hidden states they move.
MAIN_LOOPS = {
    "vhead_value_head_rows": 1,
    "vhead_value_head_rows_dropout": 1,
    "vhead_value_head_backward_vector": 2,
    "vhead_value_head_backward_vector_dropout": 2,
    "vhead_value_head_backward_weight_vector": 1,
    "vhead_value_head_backward_weight_vector_dropout": 1,
}
# Instructions for 16 bytes of half precisions that the forward kernel may take with dropout on sm_90, and what a B200's
# bandwidth would ask for.
BUDGET, MOONSHOT = 97, 76
_NO_ALLOCATE = r"LDG\.E\.NA\.128"
HIDDEN_SIZES = (1024, 2048, 3072, 4096, 5120, 8192)
ISSUED = ("vhead_value_head_rows", "vhead_value_head_rows_dropout", "vhead_value_head_backward_vector_dropout")
# Hidden states that each thread has asked for and not yet used, in bytes (value_head.cu, value_head_backward.cu).
UNDER_WAY = 64


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet: multiprocessors, GHz under load, GB/s; and what its multiprocessor holds."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    warps: int = 64
    blocks: int = 32
    shared: int = 228 << 10

    @property
    def needed(self) -> float:
        """KiB that each multiprocessor must have under way to hide 800 ns at full bandwidth."""
        return self.bandwidth * 800 / self.multiprocessors / 1024

    @property
    def instructions(self) -> float:
        """Instructions a warp has for 16 bytes a thread at 92 % of the bandwidth, four of them issued a cycle."""
        vectors = 0.92 * self.bandwidth / self.multiprocessors / 512
        return 4 * self.clock / vectors


GPUS = (
    Gpu("A100 80 GB", "sm_80", 108, 1.41, 2039, shared=164 << 10),
    Gpu("H100 SXM", "sm_90", 132, 1.755, 3350),
    Gpu("H200", "sm_90", 132, 1.755, 4800),
    Gpu("B200", "sm_100", 148, 1.85, 8000),
    Gpu("RTX 5090", "sm_120", 170, 2.41, 1792, warps=48, blocks=24, shared=100 << 10),
)


@cache
def resources(architecture: str) -> dict[str, cuda_sass.Resources]:
    """What each kernel of the stored image occupies."""
    return cuda_sass.resources(cuda_images.read_image(architecture))


@cache
def code(architecture: str) -> dict[str, cuda_sass.Code]:
    """The machine code of the stored image."""
    return cuda_sass.disassemble(cuda_images.read_image(architecture))


def family(kernel: str) -> str:
    """A kernel's name without its dtype."""
    return re.sub(f"_({'|'.join(DTYPES)})(?=_|$)", "", kernel)


def of_family(name: str, architecture: str) -> dict[str, cuda_sass.Resources]:
    """The kernels of a family."""
    return {kernel: found for kernel, found in resources(architecture).items() if family(kernel) == name}


def registers(name: str, architecture: str) -> int:
    """The most that a kernel of a family takes."""
    return max(found.registers for found in of_family(name, architecture).values())


def main_loop(kernel: str, architecture: str) -> cuda_sass.Loop:
    """The innermost loop that reads hidden states: that of one output, where there are several."""
    return next(loop for loop in code(architecture)[kernel].loops if loop.count(_NO_ALLOCATE))


def per_vector(kernel: str, architecture: str) -> float:
    """Instructions of the main loop for each 16 bytes that a thread loads, both ways of each branch counted."""
    loop = main_loop(kernel, architecture)
    return len(loop.instructions) / loop.count(_NO_ALLOCATE)


def per_vector_of_rows(kernel: str, architecture: str, columns: int) -> float:
    """The same with the beginning and end of each group of rows shared out: by the shortest way, so at least that."""
    found = code(architecture)[kernel]
    inner = main_loop(kernel, architecture)
    outer = next(loop for loop in reversed(found.loops) if loop.count(_NO_ALLOCATE))
    (first, last), (start, end) = inner.span, outer.span
    around = found.shortest_way(start, first) + found.shortest_way(last, end) + 1
    vectors = columns / 256 * (constants()["FORWARD_ROW_BYTES"] // 2)
    return per_vector(kernel, architecture) + around / vectors


def kernel_of(name: str, dtype: str) -> str:
    """The kernel of a family for a dtype: `vhead_value_head_rows_dropout` has its dtype before `_dropout`."""
    base, dropout = (name.removesuffix("_dropout"), "_dropout" if name.endswith("_dropout") else "")
    for path in ("_vector", "_scalar"):
        if base.endswith(path):
            return f"{base.removesuffix(path)}_{dtype}{path}{dropout}"
    return f"{base}_{dtype}{dropout}"


def resident(kernel: str, gpu: Gpu, threads: int) -> int:
    """Threads of a kernel that a multiprocessor holds at once."""
    found = resources(gpu.architecture)[kernel]
    warps, granule = threads // 32, -(-found.registers * 32 // 256) * 256
    by_registers = (65536 // 4 // granule) * 4 // warps
    # The system takes 1 KiB of each block's; from sm_90 on the image counts it.
    taken = found.shared if gpu.architecture != "sm_80" and found.shared else found.shared + 1024
    blocks = min(by_registers, gpu.warps // warps, gpu.blocks, gpu.shared // taken)
    return blocks * threads


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def header(*cells: str) -> str:
    """A table's first two lines."""
    return row(*cells) + "|" + "---|" * len(cells) + "\n"


def register_table() -> str:
    """Registers and ceilings, shared memory."""
    lines = [header("Kernel", *ARCHITECTURES, "Shared memory, bytes")]
    for name, ceilings in CEILINGS.items():
        cells = [f"{registers(name, a)} of {most}" for a, most in zip(ARCHITECTURES, ceilings, strict=True)]
        shared = max(found.shared for found in of_family(name, "sm_80").values())
        lines.append(row(f"`{name}`", *cells, shared))
    return "".join(lines)


def loop_table() -> str:
    """Instructions for 16 bytes of hidden states."""
    lines = [header("Kernel, bfloat16", *ARCHITECTURES)]
    for name in MAIN_LOOPS:
        kernel = kernel_of(name, "bfloat16")
        lines.append(row(f"`{kernel}`", *(f"{per_vector(kernel, a):.0f}" for a in ARCHITECTURES)))
    return "".join(lines)


def row_table() -> str:
    """Instructions for 16 bytes, the row's beginning and end shared out."""
    lines = [header("Hidden size", *(str(columns) for columns in HIDDEN_SIZES))]
    for name in ("vhead_value_head_rows", "vhead_value_head_rows_dropout"):
        kernel = kernel_of(name, "bfloat16")
        cells = [f"{per_vector_of_rows(kernel, 'sm_90', columns):.0f}" for columns in HIDDEN_SIZES]
        lines.append(row(f"`{kernel}`", *cells))
    return "".join(lines)


def issue_table() -> str:
    """Instructions for 16 bytes that each GPU has time for, and those that it gets."""
    lines = [header("GPU", *(f"`{name}`" for name in ISSUED))]
    for gpu in GPUS:
        taken = [per_vector(kernel_of(name, "bfloat16"), gpu.architecture) for name in ISSUED]
        given = [gpu.instructions * MAIN_LOOPS[name] for name in ISSUED]
        cells = [f"{t:.0f} of {g:.0f}" for t, g in zip(taken, given, strict=True)]
        lines.append(row(f"{gpu.name}, {gpu.architecture}", *cells))
    return "".join(lines)


def occupancy_table() -> str:
    """KiB of hidden states under way on each multiprocessor, and those that its bandwidth needs."""
    lines = [header("GPU", *(f"`{name}`" for name in MAIN_LOOPS))]
    for gpu in GPUS:
        cells = []
        for name, moves in MAIN_LOOPS.items():
            held = resident(kernel_of(name, "bfloat16"), gpu, block_threads(name))
            cells.append(f"{held * UNDER_WAY / 1024:.0f} of {gpu.needed / moves:.0f} ({held // 32} warps)")
        lines.append(row(f"{gpu.name}, {gpu.architecture}", *cells))
    return "".join(lines)


def constants() -> dict[str, int]:
    """The geometry that arguments.cuh states."""
    text = (cuda_images.KERNELS / "arguments.cuh").read_text(encoding="utf-8")
    return {name: int(value) for name, value in re.findall(r"constexpr u32 (\w+) = (\d+);", text)}


def block_threads(name: str) -> int:
    """Threads of a block of a family."""
    return constants()["BACKWARD_THREADS"] if "backward" in name else 32 * constants()["FORWARD_WARPS"]


def tables() -> Iterator[str]:
    """All of it, between the marks."""
    yield f"{_REGISTERS}\n\n{register_table()}"
    yield f"\n{_LOOP}\n\n{loop_table()}"
    yield f"\n{_ROWS}\n\n{row_table()}"
    yield f"\n{_ISSUED}\n\n{issue_table()}"
    yield f"\n{_UNDER_WAY}\n\n{occupancy_table()}"


_REGISTERS = (
    "Registers a thread, the most over the dtypes, of the ceiling that a test holds; no kernel has local memory:"
)
_LOOP = "Machine instructions of the main loop for 16 bytes of hidden states a thread, for one output:"
_ROWS = "The same on sm_90 with the beginning and end of a row shared out, at least:"
_ISSUED = "Instructions of the loop, of those that a GPU issues while 16 bytes a thread come at 92 % of its bandwidth:"
_UNDER_WAY = "KiB under way on a multiprocessor, of those that 800 ns of latency at full bandwidth need:"


def page_with_tables(text: str) -> str:
    """The page with what lies between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + "".join(tables()) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
