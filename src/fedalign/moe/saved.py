"""Whether what was saved loads in plain transformers and peft, and computes the same.

Names, shapes and every value always, tensor by tensor where memory does not hold a second copy. Where it does also the
logits of 32 fixed tokens: their mean difference stays within `TOLERANCE` of their spread (in bfloat16 routers are
rounded, and may choose otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedalign.errors import UserError
from fedalign.moe.families import is_encoder_decoder
from fedalign.moe.kept import kept_of
from fedalign.moe.load import auto_of, explaining, load_plain
from fedalign.moe.model import MoEModel, sha256
from fedalign.moe.stored import Loading, stored

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
    kept = kept_of(moe.model)
    kept.check(folder)
    looked = "names, shapes and values" + (f", without {', '.join(kept.lacking)}" if kept.lacking else "")
    if runs and not moe.sharded and _fits(moe):
        plain = load_plain(folder, dtype=dtype, **options)
        _same_values(moe.model.state_dict(), plain.state_dict().items(), folder)
        return f"{looked}, {_same_logits(moe, plain, folder, dtype)}"
    _same_one_by_one(moe, folder, options)
    return looked


def _same_one_by_one(moe: MoEModel, folder: Path, options: dict[str, Any]) -> None:
    """Names and shapes by loading a model without values, then value after value as it would have them."""
    with explaining(str(folder)), torch.device("meta"):
        plain, report = auto_of(str(folder), options).from_pretrained(
            folder, device_map="meta", output_loading_info=True, **options
        )
    places = stored(str(folder))
    loading = Loading(plain, places)
    wrong = {name for key in ("missing_keys", "mismatched_keys") for name in report[key]}
    wrong |= {*loading.without_place} - kept_of(moe.model).tensors.keys()
    if wrong:
        raise _other(folder, f"{min(map(str, wrong))} and {len(wrong) - 1} more")
    _same_values(moe.written or moe.model.state_dict(), loading.loaded(places), folder)


def _fits(moe: MoEModel) -> bool:
    """Whether memory that is free now holds the model once more."""
    return 1.2 * moe.nbytes < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _same_values(ours: Mapping[str, Tensor | bytes], theirs: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Compare values, or digests of ours; of what a model ties one name is enough."""
    left, unseen = dict(ours), {value.data_ptr() for value in ours.values() if isinstance(value, Tensor)}
    for name, value in theirs:
        if (own := left.pop(name, None)) is None:
            raise _other(folder, f"{name} is only there")
        equal = own == sha256(value) if isinstance(own, bytes) else torch.equal(own.cpu().to(value.dtype), value)
        if not equal:
            raise _other(folder, f"{name} has other values")
        unseen -= {own.data_ptr()} if isinstance(own, Tensor) else set()
    if lacking := [n for n, value in left.items() if not isinstance(value, Tensor) or value.data_ptr() in unseen]:
        raise _other(folder, f"{min(lacking)} is only in the model that was trained")


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
