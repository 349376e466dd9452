"""FedAlign-MoE: federated fine-tuning of Mixture-of-Experts language models (arXiv 2603.21276).

The Python door: what the commands `fedalign run` and `fedalign compare` do, for notebooks and scripts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedalign.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedalign.compare.comparison import Outcome
    from fedalign.config.run import Config
    from fedalign.config.toml import Overrides, Source, load_config
    from fedalign.inference.talk import Talk
    from fedalign.server.results import RunFolder

__version__ = "0.2.0"
__all__ = ["Config", "Run", "UserError", "__version__", "compare_runs", "load_config", "run"]

_LATER = {"Config": "fedalign.config.run", "load_config": "fedalign.config.toml"}  # an import of ours loads no library


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_LATER]


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder has it."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # so that text will do

    @property
    def _files(self) -> RunFolder:
        from fedalign.server.results import RunFolder

        return RunFolder(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """How it went: accuracies in [0, 1], losses in nats a token, bytes, seconds, versions."""
        try:
            summary: dict[str, Any] = json.loads(self._files.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{str(self.folder)!r}: holds no finished run (no summary.json).") from None
        return summary

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dict a round, from round 0 (before training); `pandas.DataFrame(history)` makes a table of it."""
        from fedalign.server.results import read_history

        return [dict(line) for line in read_history(self._files)]

    def model(self, *, best: bool = False) -> PreTrainedModel | PeftModel:
        """The final model, or the best round's, on the CPU and in `tuning.dtype`: peft's if adapters were tuned.

        Raises:
            UserError: It is not there, or the base of its adapters is not there or another one than it was.
        """
        from fedalign.export.write import open_kept
        from fedalign.moe.load import quietly

        with quietly():
            model: PreTrainedModel | PeftModel = open_kept(self.folder, best)
        return model

    def tokenizer(self) -> Any:
        """The model's, of transformers."""
        from fedalign.config import toml
        from fedalign.data.encode import load_tokenizer

        trusted = toml.load_config(self._files.config).model.trust_remote_code
        return load_tokenizer(self._files.model, trust_remote_code=trusted)

    def talk(self, *, best: bool = False) -> Talk:
        """The model to ask, as `fedalign chat` does: `.answer({"text": "..."})`; of a classifier `.classes(...)`, too.

        Raises:
            UserError: It is not there, or the base of its adapters is not there or another one than it was.
        """
        from fedalign.inference.load import Source, load
        from fedalign.inference.talk import Sampling, Talk
        from fedalign.moe.load import quietly

        with quietly():
            return Talk(load(Source(str(self.folder), best)), Sampling())


def run(
    config: Source | None = None,
    *,
    out: str | PathLike[str] | None = None,
    overrides: Overrides = (),
    resume: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    insecure_anywhere: bool = False,
) -> Run:
    """Fine-tune one MoE model across clients, as `fedalign run` does.

    Args:
        config: a TOML file, "demo", a mapping of sections, or a `Config`.
        out: the run's folder; without it: runs/NAME-ALGORITHM-SEED.
        overrides: {"section.key": value}, or the texts of `--set`.
        resume: instead of `config` and `out`: a run's folder, to go on after its last complete round.
        overwrite: replace the run that `out` holds.
        progress: show how it goes, in a terminal, a notebook or a file.
        insecure_anywhere: reach a SuperLink on another machine without TLS.

    Raises:
        UserError: Something does not fit together; its text is what the command line prints.
        KeyboardInterrupt: It was broken off; complete rounds are kept for `resume`.
    """
    from fedalign.cli.run import Beginning, asked, carry_out
    from fedalign.cli.terminal import console
    from fedalign.moe.load import quietly

    with quietly():
        settings, folder = asked(config, overrides, _path(out), _path(resume), overwrite)
        shown, how = console(quiet=not progress), Beginning(resume is None, overwrite)
        carry_out(settings, folder, shown, how, insecure_anywhere=insecure_anywhere)
    return Run(folder.path)


def compare_runs(
    config: Source | None = None,
    algorithms: Sequence[str] = (),
    *,
    ablation: bool = False,
    seeds: int | Sequence[int] | None = None,
    overrides: Overrides = (),
    tune: bool = False,
    out: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Outcome:
    """Compare algorithms over seeds, as `fedalign compare` does; finished runs in `out` are kept.

    Args:
        config: as of `run`.
        algorithms: such as ["fedavg", "fedprox:mu=0.1"].
        ablation: instead: the paper's five steps and the method.
        seeds: how many (3 if not given), or which.
        overrides: as of `run`; the text "clients.alpha=0.1,1.0" compares at both.
        tune: first choose learning rate and strength of each algorithm.
        out: the comparison's folder; without it: runs/compare-NAME, or ablation-NAME.
        resume: instead of all but `jobs`: a comparison's folder.
        jobs: runs side by side; without it: one a GPU, or one a core.
        overwrite: replace the comparison that `out` holds.
        progress: show how it goes.

    Returns:
        `.rows`, a dict for each finished run; `.table` in Markdown; `.failed`; `.folder`.

    Raises:
        UserError: Something does not fit together; its text is what the command line prints.
        KeyboardInterrupt: It was broken off; the same call goes on.
    """
    from fedalign.cli.compare import asked, carry_out
    from fedalign.cli.terminal import console
    from fedalign.moe.load import quietly

    names = [algorithms] if isinstance(algorithms, str) else algorithms
    several = None if seeds is None or isinstance(seeds, int) else "".join(f"{seed}," for seed in seeds)
    which = str(seeds) if isinstance(seeds, int) else several
    place, kept, shown = _path(out), _path(resume), console(quiet=not progress)
    with quietly():
        comparison = asked(config, names, ablation, which, overrides, tune, place, kept, overwrite, jobs, shown)
        return carry_out(comparison, overwrite)


def _path(place: str | PathLike[str] | None) -> Path | None:
    return None if place is None else Path(place)
