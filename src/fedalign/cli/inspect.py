"""`fedalign inspect`: what the MoE layers of a model are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fedalign.cli.terminal import out, print_table

if TYPE_CHECKING:
    from fedalign.moe.model import Description, MoEModel


INSPECT_EXAMPLES = "[bold]Example[/bold]\n\n  fedalign inspect allenai/OLMoE-1B-7B-0924"


def inspect(
    model: Annotated[str, typer.Argument(metavar="PATH_OR_HUB_ID", help='A folder, a hub id, or "demo".')],
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code that comes with the model.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show a model's MoE layers: router, experts, top-k, shared experts, parameter groups and sizes."""
    from fedalign.moe.load import quiet
    from fedalign.moe.model import load_model

    quiet()
    with out.status("Loading the model ..."):
        moe = load_model(model, trust_remote_code=trust_remote_code, revision=revision)
    owned = [(name, told) for name, told in (("owners", _owners(moe)), ("trained by", _trained(moe))) if told]
    more = owned + [("not for LoRA", layers) for layers in moe.not_adaptable()] + [("note", note) for note in moe.notes]
    print_table(model, [*_description_rows(moe.describe()), *more])


def _description_rows(about: Description) -> list[tuple[str, str]]:
    from fedalign.units import size

    groups = [f"{kind} {count:,} ({size(4 * count)})" for kind, count in about.group_parameters.items()]
    several = f" with {len(about.routers)} routers" if len(about.routers) != about.moe_layers else ""
    return [
        ("family", f"{about.family}, found by {about.found}"),
        ("parameters", f"{about.parameters:,}, active for a token {about.active_parameters:,}, {about.dtype}"),
        ("layers", f"{about.moe_layers} MoE{several}, {about.dense_layers} dense"),
        ("experts", f"{about.experts} a layer, top-{about.top_k}, {' and '.join(about.scoring)} scoring"),
        ("router", f"{_folded(about.routers)}, input {about.hidden}"),
        ("expert module", _folded(about.expert_modules)),
        ("shared experts", _folded(about.shared_experts) or "none"),
        ("selection biases", _folded(about.selection_biases) or "none"),
        ("longest sequence", f"{about.max_length:,} tokens" if about.max_length else "no limit"),
        (
            "parameter groups",
            f"shared, embeddings, head, {len(about.routers) * about.experts} gate rows, as many experts",
        ),
        ("size of one", "; ".join(groups)),
        ("on the wire", f"{about.trainable_parameters:,} trainable, {about.trainable_megabytes:.1f} MB in float32"),
    ]


def _owners(moe: MoEModel) -> str:
    """Whose expert is whose; empty: all are public."""
    from fedalign.moe.site_experts import owners

    record = owners(moe.model.config)
    public = moe.describe().experts - sum(map(len, record.values()))
    told = [f"{name} {', '.join(map(str, experts))}" for name, experts in record.items()]
    return "; ".join([*told, f"public: the other {public}"]) if record else ""


def _trained(moe: MoEModel) -> str:
    """Who trained what sites share; empty: no run recorded it, and no site has an expert."""
    from fedalign.moe.site_experts import KEY, TRAINED, trained_by

    config = moe.model.config.to_dict()
    known = ", ".join(trained_by(config)) or "no run"
    return f"what sites share: {known}" if config.keys() & {KEY, TRAINED} else ""


def _folded(paths: Sequence[str]) -> str:
    """Module paths with their layer numbers folded into one range."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in paths))
