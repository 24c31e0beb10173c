"""Commit and dirtiness of a run's code, also where the code came without its `.git`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainers import provenance
from trainers.provenance import CHECKOUT, checkout, code_digest

COMMIT = "0123abcd" * 5
SAY = "import json; from trainers.provenance import checkout; print(json.dumps(checkout()))"


def said(folder: Path, **environment: str) -> object:
    """What code in `folder` says of itself."""
    clean = {name: value for name, value in os.environ.items() if name != CHECKOUT}
    command = [sys.executable, "-c", SAY]
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def synced(tmp_path) -> Path:
    """The trainer as `ray up` copies it."""
    shutil.copytree(Path(provenance.__file__).parent, tmp_path / "trainers")
    return tmp_path


def test_a_copy_without_a_checkout_names_that_of_the_launch_if_the_code_is_the_same(synced):
    told = {"code": code_digest(), "commit": COMMIT, "dirty": True}
    assert said(synced) is None
    assert said(synced, **{CHECKOUT: json.dumps(told)}) == told
    (synced / "trainers" / "clock.py").write_text("# another")
    assert said(synced, **{CHECKOUT: json.dumps(told)}) is None


def test_a_checkout_names_itself(synced):
    git = ["git", "-C", str(synced), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    told = {"code": code_digest(), "commit": COMMIT, "dirty": True}
    own = said(synced, **{CHECKOUT: json.dumps(told)})
    assert own["commit"] != COMMIT
    assert own["dirty"] is False


@pytest.mark.parametrize("told", ["", "{", "3", '{"commit": "a"}', "null"])
def test_a_variable_that_says_nothing_is_none(monkeypatch, told):
    monkeypatch.setattr(provenance, "_git", lambda: None)
    monkeypatch.setenv(CHECKOUT, told)
    assert checkout() is None
