"""The search for routers and experts in models that no table knows."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.families import (
    FAMILIES,
    TOP_K,
    Family,
    MoELayer,
    computed_logits,
    family_of,
    family_row,
    is_encoder_decoder,
    read_logits,
    refuse,
    router_outputs,
    router_weight,
)
from fedalign.moe.tuning import beside_text
from fedalign.protocol import Scoring


def detect(model: PreTrainedModel) -> tuple[str, tuple[MoELayer, ...]]:
    """Find all MoE layers of a transformers model, in the order of its modules.

    Returns:
        How they were found and how sure that is (for people), and the layers.

    Raises:
        UserError: the family is refused, the model is dense, or its MoE layers cannot be understood.
    """
    config = model.config
    refuse(config)
    if row := _row(model):
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


def _row(model: PreTrainedModel) -> Family | None:
    """The table's row, if the model's code is that of transformers: a checkpoint may bring its own under the name."""
    own = type(model).__module__.startswith("transformers.")
    name = family_of(model.config).removesuffix("_text")
    return family_row(name) if own or name not in FAMILIES else None


def _from_table(model: PreTrainedModel, row: Family) -> Iterator[MoELayer]:
    for path in _modules(model):
        if path.endswith(f".{row.router}"):
            yield _layer(model, path, (path.removesuffix(row.router) + row.experts).rstrip("."), row)


def _modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All that text passes through, by path: towers may have experts of their own (dots3_note)."""
    outside = tuple(f"{path}." for path in beside_text(model))
    return {path: module for path, module in model.named_modules() if not f"{path}.".startswith(outside)}


def _layer(model: PreTrainedModel, router: str, experts: str, row: Family) -> MoELayer:
    module = model.get_submodule(router)
    size, hidden = router_weight(module).shape
    top_k = row.top_k or _top_k(module, model.get_submodule(router.rpartition(".")[0]), model.config)
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
        probabilities=row.probabilities,
        cast=not hasattr(model.get_submodule(experts), "_is_expert_parallel"),
    )


def _top_k(router: nn.Module, block: nn.Module, config: Any) -> int:
    for holder in (router, block, config.get_text_config()):
        for name in TOP_K:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    raise UserError(
        f"model = {family_of(config)}: its config must say to how many experts a token goes ({', '.join(TOP_K)})"
    )


# --- families that are not in the table ---------------------------------------------------------------------------


def _autodetected(model: PreTrainedModel) -> tuple[str, tuple[MoELayer, ...]]:
    """Routers from transformers' own recorder of router logits, else from shapes; then watch them route.

    A model without values cannot be watched: its groups are known, its scoring is that of its router's code.
    """
    modules = _modules(model)
    how, layers = _unwatched(model, modules)
    if not layers:
        return "", ()
    if model.device.type == "meta":
        alone = tuple(_alone(layer, modules[layer.router]) for layer in layers)
        return f"{how}; choice and scoring are seen when its weights are loaded", alone
    seen = _trial(model, layers)
    watched = [_understood(layer, modules[layer.router], modules[layer.experts], seen) for layer in layers]
    found = tuple(layer for layer, _ in watched)
    if any(layer.scoring == "unknown" for layer in found):
        found = _probed(model, found, seen)
    certainty = {_certainty(layer, choice) for layer, (_, choice) in zip(found, watched, strict=True)}
    return f"{how}; {'; '.join(sorted(certainty))}", found


def _unwatched(model: PreTrainedModel, modules: dict[str, nn.Module]) -> tuple[str, list[MoELayer]]:
    """How routers were found, and the layers that they and the experts beside them make."""
    recorded, shaped = dict(_recorded_routers(model)), dict.fromkeys(_shaped_routers(modules))
    layers = list(_beside(model, modules, recorded or shaped))
    marked = {path for path, module in modules.items() if hasattr(module, "_is_expert_parallel")} if layers else set()
    if orphans := marked - {layer.experts for layer in layers}:  # deepseek_v4 records some of its routers alone
        layers += [layer for layer in _beside(model, modules, shaped) if layer.experts in orphans]
        layers.sort(key=lambda layer: list(modules).index(layer.router))
    if orphans := marked - {layer.experts for layer in layers}:
        raise UserError(
            f"model = {family_of(model.config)}: every module of experts needs a router, but {min(orphans)} has none"
        )
    how = "transformers' recorder" if recorded else "shapes"
    return f"autodetected: routers by {how}", layers


