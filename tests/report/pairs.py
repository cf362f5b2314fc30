"""Log-probabilities of the same rollouts from two runs of a small language model that differ in one known way."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from tests.library_versions import DTYPE
from tests.scoring.scoring_models import ARCHITECTURES, CONTEXT, VOCABULARY

ROWS, BATCH = 96, 8
LONGEST = CONTEXT - 4
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
        config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
        self.model = AutoModelForCausalLM.from_config(config, **{DTYPE: torch.float32}).eval()
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.copy_(0.25 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        self.scale = 1.0
        self.scale = SPREAD / float(self.logits(self._random(8, 32)).std())
        self.tokens = self._sampled()
        self.prompts = torch.randint(1, 20, (ROWS,), generator=self.generator)
        self.ends = torch.randint(24, LONGEST + 1, (ROWS,), generator=self.generator)
        self.weights = copy.deepcopy(self.model.state_dict())
        self.ours, self.entropy = self._scored(self.logits(self.tokens), 1.0)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=self.generator)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, **arguments).logits.float() * self.scale

    def _sampled(self) -> torch.Tensor:
        tokens = self._random(ROWS, 2)
        while tokens.shape[1] < LONGEST:
            probabilities = torch.softmax(self.logits(tokens)[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=self.generator)], 1)
        return tokens

    def _scored(self, logits: torch.Tensor, temperature: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        distribution = torch.log_softmax(logits[:, :-1].double() / temperature, -1)
        chosen = distribution.gather(-1, self.tokens[:, 1:, None])[..., 0].numpy()
        entropy = -(distribution.exp() * distribution).sum(-1).numpy()
        bounds = list(zip(self.prompts.tolist(), self.ends.tolist(), strict=True))
        return tuple(
            [row[p - 1 : e - 1] for row, (p, e) in zip(each, bounds, strict=True)] for each in (chosen, entropy)
        )

    def _padded(self, *, hidden: bool) -> torch.Tensor:
        """The logits from left-padded batches without position ids; padding `hidden` by a mask, or seen as tokens."""
        logits = torch.zeros(ROWS, LONGEST, VOCABULARY)
        for start in range(0, ROWS, BATCH):
            rows = range(start, start + BATCH)
            longest = int(self.ends[start : start + BATCH].max())
            ids = torch.zeros((BATCH, longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for at, row in enumerate(rows):
                end = int(self.ends[row])
                ids[at, longest - end :], mask[at, longest - end :] = self.tokens[row, :end], 1
            positions = torch.arange(longest)[None].expand(BATCH, -1)
            masked = {"attention_mask": mask} if hidden else {}
            scored = self.logits(ids, position_ids=positions, **masked)
            for at, row in enumerate(rows):
                logits[row, : int(self.ends[row])] = scored[at, longest - int(self.ends[row]) :]
        return logits

    def pair(self, theirs: list[np.ndarray]) -> Pair:
        """Ours, and these numbers for the same tokens."""
        offsets = np.cumsum([0, *map(len, self.ours)])
        flat = (np.concatenate(each) for each in (self.ours, theirs, self.entropy))
        return Pair(*flat, offsets.astype(np.int64), self.prompts.numpy())

    def at_temperature(self, temperature: float) -> Pair:
        return self.pair(self._scored(self.logits(self.tokens), temperature)[0])

    def shifted(self, step: int) -> Pair:
        """Theirs of a token are ours of the next one, or of the one before; 0 where there is none."""
        return self.pair([_moved(row, step) for row in self.ours])

    def padded(self, *, hidden: bool = True) -> Pair:
        return self.pair(self._scored(self._padded(hidden=hidden), 1.0)[0])

    def in_dtype(self, dtype: torch.dtype) -> Pair:
        self.model.to(dtype)
        theirs = self._scored(self.logits(self.tokens), 1.0)[0]
        return self._restored(theirs)

    def perturbed(self, size: float) -> Pair:
        """Theirs from weights that all moved a little."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.add_(size * float(parameter.std()) * noise)
        return self._restored(self._scored(self.logits(self.tokens), 1.0)[0])

    def updated(self, rate: float) -> Pair:
        """Theirs from weights after one step of the policy gradient on random advantages, as Adam's first step is."""
        self.model.requires_grad_(True)
        logits = self.model(self.tokens).logits[:, :-1] * self.scale
        chosen = torch.log_softmax(logits, -1).gather(-1, self.tokens[:, 1:, None])[..., 0]
        advantages = torch.randn(ROWS, generator=self.generator)
        (advantages[:, None] * chosen).mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.add_(rate * parameter.grad.sign())
                    parameter.grad = None
        return self._restored(self._scored(self.logits(self.tokens), 1.0)[0])

    def noisy(self, size: float, *, capped: bool) -> Pair:
        """Theirs are ours with noise that knows nothing of a model."""
        rng = np.random.default_rng(self.generator.initial_seed())
        theirs = [row + size * rng.normal(size=len(row)) for row in self.ours]
        return self.pair([np.minimum(row, 0) if capped else row for row in theirs])

    def shuffled(self) -> Pair:
        """Theirs are ours of any other tokens."""
        rng = np.random.default_rng(self.generator.initial_seed())
        mixed = rng.permutation(np.concatenate(self.ours))
        return self.pair(np.split(mixed, np.cumsum([len(row) for row in self.ours])[:-1]))

    def _restored(self, theirs: list[np.ndarray]) -> Pair:
        self.model.to(torch.float32)
        self.model.load_state_dict(self.weights)
        return self.pair(theirs)


def _moved(row: np.ndarray, step: int) -> np.ndarray:
    moved = np.zeros_like(row)
    if step > 0:
        moved[:-step] = row[step:]
    else:
        moved[-step:] = row[:step]
    return moved
