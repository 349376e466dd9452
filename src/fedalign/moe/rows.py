"""Router rows of sites' own experts: quiet at first, then fitted on a site's data (after FlexOlmo, arXiv 2507.07024).

    quiet     w = −t·d        d = argmin Σ_public (d·x − 1)²     x: what a router reads                       [O]
    fitted    w = argmin mean_own (w·x − z − m)² + mean_public (w·x − z + m)²                                 [O]

z is the logit of the last expert that a token is sent to without the own one, m their standard deviation. Routers of
olmoe, flex_olmo, mixtral and qwen have no bias: least squares fold it into the row, since the mean of what a router
reads is not zero; where there is one it is used. t is the one of a few that fewest public tokens follow. For want of
public text it is text that the model itself writes. A small ridge keeps rows finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedalign.errors import UserError
from fedalign.moe.families import GROUPS, MoELayer, router_weight
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe
from fedalign.moe.tuning import SELECTION_BIAS
from fedalign.protocol import ParameterGroup

ROWS, LENGTH = 64, 64  # of public text
STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of t, in standard deviations of logits
UNLIKE = 0.1  # relative: of bfloat16 a product is off by a hundredth
RIDGE = 1e-3  # of the mean square of what a router reads


Text = tuple[dict[str, Tensor], Tensor]  # arguments of the model, and a mask [B, S]: nonzero where no padding is


@dataclass(frozen=True)
class Seen:
    """One router's inputs and choices, of T tokens."""

    input_T_H: Tensor  # float64; with a bias, 1 is the last
    last_T: Tensor  # float64: logit of the last expert that each token is sent to, among those asked about
    spread: float  # standard deviation of their logits
    load_E: Tensor  # tokens that each of them was sent to; 0: of all others

    def reached(self, row_H: Tensor) -> float:
        """The share of tokens that an expert with this row would be sent."""
        return float((self.input_T_H @ row_H >= self.last_T).double().mean())


def refuse_unlike(moe: MoEModel) -> None:
    """Refuse routers that do not simply send a token to its highest logits.

    Raises:
        UserError: It has such a one.
    """
    text = moe.model.config.get_text_config()
    unlike = {f"scores experts by {layer.scoring}": layer.scoring != "softmax" for layer in moe.layers} | {
        "has biases that only choose": any(name.endswith(SELECTION_BIAS) for name in moe.model.state_dict()),
        "has experts in groups": any((getattr(text, name, None) or 1) > 1 for name in GROUPS),
        "is an encoder-decoder": moe.is_seq2seq,
    }
    if why := next((reason for reason, true in unlike.items() if true), None):
        raise _unlike(moe, why)


def _unlike(moe: MoEModel, why: str) -> UserError:
    return UserError(
        f"model = {moe.family}: {why}. Sites can have experts of their own where routers send a token to its highest "
        "softmax scores, such as: olmoe, flex_olmo, mixtral, qwen2_moe, qwen3_moe, gpt_oss."
    )


@torch.no_grad()
def public_text(moe: MoEModel, seed: int) -> list[Text]:
    """Text that the model writes by itself, from random first tokens on."""
    with torch.random.fork_rng(devices=[d.index or 0 for d in moe.devices if d.type == "cuda"]):
        torch.manual_seed(seed)
        moe.model.eval()
        first = torch.randint(0, moe.model.config.get_text_config().vocab_size, (ROWS, 1)).to(moe.device)
        most = min(LENGTH, moe.max_length or LENGTH)
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None}
        written = moe.model.generate(
            first,
            attention_mask=torch.ones_like(first),
            min_new_tokens=most - 1,
            max_new_tokens=most - 1,
            pad_token_id=0,
            **options,
        )
    mask_B_S = torch.ones_like(written)
    return [({"input_ids": written, "attention_mask": mask_B_S}, mask_B_S)]


