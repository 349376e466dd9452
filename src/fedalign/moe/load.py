"""A model from a folder or the hub, on the device that was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from fedalign import parallel
from fedalign.demo import model_folder
from fedalign.errors import UserError, unknown
from fedalign.moe.families import family_of, is_encoder_decoder, refuse
from fedalign.moe.kept import Kept
from fedalign.moe.tuning import SELECTION_BIAS

DEQUANTISED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config, "mxfp8": FineGrainedFP8Config}  # on loading
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def configuration_of(source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the auto class that makes a model of it.

    Raises:
        UserError: It is of a family that is refused, or of weights that cannot be dequantised.
    """
    config = AutoConfig.from_pretrained(source, **options)
    refuse(config)
    _check_sizes(source, config.get_text_config())
    if (method := quantised_by(config)) not in (None, *DEQUANTISED):
        raise UserError(
            f"model = {source!r}: its weights are quantised by {method}, and cannot be trained. Give the model "
            f"that they were made from, or one quantised by: {', '.join(DEQUANTISED)}."
        )
    if is_encoder_decoder(config):
        return config, AutoModelForSeq2SeqLM
    parts = _beside_text(config)
    if parts and type(config) in AutoModelForImageTextToText._model_mapping:
        return config, AutoModelForImageTextToText
    if parts and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"model = {source!r}: multimodal ({family_of(config)} has {', '.join(parts)}), and transformers has no "
            "class that answers text with it. Give a checkpoint of text alone, of a family in docs/models.md."
        )
    return config, AutoModelForCausalLM


def _beside_text(config: Any) -> list[str]:
    """Parts of a configuration besides the language model: towers for pictures and sound."""
    return (
        sorted({*getattr(config, "sub_configs", ())} - {"text_config"})
        if config.get_text_config() is not config
        else []
    )


def _check_sizes(source: str, config: Any) -> None:
    """Refuse sizes that no model has, before the attempt to make one takes hours or all memory."""
    for name, most in (("hidden_size", 10**6), ("num_hidden_layers", 10**4), ("vocab_size", 10**8)):
        value = getattr(config, name, 1)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"model = {source!r}: config.json: {name} = {value!r}: must be from 1 to {most:,}.")


def auto_of(source: str, options: Mapping[str, Any]) -> Any:
    """The auto class that loads a model."""
    return configuration_of(source, options)[1]


def quantised_by(config: Any) -> str | None:
    """How the weights of a checkpoint are quantised; None: they are not."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return None if found is None else str(getattr(method, "value", method))


def load_plain(
    path_or_id: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """An ordinary transformers model on the CPU, nothing of it changed but that quantised weights are dequantised.

    Raises:
        UserError: there is no such model, or it is broken or incomplete.
    """
    if dtype not in DTYPES:
        raise unknown("model.dtype", dtype, DTYPES)
    source = resolved_source(path_or_id)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    with explaining(source):
        config, auto = configuration_of(source, options)
        if method := quantised_by(config):
            options |= {"quantization_config": DEQUANTISED[method](dequantize=True)}
        model, report = auto.from_pretrained(
            source,
            config=config,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, on one line
            **options,
        )
    _check_complete(source, model, report)
    model.kept = Kept.of(model, source, revision, dequantised=bool(method))
    if method:
        _forget_quantisation(model, DTYPES[dtype])
        model.dequantised_from = method
    return model


def _forget_quantisation(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """All in one type, and saved under the names of a model that never was quantised."""
    model._weight_conversions = None  # of loading: they would name dense weights as if they were packed
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def auto_class(folder: Path, *, trust_remote_code: bool = False) -> str:
    """The class of transformers that loads what `MoEModel.save` wrote to a folder."""
    with explaining(str(folder)):
        return str(auto_of(str(folder), {"trust_remote_code": trust_remote_code}).__name__)


@contextlib.contextmanager
def explaining(source: str) -> Iterator[None]:
    """Turn what transformers raises for a model that is not there or broken into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever its configurations and files make fail
        place = "" if Path(source).is_dir() else "no such folder, and from the Hub it "
        raise UserError(f"model = {source!r}: {place}cannot be loaded: {in_one_line(error)}") from error


def freeze_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Loading forgets that ernie4_5_moe's selection bias is frozen."""
    for name, parameter in model.named_parameters():
        if name.endswith(SELECTION_BIAS):
            parameter.requires_grad_(False)
    return model


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder of an adapter where a model is wanted.

    Raises:
        UserError: It is one.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model = {str(folder)!r}: holds a PEFT adapter, not a model. Merge it into its base first: "
            "`fedalign export RUN --to DIR --merge`, or peft's merge_and_unload"
        )


def resolved_source(path_or_id: str | Path) -> str:
    """The folder, or else the Hub id; a UserError if neither is there, or it is clearly meant as a folder."""
    path, text = Path(path_or_id).expanduser(), str(path_or_id)
    if path.is_dir():
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise UserError(f"model = {text!r}: the folder must hold a config.json and weights")
        return str(path)
    if isinstance(path_or_id, Path) or path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise UserError(f"model = {text!r}: no such folder. Give a folder saved by transformers, or a Hub id")
    ask_hub(text)
    return text


def ask_hub(source: str) -> None:
    """One short question, of a model that was never loaded here: transformers asks for half a minute.

    Raises:
        UserError: The Hub has no such model, or is not reached.
    """
    kept = Path(huggingface_hub.constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    if huggingface_hub.is_offline_mode() or (kept / "snapshots").is_dir():
        return
    try:
        huggingface_hub.HfApi().model_info(source, timeout=10)
    except Exception as error:  # of the name, the network, or of who may read it
        raise UserError(
            f"model = {source!r}: no such folder, and the Hub does not give it: {in_one_line(error)} "
            "Check the spelling and the network."
        ) from None


def _check_complete(source: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"model = {source!r}: {name} is {list(found)}, config.json says {list(wanted)}.")
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        few = ", ".join(absent[:3])
        raise UserError(f"model = {source!r}: the checkpoint must hold every weight; {len(absent)} lack: {few}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            raise UserError(f"model = {source!r}: {name} holds NaN or infinite values. Get the checkpoint anew.")


def in_one_line(error: Exception) -> str:
    """Another library's error on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def quiet() -> None:
    """Hide transformers' bars for loading and writing weights; those of downloads stay. For command lines."""
    transformers_logging.disable_progress_bar()
    enable_progress_bars()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """`quiet` for a while, in somebody's own process; torch's number of threads is put back, too."""
    bars, downloads, threads = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
        torch.get_num_threads(),
    )
    quiet()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
        torch.set_num_threads(threads)


def model_path(name: str) -> str:
    """Resolve "demo" to the model that comes with the package; anything else is a folder or a hub id."""
    return str(model_folder()) if name == "demo" else name


def hardware(device: str) -> str:
    """A device for people to read: threads of a CPU, names of GPUs.

    Args:
        device: what `pick_device` found, or the name of a model's device.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == parallel.SPLIT:
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"


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
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError):
        raise UserError(f"run.device = {name!r}: not on this machine. Choose one of: {', '.join(there)}.") from None
    return name
