"""What a notebook shows of scores."""

from collections.abc import Iterable, Sequence
from html import escape


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], below: str = "") -> str:
    """An HTML table; numbers with four significant digits, None as nothing."""
    titles = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return (
        f"<p>{escape(caption)}</p><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{escape(below)}</p>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
