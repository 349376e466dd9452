"""Which modules of a Hugging Face model are routers and experts: a table, and a search for families not in it.

A row says where a family deviates from the usual spelling: router `<block>.gate` with `weight` [E, H] that returns
(logits [T, E], weights [T, K], experts [T, K]), experts fused beside it with a leading axis E. Adding a family is one
row here and one tiny config in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalign.errors import UserError
from fedalign.protocol import Scoring

Dispatch = Literal["index", "one_hot", "logits"]


@dataclass(frozen=True)
class Family:
    """One family's spelling. Paths are suffixes of module names."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    scoring: Scoring = "softmax"
    logits: int = 0  # which output of the router is its logits
    dispatch: Dispatch = "index"  # how it says where tokens go: chosen experts, one-hot, or the top-k of its logits
    chosen: int = 2  # which output says so
    top_k: int | None = None  # only where no attribute of the router or the config says it


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(),
    "deepseek_v3": Family(scoring="sigmoid"),
    "gpt_oss": Family(router="mlp.router"),
    "granitemoe": Family(router="block_sparse_moe.router", experts="block_sparse_moe.experts"),
    "mixtral": Family(),
    "olmoe": Family(),
    "phimoe": Family(router="mlp.router"),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "switch_transformers": Family(router="mlp.router", logits=2, dispatch="one_hot", chosen=0, top_k=1),
}

REFUSED = {
    "nllb_moe": "its code in transformers is broken: only experts 0 and 1 ever run",
}


@dataclass(frozen=True)
class MoELayer:
    """One router and its experts, as transformers spells them."""

    router: str  # module path
    experts: str  # module path
    scoring: Scoring
    size: int  # E
    top_k: int  # K
    hidden: int  # H
    in_decoder: bool  # its tokens are those of the decoder of an encoder-decoder model
    logits: int  # the rest as in `Family`
    dispatch: Dispatch
    chosen: int


def detect(model: PreTrainedModel) -> tuple[str, tuple[MoELayer, ...]]:
    """Find all MoE layers of a transformers model, in the order of its modules.

    Returns:
        How they were found and how sure that is (for people), and the layers.

    Raises:
        UserError: the family is refused, the model is dense, or its MoE layers cannot be understood.
    """
    config = model.config
    refuse(config)
    if row := FAMILIES.get(family_of(config)):
        found, layers = "table", tuple(_from_table(model, row))
    else:
        found, layers = _autodetected(model)
    if not layers:
        raise _nothing_found(model)
    if len({(layer.size, layer.top_k, layer.hidden) for layer in layers}) > 1:
        sizes = sorted({f"{layer.size} experts, top-{layer.top_k}, hidden {layer.hidden}" for layer in layers})
        raise UserError(
            f"model = {family_of(config)}: all MoE layers must be of one size, but it has {'; '.join(sizes)}"
        )
    return found, layers


def refuse(config: Any) -> None:
    """Raise a UserError if this family is known not to work. Cheap: needs no weights."""
    if reason := REFUSED.get(family_of(config)):
        raise UserError(f"model = {family_of(config)}: refused: {reason}. Choose one of: {', '.join(sorted(FAMILIES))}")


def _from_table(model: PreTrainedModel, row: Family) -> Iterator[MoELayer]:
    for path, _ in model.named_modules():
        if path.endswith(f".{row.router}"):
            yield _layer(model, path, path.removesuffix(row.router) + row.experts, row)


def _layer(model: PreTrainedModel, router: str, experts: str, row: Family) -> MoELayer:
    module = model.get_submodule(router)
    size, hidden = router_weight(module).shape
    top_k = row.top_k or _top_k(module, model.config)
    if top_k > size:
        raise UserError(f"top-k = {top_k}: must be at most the number of experts, {size} (router {router})")
    return MoELayer(
        router=router,
        experts=experts,
        size=size,
        top_k=top_k,
        hidden=hidden,
        in_decoder=is_encoder_decoder(model.config) and "decoder" in router.split("."),
        scoring=row.scoring,
        logits=row.logits,
        dispatch=row.dispatch,
        chosen=row.chosen,
    )


