"""Scores rollouts by vLLM when it is told to: what `vllm_peer.py` starts, with the Python of vLLM's own environment.

    python vllm_child.py FOLDER

FOLDER has a checkpoint for token classification in `model`, and `rollouts.json`: token ids, a list for each rollout. To
each line that it reads, it answers with a line of JSON: the seconds that it took to score all of them. What it computed
is then in `values.npy`, one value for each token.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch


def processor_seconds() -> float:
    """Of all processes of this group: vLLM computes in children."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the command's name, which is in brackets, come fields 3 and later; 5 is the group.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # It has ended.
            continue
        if int(fields[2]) == os.getpgrp():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(folder: Path) -> None:
    """Loads the model, and answers until its input ends."""
    # What vLLM and its children print is a log, and goes to where errors do.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm

    rollouts = json.loads((folder / "rollouts.json").read_text())
    model = vllm.LLM(
        str(folder / "model"),
        runner="pooling",
        dtype=json.loads((folder / "model" / "config.json").read_text())["dtype"],
        enforce_eager=True,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        max_model_len=max(map(len, rollouts)) + 1,
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in rollouts]
    # The numbers of the head themselves, and no probabilities.
    plain = vllm.PoolingParams(use_activation=False)

    def answer(content: dict[str, object]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"vllm": vllm.__version__, "vllm_torch": torch.__version__})
    for _line in sys.stdin:
        wall, processor = time.perf_counter(), processor_seconds()
        outputs = model.encode(prompts, plain, pooling_task="token_classify", use_tqdm=False)
        seconds = {"wall_s": time.perf_counter() - wall, "processor_s": processor_seconds() - processor}
        values = np.concatenate([output.outputs.data.float().reshape(-1).numpy() for output in outputs])
        np.save(folder / "values.npy", values)
        answer(seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
