"""vLLM in the trainer's process, on a CPU: linear weights stay as they are, so that each step's can be loaded.

vLLM's build for CPUs packs the weights of a layer where the processor has a kernel for their dtype, and throws the
originals away. trl loads each step's weights into the same engine: the layers then fail ("'Parameter' object has no
attribute 'weight_loader'"), and an output head would go on with the packed weights of the first step. Whether a kernel
is there depends on processor and dtype, so that the same run ends on one machine and fails on the next.
"""

from __future__ import annotations

import contextlib
import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.nn import functional
from trl import GRPOConfig

from listener_reward.train.guard import change
from listener_reward.train.sharing import replaced

logger = logging.getLogger(__name__)

_DISPATCH = "dispatch_cpu_unquantized_gemm"


def keeping_weights(args: GRPOConfig) -> contextlib.AbstractContextManager[Any]:
    """vLLM that trl starts inside multiplies by torch, and keeps the weights that it loads. Only its CPU build changes.

    A build that chooses its kernels in another way is left alone, with a warning.
    """
    stock = contextlib.nullcontext()
    if not (args.use_vllm and args.vllm_mode == "colocate") or find_spec("vllm") is None:  # of which trl speaks
        return stock
    platforms: Any = import_module("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        return stock
    kernels: Any = import_module("vllm.model_executor.layers.utils")
    if reason := change(kernels, _DISPATCH, ["layer", "remove_weight"], import_module("vllm")):
        logger.warning("weights of later steps cannot be loaded where vLLM packs those of the first: %s", reason)
        return stock
    return replaced(kernels, _DISPATCH, _unpacked)


def _unpacked(layer: Any, remove_weight: bool) -> None:
    """Has `layer` multiply by the weight that it holds at the time, whatever kernel there is for packed ones."""
    del remove_weight
    layer.cpu_linear = functional.linear
