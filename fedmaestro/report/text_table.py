"""Tables as data: one function makes a table, and pages, Markdown and LaTeX show it with one loop each."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A cell that is a number: its text, its value to sort by (nan: unknown), whether it is the best of its column."""

    text: str
    value: float = math.nan
    best: bool = False


Entry = str | Number


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table with its heading, what its numbers are, and its rows; a column holds numbers, or text."""

    heading: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]

    @property
    def is_number(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(isinstance(row[column], Number) for row in self.rows) for column in range(len(self.header))]


def text_of(entry: Entry) -> str:
    """Return what stands in a cell."""
    return entry.text if isinstance(entry, Number) else entry


def is_best(entry: Entry) -> bool:
    """Return whether a cell is the best of its column."""
    return isinstance(entry, Number) and entry.best


def to_markdown(table: TextTable, level: int = 2) -> str:
    """Return heading, note and table in Markdown."""
    rule = ["---:" if is_number else "---" for is_number in table.is_number]
    rows = [[f"**{md(text_of(x))}**" if is_best(x) else md(text_of(x)) for x in row] for row in table.rows]
    grid = _grid([list(map(md, table.header)), rule, *rows])
    return "\n\n".join(part for part in (f"{'#' * level} {md(table.heading)}", md(table.note), grid) if part)


def md(value: object) -> str:
    """Return ``str(value)`` so that Markdown shows it as it is, on one line; ``a_b`` needs no escape."""
    text = re.sub(r"[\\`*{}\[\]<>|~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", str(value))
    return " ".join(text.split())


def to_latex(table: TextTable, label: str) -> str:
    r"""Return the table as a LaTeX ``table`` for the package booktabs.

    Args:
        table: its note becomes a part of the caption.
        label: for ``\ref``; letters, digits and hyphens of it are kept.
    """
    columns = "".join("r" if is_number else "l" for is_number in table.is_number)
    rows = [[rf"\textbf{{{_tex_entry(x)}}}" if is_best(x) else _tex_entry(x) for x in row] for row in table.rows]
    caption = " ".join(part for part in (f"{tex(table.heading)}.", tex(table.note)) if part)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-')}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _line(map(tex, table.header)),
            r"\midrule",
            *map(_line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "…": r"\ldots{}",
    "·": r"\textperiodcentered{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "ε": r"$\varepsilon$",
    "χ": r"$\chi$",
    "²": r"\textsuperscript{2}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def tex(value: object) -> str:
    """Return ``str(value)`` so that LaTeX shows it as it is, on one line; other scripts need XeLaTeX or LuaLaTeX."""
    return " ".join("".join(_TEX.get(character, character) for character in str(value)).split())


def _tex_entry(entry: Entry) -> str:
    """Return a cell; the sign of a negative number is a minus, no hyphen."""
    text = tex(text_of(entry))
    return f"$-${text[1:]}" if isinstance(entry, Number) and text.startswith("-") and text != "--" else text


def _grid(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _line(cells: Iterable[str]) -> str:
    r"""Return a row; braces keep a cell that begins with a bracket from being read as an argument of ``\\``."""
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"
