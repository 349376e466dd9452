"""From a run's folder to what others load: an ordinary checkpoint or adapter, with a model card.

What the run wrote is copied as it is, so plain transformers and plain peft compute what the run scored, bit for bit.
Only `merge` and `dtype` change numbers: an adapter is added to its base in the type that the run held it in, then all
is rounded to `dtype` as transformers does on loading: routers too, but for what a family keeps in float32.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from fedalign.client.memory import ClientMemory, Kept
from fedalign.client.workbench import Workbench
from fedalign.compare.folder import ComparisonFolder
from fedalign.config.run import AlgorithmConfig, Config
from fedalign.data.formats import FORMATS
from fedalign.errors import UserError, unknown
from fedalign.export.card import MIXER, OF_DOCSTRINGS, Made, Trained, base_license, of_docstrings, write_card
from fedalign.export.leaving import EVERYBODY_STAYS, Leaving, Left, copy_without
from fedalign.files import KEPT_BY_CLIENTS, MARK, SUMS, check_free, claimed, damage, folder_name, replacing, rounds_in
from fedalign.moe.kept import save_with_kept
from fedalign.moe.load import DTYPES, auto_class, load_plain, model_path
from fedalign.moe.model import MoEModel
from fedalign.moe.site_experts import KEY, TRAINED, trained_by
from fedalign.protocol import Metrics, Weights
from fedalign.server.checkpoint import Checkpoints
from fedalign.server.health import DamagedError, read_round
from fedalign.server.results import ROUND, RunFolder, check_round, read_history
from fedalign.server.scores import best_of, epsilon_spent

CLIENTS = "clients"  # folder of personal models
ADAPTER, CONFIG = "adapter_config.json", "config.json"
OF_THE_RUN = (SUMS, ROUND)  # in a folder that a run saved; what is exported has digests of its own, and a card


@dataclass(frozen=True)
class Wanted:
    """The thing to export, and the way."""

    run: Path
    to: Path
    merge: bool = False
    dtype: str | None = None  # None: as trained
    best: bool = False
    clients: bool = False
    base: str | None = None  # of an adapter; None: as the run's configuration has it
    overwrite: bool = False
    data_license: str | None = None  # of what was trained on, for the card; None: unknown
    leaving: Leaving = EVERYBODY_STAYS


@dataclass(frozen=True)
class Snapshot:
    """A run's model after some round."""

    folder: RunFolder
    config: Config
    round: int
    history: Sequence[Metrics]  # up to that round
    kept: Path | None  # as the run wrote it ...
    weights: Weights | None  # ... or of a run that was cut off what is trained alone

    @property
    def reference(self) -> Path | None:
        """A folder that has all that was not trained."""
        best = self.folder.best
        return self.kept or (best if best.is_dir() else None)


@dataclass(frozen=True)
class Base:
    """The model that an adapter is put upon."""

    place: str  # a folder or a Hub id
    revision: str | None
    config: Config
    option: str = "--base"  # by which it can be given

    def open(self, adapter: Path | None) -> MoEModel:
        """Load it with the values of `adapter`, or with new ones.

        Raises:
            UserError: It is not there, is another one than the adapter was trained on, or the adapter is damaged.
        """
        from fedalign.moe import lora

        tuning = self.config.tuning.model_copy(update={"kind": "lora"})  # nothing is trained here: no need of 4 bits
        try:
            moe = MoEModel.load(self.place, **self._options(), tuning=tuning, seed=self.config.run.seed)
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. The adapter needs its base: say where, with {self.option}."
            ) from None
        if adapter is not None:
            moe.read_adapter(adapter)
            recorded, found = lora.recorded_base(adapter), moe.base_digest()
            if recorded not in (None, found):
                raise UserError(
                    f"base {self.place!r}: its weights ({found[:12]}) are not those that the adapter was trained on "
                    f"({str(recorded)[:12]}). It was made for another base, or the base changed since: give the one "
                    f"that it was trained on with {self.option}."
                )
        return moe

    def finish(self, folder: Path, *, merge: bool, dtype: str | None) -> None:
        """Make a checkpoint of an adapter, or have it name its base and round it to `dtype`."""
        from fedalign.moe import lora

        if merge:
            model = self.under(folder).merge_and_unload()
            lora.remove(folder)
            save_with_kept(model, folder)
            return
        lora.rename_base(folder, self.place, self.revision)
        if dtype is not None:
            lora.cast(folder, DTYPES[dtype])

    def under(self, adapter: Path) -> Any:
        """Load it with `adapter` put upon it by plain peft."""
        from fedalign.moe import lora

        return lora.put_upon(load_plain(self.place, **self._options()), adapter)

    def _options(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "dtype": self.config.tuning.loaded_dtype,
            "trust_remote_code": model.trust_remote_code,
            "revision": self.revision,
        }


