"""Held-out figures of the demo model, measured on the files that ship."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_corpus import Corpus, flatten, is_prose, paragraphs, word_end, word_start
from demo_corruption import CORRUPTIONS, TRAINED, UNSEEN, Passage, corrupted_passage, natural_passage
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vhead.demo.judgement import auc

SEED = 1
WINDOW = 256
PROMPT_CHARACTERS = 60
COMPLETION_CHARACTERS = 140


@dataclass(frozen=True)
class LoadedModel:
    """The shipped folder, loaded as any user would: the checkpoint's own dtype, the head in float32."""

    tokenizer: object
    body: nn.Module
    weight: Tensor
    bias: Tensor

    @classmethod
    def from_folder(cls, folder: Path) -> "LoadedModel":
        """Loads body, tokenizer and head."""
        tensors = load_file(folder / "model.safetensors")
        body = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(tokenizer, body, tensors["v_head.summary.weight"], tensors["v_head.summary.bias"])

    def ids(self, text: bytes) -> Tensor:
        """Tokenises: one token per byte, nothing added."""
        return self.tokenizer(text.decode(), add_special_tokens=False, return_tensors="pt").input_ids

    @torch.inference_mode()
    def values(self, text: bytes) -> NDArray[np.float32]:
        """Returns the value at every byte."""
        hidden = self.body.model(input_ids=self.ids(text)).last_hidden_state[0].float()
        return (hidden @ self.weight[0] + self.bias).numpy()

    @torch.inference_mode()
    def bits(self, text: bytes) -> NDArray[np.float64]:
        """Returns the information of every byte but the first, in bits."""
        ids = self.ids(text)
        logprobs = self.body(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return (-logprobs.gather(1, ids[0, 1:, None]).squeeze(1) / math.log(2)).numpy()


def held_out_prose(corpus: Corpus, at_least: int) -> list[str]:
    """Lists the running paragraphs of the held-out topics, each on one line."""
    flat = (flatten(p) for body in corpus.held_out.values() for p in paragraphs(body) if is_prose(p))
    return [text for text in flat if len(text) >= at_least]


def bits_per_byte(model: LoadedModel, texts: Iterable[str]) -> tuple[float, int]:
    """Measures over consecutive windows of 256 bytes, the first byte of each given free, and counts them."""
    bits = [
        model.bits(data[i : i + WINDOW].decode(errors="ignore").encode())
        for data in (text.encode() for text in texts)
        for i in range(0, len(data) - 1, WINDOW)
        if len(data) - i > 1
    ]
    joined = np.concatenate(bits)
    return float(joined.mean()), len(joined)


def token_passages(texts: list[str], kinds: Iterable[str], rng: np.random.Generator) -> list[Passage]:
    """Corrupts one span of each text per kind, so that most passages turn and turn back."""
    passages = []
    for kind in kinds:
        for text in texts:
            cut = text[: WINDOW - 32]
            start = word_start(cut, int(rng.integers(20, len(cut) // 2)))
            stop = word_end(cut, start + int(rng.integers(40, 120)))
            passages.append(corrupted_passage(cut, start, stop, kind, rng))
    return passages


def token_figures(model: LoadedModel, passages: list[Passage]) -> dict[str, float]:
    """Judges values against the labels of all bytes of all passages together."""
    values = np.concatenate([model.values(passage.data) for passage in passages])
    natural = np.concatenate([np.array(passage.natural) for passage in passages])
    agrees = (values > 0) == natural
    return {
        "auc": auc(values[natural], values[~natural]),
        "accuracy": float(agrees.mean()),
        "accuracy_natural": float(agrees[natural].mean()),
        "accuracy_corrupted": float(agrees[~natural].mean()),
        "tokens": len(values),
        "tokens_corrupted": int((~natural).sum()),
    }


def _excerpt(text: str, rng: np.random.Generator) -> str:
    """Draws as many characters as a prompt and a completion have, from the start of a word."""
    length = PROMPT_CHARACTERS + COMPLETION_CHARACTERS
    starts = [0] + [i + 1 for i, c in enumerate(text) if c == " " and i + 1 + length <= len(text)]
    start = starts[int(rng.integers(len(starts)))]
    return text[start : start + length]


def rollout_pairs(texts: list[str], kind: str, rng: np.random.Generator) -> list[tuple[Passage, Passage]]:
    """Pairs natural excerpts with twins whose completions are corrupted from a random point to the end."""
    pairs = []
    for text in texts:
        excerpt = _excerpt(text, rng)
        share = float(rng.uniform(0.1, 0.6))
        start = word_start(excerpt, PROMPT_CHARACTERS + int(share * COMPLETION_CHARACTERS))
        pairs.append((natural_passage(excerpt), corrupted_passage(excerpt, start, len(excerpt), kind, rng)))
    return pairs


def rollout_figures(model: LoadedModel, pairs: list[tuple[Passage, Passage]]) -> dict[str, float]:
    """Judges rewards, the values at the last byte, of natural excerpts against their corrupted twins."""
    rewards = np.array([[model.values(passage.data)[-1] for passage in pair] for pair in pairs])
    return {
        "auc": auc(rewards[:, 0], rewards[:, 1]),
        "pairs_ordered": float((rewards[:, 0] > rewards[:, 1]).mean()),
        "mean_reward_natural": float(rewards[:, 0].mean()),
        "mean_reward_corrupted": float(rewards[:, 1].mean()),
        "pairs": len(pairs),
    }


def evaluate(folder: Path, corpus: Corpus) -> dict[str, object]:
    """Measures the shipped folder on the held-out topics."""
    model, rng = LoadedModel.from_folder(folder), np.random.default_rng(SEED)
    texts = held_out_prose(corpus, PROMPT_CHARACTERS + COMPLETION_CHARACTERS)
    passages = {kind: token_passages(texts, [kind], rng) for kind in CORRUPTIONS}
    pairs = {kind: rollout_pairs(texts, kind, rng) for kind in CORRUPTIONS}
    held_out_bits, held_out_bytes = bits_per_byte(model, corpus.held_out.values())
    training_bits, _ = bits_per_byte(model, ["\n\n".join(corpus.training)[:65536]])
    return {
        "bits_per_byte": {"held_out": held_out_bits, "held_out_bytes": held_out_bytes, "training": training_bits},
        "token": {
            "trained_kinds": token_figures(model, [p for kind in TRAINED for p in passages[kind]]),
            "unseen_kinds": token_figures(model, [p for kind in UNSEEN for p in passages[kind]]),
            "by_kind": {kind: token_figures(model, passages[kind]) for kind in CORRUPTIONS},
        },
        "rollout": {
            "trained_kinds": rollout_figures(model, [p for kind in TRAINED for p in pairs[kind]]),
            "unseen_kinds": rollout_figures(model, [p for kind in UNSEEN for p in pairs[kind]]),
            "by_kind": {kind: rollout_figures(model, pairs[kind]) for kind in CORRUPTIONS},
        },
    }
