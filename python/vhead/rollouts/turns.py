"""Chats in which the model wrote several times: as one text, with the places of what it wrote."""

from collections.abc import Sequence

from vhead.rollouts.messages import Message
from vhead.rollouts.template import Ranges, Template, end_of_turn
from vhead.rollouts.text import Passage

_MASK = "score token ids with a mask"
_REMEDY = f"{_MASK}, or use a template that marks what the model wrote by {{% generation %}} blocks"


def turns_passage(template: Template, prompt: Sequence[Message], completion: Sequence[Message]) -> Passage:
    """The chat as the template renders it, with the assistant's turns in the completion as the model's.

    Whose character is whose comes from the template's generation blocks. Where it has none, a turn is what the chat up
    to it has more than the chat before it, as long as both begin the whole.

    Raises:
        FieldError: The template refuses the chat, rewrites earlier messages when later ones follow, or leaves out what
            an assistant's message holds.
    """
    messages = [*prompt, *completion]
    whole = template.rendered(messages)
    generated = template.generated(messages)
    if generated is None:
        ranges = _by_prefixes(template, messages, len(prompt), whole)
    else:
        ranges = _by_blocks(template, messages, len(prompt), whole, generated)
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    if not ranges:
        raise template.error("a chat template that shows what the assistant wrote", "one that shows nothing of it")
    _check_contents(template, completion, whole, ranges)
    text = whole[: max(ranges[-1][1], len(whole.rstrip()))]
    border = ranges[0][0]
    return Passage(text, border, border, len(text) - border, tuple(ranges))


def _by_prefixes(template: Template, messages: Sequence[Message], first: int, whole: str) -> Ranges:
    """The assistant's turns from a message on, each from two renderings of what comes up to it."""
    places = [at for at in range(first, len(messages)) if messages[at]["role"] == "assistant"]
    return [_turn(template, messages[:at], messages[at], whole) for at in places]


def _by_blocks(template: Template, messages: Sequence[Message], first: int, whole: str, generated: Ranges) -> Ranges:
    """Those of the generation blocks that lie behind the first messages, if they show all of the later ones."""
    for at in range(first, len(messages)):
        if messages[at]["role"] == "assistant":
            template.check_nothing_is_left_out(messages[:at], messages[at], whole, messages[at + 1 :])
    if all(message["role"] != "assistant" for message in messages[:first]):
        return generated
    floor = len(_beginning(template, template.rendered(messages[:first]), whole, first, _MASK))
    return [(start, stop) for start, stop in generated if start >= floor]


def _turn(template: Template, before: Sequence[Message], answer: Message, whole: str) -> tuple[int, int]:
    """The characters of one turn of the assistant's."""
    at = len(before)
    head = _beginning(template, template.rendered(before, add_generation_prompt=True), whole, at)
    turn = _beginning(template, template.rendered([*before, answer]), whole, at)
    template.check_nothing_is_left_out(before, answer, turn)
    if len(turn) < len(head):
        raise template.error("a chat template that puts a turn behind its generation prompt", f"another; {_REMEDY}")
    _, ending = template.around(before, answer)
    stop = len(turn) - len(ending) + len(end_of_turn(ending)) if turn.endswith(ending) else len(turn.rstrip())
    return len(head), max(stop, len(head))


def _beginning(template: Template, part: str, whole: str, at: int, remedy: str = _REMEDY) -> str:
    """A part of the chat, which has to be rendered as it stands in the whole."""
    if whole.startswith(part):
        return part
    same = next(place for place in range(len(part) + 1) if not whole.startswith(part[: place + 1]))
    expected = "a chat template that leaves earlier messages as they are when later ones follow"
    got = (
        f"one that rewrites history: up to message {at} it writes {part[same : same + 40]!r} where the whole chat has "
        f"{whole[same : same + 40]!r}; {remedy}"
    )
    raise template.error(expected, got)


def _check_contents(template: Template, completion: Sequence[Message], whole: str, ranges: Ranges) -> None:
    """What the assistant wrote has to be there as it wrote it, or tokens are scored that it never chose."""
    written = "\0".join(whole[start:stop] for start, stop in ranges)
    at = 0
    for message in completion:
        content = message["content"].strip() if message["role"] == "assistant" else ""
        place = written.find(content, at)
        if place < 0:
            expected = "a chat template that shows the assistant's content as it is"
            got = f"one that changes {content[:40]!r} or leaves a part of it out; {_REMEDY}"
            raise template.error(expected, got)
        at = place + len(content)
