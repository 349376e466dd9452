"""Whether what was saved loads in plain transformers and peft, and computes the same.

Names and shapes always. Where memory holds a second copy also every value, and the logits of 32 fixed tokens: their
mean difference stays within `TOLERANCE` of their spread (in bfloat16 routers are rounded, and may choose otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedalign.errors import UserError
from fedalign.moe.families import is_encoder_decoder
from fedalign.moe.load import auto_of, load_plain
from fedalign.moe.model import MoEModel

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def check_saved(moe: MoEModel, folder: Path, base: str, *, dtype: str, runs: bool = True, **options: Any) -> str:
    """Hold `folder` against the model that was saved there; how far was looked, for people.

    Args:
        moe: the model as it was saved.
        folder: where.
        base: what adapters were put upon.
        dtype: of the weights.
        runs: whether `moe` can run; a skeleton that was filled to be saved cannot.
        options: `trust_remote_code`, and the `revision` of the base.

    Raises:
        UserError: It does not load, or is another model.
    """
    if moe.adapter is not None:
        moe.check_adapter(folder)
        if not runs or moe.saved is not None or not _fits(moe):
            return "names, shapes and values of the adapter"
        from fedalign.moe import lora  # noqa: PLC0415 # peft takes a second to import

        plain = lora.put_upon(load_plain(base, dtype=dtype, **options), folder)
        return f"names, shapes and values of the adapter, {_same_logits(moe, plain, folder, dtype)}"
    options["revision"] = None
    if moe.sharded or not _fits(moe):
        with torch.device("meta"):
            _, report = auto_of(str(folder), options).from_pretrained(
                folder, device_map="meta", output_loading_info=True
            )
        wrong = {name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]}
        if wrong:
            raise _other(folder, f"{min(map(str, wrong))} and {len(wrong) - 1} more")
        return "names and shapes"
    plain = load_plain(folder, dtype=dtype, **options)
    _same_values(moe.model.state_dict(), plain.state_dict(), folder)
    return "names, shapes and values" + (f", {_same_logits(moe, plain, folder, dtype)}" if runs else "")


def _fits(moe: MoEModel) -> bool:
    """Whether memory that is free now holds the model once more."""
    return 1.2 * moe.nbytes < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _same_values(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], folder: Path) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            raise _other(folder, f"{name} is only {'there' if name in theirs else 'in the model that was trained'}")
        if not torch.equal(ours[name].cpu().to(theirs[name].dtype), theirs[name]):
            raise _other(folder, f"{name} has other values")


@torch.no_grad()
def _same_logits(moe: MoEModel, plain: Any, folder: Path, dtype: str) -> str:
    ids_B_S = torch.arange(32).view(2, 16) * 7 % moe.model.get_input_embeddings().num_embeddings
    decoder = {"decoder_input_ids": ids_B_S} if is_encoder_decoder(moe.model.config) else {}
    found = []
    for model, device in ((moe.model, moe.device), (plain, "cpu")):
        inputs = {name: value.to(device) for name, value in ({"input_ids": ids_B_S} | decoder).items()}
        found.append(model.eval()(**inputs, use_cache=False).logits.float().cpu())
    ours, theirs = found
    apart = float((ours - theirs).abs().mean() / ours.std().clamp_min(1e-12))
    if not apart <= TOLERANCE[dtype]:
        raise _other(
            folder, f"its logits are {apart:.2g} standard deviations off, at most {TOLERANCE[dtype]:g} are due"
        )
    return f"logits to {apart:.1g} of their spread"


def _other(folder: Path, what: str) -> UserError:
    return UserError(
        f"{str(folder)!r}: plain libraries load another model from it than was trained: {what}. All rounds are kept. "
        "To finish without this check: --resume, with --no-check."
    )
