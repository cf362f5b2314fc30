"""Log-probabilities of the same rollouts from two runs of a small language model that differ in one known way."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from tests.library_versions import DTYPE
from tests.scoring.scoring_models import ARCHITECTURES, CONTEXT, VOCABULARY

ROWS = 8
BATCHES = 12
# Typical spread of a trained model's logits, which leaves many tokens nearly certain.
SPREAD = 5.0


@dataclass(frozen=True)
class Pair:
    """Flat log-probabilities of ours and theirs, with the offsets of the rollouts and the lengths of their prompts."""

    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    entropy: NDArray[np.float64]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]


class Policy:
    """A small model with logits as sharp as a trained one's, and rollouts that it sampled itself."""

    def __init__(self, seed: int, architecture: str = "gpt2") -> None:
        self.seed = seed
        config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
        self.model = AutoModelForCausalLM.from_config(config, **{DTYPE: torch.float32}).eval()
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.copy_(0.25 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        self.scale = 1.0
        probe = torch.randint(3, VOCABULARY, (8, 32), generator=self.generator)
        self.scale = SPREAD / float(self.logits(probe).std())
        self.batches = [self._sampled() for _ in range(BATCHES)]

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, **arguments).logits.float() * self.scale

    def _sampled(self) -> list[tuple[torch.Tensor, int]]:
        """Rows of tokens of different lengths, each with the length of its prompt."""
        rows = []
        prompts = torch.randint(2, 24, (ROWS,), generator=self.generator).tolist()
        for prompt in prompts:
            tokens = torch.randint(3, VOCABULARY, (1, prompt), generator=self.generator)
            length = int(torch.randint(4, CONTEXT - 24, (1,), generator=self.generator))
            for _ in range(length):
                probabilities = torch.softmax(self.logits(tokens)[0, -1], -1)
                drawn = torch.multinomial(probabilities, 1, generator=self.generator)
                tokens = torch.cat([tokens, drawn[None]], 1)
            rows.append((tokens[0], prompt))
        return rows

    def logprobs(self, temperature: float = 1.0, *, padded: bool = False) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of every rollout, alone or in left-padded batches without position ids; and the entropies."""
        logprobs, entropies = [], []
        for batch in self.batches:
            for (tokens, prompt), logits in zip(batch, self._rows(batch, padded=padded), strict=True):
                distribution = torch.log_softmax(logits[prompt - 1 : -1].double() / temperature, -1)
                logprobs.append(distribution.gather(-1, tokens[prompt:, None])[:, 0].numpy())
                entropies.append(-(distribution.exp() * distribution).sum(-1).numpy())
        return logprobs, entropies

    def _rows(self, batch: list[tuple[torch.Tensor, int]], *, padded: bool) -> list[torch.Tensor]:
        if not padded:
            return [self.logits(tokens[None])[0] for tokens, _ in batch]
        longest = max(len(tokens) for tokens, _ in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(batch):
            ids[row, longest - len(tokens) :] = tokens
            mask[row, longest - len(tokens) :] = 1
        positions = torch.arange(longest)[None].expand(len(batch), -1)
        logits = self.logits(ids, attention_mask=mask, position_ids=positions)
        return [logits[row, longest - len(tokens) :] for row, (tokens, _) in enumerate(batch)]

    def perturb(self, size: float) -> None:
        """Moves every weight a little, as an update of the policy does."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.add_(size * float(parameter.std()) * noise if parameter.numel() > 1 else 0.0)

    def learn(self, rate: float) -> None:
        """One step of the policy gradient, on random advantages."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        loss = torch.zeros(())
        for batch in self.batches:
            for tokens, prompt in batch:
                logits = self.model(tokens[None]).logits[0, prompt - 1 : -1] * self.scale
                chosen = torch.log_softmax(logits, -1).gather(-1, tokens[prompt:, None])
                loss = loss + float(torch.randn((), generator=self.generator)) * chosen.mean()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad.sign())  # as Adam's first step


def flat(policy: Policy, ours: list[np.ndarray], theirs: list[np.ndarray], entropy: list[np.ndarray]) -> Pair:
    lengths = [len(each) for each in ours]
    return Pair(
        np.concatenate(ours),
        np.concatenate(theirs),
        np.concatenate(entropy),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([prompt for batch in policy.batches for _, prompt in batch], np.int64),
    )
