"""Weights of which no more than one group is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

from torch import Tensor

from fedalign.protocol import ParameterGroup


class LazyWeights(MutableMapping[ParameterGroup, Tensor]):
    """Values by group that are made when they are looked up, and each time anew; those that were set are kept.

    >>> from fedalign.protocol import SHARED
    >>> import torch
    >>> weights = LazyWeights({SHARED: lambda: torch.ones(2)})
    >>> weights[SHARED] is weights[SHARED], (weights | {SHARED: torch.zeros(1)})[SHARED]
    (False, tensor([0.]))
    """

    def __init__(self, make: Mapping[ParameterGroup, Callable[[], Tensor]]) -> None:
        self._make = dict(make)

    def __getitem__(self, group: ParameterGroup) -> Tensor:
        return self._make[group]()

    def __setitem__(self, group: ParameterGroup, value: Tensor) -> None:
        self._make[group] = lambda: value

    def __delitem__(self, group: ParameterGroup) -> None:
        del self._make[group]

    def __iter__(self) -> Iterator[ParameterGroup]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    def __contains__(self, group: object) -> bool:
        return group in self._make

    def __or__(self, others: Mapping[ParameterGroup, Tensor]) -> LazyWeights:
        found = LazyWeights(self._make)
        found.update(others)
        return found
