"""One client on several GPUs of one machine: a share of every weight in each process, or layers here and there in one.

Processes that torchrun starts run the same program on the same data and come to the same decisions. FSDP2 shards the
model; of a batch a process runs its own rows, and what the routers did is joined again, so penalties and statistics are
those of the whole batch everywhere. The first process alone writes and prints. In a process of its own every verb but
`split` does nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fedalign.errors import UserError

PATIENCE = timedelta(hours=1)  # others wait while the first process writes
DEVICES = ("auto", "cpu", "cuda")
SPLIT = "split"  # the run.device of `split`

P = ParamSpec("P")
T = TypeVar("T")


def launched() -> int:
    """How many processes torchrun started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; within itself it only waits for all.

    Args:
        device: as configured.

    Raises:
        UserError: They are on several machines, or cannot each have a GPU of their own.
    """
    if launched() == 1 or dist.is_initialized():
        wait()
        yield
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", launched()))
    if here != launched():
        raise UserError(f"torchrun: {launched()} processes, {here} of them on this machine. Use one machine.")
    if device not in DEVICES:
        raise UserError(
            f"run.device = {device!r}: torchrun gives each process a GPU. Choose one of: {', '.join(DEVICES)}."
        )
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        if here > torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node {here}: there are {torch.cuda.device_count()} GPUs. Start no more "
                'processes than that, or set run.device = "cpu".'
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    yield
    wait()
    dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Until all are here: what the first wrote can be read."""
    if world() > 1:
        dist.barrier()


def by_the_first(act: Callable[P, None]) -> Callable[P, None]:
    """The first process does it, the others wait until it is done."""

    @wraps(act)
    def turn(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_first():
            act(*args, **kwargs)
        wait()

    return turn


def agreed(value: T) -> T:
    """The first process's value; sums on GPUs may differ in their last bits."""
    if world() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def total(values: Tensor) -> Tensor:
    """The sum over all processes; outside autograd."""
    if world() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def joined(part: Tensor, axis: int = 0) -> Tensor:
    """The parts of all processes in their order along one axis; gradients flow into one's own."""
    if world() == 1:
        return part
    rows = part.detach().movedim(axis, 0).contiguous()
    count = torch.tensor([len(rows)], device=part.device)
    counts = [torch.empty_like(count) for _ in range(world())]
    dist.all_gather(counts, count)
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather([_as_bytes(whole) for whole in gathered], _as_bytes(padded))
    parts = [whole[: int(n)].movedim(0, axis) for whole, n in zip(gathered, counts, strict=True)]
    parts[rank()] = part
    return torch.cat(parts, axis)


def _as_bytes(values: Tensor) -> Tensor:
    """The same storage in the one type that every backend carries."""
    return values.view(-1).view(torch.uint8)


def numbered(count: int, device: torch.device) -> tuple[int, int]:
    """Where one's own things begin if all processes' are numbered in order, and how many there are in all."""
    if world() == 1:
        return 0, count
    counts = joined(torch.tensor([count], device=device)).tolist()
    return sum(counts[: rank()]), sum(counts)


def own_rows(count: int) -> range:
    """This process's share of so many rows: neighbours, perhaps none."""
    share = math.ceil(count / world())
    return range(min(rank() * share, count), min((rank() + 1) * share, count))


def shard(model: nn.Module, blocks: Iterable[nn.Module], routers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process its rows of every parameter, on `device`; a block is gathered while it runs.

    Gradients are summed over the processes, also those of experts that only some of them used.

    Args:
        model: changed in place, its parameters are other objects afterwards.
        blocks: its layers.
        routers: parts of blocks, which may have parameters of another type.
        device: where to.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(f"torchrun: torch {torch.__version__} cannot shard experts. Install torch 2.13 or newer.")
    mesh = init_device_mesh(device.type, (world(),))
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    blocks = list(blocks)
    own = [
        router for router in routers if {p.dtype for p in router.parameters()} != {p.dtype for p in model.parameters()}
    ]
    for module in (*own, *blocks, model):
        # resharded even at the root, where a gathered copy would outlive a write to the shards
        fully_shard(module, mesh=mesh, mp_policy=sums, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator] # fully_shard has made it an FSDPModule


def split(model: nn.Module, blocks: Iterable[nn.Module], places: Mapping[str, str | int] | None = None) -> None:
    """Spread whole layers over the GPUs of this machine; accelerate carries what flows between them.

    Args:
        model: changed in place, its parameters are other objects afterwards.
        blocks: its layers.
        places: the device of each module; None: by the memory that is free.

    Raises:
        UserError: It does not fit.
    """
    from accelerate import dispatch_model, infer_auto_device_map  # noqa: PLC0415 - takes a second to import
    from accelerate.utils import get_balanced_memory  # noqa: PLC0415 - as above

    if places is None:
        together = sorted({type(block).__name__ for block in blocks})
        room: dict[Any, Any] = get_balanced_memory(model, no_split_module_classes=together)
        gpus = {place: free for place, free in room.items() if place != "cpu"}
        places = infer_auto_device_map(model, gpus, no_split_module_classes=together)
    if "disk" in places.values():
        raise UserError(f'run.device = "{SPLIT}": the model does not fit on the GPUs. Choose a smaller one, or qlora.')
    first, skipped = next(iter(places.values())), getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, dict(places), main_device=first, skip_keys=skipped)


def is_sharded(values: Tensor) -> bool:
    """Whether only some rows of it are here."""
    return isinstance(values, DTensor)


def whole(values: Tensor) -> Tensor:
    """All rows of a sharded tensor; any other is whole already. All processes must ask."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def held(values: Tensor) -> tuple[Tensor, int]:
    """The rows that are here, in place, and the number of the first."""
    if not isinstance(values, DTensor):
        return values, 0
    return values.to_local(), own_rows(len(values)).start


def like(values: Tensor, other: Tensor) -> Tensor:
    """A whole tensor sharded and placed as another of its shape."""
    if isinstance(other, DTensor) and values.shape == other.shape:
        return distribute_tensor(values.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return values.to(other.device)
