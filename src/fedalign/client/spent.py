"""A site's privacy ledger: each release is a line of JSON that is on disk before anything of it can leave.

Lines are only ever added, and count for ever, whichever run they were for: a kill between a line and its release costs
budget and never privacy. A site's budget is held against all of them.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedalign.client.accountant import COUNT, COUNT_NOISE, Release, Terms, epsilon, terms
from fedalign.config.run import Config
from fedalign.errors import TrainingFailedError, UserError
from fedalign.files import LOCK, append_private, locked, write_text
from fedalign.maths.hashing import derive_seed

PAID = ("privacy_epsilon", "privacy_delta", "privacy_noise_multiplier", "privacy_sampling_rate")  # metrics of a round
LEDGER, TERMS = "privacy.jsonl", "terms.json"
HERE = "here"  # the key of a run in one process


@dataclass(frozen=True)
class Line:
    """One release, or several of one kind."""

    run: str  # the run's key
    round: int  # 0: before the first
    kind: str  # count, training or loads
    noise: float
    rate: float
    times: int
    told: int | None = None  # count: the number of examples with its noise, which is what the run knows of it
    when: str = ""  # UTC, to the second

    @property
    def release(self) -> Release:
        """For the accountant."""
        return Release(self.noise, self.rate, self.times)


class PrivacyLedger:
    """The lines of a site, or of one client of a simulation.

    Args:
        folder: where the file lies.
        most: epsilon that all lines together may cost; None: they are counted, and nothing is refused.
        delta: at which that is.
    """

    def __init__(self, folder: Path, most: float | None = None, delta: float = 1e-5) -> None:
        self.file = folder / LEDGER
        self.most, self.delta = most, delta

    def lines(self, run: str | None = None) -> list[Line]:
        """All lines, or those of a run; half a line at the end is no release: its writer was killed.

        Raises:
            UserError: One is no line of ours.
        """
        try:
            *whole, _ = self.file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        found = []
        for number, text in enumerate(whole, 1):
            try:
                line = Line(**json.loads(text))
                if not (line.noise > 0 and 0 < line.rate <= 1 and line.times >= 1):
                    raise ValueError
            except (ValueError, TypeError):
                raise UserError(
                    f"{str(self.file)!r}: line {number} is no release. Mend it, since the budget is counted by it."
                ) from None
            found.append(line)
        return [line for line in found if run is None or line.run == run]

    def spent(self, delta: float | None = None, run: str | None = None) -> float:
        """Epsilon of all lines, or of those of a run."""
        return epsilon((line.release for line in self.lines(run)), self.delta if delta is None else delta)

    def charge(self, new: Sequence[Line], within: tuple[float, float] | None = None) -> None:
        """Write releases down, and return when the disk has them.

        Args:
            new: of one run.
            within: the epsilon that this run keeps with them, and its delta; None: it promises none.

        Raises:
            TrainingFailedError: They would cost more than is left; nothing is written, and nothing may leave.
        """
        with locked(self.file.with_name(f".{self.file.name}{LOCK}"), "a release", patience=60):
            lines = self.lines()
            if within is not None:
                most, delta = within
                after = epsilon((one.release for one in (*lines, *new) if one.run == new[0].run), delta)
                if after > most:
                    raise TrainingFailedError(
                        f"round {new[0].round} would bring it to epsilon {after:.4g}, and privacy.epsilon = {most:g} "
                        "is what the run keeps: a round that broke off was paid for, and its noise drawn"
                    )
            if self.most is not None:
                after = epsilon((line.release for line in (*lines, *new)), self.delta)
                if after > self.most:
                    raise TrainingFailedError(
                        f"its privacy budget is spent: with this round epsilon would be {after:.4g}, and privacy."
                        f"epsilon_total = {self.most:g} at delta = {self.delta:g} in its site.toml"
                    )
            append_private(self.file, map(asdict, new))


class Secret:
    """Where noise and samples come from: the system's randomness, or a seed where a study asks for the same again."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def draw(self, *place: object) -> int:
        """A key of 128 bits for one use of a generator; nobody else can know it unless a seed was asked for."""
        return secrets.randbits(128) if self.seed is None else derive_seed(self.seed, *place)


@dataclass(frozen=True)
class Privacy:
    """One client's part in a private run.

    Args:
        config: the run's.
        ledger: the site's.
        run: the run's key.
        folder: what the client keeps of this run.
        name: of the client.
    """

    config: Config
    ledger: PrivacyLedger
    run: str
    folder: Path
    name: str

    @property
    def secret(self) -> Secret:
        """Of every draw."""
        return Secret(self.config.privacy.seed)

    def told(self, examples: int) -> int:
        """The number of examples with noise, at least 1: drawn and paid for once a run.

        Raises:
            TrainingFailedError: The budget does not allow it.
        """
        known = [line.told for line in self.ledger.lines(self.run) if line.told is not None]
        if known:
            return known[0]
        seed = self.secret.draw("count", self.name)
        noisy = examples + random.Random(seed).gauss(0, COUNT_NOISE)
        told = max(1, round(noisy))
        self.ledger.charge([Line(self.run, 0, "count", COUNT.noise, COUNT.rate, COUNT.times, told)])
        return told

    def terms(self, examples: int) -> Terms:
        """This client's part; the noise that fits an epsilon takes seconds to find, and is kept.

        Raises:
            UserError: As of `accountant.terms`.
        """
        told, file = self.told(examples), self.folder / TERMS
        of = repr((self.config.privacy, self.config.training, self.config.run.rounds, self.config.sends_loads, told))
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["of"] == of:
                return Terms(**kept["terms"])
        found = terms(self.config, told)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"of": of, "terms": asdict(found)}))
        return found

    def pay(self, round: int, agreed: Terms) -> dict[str, float]:
        """Write a round's releases down before it is trained; what they and all before them cost in this run.

        A round that is trained again, since it broke off, is another release: its noise is drawn anew, and who saw both
        knows more.

        Raises:
            TrainingFailedError: The budget does not allow it, or the run would no longer keep its epsilon.
        """
        kinds, most = ("training", "loads"), self.config.privacy.epsilon
        self.ledger.charge(
            [
                Line(self.run, round, kind, one.noise, one.rate, one.times)
                for kind, one in zip(kinds, agreed.round, strict=False)
            ],
            within=None if most is None else (most, agreed.delta),
        )
        spent = self.ledger.spent(agreed.delta, self.run)
        return dict(zip(PAID, (spent, agreed.delta, agreed.noise, agreed.rate), strict=True))
