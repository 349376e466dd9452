"""A model from a folder or the hub, on the device that was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedalign import parallel
from fedalign.demo import model_folder
from fedalign.errors import UserError, unknown
from fedalign.moe.families import is_encoder_decoder, refuse
from fedalign.moe.tuning import SELECTION_BIAS, choosers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def configuration_of(source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the auto class that makes a model of it."""
    config = AutoConfig.from_pretrained(source, **options)
    refuse(config)
    return config, AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def load_plain(
    path_or_id: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """An ordinary transformers model on the CPU, nothing of it changed.

    Raises:
        UserError: there is no such model, or it is broken or incomplete.
    """
    if dtype not in DTYPES:
        raise unknown("model.dtype", dtype, DTYPES)
    source = resolved_source(path_or_id)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    with explaining(source):
        config, auto = configuration_of(source, options)
        model, report = auto.from_pretrained(
            source, config=config, dtype=DTYPES[dtype], output_loading_info=True, **options
        )
    _check_complete(source, model, report["missing_keys"])
    return model


def auto_class(folder: Path, *, trust_remote_code: bool = False) -> str:
    """The class of transformers that loads what `MoEModel.save` wrote to a folder."""
    with explaining(str(folder)):
        return str(configuration_of(str(folder), {"trust_remote_code": trust_remote_code})[1].__name__)


@contextlib.contextmanager
def explaining(source: str) -> Iterator[None]:
    """Turn what transformers raises for a model that is not there or broken into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        place = "" if Path(source).is_dir() else "no such folder, and from the Hub it "
        raise UserError(f"model = {source!r}: {place}cannot be loaded: {in_one_line(error)}") from error


def freeze_unreached(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze what only chooses experts or keys; loading forgets that ernie4_5_moe's selection bias is frozen."""
    blind = choosers(model)
    for name, parameter in model.named_parameters():
        if name.endswith(SELECTION_BIAS) or name.startswith(blind):
            parameter.requires_grad_(False)
    return model


def resolved_source(path_or_id: str | Path) -> str:
    """The folder, or else the Hub id; a UserError if it is clearly meant as a folder and is none."""
    path, text = Path(path_or_id).expanduser(), str(path_or_id)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"model = {text!r}: holds a PEFT adapter, not a model. Merge it into its base first: "
                "`fedalign export RUN --to DIR --merge`, or peft's merge_and_unload"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"model = {text!r}: the folder must hold a config.json and weights")
        return str(path)
    if isinstance(path_or_id, Path) or path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise UserError(f"model = {text!r}: no such folder. Give a folder saved by transformers, or a Hub id")
    return text


def _check_complete(source: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    absent = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if absent:
        few = ", ".join(absent[:3])
        raise UserError(f"model = {source!r}: the checkpoint must hold every weight; {len(absent)} lack: {few}")


def in_one_line(error: Exception) -> str:
    """What another library had to say, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def quiet() -> None:
    """Hide transformers' bars for loading and writing weights; those of downloads stay. For command lines."""
    transformers_logging.disable_progress_bar()
    enable_progress_bars()


def model_path(name: str) -> str:
    """Resolve "demo" to the model that comes with the package; anything else is a folder or a hub id."""
    return str(model_folder()) if name == "demo" else name


def pick_device(name: str) -> str:
    """`auto` is a GPU if there is one, `split` all of them.

    Raises:
        UserError: The device is not there.
    """
    there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == parallel.SPLIT:
        if torch.cuda.device_count() < 2:
            raise UserError(
                f"run.device = {name!r}: needs two GPUs or more, this machine has {torch.cuda.device_count()}. "
                f"Choose one of: {', '.join(there)}."
            )
        return name
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"run.device = {name!r}: not on this machine. Choose one of: {', '.join(there)}.") from None
    return name
