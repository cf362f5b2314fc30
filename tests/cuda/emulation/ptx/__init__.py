"""Executes PTX on the CPU: an interpreter in numpy, one lane a CUDA thread, all lanes of many blocks at once.

    memory = Memory()
    hidden = memory.input("hidden", array)
    values = memory.output("values", (rows,), np.float32)
    arguments = [..., values]
    Module(ptx_text).launch("vhead_value_head_float32_vector", grid=(4,), block=(256,), args=arguments, memory=memory)
    values.array, hidden.bytes_read

Only what the kernels' PTX uses is known; an instruction beyond that raises instead of guessing. Every access is checked
for bounds, alignment and races (two threads at one place, one of them writing, without a barrier between them), every
barrier and shuffle for threads that are missing.
"""

from tests.cuda.emulation.ptx.errors import (
    AccessError,
    BarrierError,
    EndlessError,
    LaunchError,
    PtxError,
    PtxSyntaxError,
    RaceError,
    ShuffleError,
    UnknownInstructionError,
)
from tests.cuda.emulation.ptx.memory import Allocation, Memory
from tests.cuda.emulation.ptx.module import Launch, Module

__all__ = [
    "AccessError",
    "Allocation",
    "BarrierError",
    "EndlessError",
    "Launch",
    "LaunchError",
    "Memory",
    "Module",
    "PtxError",
    "PtxSyntaxError",
    "RaceError",
    "ShuffleError",
    "UnknownInstructionError",
]
