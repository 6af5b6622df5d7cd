"""Cells and tables, and their Markdown and LaTeX forms; the page's template writes the HTML."""

from collections.abc import Callable
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None  # the number that the page sorts by; None for text
    best: bool = False  # the best of its column, shown in bold
    remark: str = ""  # shown smaller or in brackets, such as the gain over FedAvg


@dataclass(frozen=True)
class Table:
    """A titled table whose first column names the rows; `lower_is_better` sets which end a first click sorts up."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[Cell]]
    lower_is_better: bool = False


def to_markdown(table: Table) -> str:
    """Format a table as a pipe table below its title and note."""
    header = [_escape_markdown(text) for text in table.header]
    rows = [[_marked(cell, "**{}**", _escape_markdown) for cell in row] for row in table.rows]
    sides = ["left" if text else "right" for text in _text_columns(table)]
    body = tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=sides)
    return f"## {table.title}\n\n{table.note}\n\n{body}\n"


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").split())


def to_latex(table: Table) -> str:
    """Format a table as a LaTeX environment that needs booktabs and graphicx and is at most as wide as the text."""
    header = " & ".join(map(_escape_latex, table.header))
    rows = [" & ".join(_marked(cell, "\\textbf{{{}}}", _escape_latex) for cell in row) for row in table.rows]
    columns = "".join("l" if text else "r" for text in _text_columns(table))
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{\\textbf{{{_escape_latex(table.title)}.}} {_escape_latex(table.note)}}}",
        f"  \\label{{tab:{table.name}}}",
        "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"  \\begin{{tabular}}{{{columns}}}",
        "    \\toprule",
        f"    {header} \\\\",
        "    \\midrule",
        *(f"    {row} \\\\" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _text_columns(table: Table) -> list[bool]:
    """Return, per column, whether it holds no number and is aligned to the left."""
    return [all(cell.value is None for cell in column) for column in zip(*table.rows, strict=True)]


def _marked(cell: Cell, bold: str, escape: Callable[[str], str]) -> str:
    text = bold.format(escape(cell.text)) if cell.best else escape(cell.text)
    return f"{text} ({escape(cell.remark)})" if cell.remark else text


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%#_{}$"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "\u2212": "$-$", "σ": "$\\sigma$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"}
)


def _escape_latex(text: str) -> str:
    return text.translate(_LATEX)
