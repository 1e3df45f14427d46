"""Tables of text, as a terminal, Markdown, LaTeX, HTML and CSV want them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import rich.table
from rich.text import Text


class Table(NamedTuple):
    """Texts in rows. What follows a line break in a cell is of less weight; a cell that begins
    with a space belongs to the row above.

    Attributes:
        text_columns: headings of the columns that hold words rather than numbers.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Collection[str]


def below(text: str) -> str:
    return f"\n{text}" if text else ""


def terminal(table: Table) -> rich.table.Table:
    rich_table = rich.table.Table()
    for heading in table.headings:
        rich_table.add_column(
            Text(heading), justify="left" if heading in table.text_columns else "right"
        )
    for row in table.rows:
        cells = (cell.partition("\n") for cell in row)
        rich_table.add_row(
            *(Text.assemble(first, (below(rest), "dim")) for first, _, rest in cells)
        )
    return rich_table


def markdown(table: Table) -> str:
    lines = [
        [_flat(heading) for heading in table.headings],
        [":--" if heading in table.text_columns else "--:" for heading in table.headings],
        *([_flat(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flat(cell: str) -> str:
    # A bar ends a cell, a tag would be one; asterisks and underscores would set text in italics.
    return re.sub(r"([\\|<*_`])", r"\\\1", cell.replace("\n", " "))


def html(table: Table) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        cells_html = ""
        for heading, cell in zip(table.headings, cells, strict=True):
            first, _, rest = cell.partition("\n")
            small = f"<small>{escape(rest)}</small>" if rest else ""
            kinds = ["text"] * (heading in table.text_columns) + ["in"] * first.startswith(" ")
            kind = f' class="{" ".join(kinds)}"' if kinds else ""
            cells_html += f"<{tag}{kind}>{escape(first.strip())}{small}</{tag}>"
        return f"<tr>{cells_html}</tr>"

    body = "".join(line("td", row) for row in table.rows)
    return f'<div class="wide dense"><table>{line("th", table.headings)}{body}</table></div>'


# What LaTeX would take for a command, and at the start of a row for an argument of \\.
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}",
    "—": "---", "–": "--", "×": r"$\times$", "±": r"$\pm$", '"': r"\textquotedbl{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def escape_latex(text: str) -> str:
    escaped = "".join(LATEX.get(sign, sign) for sign in text.replace("\n", " "))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def latex(table: Table, caption: str) -> str:
    r"""A table for \usepackage{booktabs}; columns of words break their lines."""
    columns = "".join(
        "l" if h in table.text_columns and h != "verdict" else "r" for h in table.headings
    )
    at = list(table.headings).index("verdict")
    columns = f"{columns[:at]}p{{0.24\\textwidth}}{columns[at + 1 :]}"

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escape_latex, cells)) + r" \\"

    return "\n".join(
        [
            r"% Needs \usepackage{booktabs} and \usepackage{graphicx}.",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(table.headings),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of the same keys as CSV with a heading; None and NaN are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    for record in records:
        finite = {k: v for k, v in record.items() if not (isinstance(v, float) and math.isnan(v))}
        writer.writerow(finite)
    return out.getvalue()
