"""A frozen base in 4 bits (QLoRA): NormalFloat4 by bitsandbytes, of linear layers and of fused experts alike.

bitsandbytes and transformers convert nn.Linear only, and peft cannot adapt the fused tensors that bitsandbytes can
parametrise. So the weights themselves are packed, and act as the dense tensors they stand for: names, shapes and
modules stay, and peft, `detect` and the parameter groups see what they always saw.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.families import MoELayer
from fedalign.moe.tuning import beside_text

BLOCK = 64  # values that share a scale
LEAST_SAVED = 0.5  # share of a model's bytes that has to be saved
LARGEST = 2**31 - 1  # values that bitsandbytes' kernels can count

aten = torch.ops.aten


@dataclass(frozen=True)
class Saved:
    """Bytes of a model's parameters and buffers: as they are, and with a 4-bit base."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """The saving as a share of `before`."""
        return 1 - self.after / self.before

    def __str__(self) -> str:
        """For people.

        >>> print(Saved(before=13_840_000_000, after=4_180_000_000))
        4-bit base: 13,840.0 MB before, 4,180.0 MB after, 70% saved
        """
        return (
            f"4-bit base: {self.before / 1e6:,.1f} MB before, {self.after / 1e6:,.1f} MB after, {self.share:.0%} saved"
        )


