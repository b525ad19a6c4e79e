"""What can be chosen of a model that runs here: one list, for judges, listeners, rewards, commands and YAML files.

Known without torch.
"""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, get_args

from listener_reward.errors import InputError

if TYPE_CHECKING:
    import torch

MEMORY = 2**32
"""Bytes that a batch may take beside the weights, unless `memory` says."""

_F = TypeVar("_F", bound=Callable[..., Any])

TRANSFORMERS = "transformers"
VLLM = "vllm"
BACKENDS = (TRANSFORMERS, VLLM)
"""Names of what runs weights, beside the addresses of servers."""

Quantization = Literal["4bit", "8bit"]


class ModelOptions(TypedDict, total=False):
    """Where and how a model runs. What is left out, or None, has the default."""

    backend: str | None
    """Who runs the weights: "transformers", "vllm" for an engine in this process, or the address of a server of them.

    The server is any OpenAI-compatible one, such as "http://localhost:8000/v1", or "MODEL@http://localhost:8000/v1"
    where it has several models. Of these options vLLM takes `dtype`, `revision` and `max_pixels`, and a server the last
    two. A listener with weights of its own is not looked for behind the reasoner's address. Default: "transformers"."""
    engine: Mapping[str, Any] | None
    """Further arguments of vLLM's engine, such as `{"tensor_parallel_size": 2}`."""
    accept_less: bool
    """Take a server that gives no log-probabilities, or none of a prompt. `Judge.limits` says what that costs, and so
    does a warning. Default: False."""
    device: str | torch.device | None
    """Where the model runs: "cuda:1", "cpu". Default: this process's own GPU, or the CPU where there is none."""
    device_map: str | Mapping[str, Any] | None
    """How layers are spread over several GPUs, as transformers has it: "auto", "balanced", or a device for each part of
    the model. For a model that one GPU cannot hold. Layers on several devices do without a shared prefix, and every
    chat pays for its own prompt. Needs accelerate."""
    dtype: str | torch.dtype | None
    """Dtype of the weights, such as "bfloat16", or "auto" for the checkpoint's own. Default: bfloat16 on a GPU, float32
    on a CPU."""
    quantization: Quantization | None
    """"4bit" (NF4) or "8bit" (LLM.int8) rounds the language model's layers as it is loaded, by bitsandbytes: a quarter
    or half of bfloat16's memory, at some accuracy. Vision tower and output head stay as they are. A checkpoint that is
    saved quantised needs no option."""
    attn_implementation: str | None
    """transformers' name of an attention: "sdpa", "flash_attention_2", "eager". Default: "sdpa", the only one with a
    shared prefix."""
    revision: str | None
    """A branch, tag or commit of a checkpoint on the Hub."""
    max_pixels: int | None
    """Larger pictures are scaled down to this many pixels before the model sees them; a Qwen2.5-VL makes one token of
    784 of them, a Qwen3-VL of 1024. Default: the checkpoint's own, which may be 16 million. None in `listener_options`
    is the listener's own, whatever the reasoner has; a listener of a family without such a limit needs it."""
    batch_size: int
    """Completions sampled, or thoughts read, in one forward pass. Default: 32."""
    shared_prefix: bool
    """False runs every chat for itself, as plain transformers does. Default: True."""
    token_budget: int
    """Most tokens of the language model in one forward pass. Default: 16384, or fewer where `memory` allows fewer."""
    memory: int | str | None
    """Bytes, or a size such as "8GB", that a batch may take beside the weights: one half for what a forward pass
    computes, the other for keys and values that are kept while thoughts are sampled, for features of the batch's
    pictures, and without a shared prefix for their patches. Batches are made smaller to fit; one chat is never split.
    It is an estimate from the model's shape. Default: 4 GiB."""
    vision_bytes: int
    """Bytes of the images' features to keep between calls. Default: 512 MiB."""


MODEL_OPTIONS: tuple[str, ...] = tuple(ModelOptions.__annotations__)

_DEFAULTS = {
    "accept_less": False,
    "batch_size": 32,
    "shared_prefix": True,
    "token_budget": 16384,
    "vision_bytes": 2**29,
}
"""Those that are not None. `TransformersVLM` has the same."""


def is_address(name: object) -> bool:
    """Whether `name` is `http://...` or `MODEL@http://...`."""
    return isinstance(name, str) and re.match(r"(?:.+@)?https?://", name) is not None


def split_address(address: str) -> tuple[str | None, str]:
    """The name and the URL of `MODEL@http://...`; None for the name where there is the URL alone."""
    model, at, rest = address.rpartition("@http")
    return (model, "http" + rest) if at else (None, address)


def listed(function: _F) -> _F:
    """Lists the options in the signature of `function`, which takes them as `**options: Unpack[ModelOptions]`."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=annotation)
        for name, annotation in ModelOptions.__annotations__.items()
    ]
    cast("Any", function).__signature__ = signature.replace(parameters=[*own, *options])
    return function


def check_options(options: Mapping[str, Any], field: str = "") -> None:
    """Refuses options that `ModelOptions` does not have or that cannot be, before anything is loaded.

    `field` is the name of a mapping that holds them.
    """
    before = f"{field}: " if field else ""
    if unknown := [str(name) for name in options if name not in MODEL_OPTIONS]:
        raise InputError(f"{before}{', '.join(unknown)}: no option of a model, which has {', '.join(MODEL_OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    if "backend" in given and given["backend"] not in BACKENDS and not is_address(given["backend"]):
        choices = ", ".join(map(repr, BACKENDS))
        raise InputError(
            f"{before}backend is {given['backend']!r}; choose {choices}, or an address such as "
            "'http://localhost:8000/v1'"
        )
    if "quantization" in given and given["quantization"] not in get_args(Quantization):
        raise InputError(f"{before}quantization is {given['quantization']!r}; choose '4bit' or '8bit', or leave it out")
    if "device" in given and "device_map" in given:
        raise InputError(
            f"{before}device is {str(given['device'])!r} and device_map is {given['device_map']!r}; a map says where "
            "every layer lies, so leave one of them out"
        )
    for name in ("batch_size", "token_budget", "max_pixels"):
        if name in given and not (isinstance(given[name], int) and given[name] >= 1):
            raise InputError(f"{before}{name} is {given[name]!r}; give a whole number of at least 1")
    if "memory" in given:
        as_bytes(given["memory"], f"{before}memory")


def as_bytes(value: int | str, field: str) -> int:
    """A number of bytes, or a size such as "8GB", "512 MiB" or "1.5G", in bytes.

    Raises:
        InputError: neither, or nothing at all.
    """
    found = re.fullmatch(r"(\d+\.?\d*) ?([kmgt]?)(i?)b?", str(value).strip().lower())
    size = 0 if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))
    if size < 1:
        raise InputError(f"{field} is {value!r}; give a number of bytes, or a size such as '8GB' or '500MiB'")
    return size
