"""Trains a reward model on pairs in a short loop of its own, saves it in LLaMA-Factory's layout, and scores with it.

The loss is LLaMA-Factory's, but LLaMA-Factory is not needed; `llama_factory_training.py` lets it do the training. The
chosen text is natural, and the rejected one is its corrupted twin. A fresh head on the demo model is trained, and saved
as `value_head.safetensors` beside the language model, where LLaMA-Factory and the scorer look for it.

    pip install vhead
    python examples/pairwise_reward_model.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, formats
from vhead.demo import demo_model_path
from vhead.demo.rollouts import NATURAL, TO_THE_END, DemoRollout, read_demo_rollouts

TEST_PAIRS = 3


def pairs() -> list[tuple[DemoRollout, DemoRollout]]:
    """Pairs each natural passage with its twin that is corrupted to the end."""
    rollouts = read_demo_rollouts()
    chosen = {rollout.topic: rollout for rollout in rollouts if rollout.kind == NATURAL}
    return [(chosen[rollout.topic], rollout) for rollout in rollouts if rollout.extent == TO_THE_END]


def batch(tokenizer: PreTrainedTokenizerBase, data: list[tuple[DemoRollout, DemoRollout]]) -> dict[str, Tensor]:
    """Puts all chosen rows first and all rejected ones after them, padded on the right."""
    texts = [rollout.prompt + rollout.completion for side in zip(*data, strict=True) for rollout in side]
    return dict(tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt"))


def pairwise_loss(model: AutoModelForCausalLMWithValueHead, inputs: dict[str, Tensor]) -> Tensor:
    """Computes the loss of LLaMA-Factory 0.9.5, whose rewards are the values at the last tokens."""
    # LLaMA-Factory unpacks three outputs; the values are the last one.
    _, _, values = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
    last = inputs["attention_mask"].sum(dim=-1, keepdim=True) - 1
    chosen, rejected = values.gather(dim=-1, index=last).squeeze(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def main() -> None:
    """Trains the head, saves it beside its language model, and scores held-out pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("reward-model"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="right")
    body = AutoModelForCausalLM.from_pretrained(demo_model_path()).float().requires_grad_(requires_grad=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(body)
    train, test = pairs()[TEST_PAIRS:], pairs()[:TEST_PAIRS]
    optimizer = torch.optim.AdamW(model.v_head.parameters(), lr=1e-2)
    inputs = batch(tokenizer, train)
    model.train()
    losses = []
    for _ in range(arguments.steps):
        loss = pairwise_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"pairwise loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    # TRL's layout has both in one file. LLaMA-Factory's has the head in a file of its own.
    with tempfile.TemporaryDirectory() as merged:
        model.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        formats.convert(merged, arguments.output, format="llama-factory")
    print("saved:", *sorted(path.name for path in arguments.output.iterdir()))
    scorer = Scorer.from_pretrained(arguments.output)
    for chosen, rejected in test:
        scores = scorer.score([Rollout(rollout.prompt, rollout.completion) for rollout in (chosen, rejected)])
        print(f"{chosen.topic:16} chosen {scores[0].reward:6.2f}   rejected {scores[1].reward:6.2f}")


if __name__ == "__main__":
    main()