def family_of(config: Any) -> str:
    """The family's name as our tables spell it: transformers' `model_type`, always with underscores."""
    return str(config.model_type).replace("-", "_")


def is_encoder_decoder(config: Any) -> bool:
    """Whether a config is of a model with an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def router_weight(router: nn.Module) -> Tensor:
    """The [E, H] matrix of a router: its own or its only linear child's."""
    matrices = [p for p in router.parameters() if p.dim() == 2 and min(p.shape) > 1]
    if len(matrices) != 1:
        raise UserError(
            f"router = {type(router).__name__}: must hold one weight [experts, hidden], but holds {len(matrices)}"
        )
    return matrices[0]


def _top_k(router: nn.Module, config: Any) -> int:
    names = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
    for holder in (router, config.get_text_config()):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    raise UserError(
        f"model = {family_of(config)}: its config must say to how many experts a token goes ({', '.join(names)})"
    )


# --- families that are not in the table ---------------------------------------------------------------------------


def _autodetected(model: PreTrainedModel) -> tuple[str, tuple[MoELayer, ...]]:
    """Routers from transformers' own recorder of router logits, else from shapes; then watch them route.

    A model without values cannot be watched: its groups are known, its scoring is not.
    """
    modules = dict(model.named_modules())
    recorded = dict(_recorded_routers(model))
    routers = recorded or dict.fromkeys(_shaped_routers(modules), 0)
    layers = [
        _layer(model, path, experts, Family(logits=logits))
        for path, logits in routers.items()
        if (experts := _experts_beside(modules, path))
    ]
    if not layers:
        return "", ()
    marked = {path for path, module in modules.items() if hasattr(module, "_is_expert_parallel")}
    if orphans := sorted(marked - {layer.experts for layer in layers}):
        raise UserError(
            f"model = {family_of(model.config)}: every module of experts needs a router, but {orphans[0]} has none"
        )
    how = "transformers' recorder" if recorded else "shapes"
    if model.device.type == "meta":
        return f"autodetected: routers by {how}; choice and scoring are seen when its weights are loaded", tuple(layers)
    watched = list(_watched(model, layers))
    certainty = "; ".join(sorted({sure for _, sure in watched}))
    return f"autodetected: routers by {how}; {certainty}", tuple(layer for layer, _ in watched)


def _recorded_routers(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Paths of the routers that transformers itself records, with the index of the logits among their outputs."""
    specs = [
        spec
        for module in model.modules()
        for spec in _as_list((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    for path, module in model.named_modules():
        for spec in specs:
            wanted = getattr(spec, "target_class", spec)
            part = (getattr(spec, "layer_name", None) or "").strip(".")
            if isinstance(wanted, type) and isinstance(module, wanted) and f".{part}." in f".{path}..":
                yield path, getattr(spec, "index", 0)
                break


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _shaped_routers(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths of modules with a weight [E, H] beside a module of E experts."""
    for path, module in modules.items():
        size = expert_count(module)
        parent = path.rpartition(".")[0]
        if size is None or not parent:
            continue
        for name, child in modules[parent].named_children():
            weight = getattr(child, "weight", None)
            if child is not module and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == size:
                yield f"{parent}.{name}"
                break


def _experts_beside(modules: dict[str, nn.Module], router: str) -> str | None:
    """The module of E experts in the router's block, or in the layer around it."""
    size = router_weight(modules[router]).shape[0]
    block = router
    for _ in range(2):
        block = block.rpartition(".")[0]
        for name, child in modules[block].named_children():
            path = f"{block}.{name}" if block else name
            if path != router and expert_count(child) == size:
                return path
    return None


def expert_count(module: nn.Module) -> int | None:
    """E if the module holds experts: fused with a leading axis (as transformers marks them, or 3-D), or as children."""
    leading = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    marked = hasattr(module, "_is_expert_parallel") or bool(leading)
    if marked:
        return leading.pop() if len(leading) == 1 else None
    children = list(module.children())
    alike = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len({type(c) for c in children}) == 1
    return len(children) if alike and len(children) > 1 else None


def _watched(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Iterator[tuple[MoELayer, str]]:
    """Run the model on a few tokens to see which router output names the chosen experts, and how it scores them."""
    outputs = _trial(model, [layer.router for layer in layers])
    for layer in layers:
        output = outputs.get(layer.router)
        yield _understood(layer, output if isinstance(output, tuple) else (output,))


@torch.no_grad()
def _trial(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, Any]:
    """What each of these modules returns when the model reads 32 tokens."""
    ids_B_S = torch.arange(32, device=model.device).view(2, 16) % model.config.get_text_config().vocab_size
    decoder = {"decoder_input_ids": ids_B_S} if is_encoder_decoder(model.config) else {}
    outputs: dict[str, Any] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: outputs.update({path: output}))
        for path in paths
    ]
    was_training = model.training
    try:
        model.eval()(input_ids=ids_B_S, use_cache=False, **decoder)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"model = {family_of(model.config)}: must run on plain tokens, but fails: {cause}") from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return outputs


