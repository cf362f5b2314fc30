"""What `vhead compare` prints."""

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vhead.cli.terminal import encodable, escaped
from vhead.report import Bucket, Comparison, Difference, LogprobDifference, WorstToken

HEADER = Style(bold=True)
FAINT = Style(dim=True)
MARKED = Style(reverse=True)
_LONGEST_LABEL = 24
_PROBLEMS_SHOWN = 5


def report(console: Console, found: Comparison, ours: str, theirs: str) -> None:
    """Prints what was compared, the guess at the cause, and a table for each thing that differs.

    Args:
        console: Where to.
        found: What is printed.
        ours: Our file and column.
        theirs: Theirs.
    """
    for line in _facts(found, ours, theirs):
        console.print(Text(_printable(console, line)))
    if found.cause:
        label = f"Likely cause: {found.cause.name}. " if found.cause.name else ""
        console.print(Text.assemble("\n", (label, HEADER), found.cause.evidence))
    for table in _tables(console, found):
        console.print()
        console.print(table)


def _tables(console: Console, found: Comparison) -> Iterator[Table]:
    if found.logprobs:
        yield _numbers(found.logprobs)
        yield _buckets("By position in the completion", "position", found.logprobs.by_position)
        yield _buckets("By length of the completion", "length", found.logprobs.by_length)
        if found.logprobs.worst:
            yield _worst(console, found.logprobs.worst)
    others = [(name, each) for name, each in (("values", found.values), ("reward", found.reward)) if each]
    if others:
        yield _others(console, others)


def _facts(found: Comparison, ours: str, theirs: str) -> Iterable[str]:
    yield f"ours    {ours}"
    yield f"theirs  {theirs}"
    way = "by id" if found.by_id else "by position"
    counted = f"{found.rollouts:,} {'rollout is' if found.rollouts == 1 else 'rollouts are'} compared"
    yield f"{counted}, matched {way}; all differences are ours - theirs"
    for count, side in ((found.only_ours, "ours"), (found.only_theirs, "theirs")):
        if count:
            yield f"{count:,} {'record is' if count == 1 else 'records are'} in {side} only"
    if found.left_out:
        yield f"{found.left_out:,} {'problem' if found.left_out == 1 else 'problems'}; what does not fit is left out:"
        yield from (f"  {message}" for message in found.problems[:_PROBLEMS_SHOWN])
        if found.left_out > _PROBLEMS_SHOWN:
            yield f"  and {found.left_out - _PROBLEMS_SHOWN:,} more"


def _table(title: str, headings: Sequence[str], *, left: Sequence[int] = (0,)) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style=HEADER,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at in left else "right", no_wrap=at == 0)
    return table


def _numbers(found: LogprobDifference) -> Table:
    table = _table(f"Log-probabilities of {found.tokens:,} tokens", ("", "", "what it is"), left=(0, 2))
    for name, number, meaning in (
        ("k1", _signed(found.k1), "mean of -d, an estimate of KL in nats"),
        ("k3", _small(found.k3), "mean of exp(d) - 1 - d, another one"),
        ("chi2", _small(found.chi2), "mean of ratio^2, less 1; ratio = exp(d)"),
        ("effective sample size", f"{found.effective_sample_size:.2%}", "(sum of ratios)^2 / sum of ratio^2"),
        ("outside [0.9, 1.1]", f"{found.outside:.2%}", "share of ratios"),
        ("mean |d|", _small(found.mean_abs), "in nats"),
        ("largest |d|", _small(found.max_abs), "in nats"),
    ):
        table.add_row(name, number, Text(meaning, FAINT))
    return table


def _buckets(title: str, name: str, buckets: Sequence[Bucket]) -> Table:
    table = _table(title, (name, "tokens", "mean d", "mean |d|", "k3"))
    for each in buckets:
        numbers = f"{each.first:,}" if each.first == each.last else f"{each.first:,} to {each.last:,}"
        table.add_row(numbers, f"{each.tokens:,}", _signed(each.mean), _small(each.mean_abs), _small(each.k3))
    return table


def _worst(console: Console, tokens: Sequence[WorstToken]) -> Table:
    table = _table("Tokens that differ most", ("rollout", "position", "ours", "theirs", "in context"), left=(0, 4))
    table.columns[4].ratio = 1
    table.columns[4].overflow = "fold"
    table.expand = True
    for each in tokens:
        label = f"no. {each.rollout}" if each.id is None else str(each.id)
        numbers = (f"{each.position:,}", f"{each.ours:.3f}", f"{each.theirs:.3f}")
        table.add_row(_label(console, label), *numbers, _in_context(console, each))
    return table


def _in_context(console: Console, token: WorstToken) -> Text:
    if token.token is None:
        return Text("neither text nor token ids in the file", FAINT)
    before, marked, after = (_printable(console, part or "") for part in (token.before, token.token, token.after))
    space = " " if token.token == str(token.token_id) else ""
    return Text.assemble(f"{before}{space}[", (marked, MARKED), f"]{space}{after}")


def _others(console: Console, found: Sequence[tuple[str, Difference]]) -> Table:
    headings = ("", "numbers", "mean", "mean |.|", "largest |.|", "where", "rank corr.", "corr.")
    table = _table("Values and rewards", headings, left=(0, 5))
    for name, each in found:
        where = _label(console, "" if each.max_id is None else str(each.max_id))
        if each.max_position is not None:
            where.append(f" at {each.max_position:,}")
        correlations = ["-" if number is None else f"{number:.4f}" for number in (each.spearman, each.pearson)]
        numbers = (_signed(each.mean), _small(each.mean_abs), _small(each.max_abs))
        table.add_row(name, f"{each.count:,}", *numbers, where, *correlations)
    return table


def _label(console: Console, text: str) -> Text:
    shown = _printable(console, text)
    return Text(shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 3]}...")


def _printable(console: Console, text: str) -> str:
    return encodable(escaped(text), console.encoding)


def _small(number: float) -> str:
    return f"{number:.4f}" if 0.01 <= number < 1e4 else f"{number:.3g}"


def _signed(number: float) -> str:
    return f"{number:+.4f}" if 0.01 <= abs(number) < 1e4 else f"{number:+.3g}"
