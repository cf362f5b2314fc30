"""Distils a teacher into a student that was spoilt: the student learns the teacher's likeliest tokens at each position.

The teacher is the demo model. The student is the same model with noise on its weights, which makes it a bad one. The
teacher says once which tokens are the likeliest at each position of some texts, and how likely they are. The student is
asked about the same tokens, and the divergence from the teacher's distribution over them, and over all others taken
together, is what it learns to lower.

    pip install vhead
    python examples/distillation.py
"""

import argparse

import numpy as np
import torch

import vhead
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.demo import demo_model_path
from vhead.demo.rollouts import read_demo_rollouts

# The demo model reads bytes; its first three ids are special tokens.
FIRST_BYTE = 3
HELD_OUT = 3
LEAST_REST = 1e-6


def texts() -> list[Rollout]:
    """Makes token ids of the natural ones among the bundled texts."""
    found = []
    for record in read_demo_rollouts():
        if record.kind == "natural":
            prompt, completion = (np.frombuffer(text.encode(), np.uint8) for text in (record.prompt, record.completion))
            found.append(Rollout(prompt.astype(np.int64) + FIRST_BYTE, completion.astype(np.int64) + FIRST_BYTE))
    return found


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The KL divergence of each position, in nats, over its candidates and the rest as one more outcome.

    Args:
        teacher: Log-probabilities of the candidates, `[T, M]`.
        student: Likewise.
    """
    rests = [
        (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log() for logprobs in (teacher, student)
    ]
    old, new = (torch.cat([logprobs, rest], dim=-1) for logprobs, rest in zip((teacher, student), rests, strict=True))
    return (old.exp() * (old - new)).sum(-1)


def main() -> None:
    """Distils, and shows the divergence on texts that the student is trained on and on others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=8, help="tokens whose probabilities the teacher gives")
    options = parser.parse_args()

    torch.manual_seed(0)
    teacher = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float().eval()
    student = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()).float().eval()
    with torch.no_grad():
        for parameter in student.pretrained_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.std().item())

    # The likeliest tokens, and their log-probabilities by the teacher; `candidates` asks any model about given ones.
    given = texts()
    told = Scorer(teacher).score(given, ("logprobs",), top_logprobs=options.candidates)
    asked = [
        Rollout(rollout.prompt, rollout.completion, candidates=score.top_tokens)
        for rollout, score in zip(given, told, strict=True)
    ]
    logprobs = [score.top_logprobs for score in told]

    def mean_divergence(rollouts: list[Rollout], wanted: list[np.ndarray]) -> float:
        found = Scorer(student).score(rollouts, ("logprobs",)).candidate_logprobs
        return divergence(torch.from_numpy(np.concatenate(wanted)), torch.from_numpy(found)).mean().item()

    held_out, known = slice(None, HELD_OUT), slice(HELD_OUT, None)
    for name, part in {"seen": known, "other": held_out}.items():
        print(f"divergence on {name:>5} texts before: {mean_divergence(asked[part], logprobs[part]):.3f} nats")

    training_pass = vhead.TrainingPass(student, returns=("logprobs",))
    optimizer = torch.optim.AdamW(student.pretrained_model.parameters(), lr=1e-3, weight_decay=0.0)
    batches = training_pass.batches(asked[known])
    for _ in range(options.steps):
        optimizer.zero_grad()
        for batch in batches:
            found = training_pass(batch).candidate_logprobs
            (divergence(batch.flat(logprobs[known]), found).sum() / batch.totals.tokens).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    for name, part in {"seen": known, "other": held_out}.items():
        print(f"divergence on {name:>5} texts after:  {mean_divergence(asked[part], logprobs[part]):.3f} nats")


if __name__ == "__main__":
    main()
