"""Trains the language model with a value head that vhead ships, from text that every CPython carries.

    python tools/train_demo_model.py [--steps N] [--output FOLDER]

The body is a byte-level Llama; the head is `v_head.summary`, one linear layer on the last hidden state, that tells
natural from corrupted text token by token. Both are trained together: next-byte loss on natural bytes, logistic loss
of the value on every byte. One thread, fixed steps and seeds: the same machine and versions give the same bytes.
"""

import argparse
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from demo_corpus import CORPUS_LICENCE, CORPUS_NAME, Corpus, flatten, is_prose, load_corpus, word_end
from demo_corruption import TRAINED, UNSEEN, Passage, corrupted_passage, natural_passage
from demo_evaluation import evaluate
from demo_model_card import model_card
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

log = logging.getLogger("train_demo_model")

BYTE_OFFSET = 3  # ByT5Tokenizer: 0 pad, 1 end, 2 unknown, then the 256 bytes
IGNORED = -100
DEFAULT_OUTPUT = Path(__file__).parents[1] / "python" / "vhead" / "demo" / "model"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the corpus."""

    steps: int = 4400
    seed: int = 0
    batch_size: int = 4
    window: int = 512
    segment: int = 256
    peak_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    residual_dropout: float = 0.1
    clean_share: float = 0.3
    flat_share: float = 0.6
    span_characters: tuple[int, int] = (30, 180)
    corrupted_weight: float = 3.0
    value_loss_weight: float = 1.0


class Windows:
    """An endless seeded sequence of training windows, some natural and some with corrupted spans."""

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.recipe = recipe
        self.rng = np.random.default_rng(recipe.seed)
        self.raw = "\n\n".join(corpus.training)
        self.flat = "\n\n".join(flatten(paragraph) for paragraph in corpus.training if is_prose(paragraph))

    def _text(self) -> str:
        """Draws a stretch of text that stays long enough when letters are dropped; half start where a sentence does."""
        stream = self.flat if self.rng.random() < self.recipe.flat_share else self.raw
        length = self.recipe.window + 128
        start = int(self.rng.integers(len(stream) - 2 * length))
        if self.rng.random() < 0.5:
            start = min(i for i in (stream.find(". ", start), stream.find("\n\n", start), start + length) if i >= 0) + 2
        return stream[start : start + length]

    def _segment(self, text: str) -> Passage:
        """Leaves a segment natural or corrupts one span of it that starts and stops at a space."""
        if self.rng.random() < self.recipe.clean_share:
            return natural_passage(text)
        kind = list(TRAINED)[int(self.rng.integers(len(TRAINED)))]
        length = int(self.rng.integers(*self.recipe.span_characters))
        start = text.find(" ", int(self.rng.integers(len(text) - 20))) + 1
        return corrupted_passage(text, start, word_end(text, start + length), kind, self.rng)

    def passage(self) -> Passage:
        """Draws a window of consecutive segments."""
        text, step = self._text(), self.recipe.segment
        segments = [self._segment(text[i : i + step]) for i in range(0, len(text), step)]
        return Passage(b"".join(s.data for s in segments), tuple(label for s in segments for label in s.natural))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Returns token ids and labels (natural or not), both [batch, window + 1]."""
        length = self.recipe.window + 1
        passages: list[Passage] = []
        while len(passages) < self.recipe.batch_size:
            passage = self.passage()
            if len(passage.data) >= length:
                passages.append(passage)
        ids = torch.tensor([list(passage.data[:length]) for passage in passages]) + BYTE_OFFSET
        return ids, torch.tensor([passage.natural[:length] for passage in passages])


