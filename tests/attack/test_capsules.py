"""DLPack tensors whose fields are anything: each is read, or refused by an error of Python, and the process lives."""

import subprocess
import sys
from pathlib import Path

from tests.attack.scale import scaled

TRIES = scaled(3000, 300_000)

# Whether memory that could be an array is one cannot be checked, so that what is in reach stays inside a real array.
ATTACK = """
import ctypes, random, sys
import numpy as np
from vhead.candle import CandleValueHead
from tests.candle.test_arrays import DLTensor

seed, tries = map(int, sys.argv[1:])
choose = random.Random(seed).choice
memory = np.zeros((8, 8, 8), np.float32)
middle = memory.ctypes.data + memory.nbytes // 2
SIZES = [0, 1, 1, 2, 2, 2**61, 2**62, 2**63 - 1, -1, -(2**63)]
STRIDES = [0, 0, 1, 1, -1, 2, -2, 2**61, 2**62, 2**63 - 1, -(2**63), -(2**61)]

def pointer(numbers):
    return choose([numbers] * 9 + [None, ctypes.cast(3, ctypes.POINTER(ctypes.c_int64))])

class Tensor:
    def __init__(self):
        self.sizes, self.strides = ((ctypes.c_int64 * 3)(*(choose(n) for _ in range(3))) for n in (SIZES, STRIDES))
        tensor = self.tensor = (DLTensor * 4)()[0]
        tensor.data = choose([middle] * 6 + [middle + 1, None])
        tensor.device_kind = choose([1] * 9 + [2])
        tensor.dimensions = choose([1, 2, 3, 0, -1, 65, 2**31 - 1])
        tensor.code, tensor.bits, tensor.lanes = choose([(2, 32, 1), (2, 16, 1), (4, 16, 1), (2, 32, 2), (9, 255, 0)])
        tensor.sizes = pointer(ctypes.cast(self.sizes, ctypes.POINTER(ctypes.c_int64)))
        tensor.strides = pointer(ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64)))
        tensor.byte_offset = choose([0] * 5 + [4, 7, 2**62, 2**63, 2**64 - 1])

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

heads = [CandleValueHead(np.ones((1, columns), np.float32), num_threads=1) for columns in (1, 2)]
outcomes = {}
for _ in range(tries):
    tensor = Tensor()
    for call in (*heads, CandleValueHead):
        try:
            call(tensor)
            outcome = "read"
        except (ValueError, TypeError, MemoryError) as error:
            outcome = type(error).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(sorted(outcomes))
"""


def test_whatever_its_fields_say_the_process_lives():
    command = [sys.executable, "-c", ATTACK, "7", str(TRIES)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['AllocationError', 'TypeError', 'ValueError', 'read']\n"
