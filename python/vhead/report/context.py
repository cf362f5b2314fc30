"""What stands around a token: the text, where the record has it with the tokens' offsets, otherwise token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vhead.errors import FieldError
from vhead.report.differences import WorstToken
from vhead.rollouts.files.opening import open_reader

_TEXT, _OFFSETS, _IDS = "completion", "token_offsets", ("token_ids", "completion_ids")
_CHARACTERS_AROUND = 60
_IDS_AROUND = 5


def in_context(name: str, tokens: Sequence[WorstToken], counts: Sequence[int]) -> tuple[WorstToken, ...]:
    """The tokens with what stands around them in their file, which is read again up to the last of their records.

    Args:
        name: The file.
        tokens: The tokens.
        counts: The place of each one's record among those of the file, from 1.

    Raises:
        OSError: The file cannot be read.
    """
    wanted, records = set(counts), {}
    reader = open_reader(name)
    try:
        for row in reader:
            if row.count in wanted:
                try:
                    records[row.count] = row.members((_TEXT, _OFFSETS, *_IDS))
                except FieldError:
                    # It could be read before: somebody has written to the file since.
                    records[row.count] = {}
            if len(records) == len(wanted):
                break
    finally:
        reader.close()
    return tuple(_explained(token, records.get(count, {})) for token, count in zip(tokens, counts, strict=True))


def _explained(token: WorstToken, record: Mapping[str, Any]) -> WorstToken:
    at = token.position
    found = (record.get(name) for name in _IDS)
    ids = next((list(each) for each in found if each is not None and len(each) > at), None)
    if ids is not None:
        parts = (ids[max(0, at - _IDS_AROUND) : at], [ids[at]], ids[at + 1 : at + 1 + _IDS_AROUND])
        shown = [" ".join(map(str, part)) for part in parts]
        token = replace(token, token_id=int(ids[at]), before=shown[0], token=shown[1], after=shown[2])
    text, offsets = record.get(_TEXT), record.get(_OFFSETS)
    if isinstance(text, str) and isinstance(offsets, list) and len(offsets) > at:
        first, stop = offsets[at]
        # Minus one, or nothing between them: the token stands for no text.
        if 0 <= first < stop <= len(text):
            before, after = text[max(0, first - _CHARACTERS_AROUND) : first], text[stop : stop + _CHARACTERS_AROUND]
            return replace(token, before=before, token=text[first:stop], after=after)
    return token