def build_body() -> LlamaForCausalLM:
    """Makes the untrained body: 0.75 M parameters, embeddings tied."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def add_residual_dropout(body: LlamaForCausalLM, rate: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Drops elements of what each block adds to the residual stream, as Llama itself has no dropout there."""

    def drop(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, rate)

    projections = [p for layer in body.model.layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [projection.register_forward_hook(drop) for projection in projections]


def losses(
    body: LlamaForCausalLM, summary: nn.Linear, ids: Tensor, natural: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Returns the next-byte loss over natural bytes and the logistic loss of the values over all, both in nats."""
    hidden = body.model(input_ids=ids[:, :-1]).last_hidden_state
    logits = body.lm_head(hidden)
    targets = ids[:, 1:].masked_fill(~natural[:, 1:], IGNORED)
    lm_loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    labels = natural[:, :-1].float()
    weights = labels + recipe.corrupted_weight * (1 - labels)
    value_loss = binary_cross_entropy_with_logits(summary(hidden).squeeze(-1), labels, weights)
    return lm_loss, value_loss


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warms up linearly, then follows a half cosine to 2 % of the peak."""
    progress = step / recipe.steps
    if progress < recipe.warmup:
        return recipe.peak_learning_rate * (step + 1) / (recipe.warmup * recipe.steps)
    return recipe.peak_learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(body: LlamaForCausalLM, summary: nn.Linear, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and the head."""
    matrices = [p for p in body.model.layers.parameters() if p.ndim == 2]
    rest = [body.model.embed_tokens.weight, *(p for p in body.model.parameters() if p.ndim == 1), *summary.parameters()]
    rate = recipe.peak_learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def untrained(recipe: Recipe) -> tuple[LlamaForCausalLM, nn.Linear]:
    """Makes body and head; the head starts at zero, as the logistic loss asks for no broken symmetry."""
    torch.manual_seed(recipe.seed)
    body, summary = build_body(), nn.Linear(128, 1)
    nn.init.zeros_(summary.weight)
    nn.init.zeros_(summary.bias)
    return body.train(), summary.train()


def train(corpus: Corpus, recipe: Recipe) -> tuple[LlamaForCausalLM, nn.Linear]:
    """Trains body and head together."""
    body, summary = untrained(recipe)
    parameters = [*body.parameters(), *summary.parameters()]
    optimizers, windows = make_optimizers(body, summary, recipe), Windows(corpus, recipe)
    hooks = add_residual_dropout(body, recipe.residual_dropout)
    for step in range(recipe.steps):
        lm_loss, value_loss = losses(body, summary, *windows.batch(), recipe)
        (lm_loss + recipe.value_loss_weight * value_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 99:
            bits = lm_loss.item() / math.log(2)
            log.info("step %d: %.3f bits per byte, value loss %.3f", step + 1, bits, value_loss.item())
    for hook in hooks:
        hook.remove()
    return body.eval(), summary.eval()


def save(body: LlamaForCausalLM, summary: nn.Linear, folder: Path) -> None:
    """Writes what `save_pretrained` of a model with value head writes: the body in bfloat16, the head in float32."""
    tensors = body.to(torch.bfloat16).state_dict()
    tensors |= {f"v_head.summary.{name}": tensor for name, tensor in summary.state_dict().items()}
    body.save_pretrained(folder, state_dict=tensors)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    # transformers 5 writes an empty list here, for which transformers 4.46 to 4.57 cannot load the tokenizer.
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def provenance(folder: Path, corpus: Corpus, recipe: Recipe) -> dict[str, object]:
    """What the weights were made from, with what, and how good they are on text they have not seen."""
    body = LlamaForCausalLM.from_pretrained(folder)
    return {
        "made_by": "tools/train_demo_model.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "files_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
        "parameters": {"body": body.num_parameters(), "head": body.config.hidden_size + 1},
        "corpus": {
            "name": CORPUS_NAME,
            "licence": CORPUS_LICENCE,
            "sha256": corpus.sha256,
            "bytes": corpus.byte_count,
            "training_bytes": sum(len(paragraph.encode()) for paragraph in corpus.training),
            "held_out_topics": sorted(corpus.held_out),
            "held_out_rule": "SHA-256 of the topic's name divisible by 10; training paragraphs that share "
            "48 characters with a held-out topic are dropped",
        },
        "recipe": asdict(recipe),
        "corruptions": {"trained": sorted(TRAINED), "unseen": sorted(UNSEEN)},
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": 1,
        },
        "figures": evaluate(folder, corpus),
    }


def describe(folder: Path, facts: dict[str, object]) -> None:
    """Writes PROVENANCE.json and the model card."""
    (folder / "PROVENANCE.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def replace_folder(target: Path, made: Path) -> None:
    """Puts the finished folder in the place of the old one."""
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to replace (default %(default)s)")
    parser.add_argument("--accept-other-corpus", action="store_true", help="train on another text than the pinned one")
    return parser.parse_args()


def main() -> None:
    """Trains, saves, measures the saved files, and only then replaces the output folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    options = arguments()
    recipe, corpus = Recipe(steps=options.steps), load_corpus(accept_other=options.accept_other_corpus)
    body, summary = train(corpus, recipe)
    made = options.output.with_name(f"{options.output.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    save(body, summary, made)
    describe(made, provenance(made, corpus, recipe))
    replace_folder(options.output, made)


if __name__ == "__main__":
    main()