@dataclass(frozen=True)
class Exported:
    """The export as written."""

    made: Made
    snapshot: Snapshot
    trained: Trained
    clients: int  # models in `clients/`
    without: int  # clients that have nothing of their own
    left: Left | None  # sites that took their experts back
    notes: Sequence[str]


def export(wanted: Wanted, progress: Callable[[str], None]) -> Exported:
    """Write what `wanted` says to its folder, all at once or nothing.

    Raises:
        UserError: There is nothing to export, it cannot be exported so, or something would be lost.
    """
    if wanted.dtype is not None and wanted.dtype not in DTYPES:
        raise unknown("--dtype", wanted.dtype, DTYPES)
    snapshot = find_snapshot(wanted.run, wanted.best)
    base = base_of(snapshot, wanted.base)
    _check(wanted, snapshot)
    place = wanted.to.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(place, "an export"):
            _check_free(wanted, snapshot, base)
            return _export(wanted, snapshot, base, place, progress)
    except OSError as error:
        raise UserError(f"--to {str(wanted.to)!r}: cannot be written: {error}. Give another folder.") from None


def _export(
    wanted: Wanted, snapshot: Snapshot, base: Base | None, place: Path, progress: Callable[[str], None]
) -> Exported:
    with replacing(place, "model") as folder:
        if wanted.leaving:
            progress("Copying what stays ...")
            left, personal, without = _write_without(wanted, snapshot, base, folder, progress), dict[str, Kept](), 0
        else:
            left, (personal, without) = None, _write(wanted, snapshot, base, folder, progress)
        progress("Writing the model card ...")
        made, trained = _made(wanted, snapshot, base, folder, len(personal)), _trained(snapshot, wanted.best)
        made = replace(made, left=left)
        write_card(folder, made, trained)
        for name, kept in personal.items():
            part = folder / CLIENTS / folder_name(name)
            write_card(part, made.of_client(name, mixes=bool(kept.mixer)), trained)
    return Exported(made, snapshot, trained, len(personal), without, left, _notes(snapshot, made))


def find_snapshot(run: Path, best: bool) -> Snapshot:
    """The run's model after its last complete round, or after its best one.

    Raises:
        UserError: It is no run, a process is at work in it, or it has no such model, or a damaged one.
    """
    if ComparisonFolder(run).design.exists():
        raise UserError(f"{str(run)!r}: is a comparison. Give one of the runs in it: {run}/runs/...")
    folder = RunFolder(run)
    config = folder.read_config("fedalign")
    folder.check_idle()
    if best:
        return _best(folder, config)
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}
        finished = int(summary.get("rounds", -1))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{str(folder.summary)!r}: damaged ({error}). Finish the run: {_resume(folder)}") from None
    if folder.model.is_dir() and finished >= max((number for number, _ in rounds_in(folder.checkpoint)), default=0):
        return _saved(folder, config, folder.model, finished)
    state = Checkpoints(folder.checkpoint, {}).load()
    if state is None or not state.round:
        raise UserError(f"{str(run)!r}: no round is complete yet. Go on with it: {_resume(folder)}")
    return Snapshot(folder, config, state.round, state.lines, None, state.weights)


def _best(folder: RunFolder, config: Config) -> Snapshot:
    best = best_of(_history(folder, None), config.evaluation.best) if folder.metrics.exists() else None
    if best is None:
        raise UserError("--best: no round of this run was scored, so none is the best. Leave out --best.")
    return _saved(folder, config, folder.best, int(best["round"]))


def _saved(folder: RunFolder, config: Config, model: Path, number: int) -> Snapshot:
    """The folder that the run wrote of a round, checked to be of that round."""
    history = _history(folder, number)
    check_round(model, history[-1] if history else {"round": number})
    return Snapshot(folder, config, number, history, model, None)


def _history(folder: RunFolder, last: int | None) -> list[Metrics]:
    try:
        lines = read_history(folder, strict=True)
        return [line for line in lines if last is None or int(line["round"]) <= last]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{str(folder.path)!r}: {error}. Go on with the run: {_resume(folder)}") from None


def _resume(folder: RunFolder) -> str:
    return f"fedalign run --resume {shlex.quote(str(folder.path))}"


