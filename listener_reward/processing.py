"""Processors of the Qwen-VL family that work without torchvision.

Stock `AutoProcessor` cannot build a Qwen-VL processor where torchvision is missing, because its video processor needs
it. This package reads images only, so its processors leave the video part out, and write it into what they save, so
that a checkpoint saved here loads with stock transformers elsewhere.
"""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, ProcessorMixin, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.image_utils import make_flat_list_of_images


def _name_special_tokens(processor: Any, tokenizer: Any) -> None:
    for name, token in (
        ("image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
        ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"),
    ):
        setattr(processor, f"{name}_token", token)
        setattr(processor, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))


def _with_video_block(saved: dict[str, Any], name: str, video: str, image_processor: Any) -> dict[str, Any]:
    """Adds what stock `AutoProcessor` insists on: its own class name and a video processor's configuration."""
    saved["processor_class"] = name
    saved.setdefault(
        "video_processor",
        {
            "video_processor_type": video,
            "patch_size": image_processor.patch_size,
            "temporal_patch_size": image_processor.temporal_patch_size,
            "merge_size": image_processor.merge_size,
        },
    )
    return saved


class _EachImageOnce:
    """Preprocesses an image that stands in several chats of a batch once.

    It goes by the object, so that a look at pixels costs nothing; a group's rows share theirs where images are decoded
    once. Overrides a step of transformers' own `__call__`, and hands on exactly what that would have made.
    """

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        stock = super()._process_images  # pyright: ignore[reportAttributeAccessIssue]
        flat: list[Any] = list(make_flat_list_of_images(images))  # pyright: ignore[reportArgumentType]
        place: dict[int, int] = {}
        order = [place.setdefault(id(image), len(place)) for image in flat]
        if len(place) == len(flat):
            return stock(images, **kwargs)
        distinct: list[Any] = [None] * len(place)
        for image, index in zip(flat, order, strict=True):
            distinct[index] = image
        processed, written = stock(distinct, **kwargs)
        grids, pixels = processed["image_grid_thw"], processed["pixel_values"]
        ends = [0, *accumulate(int(math.prod(map(int, grid))) for grid in grids)]
        rows = [pixels[ends[index] : ends[index + 1]] for index in order]
        processed["pixel_values"] = torch.cat(rows) if isinstance(pixels, torch.Tensor) else np.concatenate(rows)
        processed["image_grid_thw"] = grids[order]
        return processed, [written[index] for index in order]


class ImageOnlyQwen2_5_VLProcessor(_EachImageOnce, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without the video processor.

    transformers reads the names in this signature to learn which parts a processor has, so leaving `video_processor`
    out of it is all it takes.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        _name_special_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def to_dict(self) -> dict[str, Any]:
        saved = super().to_dict()
        return _with_video_block(saved, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", self.image_processor)


class ImageOnlyQwen3VLProcessor(_EachImageOnce, Qwen3VLProcessor):
    """`Qwen3VLProcessor` without the video processor."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        _name_special_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def to_dict(self) -> dict[str, Any]:
        return _with_video_block(super().to_dict(), "Qwen3VLProcessor", "Qwen3VLVideoProcessor", self.image_processor)


_PROCESSORS = {"qwen2_5_vl": ImageOnlyQwen2_5_VLProcessor, "qwen3_vl": ImageOnlyQwen3VLProcessor}


def load_processor(model: str | Path, **kwargs: Any) -> Any:
    """The image processor, tokenizer and chat template of a Qwen2.5-VL or Qwen3-VL checkpoint, padding on the left.

    Left padding is not a taste: trl and batched generation misalign image positions silently with any other.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    kind = AutoConfig.from_pretrained(model, **kwargs).model_type
    if kind not in _PROCESSORS:
        raise ValueError(f"{model} is a {kind!r} model; listener-reward reads {' and '.join(map(repr, _PROCESSORS))}")
    return _PROCESSORS[kind].from_pretrained(model, padding_side="left", **kwargs)
