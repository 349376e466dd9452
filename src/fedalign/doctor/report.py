"""Findings of an examination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from fedalign.errors import UserError

T = TypeVar("T")
Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str  # the value, and the rule where there is one
    remedy: str = ""
    private: bool = False  # tells something of the data: for the site's own terminal


@dataclass
class Examination:
    """All that was looked at, in order."""

    checks: list[Check] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)  # what sites must have in common: name -> 64 hex digits
    preview: list[tuple[str, bool]] = field(default_factory=list)  # one example as the model reads it: text, is answer

    @property
    def failed(self) -> bool:
        """Whether anything would stop a run."""
        return any(check.verdict == "failed" for check in self.checks)

    def add(self, name: str, verdict: Verdict, found: str, remedy: str = "", private: bool = False) -> None:
        """Note a check; what to do is told only where something is to be done."""
        self.checks.append(Check(name, verdict, found, "" if verdict == "ok" else remedy, private))

    def attempt(self, name: str, look: Callable[[], T], private: bool = False) -> T | None:
        """The result of `look`; its UserError is a failed check."""
        try:
            return look()
        except UserError as error:
            self.add(name, "failed", str(error), private=private)
            return None