def open_kept(run: Path, best: bool) -> Any:
    """The model that a run wrote, loaded on the CPU by plain transformers or peft, in the type that it was tuned in.

    Raises:
        UserError: It wrote none yet, or adapters miss the base that they were trained on.
    """
    snapshot = find_snapshot(run, best)
    if snapshot.kept is None:
        raise UserError(f"{str(run)!r}: is not finished. Go on with it: {_resume(snapshot.folder)}")
    base = base_of(snapshot)
    if base is None:
        dtype, trusted = snapshot.config.tuning.loaded_dtype, snapshot.config.model.trust_remote_code
        return load_plain(snapshot.kept, dtype=dtype, trust_remote_code=trusted)
    base.open(snapshot.kept)  # it is the right one, or this says what is wrong
    return base.under(snapshot.kept)


def base_of(snapshot: Snapshot, place: str | None = None) -> Base | None:
    """Of adapters, at `place` or where the run had it; None: the run's model is whole."""
    if not snapshot.config.tuning.adapts:
        return None
    configured = model_path(snapshot.config.model.path)
    found = Path(place or configured).expanduser()
    revision = snapshot.config.model.revision if place is None else None
    return Base(str(found.resolve()) if found.is_dir() else place or configured, revision, snapshot.config)


def _check(wanted: Wanted, snapshot: Snapshot) -> None:
    """Refuse what does not go together."""
    kind, engine = snapshot.config.tuning.kind, snapshot.config.federation.engine
    for flag, given in (("--merge", wanted.merge), ("--base", wanted.base is not None)):
        if given and not snapshot.config.tuning.adapts:
            raise UserError(f"{flag}: not needed, this run has no adapters (tuning.kind = {kind!r}). Leave out {flag}.")
    if wanted.leaving:
        _check_leaving(wanted, snapshot)
    if wanted.clients and engine == "flower":
        raise UserError(
            "--clients: the sites of this run keep what is personal to themselves; the coordinator has the global "
            "model alone. Leave out --clients."
        )


def _check_leaving(wanted: Wanted, snapshot: Snapshot) -> None:
    """Refuse what would not leave the experts that stay as they are."""
    for flag, given in (("--best", wanted.best), ("--clients", wanted.clients), ("--dtype", wanted.dtype)):
        if given:
            raise UserError(f"{wanted.leaving}: takes the run's last model as it is. Leave out {flag}.")
    if snapshot.config.tuning.adapts and not wanted.merge:
        raise UserError(
            f"{wanted.leaving}: this run trained an adapter (tuning.kind = {snapshot.config.tuning.kind!r}), and its "
            "base has all experts. Merge the two: add --merge."
        )
    if snapshot.kept is None:
        raise UserError(f"{wanted.leaving}: the run is not finished. Finish it: {_resume(snapshot.folder)}")


def _write_without(
    wanted: Wanted, snapshot: Snapshot, base: Base | None, folder: Path, progress: Callable[[str], None]
) -> Left:
    """The run's model without the experts of sites that leave; adapters are merged before."""
    assert snapshot.kept is not None, "checked before"
    with tempfile.TemporaryDirectory(dir=folder) as merged:
        whole = snapshot.kept
        if base is not None:
            whole = Path(merged)
            _write(wanted, snapshot, base, whole, progress)
        return copy_without(
            whole,
            folder,
            wanted.leaving,
            run=snapshot.config.algorithm,
            omit=OF_THE_RUN,
            trust_remote_code=snapshot.config.model.trust_remote_code,
        )


def _check_free(wanted: Wanted, snapshot: Snapshot, base: Base | None) -> None:
    """Refuse a place where anything but a model that may be replaced would be lost."""
    to, run = wanted.to, snapshot.folder
    place, said = to.resolve(), f"--to {str(to)!r}"
    precious = [("the run", run.path.resolve())]
    origin = Path(base.place if base is not None else model_path(snapshot.config.model.path))
    if origin.is_dir():
        precious.append(("the model that the run began with", origin.resolve()))
    for what, path in precious:
        if path.is_relative_to(place):
            raise UserError(f"{said}: is {what}, or a folder that holds it. Give another folder.")
    check_free(to, "model", wanted.overwrite, "--to")


