"""A table as people read it, and how its numbers are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd

from analysis.load import Frames


@dataclass(frozen=True, slots=True)
class Text:
    """A table as people read it: column heads, rows of cells, which columns are words, and notes."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[bool, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]], words: Collection[str], *notes: str) -> Self:
        """From rows of cells by column, all with the same columns, of which `words` hold words."""
        columns = tuple(rows[0]) if rows else ()
        is_word = tuple(column in words for column in columns)
        return cls(columns, tuple(tuple(row.values()) for row in rows), is_word, notes)


def arm_cells(frames: Frames, row: Mapping[Any, Any]) -> dict[str, str]:
    """The cells that every row begins with: its arm, and its place on each axis."""
    arm = str(row["arm"] if frames.grid else row["label"])
    return {"arm": arm} | {axis: axis_cell(row[axis]) for axis in frames.axes}


def axis_cell(value: Any) -> str:
    return number_cell(value, "g") if isinstance(value, float) else str(value)


def loss_cell(value: float) -> str:
    return "diverged" if value == math.inf else number_cell(value, ".4f")


def number_cell(value: float, how: str) -> str:
    return "–" if pd.isna(value) else format(value, how)


def three_digits(value: float) -> str:
    """`1.00`, `46.2`, `168`, `3,012`, `1.23e+06`."""
    return number_cell(value, ",.0f" if 1000 <= value < 1e6 else "#.3g").rstrip(".")


def p_cell(value: float) -> str:
    return "< .0001" if value < 0.0001 else number_cell(value, ".4f")


def signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}".replace("-", "−")  # + 0.0: no −0.0000


def bounds(low: float, high: float) -> str:
    """` [−0.0284, −0.0221]`; nothing where there is no interval."""
    return "" if math.isnan(low) else f" [{signed(low)}, {signed(high)}]"


def interval_cell(row: Mapping[Any, Any], name: str, mark: str) -> str:
    if not row[f"{name}_pairs"]:
        return "–"
    interval = bounds(row[f"{name}_low"], row[f"{name}_high"])
    return f"{signed(row[name])}{interval} ({row[f'{name}_pairs']}){mark}"


def bounded_cell(row: Mapping[Any, Any], name: str, how: Any) -> str:
    """`0.786 [0.781, 0.790]`."""
    text: str = how(row[name])
    if pd.isna(row[f"{name}_low"]):
        return text
    return f"{text} [{how(row[f'{name}_low'])}, {how(row[f'{name}_high'])}]"


def to_csv(table: pd.DataFrame) -> str:
    """The table as CSV: the same numbers give the same bytes. Missing cells are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(column) for column in table.columns])
    for row in table.itertuples(index=False):
        writer.writerow([_cell(value) for value in row])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    """Numbers at six digits at least; text that a spreadsheet would run as a formula gets a quote."""
    if not isinstance(value, str) and pd.isna(value):
        return ""
    if isinstance(value, float):  # six decimals, or six digits of a small number: a p of 1e-9 is not 0
        return f"{value:.6g}" if 0 < abs(value) < 0.1 else f"{value:.6f}"
    text = str(value).replace("\r\n", "\n")
    return (
        "'" + text if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    )
