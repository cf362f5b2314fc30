"""From a file of rollouts to a file with a head."""

from itertools import pairwise

import torch

from vhead.errors import ResumeError
from vhead.fitting.examples import TargetFields, recorded_examples
from vhead.fitting.fitted import FittedHead
from vhead.fitting.fitting import ErrorHandler, FitOptions
from vhead.fitting.output import HeadOutput
from vhead.fitting.reading import Reading
from vhead.formats.layout import Format
from vhead.formats.registry import format_named
from vhead.formats.writing import head_tensors
from vhead.head_weights import HeadWeights, LinearWeights
from vhead.rollouts.fields import SIDES
from vhead.rollouts.files.opening import Reader
from vhead.scoring.files.journal import START_ANEW
from vhead.scoring.files.pairs import Pairing
from vhead.scoring.files.pipeline import RemainingRows
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.scorer import Scorer


def fit_file(
    scorer: Scorer,
    reader: Reader,
    output: HeadOutput,
    *,
    options: FitOptions,
    fields: TargetFields,
    format: str | None,
    progress: ScoringProgress,
    limit: int | None = None,
    on_error: ErrorHandler | None = None,
) -> FittedHead:
    """Fits a head to the records of a file, and writes it.

    Args:
        scorer: The model.
        reader: The records.
        output: Where the head goes, begun.
        options: How it is fitted.
        fields: Which fields hold the targets.
        format: The name of the head's format; None: TRL's, or vhead's own where TRL's cannot hold the head.
        progress: Told of every batch that is computed.
        limit: Only the first so many records; None: all.
        on_error: Told of each record that cannot be used, which is then left out; None: the first one is raised.

    Raises:
        RecordError: A record cannot be used, and `on_error` is None.
        FitError: The records do not make a head.
        HeadError: The format cannot hold the head.
        ResumeError: What an earlier run left does not fit.
        OSError: Reading or writing failed.
    """
    reading = Reading(scorer)
    head_format = None if format is None else format_named(format)
    if head_format is not None:
        _check_format(head_format, reading.hidden_size, options, fields)
    fitting = reading.fitting(options, output.folder)
    names = fields.targets
    if output.earlier is not None:
        notes, tensors = output.earlier
        names = notes["fields"] and tuple(notes["fields"])
        if not fitting.restore(notes, tensors):
            raise ResumeError(f"{output.folder}: expected the states that the earlier run kept; {START_ANEW}")
    known = Pairing()
    # Whether they are pairs is checked here, record by record.
    known.is_of_pairs = options.target == "pairs"
    rows = RemainingRows(reader, limit, output.journal, None, known)
    examples = recorded_examples(rows, options.target, TargetFields(names, fields.weight))

    def on_batch(rollouts: int, tokens: int, computed: int) -> None:
        if rows.expected is not None:
            progress.expect(rows.expected * (len(SIDES) if options.target == "pairs" else 1))
        progress.advance(rollouts, tokens, computed)

    last = None
    for chunk in reading.chunks(examples, options, head_format, on_error=on_error, on_batch=on_batch):
        # Noted only when another chunk has come: a broken record or the input's end may have cut this one short.
        if last is not None and output.is_note_due:
            output.note(last.row, fitting.notes() | {"fields": last.fields}, fitting.tensors())
        fitting.add(chunk.sources, chunk.scores, on_error)
        last = chunk.last
    fitted = fitting.result(output.path.name)
    output.publish(fitted.head, format or _default_format(fitted.head), rows.last)
    return fitted


def _default_format(head: HeadWeights) -> str:
    """That of what the records have turned out to make: a field may have several numbers."""
    return "trl" if len(head.layers) == 1 and len(head.layers[0].weight) == 1 else "vhead"


def _check_format(format: Format, hidden_size: int, options: FitOptions, fields: TargetFields) -> None:
    """Refuses a format that cannot hold such a head, before anything is read."""
    sizes = [hidden_size, *filter(None, [options.intermediate_size]), len(fields.targets or ("one",))]
    has_bias = options.target != "pairs"
    layers = [
        LinearWeights(torch.zeros(b, a), torch.ones(b) if has_bias or place < len(sizes) - 2 else None)
        for place, (a, b) in enumerate(pairwise(sizes))
    ]
    head_tensors(HeadWeights(tuple(layers), format="vhead", source="the head to be fitted"), format)
