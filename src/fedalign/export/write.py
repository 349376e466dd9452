"""From a run's folder to what others load: an ordinary checkpoint or adapter, with a model card.

What the run wrote is copied as it is, so plain transformers and plain peft compute what the run scored, bit for bit.
Only `merge` and `dtype` change numbers: an adapter is added to its base in the type that the run held it in, then all
is rounded to `dtype` as transformers does on loading: routers too, but for what a family keeps in float32.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedalign.client.memory import personal_parts, read_personal
from fedalign.client.workbench import Workbench
from fedalign.compare.folder import ComparisonFolder
from fedalign.config.run import Config
from fedalign.config.toml import read_config
from fedalign.errors import UserError, unknown
from fedalign.export.card import MIXTURE_GATE, Made, Trained, write_card
from fedalign.files import folder_name, replacing
from fedalign.moe.load import DTYPES, auto_class, load_plain, model_path
from fedalign.moe.model import MoEModel
from fedalign.protocol import Metrics, Weights
from fedalign.server.checkpoint import Checkpoints
from fedalign.server.health import DamagedError, read_round
from fedalign.server.results import RunFolder, read_history
from fedalign.server.scores import merit

CLIENTS = "clients"  # folder of personal models
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Request:
    """What to export, and how."""

    run: Path
    to: Path
    merge: bool = False
    dtype: str | None = None  # None: as trained
    best: bool = False
    clients: bool = False
    base: str | None = None  # of an adapter; None: as the run's configuration has it
    overwrite: bool = False


@dataclass(frozen=True)
class Source:
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
            raise UserError(f"{str(error).rstrip('.')}. The adapter needs its base: say where, with --base.") from None
        if adapter is not None:
            moe.read_adapter(adapter)
            recorded, found = lora.recorded_base(adapter), moe.base_digest()
            if recorded not in (None, found):
                raise UserError(
                    f"base {self.place!r}: its weights ({found[:12]}) are not those that the adapter was trained on "
                    f"({str(recorded)[:12]}). It was made for another base, or the base changed since: give the one "
                    "that it was trained on with --base."
                )
        return moe

    def finish(self, folder: Path, *, merge: bool, dtype: str | None) -> None:
        """Make a checkpoint of an adapter, or have it name its base and round it to `dtype`."""
        from fedalign.moe import lora

        if merge:
            model = lora.put_upon(load_plain(self.place, **self._options()), folder).merge_and_unload()
            lora.remove(folder)
            model.save_pretrained(folder)
            return
        lora.rename_base(folder, self.place, self.revision)
        if dtype is not None:
            lora.cast(folder, DTYPES[dtype])

    def _options(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "dtype": self.config.tuning.loaded_dtype,
            "trust_remote_code": model.trust_remote_code,
            "revision": self.revision,
        }


@dataclass(frozen=True)
class Exported:
    """What was written."""

    made: Made
    source: Source
    trained: Trained
    clients: int  # models in `clients/`
    without: int  # clients that have nothing of their own
    notes: Sequence[str]


def export(request: Request, progress: Callable[[str], None]) -> Exported:
    """Write what `request` says to its folder, all at once or nothing.

    Raises:
        UserError: There is nothing to export, it cannot be exported so, or something would be lost.
    """
    if request.dtype is not None and request.dtype not in DTYPES:
        raise unknown("--dtype", request.dtype, DTYPES)
    source = find_source(request.run, request.best)
    base = _base(request, source)
    _check(request, source)
    _check_free(request, source, base)
    try:
        with replacing(request.to.resolve()) as folder:
            personal, without = _write(request, source, base, folder, progress)
            progress("Writing the model card ...")
            made, trained = _made(request, source, base, folder, len(personal)), _trained(source, request.best)
            write_card(folder, made, trained)
            for name in personal:
                part = folder / CLIENTS / folder_name(name)
                write_card(part, made.of_client(name, mixes=(part / MIXTURE_GATE).exists()), trained)
    except OSError as error:
        raise UserError(f"--to {str(request.to)!r}: cannot be written: {error}. Give another folder.") from None
    return Exported(made, source, trained, len(personal), without, _notes(source, made))


def find_source(run: Path, best: bool) -> Source:
    """The run's model after its last complete round, or after its best one.

    Raises:
        UserError: It is no run, or has no such model.
    """
    folder, config = RunFolder(run), _read_config(run)
    if best:
        return _best(folder, config)
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}
        finished = int(summary.get("rounds", -1))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{str(folder.summary)!r}: damaged ({error}). Finish the run: {_resume(folder)}") from None
    rounds = [int(path.name.removeprefix("round-")) for path in folder.checkpoint.glob("round-*") if path.is_dir()]
    if folder.model.is_dir() and finished >= max(rounds, default=0):
        return Source(folder, config, finished, _history(folder, finished), folder.model, None)
    state = Checkpoints(folder.checkpoint, {}).load()
    if state is None or not state.round:
        raise UserError(f"fedalign export {str(run)!r}: no round is complete yet. Go on with it: {_resume(folder)}")
    return Source(folder, config, state.round, state.history, None, state.weights)


def _best(folder: RunFolder, config: Config) -> Source:
    lines = _history(folder, None) if folder.best.is_dir() else []
    scored = [(score, line["round"]) for line in lines if (score := merit(line)) is not None]
    if not scored:
        raise UserError("--best: no round of this run was scored, so none is the best. Leave out --best.")
    number = int(max(scored, key=lambda one: one[0])[1])
    return Source(folder, config, number, _history(folder, number), folder.best, None)


def _history(folder: RunFolder, last: int | None) -> list[Metrics]:
    try:
        lines = read_history(folder, strict=True)
        return [line for line in lines if last is None or int(line["round"]) <= last]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{str(folder.path)!r}: {error}. Go on with the run: {_resume(folder)}") from None


def _resume(folder: RunFolder) -> str:
    return f"fedalign run --resume {shlex.quote(str(folder.path))}"


def _read_config(run: Path) -> Config:
    if ComparisonFolder(run).request.exists():
        raise UserError(f"fedalign export {str(run)!r}: is a comparison. Give one of the runs in it: {run}/runs/...")
    file = RunFolder(run).config
    try:
        return read_config(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"fedalign export {str(run)!r}: holds no run (no config.toml). Give the --out of a run."
        ) from None
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{str(file)!r}: cannot be read ({' '.join(str(error).split())}).") from None


def _base(request: Request, source: Source) -> Base | None:
    """Of adapters; None: the run's model is whole."""
    if not source.config.tuning.adapts:
        return None
    configured = model_path(source.config.model.path)
    place = request.base or configured
    found = Path(place).expanduser()
    revision = source.config.model.revision if request.base is None else None
    return Base(str(found.resolve()) if found.is_dir() else place, revision, source.config)


