"""Processors of the Qwen-VL family, which work without torchvision too.

What turns pictures into patches is transformers' own: with torchvision its image and video processors, without it its
image processor for Pillow. Stock `AutoProcessor` cannot build a Qwen-VL processor where torchvision is missing, because
its video processor needs it. The processors here are built without one, then get one (`video_processing`), and write
its settings into what they save, so that a checkpoint saved here loads with stock transformers elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from transformers import PreTrainedConfig, ProcessorMixin, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.image_utils import make_flat_list_of_images

from listener_reward.chat import FOREIGN_RESERVED, QWEN_RESERVED, ChatFormat
from listener_reward.models.adapters import base_of, brings_processor, options_of_base
from listener_reward.models.auto_processing import load_auto_processor
from listener_reward.models.families import family_of
from listener_reward.models.hub import loading
from listener_reward.models.older_transformers import for_pictures
from listener_reward.models.templates import check_template
from listener_reward.models.video_processing import ClipProcessor, load_video_processor

_MIXIN: Any = ProcessorMixin
"""As `Any`: transformers types its own arguments in part only."""


def _name_special_tokens(processor: Any, tokenizer: Any) -> None:
    for name, token in (
        ("image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
        ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"),
    ):
        setattr(processor, f"{name}_token", token)
        setattr(processor, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))


class _ImageOnly:
    """A processor of transformers whose videos go through the image processor, and which takes each image once.

    transformers reads the names in the signature of `__init__` to learn which parts a processor is loaded with, so
    leaving `video_processor` out of it is all it takes.
    """

    stock_processor: str
    stock_video_processor: str

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        image_processor = for_pictures(image_processor)
        _name_special_tokens(self, tokenizer)
        _MIXIN.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = ClipProcessor(self.stock_video_processor, image_processor)

    def to_dict(self) -> dict[str, Any]:
        parent: Any = super()
        own = {"processor_class": self.stock_processor, "video_processor": self.video_processor.to_dict()}
        return parent.to_dict() | own

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        """Preprocesses an image that stands in several chats of a batch once.

        It goes by the object, so that a look at pixels costs nothing; a group's rows share theirs where images are
        decoded once. Overrides a step of transformers' own `__call__`, and hands on exactly what that would have made.
        Releases up to 5.6 have no such step, and preprocess every copy.
        """
        parent: Any = super()
        stock: Callable[..., Any] = parent._process_images
        flat: list[Any] = list(cast("Any", make_flat_list_of_images)(images))
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


class ImageOnlyQwen2_5_VLProcessor(_ImageOnly, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` whose videos go through the image processor."""

    stock_processor = "Qwen2_5_VLProcessor"
    stock_video_processor = "Qwen2VLVideoProcessor"


class ImageOnlyQwen3VLProcessor(_ImageOnly, Qwen3VLProcessor):
    """`Qwen3VLProcessor` whose videos go through the image processor."""

    stock_processor = "Qwen3VLProcessor"
    stock_video_processor = "Qwen3VLVideoProcessor"


_PROCESSORS = {"Qwen2_5_VLProcessor": ImageOnlyQwen2_5_VLProcessor, "Qwen3VLProcessor": ImageOnlyQwen3VLProcessor}


def load_processor(model: str | Path, **kwargs: Any) -> Any:
    """The image processor, tokenizer and chat template of a vision-language checkpoint, padding on the left.

    An adapter's are those beside it, or where there are none its base's. Of families without a processor here,
    transformers' own is taken (`auto_processing`).

    Left padding is not a taste: trl and batched generation misalign image positions silently with any other.

    Raises:
        InputError: the checkpoint cannot be found, reached or read, or is no vision-language model, or its chat
            template has no end.
    """
    base, given = base_of(model, **kwargs) or model, kwargs
    if base is not model:
        given = options_of_base(str(base), kwargs, model)
        if not brings_processor(model, **kwargs):
            model, kwargs = base, given
    with loading(base):
        config: dict[str, Any] = cast("Any", PreTrainedConfig).get_config_dict(base, **given)[0]
    family = family_of(config.get("model_type"), where=base, config=config)
    with loading(model):
        # A checkpoint's files are data: with None, the default, transformers would offer to run code from them.
        ours = None if family.processor is None else cast("Any", _PROCESSORS[family.processor])
        if ours is None:
            processor = load_auto_processor(config["model_type"], model, **kwargs)
        else:
            processor = ours.from_pretrained(model, padding_side="left", trust_remote_code=False, **kwargs)
        templates = processor.chat_template
        for template in cast("dict[str, Any]", templates).values() if isinstance(templates, dict) else [templates]:
            if isinstance(template, str):
                check_template(template)
        if ours is not None:
            processor.video_processor = load_video_processor(
                processor.stock_video_processor, processor.image_processor, model, **kwargs
            )
    return processor


def opened_thought(text: str, think_tag: str | None) -> str:
    """What a rendered generation prompt itself writes of the thought, as `<think>` and a line break; "" for nothing."""
    if not think_tag or not text.rstrip().endswith(think_tag):
        return ""
    return text[text.rindex(think_tag) :]


def opened_by_template(processor: Any, chat_format: ChatFormat) -> str:
    """`opened_thought` of any question in `chat_format`: what the chat template itself writes of each completion."""
    asked = processor.apply_chat_template(chat_format.messages(""), tokenize=False, add_generation_prompt=True)
    return opened_thought(asked, chat_format.think[0])


def decoded(tokenizer: Any, completions: Any) -> list[str]:
    """The text of completions' token ids, without the tokens that end, fill or frame a turn.

    transformers' own `skip_special_tokens` drops every special token. Fine-tuners like to add their tags as such, and a
    completion without its tags would be malformed.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [value for name, value in tokenizer.special_tokens_map.items() if name != "additional_special_tokens"]
    dropped = {special.get(token) for token in (*QWEN_RESERVED, *FOREIGN_RESERVED, *map(str, _flat(named)))}
    if dropped.issuperset(special.values()):
        return tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = [cast("Any", row).tolist() if isinstance(row, torch.Tensor) else row for row in completions]
    return tokenizer.batch_decode([[token for token in row if token not in dropped] for row in rows])


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)