@torch.no_grad()
def look(moe: MoEModel, text: Iterable[Text], among: Sequence[int]) -> list[Seen]:
    """Each router's inputs on some text, and choices among some experts.

    Args:
        moe: is in evaluation mode afterwards.
        text: at least one batch.
        among: places of experts in their layers, at least as many as a token is sent to.
    """
    moe.model.eval()
    inputs_L: list[list[Tensor]] = [[] for _ in moe.layers]
    logits_L: list[list[Tensor]] = [[] for _ in moe.layers]
    with RoutingProbe(moe) as probe:
        for arguments, mask_B_S in text:
            with probe.capture(mask_B_S) as captured:
                moe.model(**arguments, use_cache=False)
            for index, routing in enumerate(captured.routing):
                inputs_L[index].append(captured.hidden_T_H(index).double().cpu())
                logits_L[index].append(routing.logits_T_E.double().cpu()[:, list(among)])
    return [
        _seen(moe, layer, torch.cat(inputs), torch.cat(logits), among)
        for layer, inputs, logits in zip(moe.layers, inputs_L, logits_L, strict=True)
    ]


def _seen(moe: MoEModel, layer: MoELayer, input_T_H: Tensor, logits_T_E: Tensor, among: Sequence[int]) -> Seen:
    router = moe.model.get_submodule(layer.router)
    weight_E_H, bias_E = router_weight(router), _bias(router)
    if bias_E is not None:
        input_T_H = torch.cat([input_T_H, input_T_H.new_ones(len(input_T_H), 1)], 1)
        weight_E_H = torch.cat([weight_E_H, bias_E.unsqueeze(1)], 1)
    product_T_E = input_T_H @ weight_E_H.detach().double().cpu()[list(among)].T
    if float((product_T_E - logits_T_E).norm()) > UNLIKE * float(logits_T_E.norm()):
        raise _unlike(moe, "scales or normalises what a router reads")
    top = logits_T_E.topk(layer.top_k, dim=1)
    load_E = torch.zeros(layer.size, dtype=torch.int64)
    load_E[list(among)] = top.indices.flatten().bincount(minlength=len(among))
    return Seen(input_T_H, top.values[:, -1], float(logits_T_E.std()), load_E)


def quiet_row(public: Seen) -> tuple[Tensor, float]:
    """A row [H] that is not chosen on public text, and the share of its tokens that choose it nevertheless."""
    direction_H = _least_squares([(public.input_T_H, torch.ones_like(public.last_T))])
    rows = [-step * public.spread * direction_H for step in STEPS]
    shares = [public.reached(row_H) for row_H in rows]
    best = min(range(len(rows)), key=lambda i: (shares[i], -i))
    return rows[best], shares[best]


def fitted_row(own: Seen, public: Seen) -> Tensor:
    """A row [H] that is chosen on a site's own text, and not on public text."""
    return _least_squares([(own.input_T_H, own.last_T + own.spread), (public.input_T_H, public.last_T - public.spread)])


def _least_squares(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The row [H] whose products with inputs are nearest to targets; each part counts alike, however long it is."""
    square_H_H = torch.stack([x_T_H.T @ x_T_H / len(x_T_H) for x_T_H, _ in parts]).sum(0)
    target_H = torch.stack([x_T_H.T @ z_T / len(x_T_H) for x_T_H, z_T in parts]).sum(0)
    ridge = RIDGE * float(square_H_H.diagonal().mean())
    row_H: Tensor = torch.linalg.solve(square_H_H + ridge * torch.eye(len(square_H_H)).double(), target_H)
    return row_H


def with_row(moe: MoEModel, group: ParameterGroup, values: Tensor, row_H: Tensor) -> Tensor:
    """Flat values [N] of a router row's group with this row, and bias if there is one, in place of its own."""
    router = moe.model.get_submodule(moe.layers[group.layer].router)
    weight, bias = router_weight(router), _bias(router)
    width, start, new = weight.shape[1], 0, values.clone()
    for slot in moe.slots:
        if group not in slot.groups or not slot.parameter.requires_grad:
            continue
        if slot.parameter is weight:
            new[start : start + width] = row_H[:width].to(new)
        elif slot.parameter is bias:
            new[start] = row_H[width].to(new)
        start += slot.size
    return new


def _bias(router: nn.Module) -> nn.Parameter | None:
    """A router's bias, its own or its linear child's."""
    size = len(router_weight(router))
    found = [p for name, p in router.named_parameters() if name.rpartition(".")[2] == "bias" and p.numel() == size]
    return found[0] if found else None
