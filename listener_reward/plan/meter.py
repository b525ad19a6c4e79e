"""Counts what a pass over tensors without data would take: bytes alive at once, and floating-point operations.

A plan runs the models' own code on torch's meta device, where a tensor has a shape and a dtype and no memory. So what
is counted is what transformers, PEFT and this package do, and no formula of ours has to keep up with them. Two things
differ from a real device, and stand in here: fused attention and autocast.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Inside, every storage that an operation makes is counted until nothing holds it any more.

    What was there before, weights among it, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes that are alive now."""
        self.peak = 0
        self.flops = 0.0
        """Operations of matrix products, convolutions and attention, forward and backward."""
        self.seen: dict[int, float] = {}
        """Which fraction of the scores is computed where attention has so many queries: 1 unless it is said here."""
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see(args, made=False)
        self._see([*kwargs.values()], made=False)
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        self._see(out, made=True)
        return out

    def _see(self, values: Any, *, made: bool) -> None:
        if isinstance(values, Tensor):
            if values.is_meta:
                storage = values.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._add(storage, key, storage.nbytes() if made else 0)
        elif isinstance(values, list | tuple):
            for value in values:
                self._see(value, made=made)

    def _add(self, storage: Any, key: int, size: int) -> None:
        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextlib.contextmanager
def metered(autocast: torch.dtype | None = None) -> Iterator[Meter]:
    """A meter of what runs inside, without gradients."""
    meter = Meter()
    with torch.no_grad(), standing_in(meter, autocast), meter:
        yield meter


@contextlib.contextmanager
def standing_in(meter: Meter, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Fused attention, and arithmetic in `autocast` where it is given, for what the meta device lacks."""
    with _Fused(meter), _Autocast(autocast) if autocast else contextlib.nullcontext():
        yield


class _Fused(TorchFunctionMode):
    """Attention as fused kernels compute it, which never hold the scores: on CPUs and GPUs all that are used here.

    On the meta device torch would take its plain attention, which holds them.
    """

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.meter, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(meter: Meter, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    rows, heads, asking, width = query.shape
    seen = 0.5 if options.get("is_causal") else meter.seen.get(asking, 1.0)
    flops = 4.0 * rows * heads * asking * key.shape[-2] * width * seen
    result: Any = _FusedAttention.apply(query, key, value, meter, flops)
    return result


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: Meter, flops: float) -> Tensor:
        meter.flops += flops
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.meter, ctx.flops = meter, flops
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.meter.flops += 2.5 * ctx.flops  # the scores again, and four products of gradients
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class _Autocast(TorchFunctionMode):
    """torch.autocast, which knows no meta device: products in `dtype`, cast weights kept until the end."""

    _LOWER = (F.linear, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, Tensor.matmul)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._cast: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._LOWER:
            args = tuple(self._lowered(each) for each in args)
            kwargs = {name: self._lowered(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad):  # as torch's own cache
            return value.to(self.dtype)
        if value not in self._cast:
            self._cast[value] = value.to(self.dtype)
        return self._cast[value]
