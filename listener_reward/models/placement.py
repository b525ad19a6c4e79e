"""Where a model's weights lie and in how many bits, in transformers' own arguments."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from listener_reward.errors import InputError, MissingExtraError, missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from transformers import BitsAndBytesConfig

from listener_reward.models.options import Quantization
from listener_reward.prefix.attention import base_model

WHOLE = (
    "lm_head",
    "visual",
    "model.visual",
    "model.vision_tower",
    "model.vision_model",
    "model.connector",
    "model.multi_modal_projector",
)
"""Parts that are not quantised: the head, because label logits are to be float32, and what sees, which is small and
has layers whose widths no block of 64 divides."""


def placement(
    device: torch.device,
    dtype: str | torch.dtype,
    device_map: str | Mapping[str, Any] | None,
    quantization: Quantization | None,
) -> dict[str, Any]:
    """What `from_pretrained` of transformers is given for it; nothing where the model is moved whole once it is loaded.

    Raises:
        MissingExtraError: accelerate or bitsandbytes is not installed.
    """
    if device_map is None and quantization is None:
        return {}
    if device_map is not None and (fault := missing("large", "device_map", "accelerate")):
        raise fault
    given: dict[str, Any] = {"device_map": {"": device} if device_map is None else device_map}
    if quantization is not None:
        given["quantization_config"] = quantized(quantization, dtype)
    return given


def chosen_device(device: str | torch.device) -> torch.device:
    """A device that is on this machine.

    Raises:
        InputError: a name that is none, or a GPU that is not here.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}, which is none; give 'cpu', 'cuda' or 'cuda:1'") from error
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= here:
        has = f"{here} GPUs, from 'cuda:0' on" if here else "no GPU that torch can use"
        raise InputError(f"device is {str(device)!r}, and this machine has {has}; choose another, or leave it out")
    return chosen


@contextmanager
def attention_of(name: str | None) -> Generator[None]:
    """Around transformers' loading of a model with the attention `name`: what it lacks for that is one line.

    Raises:
        InputError: there is no such attention.
        MissingExtraError: it is in a package that is not installed, or cannot be used here.
    """
    try:
        yield
    except ImportError as error:
        if name is None:
            raise
        raise MissingExtraError(
            f"attn_implementation is {name!r}, which cannot be used here ({error}); install its package, or leave "
            "attn_implementation out"
        ) from error
    except ValueError as error:
        if name is None or "attn_implementation" not in str(error):
            raise
        raise InputError(
            f"attn_implementation is {name!r}, which transformers does not know; choose 'sdpa', 'eager' or "
            "'flash_attention_2', or leave it out"
        ) from error


def quantized(bits: Quantization, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """How the language model's layers are rounded, and in which dtype they are multiplied.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    if fault := missing("large", f"quantization={bits!r}", "accelerate", "bitsandbytes"):
        raise fault
    if bits == "8bit":  # it says at every layer of every pass that it multiplies in float16, which is what it is for
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        llm_int8_skip_modules=list(WHOLE),
    )


def input_device(model: Any) -> torch.device:
    """Where a forward pass's inputs go: where the first weights lie that are on a device at all.

    Weights that accelerate keeps in the processor's memory or on disk are on none until they are used.
    """
    base = base_model(model)
    weights = (weight.device for weight in base.parameters())
    return next((device for device in weights if device.type != "meta"), torch.device("cpu"))


_FOR_LISTENER = (
    ", or where it is the listener's give listener_options={'max_pixels': None} (--listener-option max-pixels=none)"
)


def limit_pixels(processor: Any, max_pixels: int | None) -> None:
    """Has the image processor scale pictures down to `max_pixels`, see `ModelOptions`.

    Raises:
        InputError: the processor has no such limit, or a higher least size.
    """
    if max_pixels is None:
        return
    size: Any = processor.image_processor.size  # numbers of pixels in Qwen's processors, and lengths of edges in others
    least = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    if least is None or not hasattr(
        processor.image_processor, "merge_size"
    ):  # Qwen's, whose sizes are numbers of pixels
        raise InputError(
            f"max_pixels is {max_pixels}, and the checkpoint's {type(processor).__name__} has no such limit; leave it "
            f"out{_FOR_LISTENER}"
        )
    if max_pixels < least:
        raise InputError(
            f"max_pixels is {max_pixels}, less than the processor's least, {least}; give at least that{_FOR_LISTENER}"
        )
    processor.image_processor.size = type(size)(shortest_edge=least, longest_edge=max_pixels)
