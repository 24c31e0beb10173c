"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from trainers.yamlfile import printable

Level = Literal["ok", "warning", "problem"]
PROBES = ".doctor"
"""Folder of the store where objects are tried; nothing stays there."""


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    subject: str
    what: str
    fix: str = ""

    def line(self) -> str:
        what = f"{self.what}; {self.fix}" if self.fix else self.what
        return f"{self.level:8} {self.subject:8} {printable(' '.join(what.split()))}"


Findings = Iterator[Finding]


def guarded(subject: str, check: Callable[[], Findings]) -> Findings:
    """The findings of a check; one that breaks is a finding, and the others go on."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("problem", subject, f"this check broke: {type(error).__name__}: {error}", "report it")


def count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
