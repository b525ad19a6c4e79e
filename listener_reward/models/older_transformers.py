"""What transformers before 5.19 has elsewhere or otherwise, in the terms of the newest release.

Nothing here asks for a version: each difference is found where it is, in a name, a signature or a type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from torch import Tensor
from transformers import Qwen2_5_VLModel, video_processing_utils

Qwen2VLImageProcessorPil: Any
smart_resize: Callable[..., tuple[int, int]]
_plain: Any = None
try:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl
except ImportError:  # before 5.6, when the class of the plain name did without torchvision
    from transformers.models.qwen2_vl import image_processing_qwen2_vl

    _plain = cast("Any", image_processing_qwen2_vl).Qwen2VLImageProcessor
    smart_resize = cast("Any", image_processing_qwen2_vl).smart_resize

    class _ForPictures(_plain):
        """The plain one takes a picture of one row, or of three, for one whose channels come first."""

        def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
            stock: Any = super()
            return stock.preprocess(images, *args, **{"input_data_format": "channels_last"} | kwargs)

    _ForPictures.__name__ = _plain.__name__  # which is written into what it saves
    Qwen2VLImageProcessorPil = _ForPictures
else:
    Qwen2VLImageProcessorPil = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
    smart_resize = image_processing_pil_qwen2_vl.smart_resize


def for_pictures(image_processor: Any) -> Any:
    """The image processor, for pictures of Pillow of any size."""
    if _plain is not None and type(image_processor) is _plain:
        image_processor.__class__ = Qwen2VLImageProcessorPil
    return image_processor


VideoSettings: Any = getattr(video_processing_utils, "VideoProcessorMixin", video_processing_utils.BaseVideoProcessor)
"""What reads a checkpoint's settings of videos. Without torchvision the second class cannot be made, but asked."""

_FORWARD_TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(cast("Any", Qwen2_5_VLModel).forward).parameters


def give_features(outputs: dict[str, Any]) -> dict[str, Any]:
    """A forward pass's arguments for what a vision tower gave: `outputs` by "image" and "video".

    Before 5.19 a forward pass takes pixels and calls for their features. The features themselves go in as the pixels,
    and come back from that call, see `take_features`. What Qwen3-VL adds to its first layers was not divided by images.
    """
    if not outputs:
        return {}
    if _FORWARD_TAKES_FEATURES:
        return {"mm_encoder_outputs": outputs}
    arguments = {"image": "pixel_values", "video": "pixel_values_videos"}
    for output in outputs.values():
        output.deepstack_features = [torch.cat(list(layer)) for layer in output.deepstack_features or ()]
    return {arguments[kind]: output for kind, output in outputs.items()}


def take_features(core: Any) -> None:
    """Has `core` (`model.model` of a Qwen-VL) take what `give_features` makes. Pixels are encoded as ever."""
    if _FORWARD_TAKES_FEATURES:
        return
    kind = core.__class__
    for name in ("get_image_features", "get_video_features"):
        if hasattr(core, name) and name not in vars(core):
            # A bound method: a copy of the model gets one that is bound to the copy.
            setattr(core, name, MethodType(_encoded_or_given(getattr(kind, name)), core))


def _encoded_or_given(stock: Callable[..., Any]) -> Callable[..., Any]:
    def features(core: Any, pixels: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(core, pixels, *args, **kwargs) if isinstance(pixels, Tensor) else pixels

    return features


def parts_of(layer: Any, sizes: Sequence[int]) -> Sequence[Tensor]:
    """A layer's features, (tokens, hidden) for each image, of `sizes` tokens. Before 5.19 they are one tensor."""
    return torch.split(layer, list(sizes)) if isinstance(layer, Tensor) else layer


def video_texts(processor: Any, inputs: dict[str, Any], text: str) -> tuple[str, list[str]]:
    """What stands for a video in `text`, and what `processor` writes in its place for each of the videos in `inputs`.

    Before 5.13 Qwen3-VL's frames take the place of the marks around the placeholder as well.
    """
    videos = range(len(inputs["video_metadata"]))
    if hasattr(processor, "replace_video_token"):
        return processor.video_token, [processor.replace_video_token(inputs, place) for place in videos]
    merged = processor.video_processor.merge_size**2
    grids: list[list[int]] = [grid.tolist() for grid in inputs["video_grid_thw"]] if videos else []
    written: list[str] = []
    if not hasattr(processor, "_calculate_timestamps"):  # Qwen2.5-VL's
        written += [processor.video_token * (time * high * wide // merged) for time, high, wide in grids]
        return processor.video_token, written
    start, end = processor.vision_start_token, processor.vision_end_token
    for (_, high, wide), metadata in zip(grids, inputs["video_metadata"], strict=True):
        patch = processor.video_processor.temporal_patch_size
        times = processor._calculate_timestamps(metadata.frames_indices, metadata.fps, patch)
        frame = start + processor.video_token * (high * wide // merged) + end
        written.append("".join(f"<{time:.1f} seconds>{frame}" for time in times))
    marked = start + processor.video_token + end
    return marked if marked in text else processor.video_token, written
