"""Whether all that should train does: matrices of layers that saw tokens, and that no gradient has reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fedalign import parallel
from fedalign.errors import UserError
from fedalign.moe.groups import Slot, unwrapped
from fedalign.moe.model import MoEModel


class Unreached:
    """Trained matrices that have had no gradient but zero.

    Not watched: a factor A, which has none while its B is zero, but later if B has. A router's may be zero: phimoe's
    is wherever no second expert is near, and that of one renormalised expert always.
    """

    def __init__(self, moe: MoEModel, watch: bool) -> None:
        self.moe, self.steps = moe, 0
        matrices = [s for s in moe.slots if s.parameter.requires_grad and s.parameter.dim() > 1] if watch else []
        self.slots = [slot for slot in matrices if ".lora_A." not in slot.name]

    def look(self) -> None:
        """After a backward pass: forget those that it reached."""
        self.steps += 1
        if self.slots:
            found = parallel.total(torch.stack([self._reached(slot).to(self.moe.device) for slot in self.slots]))
            self.slots = [slot for slot, reached in zip(self.slots, found.tolist(), strict=True) if not reached]

    def _reached(self, slot: Slot) -> Tensor:
        gradient = slot.parameter.grad
        if gradient is None or slot.kind == "gate":
            return torch.tensor(float(gradient is not None))
        return parallel.held(gradient)[0].any().float()

    def refuse(self, idle_L_E: Tensor, forward: Callable[[], object]) -> None:
        """After an epoch: those left whose layer sees tokens in `forward` are an error.

        Not so experts that are idle throughout, weights that are all zero, and what one step alone could not reach.

        Raises:
            UserError: There is one.
        """
        if self.steps < 2 or not self.slots:
            return
        busy = [s for s in self.slots if s.kind != "expert" or not all(idle_L_E[g.layer, g.expert] for g in s.groups)]
        holders = [path for slot in busy if self._has_values(path := _holder(slot.name))]
        ran = self._running({self._above(path) for path in holders}, forward)
        self.slots, dead = [], [path for path in holders if self._above(path) in ran]
        if dead:
            raise UserError(
                f"{dead[0]}: its layer saw tokens, but no gradient reached it and {len(dead) - 1} more, which would "
                f'stay as they were. Leave it out: tuning.exclude = ["*{dead[0].rpartition(".")[2]}*"].'
            )

    def _has_values(self, path: str) -> bool:
        return any(bool(p.any()) for p in unwrapped(self.moe.model.get_submodule(path)).parameters(recurse=False))

    def _above(self, path: str) -> str:
        """The module around a layer, lists of modules aside: that one is called, whoever reads the layer's weight."""
        path = path.rpartition(".")[0]
        listed = isinstance(self.moe.model.get_submodule(path), nn.ModuleList | nn.ModuleDict)
        return self._above(path) if listed else path

    def _running(self, paths: Iterable[str], forward: Callable[[], object]) -> set[str]:
        ran: set[str] = set()
        handles = [
            self.moe.model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.add(path))
            for path in paths
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        return ran


def _holder(name: str) -> str:
    """The layer that a matrix, or a factor of it, belongs to."""
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