class FourBit(Tensor):
    """A matrix, or E of them, in 4 bits. Whatever reads it gets the dense values; it cannot be written.

    Without a second quantisation of the scales: 4.5 bits a value instead of 4.13, but an expert is a slice of both
    parts, and the result holds no mean over a tensor, which differs in its last bits from device to device.

    Attributes:
        codes: two values a byte, uint8 [N / 2], or [E, N / 2] of E matrices of N values.
        scales: one of each block of values, float32 [N / 64] or [E, N / 64].
    """

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> FourBit:
        """A tensor without values of its own."""
        packed: FourBit = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=codes.device)
        return packed

    def __init__(self, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def of(cls, dense: Tensor, device: str | torch.device) -> Self:
        """Quantise [out, in] or [E, ., .] on `device`, matrix by matrix: never all of `dense` is there."""
        functional = library().functional
        codes, scales = [], []
        for matrix in dense if dense.dim() == 3 else (dense,):
            code, state = functional.quantize_4bit(
                matrix.to(device).contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
            )
            codes.append(code.view(-1))
            scales.append(state.absmax)
        if dense.dim() == 2:
            return cls(codes[0], scales[0], dense.shape, dense.dtype)
        return cls(torch.stack(codes), torch.stack(scales), dense.shape, dense.dtype)

    def dense(self) -> Tensor:
        """All values, in the type they had."""
        if self.dim() == 3 and self.numel() > LARGEST:
            return torch.stack([self._expert(index).dense() for index in range(len(self))])
        functional = library().functional
        # as one row: on a CPU bitsandbytes takes wrong scales for rows that are no multiple of a block
        state = functional.QuantState(
            self.scales.view(-1), shape=(self.numel(),), dtype=self.dtype, blocksize=BLOCK, quant_type="nf4"
        )
        flat: Tensor = functional.dequantize_4bit(self.codes.view(-1, 1), state)
        return flat.view(self.shape)

    def _expert(self, index: int) -> FourBit:
        return FourBit(self.codes[index], self.scales[index], self.shape[1:], self.dtype)

    def _each(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> FourBit:
        return FourBit(change(self.codes), change(self.scales), self.shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # torch leaves this argument without a type
        return f"FourBit({list(self.shape)}, {self.dtype}, device={str(self.device)!r})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Sequence[int], torch.dtype]]:
        """The inner tensors, which torch swaps when a module is moved."""
        return ["codes", "scales"], (self.shape, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], context: tuple[Sequence[int], torch.dtype], *_: Any
    ) -> FourBit:
        """The inverse of `__tensor_flatten__`."""
        return cls(inner["codes"], inner["scales"], *context)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Above autograd: only products with a matrix are special."""
        kwargs = kwargs or {}
        if function is linear and isinstance(args[1], FourBit):
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it without its first argument
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd: what only moves or selects stays packed, all else reads the dense values."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, FourBit):
            if function in (aten.detach.default, aten.alias.default):
                return first._each(lambda part: part)
            if function is aten.clone.default:
                return first._each(torch.clone)
            if function is aten._to_copy.default and (kwargs.get("dtype") or first.dtype).is_floating_point:
                return first._each(lambda part: part.to(kwargs.get("device"), copy=True), kwargs.get("dtype"))
            if function is aten.select.int and first.dim() == 3 and args[1] == 0:
                return first._expert(args[2])
        _refuse_writing(function, args, kwargs)
        with torch.inference_mode(False):  # a view made there of a tensor from outside has to be an ordinary one
            args, kwargs = tree_map_only(FourBit, FourBit.dense, (args, kwargs))
            return function(*args, **kwargs)


class _Product(torch.autograd.Function):
    """inputs · weightᵀ + bias; for the backward pass it keeps the codes, where torch would keep the dense matrix."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: FourBit, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(inputs, weight.dense(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (gradient,) = gradients
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ ctx.weight.dense().to(gradient.dtype), None, of_bias


def _linear(inputs: Tensor, weight: FourBit, bias: Tensor | None = None) -> Tensor:
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    product: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call] # torch annotates no apply
    return product


def library() -> ModuleType:
    """bitsandbytes, loaded when it is first needed.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "tuning.kind = 'qlora': needs bitsandbytes, which is not installed. Install fedalign-moe[qlora], "
            "or choose tuning.kind = 'lora'."
        )
    return importlib.import_module("bitsandbytes")


def need_cuda(device: str | torch.device) -> None:
    """Refuse a device on which a 4-bit base would work, but at the pace of a CPU.

    Raises:
        UserError: It is none of CUDA.
    """
    if torch.device(device).type != "cuda":
        there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        choices = f"run.device of {', '.join(there)}" if there else "a machine with one"
        raise UserError(
            f"tuning.kind = 'qlora': needs a CUDA device, but run.device is {str(device)!r}. "
            f"Choose {choices}, or tuning.kind = 'lora'."
        )


def quantise(model: PreTrainedModel, layers: Iterable[MoELayer], device: str | torch.device) -> Saved:
    """Pack every linear layer and all fused experts of a model in place, and move it to `device` on the way.

    Head, embeddings, norms, routers, biases and towers of a multimodal model stay as they are. A model on the CPU is
    never whole on the device before it is packed. Parameters are replaced: make optimizers, adapters and parameter
    groups afterwards.

    Raises:
        UserError: As `forecast`, or bitsandbytes is not installed.
        ValueError: The model has adapters already.
    """
    layers = tuple(layers)
    library()
    saved = forecast(model, layers)
    for _, module, name in tuple(_weights(model, layers)):
        packed = FourBit.of(getattr(module, name).detach(), device)
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
    model.to(device)
    return Saved(saved.before, sum(_nbytes(tensor) for tensor in _tensors(model)))


def forecast(model: PreTrainedModel, layers: Iterable[MoELayer]) -> Saved:
    """The saving of `quantise`, from shapes alone: a model on the meta device is enough.

    Raises:
        UserError: It would save less than half, or the experts are of an odd size.
        ValueError: The model has adapters already.
    """
    chosen = {getattr(module, name): path for path, module, name in _weights(model, tuple(layers))}
    for parameter, path in chosen.items():
        if parameter.dim() == 3 and parameter[0].numel() % BLOCK:
            raise UserError(
                f"tuning.kind = 'qlora': {path} holds {parameter[0].numel()} values an expert, and must hold a "
                f"multiple of {BLOCK}. Choose tuning.kind = 'lora'."
            )
    before = {tensor: _nbytes(tensor) for tensor in _tensors(model)}
    saved = Saved(sum(before.values()), sum(_packed_nbytes(t) if t in chosen else n for t, n in before.items()))
    if saved.share < LEAST_SAVED:
        kept = [(name, parameter) for name, parameter in model.named_parameters() if parameter not in chosen]
        largest, _ = max(kept, key=lambda named: named[1].nbytes)
        raise UserError(
            f"tuning.kind = 'qlora': saves {saved.share:.0%} of {saved.before / 1e6:,.1f} MB, and must save at least "
            f"half: {largest} and others stay as they are. Choose tuning.kind = 'lora'."
        )
    return saved


def recompute_experts(model: PreTrainedModel, layers: Iterable[MoELayer]) -> None:
    """Compute packed fused experts again in the backward pass, so that no dense copy of them lives that long.

    Call it last, when the adapters are in. Gradient checkpointing of whole layers does the same, and more.
    """
    for layer in layers:
        experts = model.get_submodule(layer.experts)
        fused = any(isinstance(parameter, FourBit) and parameter.dim() == 3 for parameter in experts.parameters())
        if fused and not layer.router.startswith(f"{layer.experts}."):  # a router inside must not be asked twice
            experts.forward = MethodType(_recomputed, experts)


def _recomputed(experts: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(experts).forward, experts)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _weights(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Iterator[tuple[str, nn.Module, str]]:
    """The packed tensors: path, module, and name there."""
    head = model.get_output_embeddings()
    routers = tuple(f"{layer.router}." for layer in layers)
    outside = tuple(f"{path}." for path in beside_text(model))
    for path, module in model.named_modules():
        if ".lora_" in path:
            raise ValueError(f"{path}: quantise a model first, adapt it then")
        gate = f"{path}.".startswith(routers) or getattr(module, "out_features", 0) == 1  # of a shared expert
        kept = module is head or gate or f"{path}.".startswith(outside)
        if type(module) is nn.Linear and not kept:  # subclasses are routers
            yield f"{path}.weight", module, "weight"
    for layer in layers:
        for path, module in model.get_submodule(layer.experts).named_modules(prefix=layer.experts):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and len(parameter) == layer.size:
                    yield f"{path}.{name}", module, name


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer once."""
    yield from model.parameters()
    yield from model.buffers()


def _nbytes(tensor: Tensor) -> int:
    return tensor.codes.nbytes + tensor.scales.nbytes if isinstance(tensor, FourBit) else tensor.nbytes


def _packed_nbytes(dense: Tensor) -> int:
    count = len(dense) if dense.dim() == 3 else 1
    size = dense.numel() // count
    return count * (math.ceil(size / 2) + 4 * math.ceil(size / BLOCK))


def _refuse_writing(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Dense values are made for one operation: what it wrote there would be lost without a word."""
    for index, argument in enumerate(function._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(value, FourBit) and argument.alias_info is not None and argument.alias_info.is_write:
            # no TypeError: `+=` would take it for "not implemented" and try something else
            raise RuntimeError(f"{function}: weights in 4 bits cannot be written. Write to the model they were made of")
