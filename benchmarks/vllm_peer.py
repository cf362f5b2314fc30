"""vLLM's CPU build as another way to score values: in a process of its own, by the Python that has it."""

import atexit
import copy
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vhead import Rollout
from vhead.benchmark.document import Row

CHILD = Path(__file__).with_name("vllm_child.py")
# The model loads in half a minute on two idle cores; on a busy machine that has taken five.
SECONDS_TO_END = 30
# Of the environment, what is ours and not vLLM's: its threads are its own matter.
NOT_PASSED_ON = ("PYTHON", "OMP_", "KMP_", "VHEAD_")


class VllmServer:
    """A language model and a value head in vLLM, and rollouts to score; loading is done when this is made.

    vLLM's processes poll while they wait, so that they stand still until it is their turn.

    Args:
        python: The interpreter of an environment that has vLLM.
        body: The language model, a Qwen2.
        head: The value head.
        rollouts: Token ids.

    Attributes:
        about: The releases of vLLM and of its torch.

    Raises:
        RuntimeError: vLLM did not start; the end of what it said is in the message.
    """

    def __init__(self, python: Path, body: PreTrainedModel, head: torch.nn.Linear, rollouts: list[Rollout]) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="vhead-vllm-")
        self._folder = Path(self._kept.name)
        write_token_classifier(self._folder / "model", body, head)
        whole = [[*rollout.prompt.tolist(), *rollout.completion.tolist()] for rollout in rollouts]
        (self._folder / "rollouts.json").write_text(json.dumps(whole))
        self._log = self._folder / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(CHILD), str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=vllm_environment(torch.get_num_threads()),
                # If this process ends without a word, the system ends a stopped group whose parent is gone.
                process_group=0,
            )
        atexit.register(self.close)
        self.about = self._answer()
        self._signal(signal.SIGSTOP)

    def clocked(self) -> Row:
        """Seconds of scoring all rollouts, by the clock and of the processors, as vLLM's process sees them."""
        self._signal(signal.SIGCONT)
        print("score", file=self._pipe(self._process.stdin), flush=True)
        seconds = self._answer()
        self._signal(signal.SIGSTOP)
        return seconds

    def values(self) -> NDArray[np.float32]:
        """What it computed last, one value for each token of each rollout, float32 `[T]`."""
        values: NDArray[np.float32] = np.load(self._folder / "values.npy")
        return values

    def close(self) -> None:
        """Ends vLLM, and removes what was written for it."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            self._pipe(self._process.stdin).close()
            try:
                self._process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        self._kept.cleanup()

    def _answer(self) -> Row:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"vLLM ended without an answer; its log ends with: {self._log.read_text()[-2000:]}")
        answer: Row = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    @staticmethod
    def _pipe(stream: IO[str] | None) -> IO[str]:
        if stream is None:
            raise RuntimeError("vLLM was started without pipes")
        return stream


def vllm_environment(threads: int, cache_gib: int = 4) -> dict[str, str]:
    """What vLLM runs with: as many threads as the others have, on the first cores, and so much for keys and values."""
    passed = {name: setting for name, setting in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return passed | {
        # By itself it leaves a core of two idle.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def write_token_classifier(folder: Path, body: PreTrainedModel, head: torch.nn.Linear) -> None:
    """The same weights as a checkpoint of transformers' `Qwen2ForTokenClassification`."""
    folder.mkdir()
    weights = {f"model.{name}": weight for name, weight in body.get_submodule("model").state_dict().items()}
    weights |= {"score.weight": head.weight.detach(), "score.bias": head.bias.detach()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    config = copy.deepcopy(body.config)
    config.architectures, config.num_labels = ["Qwen2ForTokenClassification"], 1
    content = config.to_dict() | {"dtype": str(body.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content))
