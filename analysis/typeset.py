"""Tables for papers and pages: LaTeX and Markdown, with all text escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.tables import Text

NARROW = 7
"""Columns that fit the width of a page as they are."""

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "‖": r"$\|$",
    "→": r"$\to$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "≠": r"$\ne$",
    "≈": r"$\approx$",
    "√": r"$\surd$",
    "²": r"$^2$",
    "ⁿ": r"$^n$",
    "ᵀ": r"$^\top$",
    "σ": r"$\sigma$",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "Δ": r"$\Delta$",
    "χ": r"$\chi$",
    "½": r"$\frac12$",
    "’": "'",
    "“": "``",
    "”": "''",
}
"""LaTeX of characters that mean something to it, or that its fonts lack."""


def as_text(table: pd.DataFrame, *notes: str) -> Text:
    """Any table as people read it: four digits of a number, an estimate with its bounds in one cell, and
    the ids of runs, which no page has room for, left to the CSV."""
    bounds = {c: (f"{c}_low", f"{c}_high") for c in table.columns if {f"{c}_low", f"{c}_high"} <= set(table)}
    hidden = {b for pair in bounds.values() for b in pair} | {c for c in table if str(c).endswith("run_ids")}
    columns = [c for c in table.columns if c not in hidden]
    rows = []
    for row in table.to_dict("records"):
        cells = []
        for column in columns:
            text = _four(row[column])
            if column in bounds and not any(pd.isna(row[b]) for b in bounds[column]):
                low, high = (_four(row[b]) for b in bounds[column])
                text += f" [{low}, {high}]"
            cells.append(text)
        rows.append(tuple(cells))
    words = tuple(not pd.api.types.is_numeric_dtype(table[c]) for c in columns)
    return Text(tuple(str(c) for c in columns), tuple(rows), words, notes)


def _four(value: Any) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, float):
        text = f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
        return text.replace("inf", "∞").replace("-", "−")
    return str(value)


def to_latex(table: Text | pd.DataFrame, *, caption: str, label: str) -> str:
    """A floating table for a paper. It needs `\\usepackage{booktabs}`, and beyond `NARROW` columns, where it
    is scaled to the line, `\\usepackage{graphicx}`.

    Words are set left and numbers right; notes follow in small print. All text is escaped. Letters that
    LaTeX's own fonts lack (in names that people chose) are left as they are.

    Raises:
        ValueError: `label` has other characters than letters, digits and `:._-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9:._-]+", label):
        raise ValueError(f"label {label!r}: letters, digits and : . _ - only")
    text = as_text(table) if isinstance(table, pd.DataFrame) else table
    wide = len(text.columns) > NARROW
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption)}}}", rf"\label{{{label}}}"]
    lines += [r"\small", r"\resizebox{\linewidth}{!}{%"] if wide else [r"\small"]
    lines.append(rf"\begin{{tabular}}{{{''.join('l' if word else 'r' for word in text.words)}}}")
    lines += [r"\toprule", _latex_row(text.columns), r"\midrule", *map(_latex_row, text.rows)]
    lines += [r"\bottomrule", r"\end{tabular}" + "}" * wide]
    lines += [rf"\par\smallskip {{\footnotesize {_latex(note)}\par}}" for note in text.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(_latex(cell) for cell in cells) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row  # else an argument of the line before


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()) if c.isprintable())


def to_markdown(table: Text | pd.DataFrame) -> str:
    """The same as a table of GitHub's Markdown, its notes below; all text is escaped."""
    text = as_text(table) if isinstance(table, pd.DataFrame) else table
    rule = ["---" if word else "---:" for word in text.words]
    rows = [[_markdown(cell) for cell in row] for row in (text.columns, *text.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    return "\n".join([*lines, *(f"\n{_markdown(note)}" for note in text.notes), ""])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]&~])", r"\\\1", " ".join(text.split()))