def _understood(layer: MoELayer, outputs: tuple[Any, ...]) -> tuple[MoELayer, str]:
    """The layer with its dispatch and scoring as seen in a router's outputs, and how sure they are."""
    logits = outputs[layer.logits] if layer.logits < len(outputs) else None
    if not isinstance(logits, Tensor) or logits.shape[-1] != layer.size:
        raise UserError(f"router = {layer.router}: output {layer.logits} must be logits over {layer.size} experts")
    logits_T_E = logits.reshape(-1, layer.size).float()
    if (logits_T_E.sum(1) - 1).abs().max() < 1e-3 and logits_T_E.min() >= 0:
        raise UserError(f"router = {layer.router}: must return logits over the experts, but returns probabilities")
    shape = (len(logits_T_E), layer.top_k)
    fitting = [(index, o) for index, o in enumerate(outputs) if isinstance(o, Tensor) and o.shape == shape]
    chosen = next((index for index, o in fitting if not o.is_floating_point()), None)
    if chosen is None:
        return replace(layer, dispatch="logits"), "choice assumed to be the top-k of the logits, scoring to be softmax"
    layer = replace(layer, chosen=chosen)
    weights = next((o.float() for index, o in fitting if index != layer.logits and o.is_floating_point()), None)
    if weights is not None:
        spread = {scoring: _spread(weights, logits_T_E, outputs[chosen], scoring) for scoring in get_args(Scoring)}
        best, other = sorted(get_args(Scoring), key=spread.__getitem__)
        if spread[best] < 0.02 and 3 * spread[best] < spread[other]:  # 0.02: weights may be in bfloat16
            return replace(layer, scoring=best), "choice and scoring seen in a trial run"
    return layer, "choice seen in a trial run, scoring assumed to be softmax"


def _spread(weight_T_K: Tensor, logits_T_E: Tensor, topk_T_K: Tensor, scoring: Scoring) -> float:
    """0 if the weights are these scores up to a factor (one per token, since many renormalise over the top-k)."""
    score_T_E = logits_T_E.softmax(1) if scoring == "softmax" else logits_T_E.sigmoid()
    ratio_T_K = weight_T_K / score_T_E.gather(1, topk_T_K)
    axis = 1 if ratio_T_K.shape[1] > 1 else 0
    return float((ratio_T_K.amax(axis) / ratio_T_K.amin(axis) - 1).mean())


def _nothing_found(model: PreTrainedModel) -> UserError:
    family, tree = family_of(model.config), module_tree(model)
    choices = f"Choose one of: {', '.join(sorted(FAMILIES))}, or another model with a router"
    if family in FAMILIES or "expert" in tree.lower() or "router" in tree.lower():
        return UserError(f"model = {family}: no router with experts beside it was found among {tree}. {choices}")
    return UserError(f"model = {family}: a dense model, it has no routed experts. {choices}")


def module_tree(model: PreTrainedModel, limit: int = 100) -> str:
    """All kinds of modules in a model on one line, layer numbers folded into `*`."""
    kinds = {
        ".".join("*" if part.isdigit() else part for part in path.split(".")): type(module).__name__
        for path, module in model.named_modules()
        if path
    }
    names = [f"{path} ({kind})" for path, kind in kinds.items()]
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
