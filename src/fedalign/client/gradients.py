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
    is wherever no second expert is near, and that of one renormalised expert always. Of experts with modules of their
    own one speaks for all: tokens of the others may be none, or matter to no answer.
    """

    def __init__(self, moe: MoEModel, watch: bool) -> None:
        self.moe, self.steps = moe, 0
        self.slots: dict[str, list[Slot]] = {}
        for slot in moe.slots if watch else ():
            if slot.parameter.requires_grad and slot.parameter.dim() > 1 and ".lora_A." not in slot.name:
                self.slots.setdefault(self._shared_name(slot), []).append(slot)

    def _shared_name(self, slot: Slot) -> str:
        """Its name; without the expert's number where experts have modules of their own."""
        if slot.kind != "expert" or len(slot.groups) > 1:
            return slot.name
        experts = f"{self.moe.layers[slot.groups[0].layer].experts}."
        return experts + slot.name.removeprefix(experts).partition(".")[2]

    def look(self) -> None:
        """After a backward pass: forget those that it reached."""
        self.steps += 1
        if self.slots:
            reached = [torch.stack([self._reached(slot) for slot in slots]).any() for slots in self.slots.values()]
            found = parallel.total(torch.stack(reached).to(self.moe.device, torch.float32)).tolist()
            self.slots = {
                name: self.slots[name] for name, any_ in zip(tuple(self.slots), found, strict=True) if not any_
            }

    def _reached(self, slot: Slot) -> Tensor:
        gradient = slot.parameter.grad
        if gradient is None or slot.kind == "gate":
            return torch.tensor(gradient is not None)
        return parallel.held(gradient)[0].any().cpu()

    def refuse(self, forward: Callable[[], object]) -> None:
        """After an epoch: those left whose layer sees tokens in `forward` are an error.

        Not so weights that are all zero, and what one step alone could not reach.

        Raises:
            UserError: There is one.
        """
        if self.steps < 2 or not self.slots:
            return
        holders = [path for slots in self.slots.values() if self._has_values(path := _holder(slots[0].name))]
        ran = self._running({self._above(path) for path in holders}, forward)
        self.slots, dead = {}, [path for path in holders if self._above(path) in ran]
        if dead:
            raise UserError(
                f"{dead[0]}: its layer saw tokens, but no gradient reached it and {len(dead) - 1} more, which would "
                f'stay as they were. Leave it out: tuning.exclude = ["*{dead[0].rpartition(".")[2]}*"].'
            )

    def _has_values(self, path: str) -> bool:
        own = unwrapped(self.moe.model.get_submodule(path)).parameters(recurse=False)
        return any(bool(parallel.held(values.detach())[0].any()) for values in own)

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
