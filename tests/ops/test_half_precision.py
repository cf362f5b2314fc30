"""Which half precisions are left to torch: what the processor is decides."""

from pathlib import Path

import pytest
import torch

from vhead.ops import half_precision


@pytest.mark.parametrize(
    ("machine", "maker", "instructions", "allowed", "faster"),
    [
        ("x86_64", "GenuineIntel", [], "", (True, True)),
        ("AMD64", "AuthenticAMD", [], "", (True, True)),
        ("x86_64", "GenuineIntel", ["avx512_bf16"], "", (True, True)),
        ("x86_64", "AuthenticAMD", ["avx512_bf16"], "", (False, True)),
        ("x86_64", "AuthenticAMD", ["avx512_bf16"], "AVX512_CORE", (True, True)),
        ("x86_64", "AuthenticAMD", ["avx512_bf16"], "avx512_core_bf16", (False, True)),
        ("x86_64", "GenuineIntel", ["avx512_bf16", "avx512_fp16"], "ALL", (True, False)),
        ("x86_64", "GenuineIntel", ["avx512_bf16", "avx512_fp16"], "AVX512_CORE_BF16", (True, True)),
        ("x86_64", "GenuineIntel", ["avx512_bf16", "avx512_fp16"], "AVX512_CORE_AMX", (True, False)),
        ("aarch64", "", [], "", (False, False)),
    ],
)
def test_the_processor_decides_and_no_measurement(monkeypatch, machine, maker, instructions, allowed, faster):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    monkeypatch.setattr(half_precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(half_precision._native, "processor", lambda: (maker, instructions))
    assert tuple(map(half_precision.is_float32_faster.__wrapped__, (torch.bfloat16, torch.float16))) == faster


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not describe its processor there")
def test_the_processor_is_described_as_the_system_describes_it():
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    maker, instructions = half_precision._native.processor()
    assert maker in told
    assert set(instructions) == {"avx512_bf16", "avx512_fp16"} & set(told.split())