def _check(request: Request, source: Source) -> None:
    """Refuse what does not go together."""
    kind, engine = source.config.tuning.kind, source.config.federation.engine
    for flag, given in (("--merge", request.merge), ("--base", request.base is not None)):
        if given and not source.config.tuning.adapts:
            raise UserError(f"{flag}: not needed, this run has no adapters (tuning.kind = {kind!r}). Leave out {flag}.")
    if request.clients and engine == "flower":
        raise UserError(
            "--clients: the sites of this run keep what is personal to themselves; the coordinator has the global "
            "model alone. Leave out --clients."
        )


def _check_free(request: Request, source: Source, base: Base | None) -> None:
    """Refuse a place where anything but a model that may be replaced would be lost."""
    to, run = request.to, source.folder
    place, said = to.resolve(), f"--to {str(to)!r}"
    precious = [("the run", run.path.resolve())]
    origin = Path(base.place if base is not None else model_path(source.config.model.path))
    if origin.is_dir():
        precious.append(("the model that the run began with", origin.resolve()))
    for what, path in precious:
        if path.is_relative_to(place):
            raise UserError(f"{said}: is {what}, or a folder that holds it. Give another folder.")
    for own in (run.model, run.best, run.checkpoint, run.clients, run.health):
        if place.is_relative_to(own.resolve()):
            raise UserError(f"{said}: is a part of the run. Give another folder.")
    if to.exists() and not to.is_dir():
        raise UserError(f"{said}: is a file. Give a folder that does not exist yet.")
    if not to.exists() or not any(to.iterdir()):
        return
    if not any((to / name).exists() for name in ("config.json", ADAPTER)):
        raise UserError(f"{said}: is not empty and holds no model. Give a new or empty folder.")
    if not request.overwrite:
        raise UserError(f"{said}: already holds a model. Replace it: --overwrite; or give another --to.")


def _write(
    request: Request, source: Source, base: Base | None, folder: Path, progress: Callable[[str], None]
) -> tuple[dict[str, Path], int]:
    """Models without cards; the files of the clients' own parts, and how many clients have none."""
    progress("Reading the run ...")
    names, clients = list(_holdings(source.folder)) if request.clients else [], source.folder.clients
    found = {name: personal_parts(clients, source.round, name) for name in names}
    personal = {name: file for name, file in found.items() if file is not None}
    if request.clients and not personal:
        raise UserError(
            f"--clients: {source.config.algorithm.name} left nothing personal with any client: all use the exported "
            "model. Leave out --clients."
        )
    if source.kept is not None:
        _copy(source.kept, folder)
    if source.kept is None or personal or (base is not None and (request.merge or request.base is not None)):
        progress("Loading the model ...")
        _with_model(source, base, folder, personal, progress)
    for number, part in enumerate(_folders(folder, personal)):
        of_client = f" of client {number} of {len(personal)}" if number else ""
        if base is not None:
            progress(f"{'Merging' if request.merge else 'Writing'} the adapter{of_client} ...")
            base.finish(part, merge=request.merge, dtype=request.dtype)
        if request.dtype is not None and (base is None or request.merge):
            progress(f"Rounding the model{of_client} ...")
            _cast(part, request.dtype, source.config.model.trust_remote_code)
    return personal, len(names) - len(personal)


