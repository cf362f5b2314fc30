"""The memory of workers that share their weights: the proportional set size of all of them together."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.attack.scale import scaled
from tests.sync.conftest import save_critic
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.scoring.sharing import share_weights

WORKERS = scaled(2, 4)
VOCABULARY = scaled(60_000, 400_000)
HIDDEN_SIZE = 512
MOST = 1.15
ROLLOUTS = [Rollout([5, 6, 7, place], [8, 9, 3]) for place in range(4)]


def proportional():
    """Bytes of this process' share of the machine's memory, and how many of them are of no file."""
    found = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return tuple(1024 * int(found[field].split()[0]) for field in ("Pss", "Pss_Anon"))


def worker(folder, together, results):
    """Loads and scores, then has weights of its own, and says what its share has risen by each time."""
    torch.set_num_threads(1)
    # What an interpreter takes for itself, it takes now.
    Scorer.from_pretrained(demo_model_path()).score(ROLLOUTS, ("values", "logprobs"))
    together.wait()
    before, _ = proportional()
    together.wait()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder).eval()
    share_weights(model, folder)
    together.wait()
    loaded = proportional()[1]
    # Activations are what is taken from here on: a scorer begins with a trial.
    Scorer(model).score(ROLLOUTS, ("values", "logprobs"))
    together.wait()
    after, own = proportional()
    activations = max(0, own - loaded)
    together.wait()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    together.wait()
    results.put((after - before - activations, proportional()[0] - before - activations))
    together.wait()


def rises(folder):
    """The sums over all workers."""
    fork = multiprocessing.get_context("fork")
    together, results = fork.Barrier(WORKERS), fork.Queue()
    workers = [fork.Process(target=worker, args=(folder, together, results)) for _ in range(WORKERS)]
    for one in workers:
        one.start()
    found = [results.get(timeout=250) for _ in workers]
    for one in workers:
        one.join()
    return [sum(each) for each in zip(*found, strict=True)]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what is shared")
def test_workers_that_share_have_hardly_more_memory_than_one_body_and_the_check_finds_copies(tmp_path):
    save_critic(tmp_path, vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, intermediate_size=64)
    body = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # Importing torch takes long, and children are forked from a process of one thread.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        shared, copied = process.submit(rises, tmp_path).result(scaled(280, 3000))
    assert shared < MOST * body, f"{shared / body:.2f}"
    assert copied > (WORKERS - 0.5) * body, f"{copied / body:.2f}"
