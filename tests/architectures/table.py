"""The table of model types: rows as Markdown, and back."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.architectures.report import COLUMNS, DOES_NOT_APPLY, KNOWN_LIMIT, Row

_HEADER = ["model type", "auto class", "route", *COLUMNS, "notes"]

_INTRODUCTION = """\
# Which models work

`make model-types` writes this page. It takes every model type that transformers' auto classes for language models know,
builds a tiny model of it with random weights, and runs the checks below.

Examined with transformers {transformers} and torch {torch}: {total} model types, counted once for each auto class whose
models differ. {examined} of them are examined, and hold everything except what their notes say. The other {left_out}
cannot be built, or are not language models.

{counts}

- **forward**: `forward(...).value` is the head's output for transformers' own last hidden state, bit for bit. That
  state is the last of its `output_hidden_states`, which is the one that TRL's class read.
- **logits**: the model's own logits are computed from this same state. Its language-model head reads the state as it
  is, or scaled, or through a transform of each position by itself.
- **values**: `values(...)` gives the same values bit for bit, without building logits. On a batch with padding on the
  right it gives the same values on every token, up to rounding. An encoder-decoder takes `labels` in place of the
  decoder's tokens.
- **gradients**: a loss on the values reaches the head, and the model down to its embeddings.
- **generate**: the model continues the text.
- **save, load**: `save_pretrained` and `from_pretrained` bring back the same bits, in the language model and in the
  head.
- **right padding**, **left padding**: `values(...)` gives a padded row the values of the same tokens without padding,
  up to rounding.
- **generated values**: `generate(..., output_values=True)` reads values off while it continues a left-padded batch, and
  they are what `values(...)` gives for the finished sequences. Where they are not, transformers' own `generate` runs
  the model differently from `forward`; what is read off belongs to the run that chose the token.
- **longest**: a sequence of the greatest length that the scorer accepts goes through the model.

This is how padding is made harmless. Where a token comes after padding, `values` moves each row's tokens in front of
its padding, runs the model, and moves the states back, so that no model counts, reads or groups anything that is not a
token. CPM-Ant, PaliGemma and Reformer notice padding behind the tokens as well, so each of their padded rows runs alone
(`model.plan.padding` says so). `forward` passes its inputs on as they are, as TRL's class does, and a padded row is
whatever the model itself makes of it.

The **route** is how the last hidden state is reached without logits. *Base model*: the model's trunk is called.
*Encoder, then decoder*: the T5 family has no trunk of its own, so the two are called one after the other. *Full
forward*: the whole model runs, logits included, and one hidden state is kept. *All layers kept*: transformers returns
that state only together with all the others.

Models are given text, and also images, boxes or sound where they refuse text alone. BERT and its relatives are built
with `is_decoder=True`, because without it they attend in both directions.
"""


def render(rows: Iterable[Row], *, transformers: str, torch: str) -> str:
    """The page."""
    rows = sorted(rows, key=lambda row: (row.model_type, row.auto_class))
    examined, left_out = [row for row in rows if row.cells], [row for row in rows if not row.cells]
    introduction = _INTRODUCTION.format(
        transformers=transformers,
        torch=torch,
        total=len(rows),
        examined=len(examined),
        left_out=len(left_out),
        counts="\n".join(_counts(examined)),
    )
    table = "\n".join([*_lines([_HEADER, ["---"] * len(_HEADER)]), *_lines(map(_fields, examined))])
    others = "\n".join(_lines([_LEFT_OUT_HEADER, ["---"] * 3, *map(_left_out_fields, left_out)]))
    return f"{introduction}\n## Model types\n\n{table}\n\n## Not examined\n\n{others}\n"


_LEFT_OUT_HEADER = ["model type", "auto class", "reason"]


def _counts(rows: list[Row]) -> Iterator[str]:
    yield from _lines([["", "holds", "does not, with a reason", "does not apply"], ["---"] * 4])
    for column in COLUMNS:
        cells = Counter(row.cells.get(column, "fails") for row in rows)
        yield from _lines([[column, str(cells["yes"]), str(cells[KNOWN_LIMIT]), str(cells[DOES_NOT_APPLY])]])


def _fields(row: Row) -> list[str]:
    cells = [row.cells.get(column, "fails") for column in COLUMNS]
    return [f"`{row.model_type}`", f"`{row.auto_class}`", row.route, *cells, "; ".join(row.notes)]


def _left_out_fields(row: Row) -> list[str]:
    return [f"`{row.model_type}`", f"`{row.auto_class}`", "; ".join(row.notes)]


def _lines(rows: Iterable[Iterable[str]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(row)} |"


def documented_versions(page: str) -> tuple[str, str]:
    """The versions of transformers and torch that the page was written with."""
    found = re.search(r"Examined with transformers (\S+) and torch (\S+):", page)
    assert found is not None, "the page states no versions"
    return found[1], found[2]


def documented_rows(page: str) -> dict[tuple[str, str], str]:
    """The line of each model type."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return {(fields[1], fields[3]): line for line in lines if (fields := line.split("`"))}


def line_of(row: Row) -> str:
    """A row's line as the page has it."""
    return next(_lines([_fields(row) if row.cells else _left_out_fields(row)]))
