"""Meters a run: time, memory, tokens, patches and floating-point operations."""

from __future__ import annotations

import contextlib
import importlib
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

_FUSED_HEAD = {
    "forward": [
        *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"),
        *("logit_scale", "outputs"),
    ],
    "backward": ["ctx", "grad_logprobs", "grad_entropy", "_"],
}
"""The parameters of what trl's fused head does, the weight's product among them."""


@dataclass
class Reading:
    """The readings of one workload done in one way."""

    seconds: list[float] = field(default_factory=list)
    """Wall time of each repeat."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of each repeat, all threads together: steadier than wall time on a machine with other work."""
    tokens: int = 0
    """Tokens that went through the language model, padding and decoding steps included, in the last repeat."""
    patches: int = 0
    """Image patches that went through the vision tower, in the last repeat."""
    weight_flops: float = 0.0
    """Floating-point operations of the products with weight matrices, the head's included, forward and (if there is
    one) backward."""
    peak_mb: float = 0.0
    """Memory: peak use minus use before the run, of the GPU or else of the process, in MB (1e6 bytes)."""
    before: int | None = None
    """Bytes in use before the run; None takes the use at the start of each repeat. After a warm-up the process may
    already hold the memory that a repeat uses."""


@contextlib.contextmanager
def metered(models: Sequence[Any], reading: Reading, *, backward: bool = False) -> Iterator[None]:
    """Adds one repeat to `reading`, the sum over all `models`. With `backward`, products of gradients count too.

    The counting is a hook on every linear layer, some microseconds each. The backward pass's products are counted as
    it comes by, so those of a forward pass that is computed again (gradient checkpointing) are counted once. trl's
    fused head multiplies by the head's weight without calling its layer, and is counted where it does.

    Raises:
        MissingExtraError: trl is loaded, and its fused head is another than the one that can be counted.
    """
    reading.tokens = reading.patches = 0
    reading.weight_flops = 0.0
    hooks = []

    def count(flops: float) -> None:
        reading.weight_flops += flops

    def linear(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        once = 2 * module.weight.numel() * (output.numel() // output.shape[-1])
        count(once)
        if backward and output.requires_grad:
            gradients = int(args[0].requires_grad) + int(module.weight.requires_grad)
            output.register_hook(lambda _: count(gradients * once))

    def tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        reading.tokens += embeds.shape[0] * embeds.shape[1] if embeds is not None else 0

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
    with _fused_head_counted(count, backward):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = in_use() if reading.before is None else reading.before
        start, processor = time.perf_counter(), time.process_time()
        try:
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


@contextlib.contextmanager
def _fused_head_counted(count: Callable[[float], None], backward: bool) -> Iterator[None]:
    """Inside, `count` is told the operations of trl's fused head. Where trl is not loaded, nothing has such a head."""
    if "trl" not in sys.modules:
        yield
        return
    head: Any = fused_head()
    forward, backward_of = head.forward, head.backward

    def counted_forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        ctx.flops_of_a_product = 2 * weight.numel() * len(hidden)
        count(ctx.flops_of_a_product)
        return forward(ctx, hidden, weight, *rest)

    def counted_backward(ctx: Any, *gradients: Any) -> Any:
        if backward:  # one product more than gradients: the logits are not kept, and so computed again
            count((1 + sum(ctx.needs_input_grad[:2])) * ctx.flops_of_a_product)
        return backward_of(ctx, *gradients)

    head.forward, head.backward = staticmethod(counted_forward), staticmethod(counted_backward)
    try:
        yield
    finally:
        head.forward, head.backward = staticmethod(forward), staticmethod(backward_of)


def fused_head() -> Any:
    """trl's autograd function for log-probabilities of `hidden @ weight.T`, which keeps no logits.

    Raises:
        MissingExtraError: this trl has another.
    """
    from listener_reward.train.guard import require

    try:
        kernels: Any = importlib.import_module("trl.kernels")
    except ImportError:
        kernels = SimpleNamespace(__name__="trl.kernels")  # nothing in it is as expected
    require(kernels, "ChunkedLogProbFunction", ["args", "kwargs"])
    head = kernels.ChunkedLogProbFunction
    for name, expected in _FUSED_HEAD.items():
        require(head, name, expected)
    return head


def in_use() -> int:
    """Bytes of GPU memory that tensors hold; without a GPU, bytes of memory of the process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()


def resident() -> int:
    """Bytes of memory that the process holds now; without /proc, its peak so far."""
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
