"""The machine code of every architecture: registers, memory, loads and instructions, and that docs/cuda.md says so."""

import re

import pytest

from tests.cuda.emulation import ptx_images

pytestmark = ptx_images.needs_disassembler
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ptx_images.ROOT / "tools")
        yield ptx_images.tool("cuda_report")


@pytest.fixture(scope="module")
def sass(report):
    return report.cuda_sass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_stay_below_their_ceilings(report, architecture) -> None:
    place = report.ARCHITECTURES.index(architecture)
    found = report.resources(architecture)
    assert {report.family(kernel) for kernel in found} == set(report.CEILINGS)
    over = {
        kernel: resources.registers
        for kernel, resources in found.items()
        if resources.registers > report.CEILINGS[report.family(kernel)][place]
    }
    assert over == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(report, architecture) -> None:
    """No local memory at all: neither room for it nor an instruction that uses it."""
    assert {kernel for kernel, found in report.resources(architecture).items() if found.local} == set()
    assert {kernel for kernel, code in report.code(architecture).items() if code.count("LDL|STL")} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_no_atomic(report, architecture) -> None:
    assert {kernel for kernel, code in report.code(architecture).items() if code.count("ATOM|RED[.G ]|REDG")} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_come_in_16_bytes_past_the_cache(report, architecture, dtype) -> None:
    """On the vector path every load of the main loop has 128 bits, and those of hidden states ask for no cache line."""
    for name in report.MAIN_LOOPS:
        loop = report.main_loop(report.kernel_of(name, dtype), architecture)
        assert loop.count(r"LDG\.E\.NA\.128\.CONSTANT") >= 4
        wide = loop.count(r"LDG\.E\.(NA\.)?128")
        narrow = 4 * name.startswith("vhead_value_head_backward")  # where a row starts, from shared memory otherwise
        assert loop.count("LDG") - wide <= narrow


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_leave_in_16_bytes(report, architecture, dtype) -> None:
    loop = report.main_loop(f"vhead_value_head_backward_{dtype}_vector", architecture)
    assert loop.count(r"STG\.E(\.\w+)*\.128") == loop.count("STG") == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_instructions_of_the_forward_loop(report, dtype) -> None:
    """Dropout must not make the forward kernel slower than memory: on an H200 by far, on a B200 just."""
    kernel = f"vhead_value_head_rows_{dtype}_dropout"
    assert report.per_vector(kernel, "sm_90") <= report.MOONSHOT < report.BUDGET
    for gpu in report.GPUS:
        assert report.per_vector(kernel, gpu.architecture) <= gpu.instructions, gpu
        assert report.per_vector(f"vhead_value_head_rows_{dtype}", gpu.architecture) <= gpu.instructions / 3, gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_instructions_of_the_backward_loop(report, dtype) -> None:
    for gpu in report.GPUS:
        assert (
            report.per_vector(f"vhead_value_head_backward_{dtype}_vector_dropout", gpu.architecture)
            <= 2 * gpu.instructions
        ), gpu


def test_a_whole_row_s_instructions(report) -> None:
    """The loop's count does not depend on the hidden size; the beginning and end of a row weigh more in a short one."""
    kernel = "vhead_value_head_rows_bfloat16_dropout"
    counts = {columns: report.per_vector_of_rows(kernel, "sm_90", columns) for columns in (1024, 2048, 4096, 8192)}
    assert all(counts[columns] <= report.BUDGET for columns in (2048, 4096, 8192))
    assert counts[1024] <= 100


def test_enough_is_under_way(report) -> None:
    """Loads under way hide the latency of every GPU of the table but a B200, of whose forward need 95 % are there."""
    threads = report.block_threads()
    for gpu in report.GPUS:
        for name, moves in report.MAIN_LOOPS.items():
            held = report.resident(report.kernel_of(name, "bfloat16"), gpu, threads[name.split("_")[1]])
            needed = gpu.needed / moves * (0.94 if gpu.name == "B200" else 1)
            assert held * report.UNDER_WAY / 1024 >= needed, (gpu, name)


def test_the_gpus_budgets() -> None:
    """By hand: an H200 multiprocessor gets 0.92 * 4800 / 132 = 33.5 GB/s, 65.3 million times 32 threads' 16 bytes."""
    tool = ptx_images.tool("cuda_report")
    h200 = next(gpu for gpu in tool.GPUS if gpu.name == "H200")
    assert h200.instructions == pytest.approx(4 * 1755 / 65.34, rel=1e-3)
    assert h200.needed == pytest.approx(4800e9 * 800e-9 / 132 / 1024, rel=1e-6)


def test_the_page_is_current(report) -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.page_with_tables(page), "python tools/cuda_report.py"


def test_a_stale_page_would_be_seen(report) -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    changed = re.sub(r"(\d+) of (\d+)", r"\1 of 0\2", page, count=1)
    assert changed != page
    assert report.page_with_tables(changed) == page


LISTING = """
\t.section\t.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.NA.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_2) ;
        /*0030*/                   FFMA R5, R4, R6, R5 ;
        /*0040*/                   STL [R1], R5 ;
.L_x_2:
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_loops_and_ways_are_found(sass) -> None:
    code = sass._code(LISTING)
    assert [loop.span for loop in code.loops] == [(0x10, 0x50)], "the last branch only fills up"
    assert code.loops[0].count("LDG") == code.count("STL") == 1
    assert code.shortest_way(0, 0x50) == 3
    assert code.shortest_way(0x30, 0x60) == 3
    with pytest.raises(sass.SassError, match="no way from 0x0 to 0x70"):
        code.shortest_way(0, 0x70)


def test_a_cubin_that_is_none_is_named(sass) -> None:
    with pytest.raises(sass.SassError, match="not a 64-bit ELF file"):
        sass.resources(b"PTX")
    with pytest.raises(sass.SassError, match="nvdisasm: "):
        sass.disassemble(b"PTX")


def test_a_missing_or_other_disassembler_is_named(sass, monkeypatch) -> None:
    class Other:
        version = "12.0"

    monkeypatch.setattr(sass, "distribution", lambda _: Other())
    with pytest.raises(sass.SassError, match=r"^expected nvidia-cuda-nvdisasm==13.2.86, found 12.0: pip install"):
        sass.disassembler()

    def missing(_):
        raise sass.PackageNotFoundError

    monkeypatch.setattr(sass, "distribution", missing)
    with pytest.raises(sass.SassError, match=r"^nvdisasm is not installed: pip install nvidia-cuda-nvdisasm==13.2.86$"):
        sass.disassembler()
