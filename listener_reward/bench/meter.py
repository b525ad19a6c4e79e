"""Reads off what a stretch of work took: time, memory, tokens, patches, and how near it came to the machine's rate."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


@dataclass
class Reading:
    """What one arm of a benchmark took."""

    seconds: list[float] = field(default_factory=list)
    """Wall time of each repeat."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of each repeat, all threads together: what to look at where other work runs beside."""
    tokens: int = 0
    """Tokens that went through the language model, padding and decoding steps included, in the last repeat."""
    patches: int = 0
    """Image patches that went through the vision tower, in the last repeat."""
    weight_flops: float = 0.0
    """Floating-point operations of the products with weight matrices, the head's included, forward and (if there is
    one) backward."""
    peak_mb: float = 0.0
    """Most memory of the process or of the GPU over what it had before, in MB (1e6 bytes)."""
    before: int | None = None
    """Bytes that count as "before"; None for what there is at the start of each repeat. After a warm-up the process may
    already hold the memory that a repeat uses."""


@contextlib.contextmanager
def metered(models: Sequence[Any], reading: Reading, *, backward: bool = False) -> Iterator[None]:
    """Adds one repeat to `reading`: what all `models` do together. `backward` counts the products of gradients too.

    The counting is a hook on every linear layer, some microseconds each. trl's fused head multiplies by the head's
    weight without calling its layer, and is counted where it does.
    """
    reading.tokens = reading.patches = 0
    reading.weight_flops = 0.0
    hooks = []

    def linear(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        times = 1 + _gradients(args[0], module.weight, backward)
        reading.weight_flops += 2 * times * module.weight.numel() * (output.numel() // output.shape[-1])

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> None:
        gradients = _gradients(hidden, weight, backward)
        times = 1 + gradients + bool(gradients)  # its backward pass multiplies once more, not to keep logits
        reading.weight_flops += 2 * times * weight.numel() * len(hidden)

    def tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shown = kwargs.get("inputs_embeds")
        reading.tokens += shown.shape[0] * shown.shape[1] if shown is not None else 0

    def patches(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        reading.patches += len(args[0] if args else kwargs["hidden_states"])

    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(linear))
        name = type(module).__name__
        if name.endswith("VLTextModel"):
            hooks.append(module.register_forward_pre_hook(tokens, with_kwargs=True))
        elif "VisionTransformer" in name or name.endswith("VLVisionModel"):
            hooks.append(module.register_forward_pre_hook(patches, with_kwargs=True))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = in_use() if reading.before is None else reading.before
    start, processor = time.perf_counter(), time.process_time()
    try:
        with _fused_heads(head):
            yield
    finally:
        if cuda:
            torch.cuda.synchronize()
        reading.seconds.append(time.perf_counter() - start)
        reading.cpu_seconds.append(time.process_time() - processor)
        peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
        reading.peak_mb = max(reading.peak_mb, (peak - before) / 1e6)
        for hook in hooks:
            hook.remove()


def _gradients(x: torch.Tensor, weight: torch.Tensor, backward: bool) -> int:
    """How many products the backward pass of `x @ weight` has; a forward pass computed again has had them counted."""
    again = torch._C._current_graph_task_id() != -1  # inside a backward pass
    if not backward or again or not torch.is_grad_enabled():
        return 0
    return int(x.requires_grad) + int(weight.requires_grad)


@contextlib.contextmanager
def _fused_heads(count: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Inside, `count` is told of each `(hidden, weight)` that trl's fused head multiplies."""
    utils: Any = sys.modules.get("trl.trainer.utils")
    if utils is None:  # nothing has loaded trl, so nothing has such a head
        yield
        return
    stock = utils._ChunkedLogProbFunction

    def apply(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        count(hidden, weight)
        return stock.apply(hidden, weight, *rest)

    utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = stock


def in_use() -> int:
    """Bytes of memory that tensors have on the GPU, or the process where there is none."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()


def resident() -> int:
    """Bytes of memory that the process has now; on systems without /proc, the most it has had."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_resident()


def peak_resident() -> int:
    """The most bytes of memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_rate(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """The machine's own rate for matrix products: floating-point operations per second, the best of some tries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.matmul(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
