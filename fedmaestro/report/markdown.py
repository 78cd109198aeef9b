"""Tables in Markdown."""

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """Return a table whose first columns hold text, and the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def escaped(value: object) -> str:
    """Return ``str(value)`` so that Markdown shows it as it is, on one line; ``a_b`` needs no escape."""
    text = re.sub(r"[\\`*{}\[\]<>|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", str(value))
    return " ".join(text.split())
