from __future__ import annotations

import math
import re
import shutil
import subprocess

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_size import paper_size

from analysis import mechanism, survival
from analysis.tables import Text, log_rank_text, modular, modular_text, t1, t1_text, t2, t2_text, t4, t4_text
from analysis.typeset import as_text, to_latex, to_markdown

HOSTILE = Text(
    ("a_b", "50%", "x & y"),
    (
        ("[1, 2]", "\\input{/etc/passwd}", "$x^2$"),
        ("*", "#1 {} ~ ^ | < > \"", "σ_max ≥ −1.5 ± .2 × 10ⁿ … ‖W‖ → ∞"),
        ("line\nbreak", "tab\there", "\x07bell"),
    ),
    (True, False, False),
    ("100% of 5_000 & more.",),
)  # fmt: skip


@pytest.fixture(scope="module")
def paper():
    return paper_size(("all_stiefel", "all_dgram", "hetero"), 2, step_every=500, flow_every=1000)


@pytest.fixture(scope="module")
def texts(paper):
    crossed = mechanism.crossings(paper)
    return {
        "t1": t1_text(paper, t1(paper)),
        "t2": t2_text(paper, t2(paper)),
        "t4": t4_text(paper, t4(paper)),
        "modular": modular_text(paper, modular(paper)),
        "log_rank": log_rank_text(survival.comparisons(paper)),
        "alarms": mechanism.alarms_text(mechanism.alarms(paper, crossed)),
        "precedence": mechanism.precedence_text(mechanism.precedence(paper, crossed)),
        "orders": mechanism.orders_text(mechanism.orders(paper, crossed), mechanism.chain(paper, crossed)),
        "raw": as_text(t1(paper)),
        "hostile": HOSTILE,
    }


NAMES = ["t1", "t2", "t4", "modular", "log_rank", "alarms", "precedence", "orders", "raw", "hostile"]


def cells(line):
    """Cells of a row of LaTeX: split where an ampersand is not escaped."""
    return re.split(r"(?<!\\)&", line)


def check_latex(source, text):
    """What pdflatex would refuse: unbalanced groups, bare specials, rows of the wrong width, not ASCII."""
    assert source.isascii()
    plain = re.sub(r"\\[\\&%$#_{}~^|]|\\label\{.*?\}", "", source)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "#" not in plain
    assert "~" not in plain
    outside = "".join(plain.split("$")[::2])
    assert "_" not in outside
    assert "^" not in outside
    assert re.findall(r"(?<!\\)%", source) == ["%"] * (len(text.columns) > 7)  # of \resizebox
    environments = re.findall(r"\\(begin|end)\{(\w+)\}", source)
    assert environments == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    rows = [line for line in source.split("\n") if line.endswith(r" \\")]
    assert [len(cells(row)) for row in rows] == [len(text.columns)] * (1 + len(text.rows))
    assert not any(row.startswith(("[", "*")) for row in rows)
    order = [source.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert order == sorted(order)
    commands = set(re.findall(r"\\([a-zA-Z]+)", source))
    assert "input" not in commands
    assert commands <= KNOWN, commands - KNOWN


COMMANDS = """begin end centering caption label small resizebox linewidth toprule midrule bottomrule par
smallskip footnotesize textbackslash textasciitilde textasciicircum textless textgreater textquotedbl textbar
dots cdot times pm infty to ge le ne approx surd top sigma lambda tau Delta chi frac"""
KNOWN = set(re.findall(r"\w+", COMMANDS))


@pytest.mark.parametrize("name", NAMES)
def test_latex_is_whole(texts, name):
    source = to_latex(texts[name], caption="Costs: 5% & σ_max", label=f"tab:{name}")
    check_latex(source, texts[name])
    assert rf"\label{{tab:{name}}}" in source
    assert r"\caption{Costs: 5\% \& $\sigma$\_max}" in source


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no TeX here: pdflatex is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_latex_compiles(texts, name, tmp_path):
    body = to_latex(texts[name], caption="Caption", label="tab:x")
    head = (
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    )
    (tmp_path / "t.tex").write_text(head + body + "\\end{document}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_by_hand():
    text = Text(("arm", "loss"), (("all_dgram", "−0.0125 [−0.0161, −0.0089]"),), (True, False), ("n = 5.",))
    assert to_latex(text, caption="Loss", label="tab:loss").split("\n") == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Loss}",
        r"\label{tab:loss}",
        r"\small",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"arm & loss \\",
        r"\midrule",
        r"all\_dgram & $-$0.0125 [$-$0.0161, $-$0.0089] \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip {\footnotesize n = 5.\par}",
        r"\end{table}",
        "",
    ]


@pytest.mark.parametrize("label", ["", "tab loss", "tab}", "tab\\x"])
def test_a_label_that_latex_cannot_refer_to_is_refused(label):
    with pytest.raises(ValueError, match="letters, digits"):
        to_latex(HOSTILE, caption="", label=label)


@given(st.lists(st.text(max_size=12), min_size=3, max_size=3))
def test_any_text_stays_in_its_cell(words):
    text = Text(("a", "b", "c"), (tuple(words),), (True, True, False), ())
    source = to_latex(text, caption="c", label="l")
    (row,) = [line for line in source.split("\n") if line.endswith(r" \\")][1:]
    assert len(cells(row)) == 3
    lines = to_markdown(text).split("\n")
    assert len(lines) == 4
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 4


@pytest.mark.parametrize("name", NAMES)
def test_markdown_has_a_cell_for_every_cell(texts, name):
    text = texts[name]
    lines = [line for line in to_markdown(text).split("\n") if line.startswith("| ")]
    assert len(lines) == 2 + len(text.rows)
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == len(text.columns) + 1
    assert lines[1].split() == ["|", *(x for word in text.words for x in ("---" if word else "---:", "|"))]


def test_markdown_makes_no_links_and_no_html():
    text = Text(("x",), (("[a](javascript:x)",), ("<img src=x>",), ("**bold** `c` a_b_c",)), (True,), ())
    assert to_markdown(text).split("\n")[2:5] == [
        r"| \[a\](javascript:x) |",
        r"| \<img src=x\> |",
        r"| \*\*bold\*\* \`c\` a\_b\_c |",
    ]


def test_any_frame_becomes_text_with_its_bounds():
    table = pd.DataFrame(
        {
            "arm": ["a", "b"],
            "gap": [-0.0123, 1.0],
            "gap_low": [-0.02, math.nan],
            "gap_high": [1e-9, math.nan],
            "p": [1.234567e-9, math.inf],
            "n": [3, 4],
            "run_ids": ["x y", "z"],
        }
    )
    text = as_text(table, "A note.")
    assert text.columns == ("arm", "gap", "p", "n")
    assert text.rows == (("a", "−0.0123 [−0.02, 1e−09]", "1.235e−09", "3"), ("b", "1", "∞", "4"))
    assert text.words == (True, False, False, False)
    assert text.notes == ("A note.",)
