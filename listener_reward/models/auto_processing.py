"""The processors of families that the package does not know by name, as transformers' `AutoProcessor` gives them.

Many of them have a video processor, which needs torchvision, and cannot be had without. Here they are loaded without
it, and read images alone.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import transformers
from transformers import AutoProcessor
from transformers.models.auto import processing_auto
from transformers.utils.hub import PushToHubMixin

from listener_reward.errors import InputError
from listener_reward.models.hub import cannot_load, find_file

_VIDEO = "video_processor"


def load_auto_processor(kind: str, model: str | Path, **kwargs: Any) -> Any:
    """The processor of a checkpoint whose `model_type` is `kind`, padding on the left.

    Raises:
        InputError: transformers has no processor of images and text for it, or a package that it needs is missing.
    """
    try:
        processor = _load(kind, model, **kwargs)
    except ImportError as error:
        raise InputError(cannot_load(model, error)) from error
    if not all(hasattr(processor, part) for part in ("image_processor", "tokenizer", "apply_chat_template")):
        reason = f"transformers has no processor of images and text for {kind!r} models"
        raise InputError(cannot_load(model, reason))
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _load(kind: str, model: str | Path, **kwargs: Any) -> Any:
    name: str | None = cast("Any", processing_auto).PROCESSOR_MAPPING_NAMES.get(kind)
    if name is None or find_spec("torchvision"):
        return AutoProcessor.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            model, trust_remote_code=False, **kwargs
        )
    stock = getattr(transformers, name)
    if _VIDEO not in stock.get_attributes():
        return stock.from_pretrained(model, trust_remote_code=False, **kwargs)
    return images_only(stock).from_pretrained(model, trust_remote_code=False, **kwargs)


@cache
def images_only(stock: Any) -> Any:
    """`stock`, a class of processors with a video processor, for images alone."""

    class Others(stock):
        """`stock` with its other parts, to load those."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in stock.get_attributes() if name != _VIDEO]

    class ImagesOnly(stock):
        @classmethod
        def _get_arguments_from_pretrained(cls, model: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
            load: Any = Others._get_arguments_from_pretrained
            found = iter(load(model, processor_dict, **kwargs))
            return [NoVideos(model, **kwargs) if name == _VIDEO else next(found) for name in stock.get_attributes()]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            given: Any = super()
            return (
                NoVideos if argument_name == _VIDEO else given.check_argument_for_proper_class(argument_name, argument)
            )

        def to_dict(self) -> dict[str, Any]:
            parent: Any = super()
            own: dict[str, Any] = parent.to_dict() | {"processor_class": stock.__name__}
            return {name: value for name, value in own.items() if name != _VIDEO or value}

    return ImagesOnly


class NoVideos(PushToHubMixin):
    """Stands where a video processor would: it reads no video, and saves again what the checkpoint says of its own.

    With torchvision, a checkpoint saved here then has the one that it had.
    """

    num_frames = fps = None  # rendering a chat asks for them, whatever is in it
    _auto_class = None

    def __init__(self, model: str | Path, **kwargs: Any):
        self.saved = _saved_video_processor(model, **kwargs)

    def _set_processor_class(self, name: str) -> None:
        """Called where a processor is saved; the settings name its class already."""

    def to_dict(self) -> dict[str, Any]:
        return self.saved


def _saved_video_processor(model: str | Path, **kwargs: Any) -> dict[str, Any]:
    """The settings of a checkpoint's video processor, from either of the files that hold them; empty without."""
    for file, key in (("processor_config.json", _VIDEO), ("video_preprocessor_config.json", None)):
        if path := find_file(model, file, **kwargs):
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found := saved if key is None else saved.get(key):
                return found
    return {}
