"""What no gradient reaches, though its layer saw tokens, ends the run by its name."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedalign.client.trainer import Trainer
from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from fedalign.moe.upcycle import Recipe, upcycle
from tests.client.test_trainer import broadcast, client, settings
from tests.moe.tiny import build


def round_one(model: nn.Module, folder: Path, kind: str = "full", count: int = 20, **options: Any) -> MoEModel:
    config = settings()
    moe = MoEModel.wrap(model, TuningConfig(kind=kind, **options))  # type: ignore[arg-type] # pytest's words
    Trainer(moe, None, config.algorithm.build(), config).train(client(folder, count=count), broadcast(moe))
    return moe


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_matrix_cut_off_from_the_loss_ends_the_run_by_name(kind: str, tmp_path: Path) -> None:
    model = build("olmoe")
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj: its layer saw tokens, but no gradient.*k_proj\*"):
        round_one(model, tmp_path, kind)


def test_an_adapter_that_is_read_past_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jamba's scan reads the weight of its dt_proj, which is never called."""
    monkeypatch.setattr("fedalign.moe.lora.SCANS", {"nothing"})
    with pytest.raises(UserError, match=r"mamba.dt_proj: its layer saw tokens"):
        round_one(build("jamba"), tmp_path, "lora", targets=("dense",))


def test_a_part_that_is_not_run_is_no_error(tmp_path: Path) -> None:
    model = build("olmoe")
    model.model.tower = nn.Sequential(nn.Linear(4, 4))
    round_one(model, tmp_path)


def test_experts_that_no_token_reaches_are_no_error_but_a_matrix_of_them_all_is(tmp_path: Path) -> None:
    for cut in (False, True):
        model = build("deepseek")  # a module for each expert
        with torch.no_grad():
            for layer in model.model.layers[1:]:
                layer.mlp.gate.weight.zero_()  # ties: the same two are chosen always
                for expert in layer.mlp.experts if cut else ():
                    expert.up_proj.register_forward_hook(lambda _, __, output: output.detach())
        with pytest.raises(UserError, match=r"experts.0.up_proj: its layer saw tokens") if cut else nullcontext():
            round_one(model, tmp_path)


def test_a_shared_expert_that_upcycling_left_at_zero_is_no_error(tmp_path: Path) -> None:
    round_one(upcycle(build("qwen2", max_position_embeddings=128), Recipe(experts=4)), tmp_path)


def test_one_step_proves_nothing(tmp_path: Path) -> None:
    model = build("olmoe")
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda _, __, output: output.detach())
    round_one(model, tmp_path, count=2)
