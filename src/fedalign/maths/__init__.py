"""The equations: pure functions on tensors. They need torch alone, and load it when first used: options need none."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "torch"]


class _Later:
    """A module that is imported when something of it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import torch
    from torch.nn import functional
else:
    torch, functional = _Later("torch"), _Later("torch.nn.functional")