@torch.no_grad()
def _alone(layer: MoELayer, router: nn.Module) -> MoELayer:
    """The layer with what a copy of its router does by itself, with random values: the model has none yet."""
    twin = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.normal_(generator=generator)
    for buffer in twin.buffers():
        buffer.zero_()
    hidden_T_H = torch.randn(32, layer.hidden, generator=generator) * 2 / layer.hidden**0.5
    wanted = [p for p in inspect.signature(twin.forward).parameters.values() if p.default is p.empty][1:]
    more = [torch.zeros(()) for parameter in wanted if parameter.kind != parameter.VAR_KEYWORD]
    for hidden in (hidden_T_H, hidden_T_H.unsqueeze(0)):
        with contextlib.suppress(Exception):  # a router may want what only its model knows
            output = twin(hidden, *more)
            return _understood(layer, twin, nn.Identity(), {twin: [_Call((hidden,), output)]})[0]
    return replace(layer, scoring="unknown")


def _tables(router: nn.Module) -> list[Tensor]:
    """Tables of the experts that each token goes to, whatever the router thinks of it (deepseek_v4)."""
    return [buffer for buffer in router.buffers() if buffer.dim() == 2 and not buffer.is_floating_point()]


def _certainty(layer: MoELayer, choice: str) -> str:
    if layer.logits is None and layer.scoring == "unknown":
        raise UserError(
            f"router = {layer.router}: must return logits over {layer.size} experts, or weights that are the softmax, "
            "sigmoid or sqrt-softplus of its weight times its input"
        )
    origin = "logits computed, " if layer.logits is None else ""
    if layer.scoring == "unknown":
        return f"{origin}choice {choice}, scoring unknown"
    return f"{origin}choice and scoring seen in a trial run"


def _probed(
    model: PreTrainedModel, layers: Sequence[MoELayer], seen: Mapping[nn.Module, Sequence[_Call]]
) -> tuple[MoELayer, ...]:
    """The layers with the scoring that routers show whose weights, meanwhile, tell experts clearly apart.

    Which scores a router computes is its code's; near zero, as routers begin, all of them look alike.
    """
    routers = [model.get_submodule(layer.router) for layer in layers]
    changed = [
        *(router_weight(router) for router in routers),
        *(table for router in routers for table in _tables(router)),
    ]
    before = [values.detach().clone() for values in changed]
    generator = torch.Generator().manual_seed(0)
    try:
        for layer, router in zip(layers, routers, strict=True):
            given, weight = seen[router][0].given[0].float(), router_weight(router)
            scale = 2 / (given.square().sum(-1).mean().sqrt() + 1e-6)
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale.cpu())
            for table in _tables(router):
                order = torch.rand(len(table), layer.size, generator=generator).argsort(1)
                table.copy_(order[:, : table.shape[1]])
        clear = _trial(model, layers)
        pairs = zip(layers, routers, strict=True)
        again = [_understood(layer, router, model.get_submodule(layer.experts), clear)[0] for layer, router in pairs]
    finally:
        for values, old in zip(changed, before, strict=True):
            values.data.copy_(old)
    return tuple(replace(layer, scoring=probed.scoring) for layer, probed in zip(layers, again, strict=True))


def _beside(
    model: PreTrainedModel, modules: dict[str, nn.Module], routers: Mapping[str, int | None]
) -> Iterator[MoELayer]:
    """The layers of routers that have experts beside them; of each router its output that is logits."""
    for path, logits in routers.items():
        if experts := _experts_beside(modules, path):
            yield _layer(model, path, experts, Family(logits=logits))


