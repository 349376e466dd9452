"""The public model: the weights that clients hold where broadcasts travel as differences.

The server's master weights m are told by one sequence of differences, the same for all clients. Of round r it is

    q_r = Q(m_r - p_{r-1}),   p_r = bfloat16(p_{r-1} + q_r),   p_0 = bfloat16(m_0)

with stochastic rounding Q to int8 or int4. The difference is taken to what clients hold, so each makes up for what
rounding lost before (error feedback; Seide et al. 2014, and down as well as up Tang et al. 2019, DoubleSqueeze): p_r
differs from m_r by the rounding of one step, however many there were. Clients train from p_r and send how they moved
from it, and the server adds that to m_r. A group whose master did not change has no difference: nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedalign.files import fingerprint
from fedalign.maths.hashing import derive_seed
from fedalign.maths.rounding import advanced, broadcast_dtype, bytes_of, pack, unpack
from fedalign.protocol import Packed, ParameterGroup, Weights, WireDtype


@dataclass(frozen=True)
class PublicModel:
    """The weights of one broadcast, whole and as differences to the broadcast before."""

    weights: Mapping[ParameterGroup, Packed]  # bfloat16
    differences: Mapping[ParameterGroup, Packed] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)  # group with a difference -> digest of what it is added to


def first(weights: Weights, dtype: WireDtype, keep: Callable[[Tensor], Tensor]) -> PublicModel:
    """The public model of the first broadcast, where differences will be in `dtype`; `keep` as in `following`."""
    whole = broadcast_dtype(dtype)
    return PublicModel({group: _kept(pack(value, whole, seed=0), keep) for group, value in weights.items()})


def following(
    last: PublicModel, old: Weights, new: Weights, dtype: WireDtype, seed: int, keep: Callable[[Tensor], Tensor]
) -> PublicModel:
    """The public model of the next broadcast.

    Args:
        last: what clients were sent of `old`.
        old: the master weights before.
        new: the master weights now; a group that is the same tensor as in `old` did not change.
        dtype: of differences, int8 or int4.
        seed: of their rounding.
        keep: puts a tensor where it shall lie; see `maths.heap`.
    """
    weights, differences, before = dict(last.weights), dict[ParameterGroup, Packed](), dict[str, str]()
    for group, master in new.items():
        base = last.weights[group]
        if master is old[group] or not len(master):
            continue
        difference = pack(master - unpack(base), dtype, derive_seed(seed, group))
        moved = advanced(base, difference)
        if torch.equal(moved.values, base.values):
            continue
        differences[group], weights[group] = _kept(difference, keep), _kept(moved, keep)
        before[str(group)] = fingerprint(part.numpy().data for part in bytes_of(base))
    return PublicModel(weights, differences, before)


def _kept(packed: Packed, keep: Callable[[Tensor], Tensor]) -> Packed:
    return Packed(keep(packed.values), packed.scale)
