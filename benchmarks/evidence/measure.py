"""What the evidence measures beside scores: how routers and experts of a finished run diverge, drift and specialise.

Divergence and drift come from the run's health files, specialisation by label and task from one pass of the final model
over the run's test set. Mutual information is of the experts that tokens are sent to and of what the text is about,
nats, each group counted alike; what shuffled groups give is taken off, since few tokens always seem to tell something.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.sources import read_rows
from fedalign.files import write_text
from fedalign.server.health import Health, read_health
from fedalign.server.results import RunFolder

MEASURES = "measures.json"
BATCH = 64  # texts of one pass


def mutual_information(count_K_E: Tensor) -> float:
    """Between group and expert, nats, every group weighted alike; at most the log of the smaller number.

    >>> round(mutual_information(torch.tensor([[5.0, 0.0], [0.0, 9.0]])), 4)  # log 2
    0.6931
    >>> mutual_information(torch.tensor([[5.0, 5.0], [1.0, 1.0]]))
    0.0
    """
    share_K_E = count_K_E.double() / count_K_E.double().sum(1, keepdim=True)
    mean_E = share_K_E.mean(0)
    return float(torch.special.xlogy(share_K_E, share_K_E / mean_E).nansum(1).mean())


def off_diagonal_mean(table_E_C_C: Tensor) -> float:
    """Mean over pairs of different clients, without those that are not there (NaN).

    >>> off_diagonal_mean(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]))
    0.5
    """
    pairs = ~torch.eye(table_E_C_C.shape[-1], dtype=torch.bool)
    return float(table_E_C_C.float()[..., pairs].nanmean())


def layers_of(health: Health) -> dict[str, list[float]]:
    """A round, layer by layer."""
    tensors = health.tensors
    prob_C_L_E = tensors["prob_C_L_E"].double()
    divergence_C_L = torch.special.xlogy(prob_C_L_E, prob_C_L_E / prob_C_L_E.mean(0)).nansum(-1)
    layers = range(prob_C_L_E.shape[1])
    load_C_L_E = tensors["load_C_L_E"]
    trained_C = load_C_L_E.sum((1, 2)) > 0
    found = {
        "routing_divergence_nats": divergence_C_L.mean(0).tolist(),
        "expert_and_client_nats": [mutual_information(load_C_L_E[trained_C, layer]) for layer in layers],
        "expert_update_norm": tensors["expert_norm_C_L_E"].mean((0, 2)).tolist(),
        "router_update_norm": tensors["gate_norm_C_L_E"].square().sum(2).sqrt().mean(0).tolist(),
    }
    if "consensus_L_E_C_C" in tensors and len(health.clients) > 1:
        found["update_cosine"] = [off_diagonal_mean(tensors["consensus_L_E_C_C"][layer]) for layer in layers]
        found["centroid_cosine"] = [off_diagonal_mean(tensors["similarity_L_E_C_C"][layer]) for layer in layers]
    return found


@torch.no_grad()
def expert_counts(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """How many of each text's tokens go to each expert, [texts, L, E]."""
    model.eval()
    experts, topk = model.config.num_experts, model.config.num_experts_per_tok
    counts = []
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True)
        mask_B_S_1 = inputs["attention_mask"].unsqueeze(-1)
        output = model.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True
        )
        layers = [
            torch.nn.functional.one_hot(logits_T_E.topk(topk).indices, experts).sum(1).view(*mask_B_S_1.shape[:2], -1)
            for logits_T_E in output.router_logits
        ]
        counts.append(torch.stack([(layer * mask_B_S_1).sum(1) for layer in layers], dim=1))
    return torch.cat(counts)


def specialisation(count_N_L_E: Tensor, groups: Sequence[str]) -> list[float]:
    """Mutual information of expert and group, layer by layer, less what shuffled groups give."""
    shuffled = random.Random(0).sample(groups, len(groups))
    return [
        mutual_information(_by_group(count_N_L_E[:, layer], groups))
        - mutual_information(_by_group(count_N_L_E[:, layer], shuffled))
        for layer in range(count_N_L_E.shape[1])
    ]


def _by_group(count_N_E: Tensor, groups: Sequence[str]) -> Tensor:
    names = {name: index for index, name in enumerate(sorted(set(groups)))}
    index_N = torch.tensor([names[group] for group in groups])
    return torch.zeros(len(names), count_N_E.shape[1]).index_add_(0, index_N, count_N_E.float())


def load(folder: Path) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer."""
    return OlmoeForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def of_test_set(config: Config, model: Path) -> dict[str, list[float]]:
    """Specialisation of a model by label and task on a run's test file."""
    rows = [row.values for row in read_rows(config.data.test or "", config.data, "test")]
    counts = expert_counts(*load(model), [str(row.get("text", row.get("question"))) for row in rows])
    found = {"expert_and_task_nats": specialisation(counts, [str(row["task"]) for row in rows])}
    if all("label" in row for row in rows):
        found["expert_and_label_nats"] = specialisation(counts, [str(row["label"]) for row in rows])
    return found


def measure(path: Path) -> dict[str, Any]:
    """Everything of a finished run: `first` and `last` round, and the final model; kept beside its metrics."""
    file = path / MEASURES
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    folder = RunFolder(path)
    rounds = sorted(folder.health.glob("round-*.safetensors"))
    found = {
        "first": layers_of(read_health(rounds[0])),
        "last": layers_of(read_health(rounds[-1])),
        "model": of_test_set(load_config(folder.config), folder.model) if folder.model.exists() else {},
    }
    write_text(file, json.dumps(found, indent=1))
    return found


def prune(path: Path) -> None:
    """Drop what a finished run needs no more: models, checkpoints, and what clients remember."""
    folder = RunFolder(path)
    for part in (folder.model, folder.best, folder.checkpoint, folder.clients):
        shutil.rmtree(part, ignore_errors=True)


def mean(values: Iterable[float]) -> float:
    """Over layers."""
    listed = list(values)
    return sum(listed) / len(listed)