def _write(
    wanted: Wanted, snapshot: Snapshot, base: Base | None, folder: Path, progress: Callable[[str], None]
) -> tuple[dict[str, Kept], int]:
    """Models without cards; what clients have of their own, and how many have nothing."""
    progress("Reading the run ...")
    names = list(_holdings(snapshot.folder)) if wanted.clients else []
    personal = {name: kept for name in names if (kept := _kept(snapshot, name)).personal}  # on disk until it is used
    if wanted.clients and not personal:
        raise UserError(
            f"--clients: {snapshot.config.algorithm.name} left nothing personal with any client: all use the exported "
            "model. Leave out --clients."
        )
    if snapshot.kept is not None:
        _copy(snapshot.kept, folder)
    if snapshot.kept is None or personal or (base is not None and (wanted.merge or wanted.base is not None)):
        progress("Loading the model ...")
        _with_model(snapshot, base, folder, personal, progress)
    for number, part in enumerate(_folders(folder, personal)):
        of_client = f" of client {number} of {len(personal)}" if number else ""
        if base is not None:
            progress(f"{'Merging' if wanted.merge else 'Writing'} the adapter{of_client} ...")
            base.finish(part, merge=wanted.merge, dtype=wanted.dtype)
        if wanted.dtype is not None and (base is None or wanted.merge):
            progress(f"Rounding the model{of_client} ...")
            _cast(part, wanted.dtype, snapshot.config.model.trust_remote_code)
        if (part / CONFIG).exists():
            _record(part / CONFIG, snapshot.config.algorithm)
    return personal, len(names) - len(personal)


def _record(file: Path, algorithm: AlgorithmConfig) -> None:
    """Have a model's configuration say that this run trained it; what a run wrote says so already."""
    config = json.loads(file.read_text(encoding="utf-8"))
    recorded = config | {TRAINED: trained_by(config, algorithm)}
    if recorded != config:
        file.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shared_by(file: Path) -> list[str] | None:
    """Who trained what sites share, as a configuration says; None: there is none, or no expert is a site's."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return trained_by(config) if KEY in config else None


def _kept(snapshot: Snapshot, name: str) -> Kept:
    """The state that a client kept from its last round, up to the one that is exported.

    Raises:
        UserError: It has forgotten, or what it kept is damaged.
    """
    memory = ClientMemory(snapshot.folder.clients / folder_name(name))
    rounds = rounds_in(memory.folder)
    if len(rounds) >= KEPT_BY_CLIENTS and rounds[0][0] > snapshot.round:
        raise UserError(
            f"--clients: clients keep what is personal of their last {KEPT_BY_CLIENTS} rounds, and {name!r} took part "
            f"in as many after round {snapshot.round}. Leave out --best or --clients."
        )
    try:
        return memory.before(snapshot.round + 1)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(memory.folder)!r}: damaged: {error}. Leave out --clients.") from None


def _folders(folder: Path, personal: Iterable[str]) -> Iterator[Path]:
    """The global model's, then those of the clients."""
    yield folder
    yield from (folder / CLIENTS / folder_name(name) for name in personal)


def _copy(kept: Path, folder: Path) -> None:
    """Copy a model as it is, but for what the run says of it.

    Raises:
        UserError: The copy is not what was written: a file cannot be read, or the run went on meanwhile.
    """
    try:
        shutil.copytree(kept, folder, ignore=shutil.ignore_patterns(MARK), dirs_exist_ok=True)
        problem = damage(folder)
    except shutil.Error as error:
        problem = " ".join(str(error).split())
    if problem:
        raise UserError(f"{str(kept)!r}: damaged, or changed while it was read: {problem}")
    for name in OF_THE_RUN:
        (folder / name).unlink()


def _with_model(
    snapshot: Snapshot,
    base: Base | None,
    folder: Path,
    personal: Mapping[str, Kept],
    progress: Callable[[str], None],
) -> None:
    """Write what needs the model itself, after a look at whether it is the right one."""
    moe = open_model(snapshot, base)
    if snapshot.weights is not None:
        try:
            moe.write(snapshot.weights)
        except ValueError as error:
            raise UserError(f"checkpoint of round {snapshot.round}: does not fit the model: {error}") from None
        moe.save(folder)
        _add_tokenizer(snapshot, moe, folder)
    if not personal:
        return
    weights = snapshot.weights or moe.read()
    for number, (name, kept) in enumerate(personal.items(), start=1):
        progress(f"Writing client {number} of {len(personal)} ...")
        part = folder / CLIENTS / folder_name(name)
        moe.write({**weights, **kept.personal})
        moe.save(part)
        _copy_beside(folder, part)
        if kept.mixer:
            save_file(dict(kept.mixer), part / MIXER)


