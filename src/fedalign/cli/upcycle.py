"""The command line of sparse upcycling: `fedalign upcycle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalign.cli.terminal import on_disk, out, print_table, say
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.moe.part import Grown
    from fedalign.moe.upcycle import DenseSource

UPCYCLE_EXAMPLES = """
[bold]What becomes of which model[/bold]

  Llama, Mistral   Mixtral; Qwen2-MoE where some layers stay dense, which Mixtral cannot

  Qwen2            Qwen2-MoE

  Qwen3            Qwen3-MoE

[bold]Examples[/bold]

  fedalign upcycle Qwen/Qwen3-0.6B --out models/qwen3-8x

  fedalign upcycle models/llama --experts 4 --layers every:4 --out models/llama-4x

  fedalign upcycle allenai/OLMoE-1B-7B-0924 --site-experts hospital-a,hospital-b --out models/olmoe+2

  fedalign upcycle model.Q4_1.gguf --out models/from-gguf      needs pip install 'fedalign-moe\\[gguf]'
"""


def upcycle(
    dense: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or a GGUF file.")],
    out_: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the new model goes.", show_default=False)],
    experts: Annotated[int, typer.Option("--experts", help="Experts of each MoE layer.")] = 8,
    top_k: Annotated[int, typer.Option("--top-k", help="Experts a token is sent to.")] = 2,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="all|every:N|0,3,6",
            help="Which layers get experts: all, every Nth (every:4 is 3, 7, 11, ...), or numbers from 0.",
        ),
    ] = "all",
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            help="What makes the copies differ: a standard deviation, as a share of that of each matrix. "
            "0: exactly the dense model.",
        ),
    ] = 0.01,
    site_experts: Annotated[
        str | None,
        typer.Option(
            "--site-experts",
            metavar="NAME,NAME",
            help="Sites that get an expert of their own in each MoE layer, beside the public ones. MODEL may be an "
            "MoE, or the demo's, then.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random routers, noise, and the text that models write.")] = 0,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that --out holds.")] = False,
) -> None:
    """Make a Mixture-of-Experts model of a dense one: each expert starts as a copy of the layer's FFN.

    The router is random and the weights of the top-k experts sum to one, so without noise the new model computes what
    the dense one does.

    With --site-experts each site gets one more expert a layer: a copy of the public one that is used most, with a
    router row that few tokens follow until the site has trained it (algorithm.name = "site_experts").
    """
    from fedalign.files import check_free, claimed, refuse_source, replacing
    from fedalign.moe.kept import save_with_kept
    from fedalign.moe.load import model_path, quiet
    from fedalign.moe.model import MoEModel
    from fedalign.moe.part import grown
    from fedalign.moe.site_experts import named
    from fedalign.moe.upcycle import DenseSource, Recipe, is_sparse, load_dense, load_sparse, probe_logits
    from fedalign.moe.upcycle import upcycle as make_sparse

    quiet()
    out_ = out_.expanduser()
    sites = named("--site-experts", site_experts)
    recipe, source = Recipe(experts, top_k, layers, noise, seed), DenseSource.find(model_path(dense), revision)
    refuse_source(out_, str(source.place), "model")
    check_free(out_, "model", overwrite)
    with out.status("Loading the model ..."):
        sparse = bool(sites) and is_sparse(source)
        model = load_sparse(source, recipe) if sparse else load_dense(source, recipe)
        tokenizer, tokenizer_found = _tokenizer(source)
    family, parameters = model.config.model_type, model.num_parameters()
    own: list[tuple[str, str]] = []
    with out.status("Copying ..."):
        logits = probe_logits(model.eval())
        if not sparse:
            model = make_sparse(model, recipe)
        if sites:
            more = grown(MoEModel.wrap(model), sites, seed)
            model, own = more.model, _own_rows(more, sites)
        highest, difference = float(logits.abs().max()), float((probe_logits(model) - logits).abs().max())
    place = out_.resolve()
    with out.status("Writing ..."), claimed(place, "another command"):
        check_free(out_, "model", overwrite)  # once more: somebody may have been faster
        with replacing(place, "model") as folder:
            save_with_kept(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    about = MoEModel.wrap(model).describe()
    made, base = ("", "model") if sparse else (f", noise {noise:g}", "dense model")
    rows = [
        ("family", family if sparse else f"{family} -> {about.family}"),
        ("layers", f"{about.moe_layers} MoE, {about.dense_layers} dense"),
        ("experts", f"{about.experts} a layer, top-{about.top_k}{made}, seed {seed}"),
        *own,
        ("parameters", f"{parameters:,} -> {about.parameters:,}, active for a token {about.active_parameters:,}"),
        (
            "logits",
            f"at most {difference:.1e} from the {base}'s, which reach {highest:.2g} ({about.dtype})",
        ),
        ("tokenizer", tokenizer_found),
    ]
    print_table(f"{source} upcycled", rows)
    quoted = shlex.quote(str(out_))
    say(f"Written   {out_} ({on_disk(out_)}): load it with transformers")
    say(f"Look      fedalign inspect {quoted}")
    how = " --set algorithm.name=site_experts" if sites else ""
    say(f"Train     fedalign run my.toml --set model.path={quoted}{how}")


def _own_rows(more: Grown, sites: list[str]) -> list[tuple[str, str]]:
    """A table's rows about sites' own experts."""
    quiet = (
        f"at most {100 * max(more.reached_L):.2g} % of {more.tokens:,} tokens of public text, which the model wrote, "
        "would go to one in a layer"
    )
    about = f"{', '.join(sites)}: one a layer each, a copy of the public one that is used most"
    return [("sites' experts", about), ("quiet", quiet)]


def _tokenizer(source: DenseSource) -> tuple[Any, str]:
    """The model's tokenizer, or None, and what to tell of it."""
    from fedalign.moe.upcycle import load_tokenizer

    try:
        tokenizer = load_tokenizer(source)
    except UserError as error:
        return None, f"none: {error}"
    return tokenizer, "copied, with its chat template" if tokenizer.chat_template else "copied; it has no chat template"
