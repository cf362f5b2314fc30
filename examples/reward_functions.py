"""Rewards from `vhead serve` in trl's `GRPOTrainer`, verl and OpenRLHF: one reward function for each of them.

Start a server, and name its address in REWARD_URL, and its key, if it wants one, in VHEAD_API_KEY:

    pip install 'vhead[cli,serve,client]'
    vhead serve ./reward-model --port 8000 &
    export REWARD_URL=http://127.0.0.1:8000

In trl, pass `served_reward` to `GRPOTrainer(reward_funcs=...)`; this file does that when it is run. In verl, say

    reward_model.reward_manager=batch
    custom_reward_function.path=reward_functions.py
    custom_reward_function.name=compute_score

and in OpenRLHF `--remote_rm_url reward_functions.py`. OpenRLHF also takes the server's own address,
`--remote_rm_url http://127.0.0.1:8000/get_reward`, without any code and without repetitions when the server is busy.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from vhead import Client, Rollout

Text = str | list[dict[str, Any]]


@cache
def client() -> Client:
    """The connection to the server, made when it is first needed: frameworks start processes after their imports."""
    return Client(os.environ["REWARD_URL"], api_key=os.environ.get("VHEAD_API_KEY"))


def rewards(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
    """The reward of each completion; None where the policy wrote nothing, as a reward belongs to a token."""
    written = [at for at, completion in enumerate(completions) if completion]
    scores = client().score([Rollout(prompts[at], completions[at]) for at in written], returns=("reward",))
    found: list[float | None] = [None] * len(completions)
    for at, reward in zip(written, scores.reward.tolist(), strict=True):
        found[at] = reward
    return found


def served_reward(prompts: list[Text], completions: list[Text], **_: Any) -> list[float | None]:
    """For trl: it leaves a None out of the group. Prompts and completions are texts, or messages."""
    return rewards(prompts, completions)


def compute_score(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    *,
    prompt_key: str = "question",
    of_nothing: float = 0.0,
    **_: Any,
) -> list[float]:
    """For verl's batch reward manager, which hands over no prompts: your data set has them in `extra_info`."""
    prompts = [extra_info[prompt_key] for extra_info in extra_infos]
    return [of_nothing if reward is None else reward for reward in rewards(prompts, solution_strs)]


def reward_func(queries: list[str], prompts: list[str], labels: list[Any], **_: Any) -> dict[str, Any]:
    """For OpenRLHF: a query is a prompt with its completion, both in the chat template's form."""
    import torch  # neither trl's form nor verl's needs it

    completions = [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]
    found = [0.0 if reward is None else reward for reward in rewards(prompts, completions)]
    reward = torch.tensor(found)
    return {"rewards": reward, "scores": reward, "extra_logs": {"served_reward": reward}}


def main() -> None:
    """Trains the demo model for a few steps of GRPO on the server's rewards."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from vhead.demo import demo_model_path
    from vhead.demo.rollouts import read_demo_rollouts

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="grpo-policy")
    arguments = parser.parse_args()

    prompts = sorted({rollout.prompt[-60:] for rollout in read_demo_rollouts()})
    config = GRPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-3,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(demo_model_path()).float(),
        reward_funcs=served_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left"),
    )
    trainer.train()
    for line in trainer.state.log_history:
        if "reward" in line:
            print(f"step {line['step']}: mean reward {line['reward']:+.3f}")


if __name__ == "__main__":
    main()