def open_model(snapshot: Snapshot, base: Base | None) -> MoEModel:
    """The run's model; of a run that was cut off `snapshot.weights` are still to be written into it."""
    if base is not None:
        return base.open(snapshot.reference)
    config = snapshot.config
    return MoEModel.load(
        snapshot.reference or model_path(config.model.path),
        dtype=config.tuning.loaded_dtype,
        trust_remote_code=config.model.trust_remote_code,
        revision=None if snapshot.reference else config.model.revision,
        tuning=config.tuning,
    )


def _add_tokenizer(snapshot: Snapshot, moe: MoEModel, folder: Path) -> None:
    if snapshot.reference is not None:
        _copy_beside(snapshot.reference, folder)
    else:
        Workbench.around(moe, snapshot.config).tokenizer.save_pretrained(folder)


def _copy_beside(there: Path, folder: Path) -> None:
    """Copy what a model's folder holds beside the model: its tokenizer."""
    for file in there.iterdir():
        wanted = file.is_file() and file.name not in (MARK, *OF_THE_RUN) and ".safetensors" not in file.suffixes
        if wanted and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _cast(folder: Path, dtype: str, trust_remote_code: bool) -> None:
    """Round a checkpoint, in place."""
    model = load_plain(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(dir=folder) as rounded:  # what is kept as it was is read once more
        save_with_kept(model, rounded)
        for file in folder.glob("*.safetensors*"):
            if file.name != MIXER:
                file.unlink()
        for file in Path(rounded).iterdir():
            file.replace(folder / file.name)


def _holdings(folder: RunFolder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.holdings.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{str(folder.holdings)!r}: cannot be read ({error}). Go on with the run: {_resume(folder)}"
        ) from None


def _made(wanted: Wanted, snapshot: Snapshot, base: Base | None, folder: Path, clients: int) -> Made:
    config = snapshot.config
    place = base.place if base is not None else model_path(config.model.path)
    return Made(
        name=wanted.to.resolve().name,
        form="checkpoint" if base is None else "merged" if wanted.merge else "adapter",
        dtype=wanted.dtype or config.tuning.loaded_dtype,
        loader=_loader(folder, config.model.trust_remote_code),
        base=place,
        local_base=Path(place).is_dir(),
        trust_remote_code=config.model.trust_remote_code,
        clients=clients,
        base_license=base_license(config, place),
        data_license=wanted.data_license or (OF_DOCSTRINGS if of_docstrings(config) else None),
        shared_by=_shared_by(folder / CONFIG),
    )


def _trained(snapshot: Snapshot, best: bool) -> Trained:
    try:
        health = read_round(snapshot.folder.health / f"round-{snapshot.round:05d}.safetensors")
    except DamagedError:
        health = None
    summary = snapshot.folder.summary
    told = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    return Trained(
        with_classes(snapshot.config, snapshot.folder),
        snapshot.round,
        best,
        snapshot.history,
        _holdings(snapshot.folder),
        told.get("versions", {}),
        health,
        epsilon_spent(read_history(snapshot.folder), snapshot.folder.last_asked()),
        None if best else told.get("checked"),
    )


def with_classes(config: Config, folder: RunFolder) -> Config:
    """With the classes that the clients' examples were of, where the configuration names none."""
    if not FORMATS[config.data.kind].classes or config.data.labels or not folder.holdings.is_file():
        return config
    held = json.loads(folder.holdings.read_text(encoding="utf-8")).values()
    names = tuple(sorted({name for client in held for name in client["labels"] if name}))
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": names})})


def _loader(folder: Path, trust_remote_code: bool) -> str:
    """The class that loads a folder."""
    if not (folder / ADAPTER).exists():
        return auto_class(folder, trust_remote_code=trust_remote_code)
    task = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["task_type"]
    of_task = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
    return of_task.get(task, "AutoPeftModel")  # of a multimodal base, which the adapter names by its class


def _notes(snapshot: Snapshot, made: Made) -> list[str]:
    """Notes that a person has to know."""
    rounds, notes = snapshot.config.run.rounds, []
    if not snapshot.folder.finished():
        notes.append(f"The run is not finished: this is its model after round {snapshot.round} of {rounds}.")
    if made.form == "adapter" and made.local_base:
        notes.append("The adapter names its base by a folder of this machine: for others, name its Hub id with --base.")
    if made.left is not None:
        notes += made.left.notes
    if made.clients:
        notes.append(f"Folders in {CLIENTS}/ are called after the clients, and hold what is personal to them.")
    return notes
