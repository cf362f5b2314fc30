"""The model card of the demo model, filled in from its provenance."""

from typing import Any

CARD = """\
---
library_name: vhead
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [value-head, reward-model, byte-level, demo]
---

# vhead's demo model

A byte-level Llama ({body:,} parameters, bfloat16, context {window}) with a trained value head (`v_head.summary`,
float32) that tells natural from corrupted text, byte by byte. It ships inside `vhead` so that everything can be tried
without a network, and it is meant for that: demonstrations and tests.

```python
from vhead import Rollout, Scorer
from vhead.demo import demo_model_path

scorer = Scorer.from_pretrained(demo_model_path())
rollout = Rollout("The statement is used to ", "raise an exception that the caller handles.")
print(scorer.score([rollout])[0].reward)
```

It loads with plain `AutoModelForCausalLM` and `AutoTokenizer` as well. The tokenizer (`ByT5Tokenizer`) needs no
vocabulary file.

## What the value means

After each byte, a logit of whether the text at this place is natural: above zero natural, below zero corrupted. It
falls where a corruption starts and recovers after its end. The reward of a rollout is the value at its last byte.

## Training

`tools/train_demo_model.py` trained body and head together for {steps} steps on one thread: next-byte loss on natural
bytes, logistic loss of the value on all bytes. In most windows a span was spoiled in one of {trained_count} ways
({trained}). `PROVENANCE.json` holds the recipe, the versions and the hash of every file.

The text is `{corpus}` of CPython {python} (SHA-256 `{sha256}`). {topic_count} whole topics are held out
({topics}); training paragraphs that share 48 characters with one of them are dropped.

## Figures on held-out topics

Measured on the shipped files, corruptions drawn with seeds that training did not use.

| | |
|---|---|
| language model, natural text | {bits:.2f} bits per byte ({training_bits:.2f} on training text) |
| value of single bytes, natural against corrupted | ROC AUC {token_auc:.3f}, right side of zero {token_accuracy:.1%} |
| reward, natural against corrupted to the end | ROC AUC {rollout_auc:.3f}, {ordered:.1%} of {pairs} pairs in order |

| corruption | AUC, bytes | AUC, rollouts | pairs in order |
|---|---|---|---|
{rows}

The byte figures count every byte, also the first of a span, which nobody could tell, and those right after its end.

## Limits

It knows one book. On other text, natural or not, its values mean little. What reads fluently and means nothing, such as
words in a slightly wrong order, is the hardest for it, as the table says.

## Licence of the text

The training text is part of CPython: Copyright © 2001-2023 Python Software Foundation; All Rights Reserved; PSF License
Version 2 (`LICENSE-PSF.txt` in the folder above).
"""


def model_card(facts: dict[str, Any]) -> str:
    """Fills in the card from the contents of PROVENANCE.json."""
    corpus, figures, kinds = facts["corpus"], facts["figures"], facts["corruptions"]
    token, rollout = figures["token"], figures["rollout"]
    return CARD.format(
        body=facts["parameters"]["body"],
        window=facts["recipe"]["window"],
        steps=facts["recipe"]["steps"],
        trained=", ".join(kinds["trained"]),
        trained_count=len(kinds["trained"]),
        corpus=corpus["name"],
        python=facts["environment"]["python"],
        sha256=corpus["sha256"],
        topic_count=len(corpus["held_out_topics"]),
        topics=", ".join(corpus["held_out_topics"]),
        bits=figures["bits_per_byte"]["held_out"],
        training_bits=figures["bits_per_byte"]["training"],
        token_auc=token["trained_kinds"]["auc"],
        token_accuracy=token["trained_kinds"]["accuracy"],
        rollout_auc=rollout["trained_kinds"]["auc"],
        ordered=rollout["trained_kinds"]["pairs_ordered"],
        pairs=rollout["trained_kinds"]["pairs"],
        rows="\n".join(_row(kind, kinds["unseen"], figures) for kind in token["by_kind"]),
    )


def _row(kind: str, unseen: list[str], figures: dict[str, Any]) -> str:
    token, rollout = figures["token"]["by_kind"][kind], figures["rollout"]["by_kind"][kind]
    name = f"{kind} (not in training)" if kind in unseen else kind
    return f"| {name} | {token['auc']:.3f} | {rollout['auc']:.3f} | {rollout['pairs_ordered']:.1%} |"
