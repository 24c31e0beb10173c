"""Tables as functions of frames: numbers first (`t1` to `t4`, `modular`), then the same as text and as
CSV. `analysis.typeset` writes them for papers and pages."""

from analysis.tables.assignments import EXPLORATORY, PREDECLARED, PRIMARY, PUBLISHED, REFERENCES, t1, t1_text
from analysis.tables.cells import Text, bounds, p_cell, signed, three_digits, to_csv
from analysis.tables.costs import t2, t2_text
from analysis.tables.metrics import modular, modular_text
from analysis.tables.rules import log_rank_text, t4, t4_text
from analysis.tables.search import t3, t3_text

__all__ = [
    "EXPLORATORY",
    "PREDECLARED",
    "PRIMARY",
    "PUBLISHED",
    "REFERENCES",
    "Text",
    "bounds",
    "log_rank_text",
    "modular",
    "modular_text",
    "p_cell",
    "signed",
    "t1",
    "t1_text",
    "t2",
    "t2_text",
    "t3",
    "t3_text",
    "t4",
    "t4_text",
    "three_digits",
    "to_csv",
]
