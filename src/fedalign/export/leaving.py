"""Sites that leave: a model without their experts, as an ordinary folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fedalign.config.run import AlgorithmConfig
from fedalign.errors import UserError
from fedalign.export.card import CARD, settings_of, template
from fedalign.files import MARK, SUMS, check_free, claimed, digests, refuse_damaged, replacing
from fedalign.moe.load import auto_class
from fedalign.moe.site_experts import KEY, TRAINED, UNKNOWN, among, checked, trained_by
from fedalign.moe.subset import Cut, check_subset, experts_in, without, write_subset
from fedalign.server.results import ROUND

FORMER = "README-of-the-whole-model.md"
BESIDE = (".jinja", ".json", ".md", ".model", ".py", ".tiktoken", ".txt", "LICENSE", "NOTICE")  # ends of names
ALGORITHM = "site_experts"


@dataclass(frozen=True)
class Leaving:
    """Who leaves, as a user says it: names that go, or the names that alone stay. Commas part names."""

    without: Sequence[str] = ()
    only: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.without or self.only)

    def __str__(self) -> str:
        flag, names = ("--without", self.without) if self.without else ("--only", self.only)
        return f"{flag} {','.join(names)}"

    def gone(self, record: Mapping[str, Sequence[int]]) -> list[str]:
        """Names of the sites that leave, in the order of the record.

        Raises:
            UserError: A name is empty or of no site, or nobody would leave, or nobody would stay.
        """
        if self.without and self.only:
            raise UserError("--without, --only: one says who leaves, the other who stays. Give one of them.")
        named = among(*(("--without", self.without) if self.without else ("--only", self.only)), record)
        gone = [name for name in record if (name in named) == bool(self.without)]
        if not gone:
            raise UserError(f"{self}: names all sites of the model, so that nobody leaves. Leave one out.")
        if len(gone) == len(record):
            raise UserError(
                f"{self}: names all sites of the model: what would be left is the model that they began with. "
                "Take that one."
            )
        return gone


EVERYBODY_STAYS = Leaving()


@dataclass(frozen=True)
class Left:
    """A model that sites have left."""

    gone: Mapping[str, Sequence[int]]  # their experts, as the whole model numbered them
    stay: Mapping[str, Sequence[int]]  # owners' experts, likewise
    cut: Cut
    behind: str  # what remains of those who left, in a sentence or two
    omitted: Sequence[str] = ()  # files and folders of the whole model that are not copied

    def table(self) -> list[tuple[str, str, str]]:
        """Owners, their experts here, and in the whole model."""
        owned = {expert for experts in self.stay.values() for expert in experts}
        public = [expert for expert in self.cut.stay if expert not in owned]
        rows = {"public": public, **self.stay}
        return [(name, _listed(map(self.cut.place, experts)), _listed(experts)) for name, experts in rows.items()]

    @property
    def notes(self) -> list[str]:
        """Notes for people, a line each."""
        omitted = (
            f"Not copied, since parts of those who left may be in it: {', '.join(self.omitted)}."
            if self.omitted
            else ""
        )
        return [self.behind, *([omitted] if omitted else [])]

    def __str__(self) -> str:
        return "; ".join(f"{name}: expert {_listed(experts)} of each layer" for name, experts in self.gone.items())


def remainder(trained: Sequence[str]) -> str:
    """The remainder of a site whose expert is taken out, in a sentence or two.

    Args:
        trained: who trained what sites share, see `moe.site_experts.trained_by`.
    """
    known = [name if name != ALGORITHM else f'{name} (shared = "average")' for name in trained if name != UNKNOWN]
    said = []
    if known:
        said.append(
            f"Stays behind: parts that sites share were trained by {', '.join(known)}; what a site that took part gave "
            "to these is still in them."
        )
    if UNKNOWN in trained:
        said.append(
            f"Not known: config.json does not say how {'it was trained before' if known else 'the model was trained'}. "
            "If sites trained parts that they share, what a site that left gave to these is still in them."
        )
    return " ".join(said) or (
        "No run trained parts that sites share, as config.json has it. What the model that they began with held of a "
        "site is still in it."
    )


def copy_without(
    whole: Path,
    folder: Path,
    leaving: Leaving,
    *,
    run: AlgorithmConfig | None = None,
    omit: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Left:
    """Fill a folder with a model but for the experts of those who leave.

    Args:
        whole: a model's folder.
        folder: an empty one.
        leaving: who leaves.
        run: the algorithm of the run that made it; None: config.json knows of it.
        omit: names of files that are not copied.
        trust_remote_code: whether code that comes with the model may be run.

    Raises:
        UserError: Nobody of that name is there, or the model cannot be cut.
    """
    if (whole / "adapter_config.json").exists():
        raise UserError(
            f"{leaving}: {str(whole)!r} holds an adapter, whose base has all experts. Merge the two from the run: "
            f"fedalign export RUN {leaving} --merge --to DIR."
        )
    if (whole / SUMS).exists():
        refuse_damaged(whole)
    config = _read(whole / "config.json")
    experts = experts_in(config, str(leaving))
    record = checked(config.get(KEY, {}), experts)
    gone = leaving.gone(record)
    leave = {expert for name in gone for expert in record[name]}
    cut = Cut(experts, tuple(expert for expert in range(experts) if expert not in leave))
    check_subset(config, cut, str(leaving))
    stay = {name: mine for name, mine in record.items() if name not in gone}
    owned, trained = {name: [*map(cut.place, mine)] for name, mine in stay.items()}, trained_by(config, run)
    smaller = without(config, cut) | {KEY: owned, TRAINED: trained}
    omitted = _copy_beside(whole, folder, {MARK, SUMS, CARD, *omit})
    (folder / "config.json").write_text(json.dumps(smaller, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_subset(whole, folder, cut, trust_remote_code=trust_remote_code)
    return Left({name: record[name] for name in gone}, stay, cut, remainder(trained), omitted)


def _copy_beside(whole: Path, folder: Path, known: Collection[str]) -> list[str]:
    """Copy what lies beside the weights, such as a tokenizer; the rest might hold weights, too, and is returned."""
    omitted = []
    for file in sorted(whole.iterdir()):
        if file.name in known or file.name.endswith((".safetensors", ".index.json")):
            continue
        if file.is_file() and file.name.endswith(BESIDE):
            shutil.copyfile(file, folder / file.name)
        else:
            omitted.append(file.name)
    return omitted


def export_folder(whole: Path, to: Path, leaving: Leaving, *, overwrite: bool = False) -> Left:
    """Write a model that no run's folder holds without the experts of those who leave, with a card, or nothing.

    Raises:
        UserError: It cannot be cut so, or something would be lost.
    """
    place = to.resolve()
    if whole.resolve().is_relative_to(place) or place.is_relative_to(whole.resolve()):
        raise UserError(f"--to {str(to)!r}: is the whole model, holds it, or lies in it. Give another folder.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(place, "an export"):
            check_free(to, "model", overwrite, "--to")
            with replacing(place, "model") as folder:
                left = copy_without(whole, folder, leaving, omit=(ROUND,))
                _write_card(whole, folder, place.name, left)
                return left
    except OSError as error:
        raise UserError(f"--to {str(to)!r}: cannot be written: {error}. Give another folder.") from None


def _write_card(whole: Path, folder: Path, name: str, left: Left) -> None:
    former = (whole / CARD).read_text(encoding="utf-8") if (whole / CARD).is_file() else ""
    if former:
        (folder / FORMER).write_text(former, encoding="utf-8")
    text = template("subset").render(
        head=ModelCardData(library_name="transformers", tags=["mixture-of-experts", "fedalign-moe"]).to_yaml().strip(),
        name=name,
        former=FORMER if former else "",
        settings=settings_of(former),
        loader=auto_class(folder),
        left=left,
        weights=digests(folder, folder.glob("*.safetensors")),
    )
    (folder / CARD).write_text(f"{text}\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{str(file)!r}: cannot be read: {' '.join(str(error).split())}") from None


def _listed(experts: Any) -> str:
    return ", ".join(map(str, experts))