def _folders(folder: Path, personal: Mapping[str, Path]) -> Iterator[Path]:
    """The global model's, then those of the clients."""
    yield folder
    yield from (folder / CLIENTS / folder_name(name) for name in personal)


def _copy(kept: Path, folder: Path) -> None:
    """Copy a model as it is.

    Raises:
        UserError: A file of it cannot be read.
    """
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass  # a file cut short is noticed here
    except (OSError, shutil.Error, SafetensorError) as error:
        raise UserError(f"{str(kept)!r}: damaged: {' '.join(str(error).split())}") from None


def _with_model(
    source: Source,
    base: Base | None,
    folder: Path,
    personal: Mapping[str, Path],
    progress: Callable[[str], None],
) -> None:
    """Write what needs the model itself, after a look at whether it is the right one."""
    moe = _open(source, base)
    if source.weights is not None:
        try:
            moe.write(source.weights)
        except ValueError as error:
            raise UserError(f"checkpoint of round {source.round}: does not fit the model: {error}") from None
        moe.save(folder)
        _add_tokenizer(source, moe, folder)
    if not personal:
        return
    weights = source.weights or _exact(source, moe)
    for number, (name, file) in enumerate(personal.items(), start=1):
        progress(f"Writing client {number} of {len(personal)} ...")
        part, own = folder / CLIENTS / folder_name(name), read_personal(file)
        moe.write({**weights, **own.weights})
        moe.save(part)
        _copy_beside(folder, part)
        if own.gate:
            save_file({key: value.contiguous() for key, value in own.gate.items()}, part / MIXTURE_GATE)


def _open(source: Source, base: Base | None) -> MoEModel:
    """The run's model, to write other values into what is trained."""
    if base is not None:
        return base.open(source.reference)
    return _load(source, source.config.tuning.loaded_dtype)


def _load(source: Source, dtype: str) -> MoEModel:
    config = source.config
    return MoEModel.load(
        source.reference or model_path(config.model.path),
        dtype=dtype,
        trust_remote_code=config.model.trust_remote_code,
        revision=None if source.reference else config.model.revision,
        tuning=config.tuning,
    )


def _exact(source: Source, moe: MoEModel) -> Weights:
    """What the run wrote of what is trained: loading a model in bfloat16 rounds its routers before they are float32."""
    rounded = not source.config.tuning.adapts and source.config.tuning.loaded_dtype != "float32"
    return (_load(source, "float32") if rounded else moe).read()


def _add_tokenizer(source: Source, moe: MoEModel, folder: Path) -> None:
    if source.reference is not None:
        _copy_beside(source.reference, folder)
    else:
        Workbench.around(moe, source.config).tokenizer.save_pretrained(folder)


def _copy_beside(there: Path, folder: Path) -> None:
    """Copy what a model's folder holds beside the model: its tokenizer."""
    for file in there.iterdir():
        if file.is_file() and ".safetensors" not in file.suffixes and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _cast(folder: Path, dtype: str, trust_remote_code: bool) -> None:
    """Round a checkpoint, in place."""
    model = load_plain(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    for file in folder.glob("*.safetensors*"):
        if file.name != MIXTURE_GATE:
            file.unlink()
    model.save_pretrained(folder)


def _holdings(folder: RunFolder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.holdings.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{str(folder.holdings)!r}: cannot be read ({error}). Go on with the run: {_resume(folder)}"
        ) from None


def _made(request: Request, source: Source, base: Base | None, folder: Path, clients: int) -> Made:
    config = source.config
    place = base.place if base is not None else model_path(config.model.path)
    return Made(
        name=request.to.resolve().name,
        form="checkpoint" if base is None else "merged" if request.merge else "adapter",
        dtype=request.dtype or config.tuning.loaded_dtype,
        loader=_loader(folder, config.model.trust_remote_code),
        base=place,
        local_base=Path(place).is_dir(),
        trust_remote_code=config.model.trust_remote_code,
        clients=clients,
    )


def _trained(source: Source, best: bool) -> Trained:
    try:
        health = read_round(source.folder.health / f"round-{source.round:05d}.safetensors")
    except DamagedError:
        health = None
    summary = source.folder.summary
    versions = json.loads(summary.read_text(encoding="utf-8")).get("versions", {}) if summary.exists() else {}
    return Trained(source.config, source.round, best, source.history, _holdings(source.folder), versions, health)


def _loader(folder: Path, trust_remote_code: bool) -> str:
    """The class that loads a folder."""
    if not (folder / ADAPTER).exists():
        return auto_class(folder, trust_remote_code=trust_remote_code)
    task = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["task_type"]
    return {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}[task]


def _notes(source: Source, made: Made) -> list[str]:
    """What a person has to know of it."""
    rounds, notes = source.config.run.rounds, []
    if source.kept is None:
        notes.append(f"The run is not finished: this is its model after round {source.round} of {rounds}.")
    if made.form == "adapter" and made.local_base:
        notes.append("The adapter names its base by a folder of this machine: for others, name its Hub id with --base.")
    if made.clients:
        notes.append(f"Folders in {CLIENTS}/ are called after the clients, and hold what is personal to them.")
    return notes
