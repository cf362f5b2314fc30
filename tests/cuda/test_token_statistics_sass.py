"""The machine code of the token statistics' kernels: instructions for each logit, and 128-bit loads and stores."""

import pytest

from tests.cuda.emulation import ptx_images

pytestmark = ptx_images.needs_disassembler
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# Logits that a thread takes in a turn of the loop: of the sums, and of the line where a rule is applied or none.
IN_SUMS, AS_THEY_ARE, SCALED = 8, 32, 16


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ptx_images.ROOT / "tools")
        yield ptx_images.tool("cuda_report")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_for_a_logit(report, architecture) -> None:
    """Of those, 17 are the exponential and the three sums, each of which depends on the one before it."""
    loops = report.code(architecture)["vhead_token_statistics_fold"].loops
    sums = next(loop for loop in loops if loop.count("LDS") == IN_SUMS)
    assert len(sums.instructions) / IN_SUMS <= 22.5
    assert sums.count("BRA") == 1, "nothing is computed for some threads alone, one logit after the other"
    quads = {loop.count(r"LDG\.E\.NA\.128"): loop for loop in reversed(loops) if loop.count(r"LDG\.E\.NA\.128")}
    assert len(quads[AS_THEY_ARE // 4].instructions) / AS_THEY_ARE <= 3.3
    assert len(quads[SCALED // 4].instructions) / SCALED <= 6.6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_and_stores_of_16_bytes(report, architecture) -> None:
    code = report.code(architecture)
    for dtype, stores in (("float32", 2), ("bfloat16", 1), ("float16", 1)):
        kernel = code[f"vhead_token_statistics_differentiate_{dtype}"]
        assert kernel.count(r"LDG\.E\.128") == 4, "products and biases"
        assert kernel.count(r"STG\.E(\.\w+)*\.128") == stores
