"""Answers to a file of prompts, kept as they come: beside their place until all are there, so that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedalign.client.workbench import Workbench
from fedalign.errors import UserError
from fedalign.files import claimed, replacing_file
from fedalign.inference.talk import Sampling
from fedalign.server.run import digest

GENERATED = "generated"  # the column of the answers
Line = Mapping[str, Any]


def made_of(bench: Workbench, sampling: Sampling, prompts: Sequence[Line]) -> dict[str, str]:
    """Fingerprints of all that answers depend on, by what a person calls it."""
    settings = [bench.config.model_dump(mode="json")[section] for section in ("data", "evaluation")]
    return {
        "model": bench.moe.weights_hash(),
        "configuration": digest([*settings, asdict(sampling)]),
        "prompts": digest(prompts),
    }


@dataclass(frozen=True)
class AnswerFile:
    """A file of a JSON object an answer; until it is complete, `part` holds what there is, after a line of origins."""

    place: Path

    @property
    def part(self) -> Path:
        """The part that a broken-off run leaves."""
        return self.place.with_name(f"{self.place.name}.part")

    def check(self, *, resume: bool) -> None:
        """Refuse to overwrite.

        Raises:
            UserError: Answers are there already.
        """
        if self.place.exists():
            raise UserError(
                f"--to {str(self.place)!r}: is there already, and nothing is overwritten. Give another name."
            )
        if self.part.exists() and not resume:
            raise UserError(
                f"--to {str(self.place)!r}: {str(self.part)!r} holds the answers of a run that was broken off. "
                "Go on with --resume, or remove it."
            )

    @contextmanager
    def writing(self, origins: Mapping[str, str], *, resume: bool) -> Iterator[Answers]:
        """Go on after the answers that are there; on a clean exit the file is complete and in its place.

        Raises:
            UserError: What is there is of another model, configuration or prompts, or another process is at work.
        """
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.place, "`fedalign generate`"):
            self.check(resume=resume)
            done = self._kept(origins)
            answers = Answers(self.part, done or [])
            if done is None:
                self.part.write_text(json.dumps(origins) + "\n", encoding="utf-8")
            try:
                yield answers
            finally:
                if not answers.lines:
                    self.part.unlink()
            with replacing_file(self.place) as new:
                new.write_text("".join(answers.lines), encoding="utf-8")
            self.part.unlink()

    def _kept(self, origins: Mapping[str, str]) -> list[str] | None:
        """The whole lines of answers, after half a line was cut off; None: there is no file to go on with."""
        lines = _lines(self.part) if self.part.exists() else []
        if not lines:
            return None
        try:
            there = dict(json.loads(lines[0]))
        except (ValueError, TypeError):
            raise UserError(f"--resume: {str(self.part)!r} was not written by us. Move it away.") from None
        for name, mine in origins.items():
            if there.get(name) != mine:
                raise UserError(
                    f"--resume: the answers in {str(self.part)!r} are of another {name}. "
                    "Remove it, or give another --to."
                )
        with self.part.open("rb+") as file:
            file.truncate(len("".join(lines).encode()))
        return lines[1:]


@dataclass(frozen=True)
class Answers:
    """The answers that there are; new ones are kept at once."""

    part: Path
    lines: list[str]

    def add(self, line: Line) -> None:
        """Keep one more."""
        self.lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with self.part.open("a", encoding="utf-8") as file:
            file.write(self.lines[-1])


def _lines(file: Path) -> list[str]:
    """The lines that have an end."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode()
    return [f"{line}\n" for line in whole.split("\n")[:-1]]
