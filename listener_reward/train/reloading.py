"""vLLM in the trainer's process, on a CPU: linear weights stay as they are, so that each step's can be loaded.

vLLM's build for CPUs packs the weights of a layer where the processor has a kernel for their dtype, and throws the
originals away. trl loads each step's weights into the same engine: the layers then fail ("'Parameter' object has no
attribute 'weight_loader'"), and an output head would go on with the packed weights of the first step. Whether a kernel
is there depends on processor and dtype, so that the same run ends on one machine and fails on the next.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch.nn import functional

from listener_reward.train.sharing import replaced

logger = logging.getLogger(__name__)

_DISPATCH = "dispatch_cpu_unquantized_gemm"
_PARAMETERS = ["layer", "remove_weight"]


def keeping_weights() -> contextlib.AbstractContextManager[Any]:
    """Engines that are made inside multiply by torch, and keep the weights that they load. Only vLLM for CPUs changes.

    A vLLM that chooses its kernels in another way is left alone, with a warning.
    """
    if find_spec("vllm") is None:
        return contextlib.nullcontext()  # trl says so, and names the extra
    platforms: Any = import_module("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        return contextlib.nullcontext()
    kernels: Any = import_module("vllm.model_executor.layers.utils")
    stock = getattr(kernels, _DISPATCH, None)
    if stock is None or list(inspect.signature(stock).parameters) != _PARAMETERS:
        logger.warning(
            "vLLM %s for CPUs has no %s(%s), which vLLM 0.32 has; if it packs weights, later ones cannot be loaded",
            *(version("vllm"), _DISPATCH, ", ".join(_PARAMETERS)),
        )
        return contextlib.nullcontext()
    return replaced(kernels, _DISPATCH, _unpacked)


def _unpacked(layer: Any, remove_weight: bool) -> None:
    """Has `layer` multiply by the weight that it holds at the time, whatever kernel there is for packed ones."""
    del remove_weight
    layer.cpu_linear = functional.linear