def _recorded_routers(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Paths of the routers that transformers itself records, with the index of the logits among their outputs."""
    specs = [
        spec
        for module in model.modules()
        for spec in _as_list((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    recorded: dict[str, int] = {}
    for path, module in _modules(model).items():
        for spec in specs:
            wanted = getattr(spec, "target_class", spec)
            part = (getattr(spec, "layer_name", None) or "").strip(".")
            if isinstance(wanted, type) and isinstance(module, wanted) and f".{part}." in f".{path}..":
                recorded[path] = getattr(spec, "index", 0)
                break
    for path, index in recorded.items():
        if not any(other.startswith(f"{path}.") for other in recorded):  # jetmoe records routers and what holds them
            yield path, index


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
            matrices = [p for p in child.parameters() if p.dim() == 2]
            if child is not module and len(matrices) == 1 and matrices[0].shape[0] == size:
                yield f"{parent}.{name}"
                break


def _experts_beside(modules: dict[str, nn.Module], router: str) -> str | None:
    """The module of E experts in the router's block, or in the layer around it.

    Where several hold a part of each expert, fused, it is the block.
    """
    size = router_weight(modules[router]).shape[0]
    block = router
    for _ in range(2):
        block = block.rpartition(".")[0]
        paths = {f"{block}.{name}".lstrip("."): child for name, child in modules[block].named_children()}
        found = [path for path, child in paths.items() if path != router and expert_count(child) == size]
        if len(found) > 1:
            return block if all(_leading(modules[path]) for path in found) else None
        if found:
            return found[0]
    return None


def expert_count(module: nn.Module) -> int | None:
    """E if the module holds experts: fused with a leading axis (as transformers marks them, or 3-D), or as children."""
    leading = _leading(module)
    if leading or hasattr(module, "_is_expert_parallel"):
        return leading.pop() if len(leading) == 1 else None
    children = list(module.children())
    alike = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len({type(c) for c in children}) == 1
    return len(children) if alike and len(children) > 1 else None


def _leading(module: nn.Module) -> set[int]:
    return {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}


@dataclass(frozen=True)
class _Call:
    """One call of a module during the trial run."""

    given: tuple[Any, ...]
    output: Any


@torch.no_grad()
def _trial(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[nn.Module, list[_Call]]:
    """How routers and experts are called when the model reads 32 tokens."""
    ids_B_S = torch.arange(32, device=model.device).view(2, 16) % model.config.get_text_config().vocab_size
    decoder = {"decoder_input_ids": ids_B_S} if is_encoder_decoder(model.config) else {}
    seen: dict[nn.Module, list[_Call]] = {}
    watched = [model.get_submodule(path) for layer in layers for path in (layer.router, layer.experts)]
    watched += [child for layer in layers for child in model.get_submodule(layer.experts).children()]

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.setdefault(module, []).append(_Call((*args, *kwargs.values()), output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in dict.fromkeys(watched)]
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
    return seen


@torch.no_grad()
def _understood(
    layer: MoELayer, router: nn.Module, experts: nn.Module, seen: Mapping[nn.Module, Sequence[_Call]]
) -> tuple[MoELayer, str]:
    """The layer with its logits, dispatch and scoring as seen in a trial run, and how its choice is known."""
    if router not in seen:
        raise UserError(f"router = {layer.router}: must run whenever the model does, but did not")
    hidden, output = seen[router][0].given[0], seen[router][0].output
    layer = _with_logits(layer, router, hidden, output if isinstance(output, tuple) else (output,))
    outputs = router_outputs(layer, router, hidden, output)
    logits_T_E = read_logits(layer, outputs)
    named = next((index for index, o in enumerate(outputs) if _is_choice(o, (len(logits_T_E), layer.top_k))), None)
    if named is None:
        layer, topk_T_K = replace(layer, dispatch="logits"), logits_T_E.topk(layer.top_k).indices
    else:
        layer, topk_T_K = replace(layer, chosen=named), outputs[named]
    shown = [*_received(layer, experts, topk_T_K, seen), *_dense(layer, outputs, topk_T_K)]
    if any(share > 0.1 for share in shown):  # equal logits, as bfloat16 has them, may be told apart either way
        raise UserError(f"router = {layer.router}: must say which experts its tokens go to, but they go to others")
    if named is None and not shown:
        return replace(layer, scoring="unknown"), "assumed to be the top-k of the logits"
    weight_T_K = _weights(layer, outputs, topk_T_K, seen.get(experts, ()))
    scoring = "softmax" if layer.probabilities else _scoring(weight_T_K, logits_T_E, topk_T_K)
    return replace(layer, scoring=scoring), "seen in a trial run"


def _with_logits(layer: MoELayer, router: nn.Module, hidden: Tensor, outputs: tuple[Any, ...]) -> MoELayer:
    """The layer with its `logits` and `probabilities`."""
    computed_T_E = computed_logits(router, hidden)
    dense = {
        index: output.reshape(-1, layer.size).float()
        for index, output in enumerate(outputs)
        if isinstance(output, Tensor) and output.is_floating_point() and output.shape[-1] == layer.size
    }
    if layer.logits is None:  # found by its shape: nothing says where its logits are
        limit = 0.05 * computed_T_E.abs().max()  # they may be in bfloat16
        same = [index for index, found_T_E in dense.items() if (found_T_E - computed_T_E).abs().max() < limit]
        layer = replace(layer, logits=next(iter([*same, *dense]), None))
    elif layer.logits not in dense:
        raise UserError(f"router = {layer.router}: output {layer.logits} must be logits over {layer.size} experts")
    found_T_E = dense.get(-1 if layer.logits is None else layer.logits, computed_T_E)
    return replace(layer, probabilities=bool((found_T_E.sum(1) - 1).abs().max() < 1e-2 and found_T_E.min() >= 0))


def _is_choice(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()


def _received(
    layer: MoELayer, experts: nn.Module, topk_T_K: Tensor, seen: Mapping[nn.Module, Sequence[_Call]]
) -> Iterator[float]:
    """The share of tokens that went to other experts than these; nothing if it cannot be seen."""
    given = [value for call in seen.get(experts, ()) for value in call.given]
    for index_T_K in [value for value in given if _is_choice(value, (len(topk_T_K), layer.top_k))][:1]:
        other_T = (index_T_K.sort(1).values != topk_T_K.sort(1).values).any(1)
        yield float(other_T.float().mean())
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        calls = [seen.get(child, ()) for child in experts.children()]
        count_E = torch.tensor([sum(call.given[0].numel() for call in of) // layer.hidden for of in calls])
        if count_E.sum() == topk_T_K.numel():  # else each expert reads all tokens
            expected_E = torch.bincount(topk_T_K.flatten().cpu(), minlength=layer.size)
            yield float((count_E - expected_E).abs().sum()) / 2 / topk_T_K.numel()


def _dense(layer: MoELayer, outputs: tuple[Any, ...], topk_T_K: Tensor) -> Iterator[float]:
    """The same, from an output over all experts that is zero for those not chosen."""
    for weight_T_E in _dense_weights(layer, outputs, len(topk_T_K)):
        yield float((weight_T_E.gather(1, topk_T_K) == 0).any(1).float().mean())


def _dense_weights(layer: MoELayer, outputs: tuple[Any, ...], tokens: int) -> Iterator[Tensor]:
    for index, output in enumerate(outputs):
        dense = isinstance(output, Tensor) and output.is_floating_point() and output.shape == (tokens, layer.size)
        if index != layer.logits and dense and bool(((output != 0).sum(1) == layer.top_k).all()):
            yield output


def _weights(layer: MoELayer, outputs: tuple[Any, ...], topk_T_K: Tensor, calls: Sequence[_Call]) -> Tensor | None:
    """The factors of the chosen experts' outputs, [T, K]; None: they cannot be seen."""
    values = [output for index, output in enumerate(outputs) if index != layer.logits]
    values += [value for call in calls for value in call.given]
    fitting = (v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.shape == topk_T_K.shape)
    dense = (weight_T_E.gather(1, topk_T_K) for weight_T_E in _dense_weights(layer, outputs, len(topk_T_K)))
    return next((weight_T_K.float() for weight_T_K in chain(fitting, dense)), None)


def _scoring(weight_T_K: Tensor | None, logits_T_E: Tensor, topk_T_K: Tensor) -> Scoring:
    """By which scores of the logits the experts' outputs were weighted."""
    if weight_T_K is None:
        return "unknown"
    scores: dict[Scoring, Tensor] = {
        "softmax": logits_T_E.softmax(1),
        "sigmoid": logits_T_E.sigmoid(),
        "sqrtsoftplus": functional.softplus(logits_T_E).sqrt(),
    }
    spread = {scoring: _spread(weight_T_K, score_T_E.gather(1, topk_T_K)) for scoring, score_T_E in scores.items()}
    best, other, _ = sorted(scores, key=spread.__getitem__)
    clear = spread[best] < 0.02 and 3 * spread[best] < spread[other]  # 0.02: weights may be in bfloat16
    return best if clear else "unknown"


def _spread(weight_T_K: Tensor, score_T_K: Tensor) -> float:
    """0 if the weights are these scores up to a factor (one per token, since many renormalise over the top-k)."""
    ratio_T_K = weight_T_K / score_T_K
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
