"""Checks of the model: what it is, its weights, and what training it takes."""

from __future__ import annotations

import torch

from fedalign.client.memory import ClientData
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.data.encode import text_hash, tokenizer_hash
from fedalign.data.formats import FORMATS
from fedalign.doctor.estimate import SiteEstimate, StepCost, measure_step, parameter_counts, round_tokens
from fedalign.doctor.machine import COMFORT
from fedalign.doctor.report import Examination
from fedalign.moe.load import model_path
from fedalign.moe.model import MoEModel
from fedalign.units import clock, size


def skeleton_bench(config: Config) -> Workbench:
    """The configured model without its weights, and its tokenizer.

    Raises:
        UserError: There is no such model, or a limit does not fit it.
    """
    moe = MoEModel.skeleton(
        model_path(config.model.path),
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
        dtype=config.tuning.loaded_dtype,
        tuning=config.tuning,
    )
    return Workbench.around(moe, config)


def check_model(found: Examination, config: Config) -> Workbench | None:
    """Model and tokenizer are there, and what they are; the weights are not read."""
    bench = found.attempt("model", lambda: skeleton_bench(config))
    if bench is None:
        return None
    moe, (total, trained) = bench.moe, parameter_counts(bench)
    template = str(bench.tokenizer.chat_template or "")
    found.hashes |= {
        "architecture": moe.fingerprint(),
        "tokenizer": tokenizer_hash(bench.tokenizer),
        "chat template": text_hash(template),
    }
    found.add("model", "ok", f"{config.model.path}: {moe.family}, found by {moe.found}")
    found.add(
        "layout",
        "ok",
        f"{moe.layout.layers} MoE layers x {moe.experts} experts, top-{moe.top_k}; "
        f"{total / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M trained",
    )
    for note in moe.notes:
        found.add("note", "ok", note)
    lacks = FORMATS[config.data.kind].prompt is None and not template
    found.add(
        "tokenizer",
        "failed" if lacks else "ok",
        f"{len(bench.tokenizer):,} tokens, {'a' if template else 'no'} chat template"
        + (f", and data.kind = {config.data.kind!r} needs one" if lacks else ""),
        'Use a model tuned for chat, data.chat_template = "chatml", or data.kind = one of: instruction, text.',
    )
    return bench


def check_weights(found: Examination, config: Config) -> Workbench | None:
    """Load the weights, and compare them with those that the coordinator asks for."""
    bench = found.attempt("weights", lambda: Workbench.load(config))
    if bench is None:
        return None
    mine, wanted = bench.moe.weights_hash(), config.model.weights_hash
    found.hashes["weights"] = mine
    found.add(
        "weights",
        "ok" if wanted in (None, mine) else "failed",
        f"hash {mine[:12]}..." + (f", model.weights_hash = {wanted[:12]}..." if wanted else ""),
        "Use the same files, or the same revision, as the coordinator.",
    )
    return bench


def measured(found: Examination, bench: Workbench, client: ClientData) -> StepCost | None:
    """The cost of one forward and backward pass over the site's own examples."""
    try:
        return measure_step(bench, client.train)
    except torch.OutOfMemoryError:
        remedy = "Lower limits.batch_tokens in site.toml."
        found.add("memory", "failed", "one forward and backward pass does not fit", remedy)
        return None


def check_traffic(found: Examination, expected: SiteEstimate) -> None:
    """Bytes that a round sends and receives."""
    down = size(expected.down_a_round)
    if expected.down_whole > expected.down_a_round:
        down += f" ({size(expected.down_whole)} in the first and after one that it missed)"
    found.add(
        "traffic",
        "ok",
        f"a round: {down} down, at most {size(expected.up_a_round_at_most)} up, of which statistics "
        f"{size(expected.statistics)}",
    )


def check_time(found: Examination, config: Config, client: ClientData, step: StepCost) -> None:
    """A round of this site ends before the coordinator stops waiting."""
    seconds = step.seconds_a_token * round_tokens(config, [client.train], [client.held_out])
    limit = config.federation.timeout_seconds
    found.add(
        "time a round",
        "ok" if seconds <= COMFORT * limit else "warning",
        f"about {clock(seconds)}, from one measured pass (federation.timeout_seconds = {limit})",
        "Ask the coordinator for a longer timeout, fewer epochs, or data.max_train.",
    )
