"""The video processors of the Qwen-VL family, with torchvision and without.

With torchvision they are transformers' own. Without it frames become patches by way of the image processor.

Stock `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor` differ from the image processor in two things: how large a
frame becomes, and that a patch spans two neighbouring frames where an image's spans the same picture twice. So the
image processor cuts each frame into patches, and those of neighbours are put together here. What the text needs to know
(how many tokens, how far apart, which time stamps) transformers' own processors work out from the result.

Two differences remain. Frames are chosen by the caller, never here (`do_sample_frames=False`). And frames are resized
by Pillow, as images are in this package, where torchvision's bicubic filter may round a value the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_whole
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from listener_reward.media.clips import Clip, assumed_times, spacing_of
from listener_reward.models.older_transformers import VideoSettings, smart_resize

_STOCK: dict[str, dict[str, Any]] = {
    "Qwen2VLVideoProcessor": {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "max_video_tokens": 128000,
    },
    "Qwen3VLVideoProcessor": {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": IMAGENET_STANDARD_MEAN,
        "image_std": IMAGENET_STANDARD_STD,
        "max_video_tokens": 768,
    },
}
"""Where the two differ, and what holds where a checkpoint does not say: transformers' own defaults, in classes that are
not to be had without torchvision."""

_PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_PATCHES = ("patch_size", "temporal_patch_size", "merge_size")
_KEPT = (*_PATCHES, *_PIXELS, "size", "resample", "cap_pixels_per_frame", "max_video_tokens")


class ClipProcessor:
    """Frames to `pixel_values_videos` and `video_grid_thw`, as one of the two stock processors makes them."""

    def __init__(self, stock: str, image_processor: Any, saved: Mapping[str, Any] | None = None):
        """
        Args:
            stock: the class of transformers that this one stands for.
            image_processor: the checkpoint's, which cuts the patches.
            saved: what the checkpoint says of its videos. None gives a frame what an image gets, whatever that is at
                the time, for a processor that was put together from its parts.
        """
        self.stock = stock
        self.image_processor = image_processor
        self.saved = saved

    @property
    def config(self) -> dict[str, Any]:
        """Every setting that counts: what is saved, then transformers' defaults."""
        images, saved = self.image_processor, self.saved
        if saved is None:
            saved = {name: getattr(images, name) for name in ("size", "image_mean", "image_std")}
        config = {name: getattr(images, name) for name in _PATCHES}  # the vision tower reads both
        config |= _STOCK[self.stock] | {name: saved[name] for name in _KEPT if saved.get(name) is not None}
        size = dict(config["size"])
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if self.stock == "Qwen2VLVideoProcessor" and saved.get(name) is not None:  # the other does not read them
                size[edge] = saved[name]
        return config | {"size": size}

    @property
    def patch_size(self) -> int:
        return self.config["patch_size"]

    @property
    def temporal_patch_size(self) -> int:
        return self.config["temporal_patch_size"]

    @property
    def merge_size(self) -> int:
        return self.config["merge_size"]

    @classmethod
    def from_pretrained(cls, stock: str, image_processor: Any, model: str | Path, **kwargs: Any) -> ClipProcessor:
        """With the checkpoint's own settings, from the files and in the order in which transformers looks for them."""
        saved, _ = VideoSettings.get_video_processor_dict(str(model), **kwargs)
        return cls(stock, image_processor, saved)

    def to_dict(self) -> dict[str, Any]:
        """What stock `AutoProcessor` reads of a checkpoint's videos."""
        return {"video_processor_type": self.stock, **self.config}

    def __call__(
        self,
        videos: Sequence[Sequence[Image.Image]],
        *,
        video_metadata: Sequence[VideoMetadata] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Patches of videos, each a sequence of RGB frames of one size.

        Returns:
            `pixel_values_videos` (patches, channels * temporal_patch_size * patch_size**2) float32, `video_grid_thw`
            (videos, 3) int64, and `video_metadata`, which the callers in transformers read the times from.
        """
        parts, grids = zip(*map(self._patches, videos), strict=True)
        if video_metadata is None:
            video_metadata = [metadata_of(assumed_times(len(frames))) for frames in videos]
        data = {"pixel_values_videos": torch.cat(parts), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data | {"video_metadata": list(video_metadata)})

    def frame_size(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """Width and height that each of so many frames of this size is resized to."""
        least, most = self.config["size"]["shortest_edge"], self.config["size"]["longest_edge"]
        factor, temporal = self.patch_size * self.merge_size, self.temporal_patch_size
        capped = self.config.get("cap_pixels_per_frame")
        if self.stock == "Qwen3VLVideoProcessor":  # its limits are those of the whole video
            if capped:
                most = max(min(self.config["max_video_tokens"] * factor**2, most // frames), int(least * 1.05)) * frames
            high, wide = smart_resize_whole(frames, height, width, temporal, factor, least, most)
        else:
            if capped:
                whole = int(self.config["max_video_tokens"] * factor**2 * 0.9)
                most = max(min(most, whole * temporal // frames), int(least * 1.05))
            high, wide = smart_resize(height, width, factor, least, most)
        return wide, high

    def _patches(self, frames: Sequence[Image.Image]) -> tuple[torch.Tensor, list[int]]:
        size = self.frame_size(len(frames), *frames[0].size)
        resample = Image.Resampling(self.config.get("resample", Image.Resampling.BICUBIC))
        resized = [frame.resize(size, resample) for frame in frames]
        resized += resized[-1:] * (-len(resized) % self.temporal_patch_size)
        options = {name: self.config[name] for name in (*_PIXELS, *_PATCHES) if name in self.config}
        cut = self.image_processor(images=resized, do_resize=False, return_tensors="pt", **options)
        time, patch = self.temporal_patch_size, self.patch_size
        pixels = cut["pixel_values"].unflatten(1, (-1, time, patch, patch))[:, :, 0]  # each picture stood there twice
        high, wide = cut["image_grid_thw"][0, 1:].tolist()
        pixels = pixels.unflatten(0, (-1, time, high * wide)).permute(0, 2, 3, 1, 4, 5)
        return pixels.flatten(0, 1).flatten(1), [len(resized) // time, high, wide]


class StockClipProcessor:
    """One of the two stock processors, which need torchvision, called as a `ClipProcessor` is."""

    def __init__(self, stock: Any):
        self.stock = stock

    @property
    def config(self) -> dict[str, Any]:
        return self.stock.to_dict()

    @property
    def patch_size(self) -> int:
        return self.stock.patch_size

    @property
    def temporal_patch_size(self) -> int:
        return self.stock.temporal_patch_size

    @property
    def merge_size(self) -> int:
        return self.stock.merge_size

    def to_dict(self) -> dict[str, Any]:
        return self.config

    def frame_size(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """As a `ClipProcessor`'s."""
        return ClipProcessor(type(self.stock).__name__, self, self.config).frame_size(frames, width, height)

    def __call__(
        self,
        videos: Sequence[Sequence[Image.Image]],
        *,
        video_metadata: Sequence[VideoMetadata] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """As a `ClipProcessor`'s."""
        if video_metadata is None:
            video_metadata = [metadata_of(assumed_times(len(frames))) for frames in videos]
        return self.stock(
            [list(frames) for frames in videos],
            video_metadata=list(video_metadata),
            do_sample_frames=False,
            return_metadata=True,
            return_tensors="pt",
        )


def load_video_processor(
    stock: str, image_processor: Any, model: str | Path, **kwargs: Any
) -> ClipProcessor | StockClipProcessor:
    """The video processor of a checkpoint: transformers' class `stock`, or one that stands for it."""
    if not is_torchvision_available():
        return ClipProcessor.from_pretrained(stock, image_processor, model, **kwargs)
    saved, _ = VideoSettings.get_video_processor_dict(str(model), **kwargs)
    return StockClipProcessor(getattr(transformers, stock).from_dict(saved))


def metadata(clip: Clip) -> VideoMetadata:
    """The clip's times in the terms of transformers."""
    return metadata_of(clip.times)


def metadata_of(times: Sequence[float]) -> VideoMetadata:
    """Times of frames in the terms of transformers, as of a video with one frame a second.

    The frames are then taken at `times`, which gives Qwen3-VL's time stamps, and the video's rate is that of the
    frames, from which Qwen2.5-VL's seconds per patch come.
    """
    duration: Any = len(times) * spacing_of(times)  # of frames, which need not be whole here
    indices: Any = list(times)
    return VideoMetadata(total_num_frames=duration, fps=1.0, frames_indices=indices)


def seconds_per_patch(clips: Sequence[Clip], processor: Any) -> torch.Tensor:
    """What Qwen2.5-VL's positions are spaced by, (clips,) float32, as its own processor has it."""
    temporal = processor.video_processor.temporal_patch_size
    return torch.tensor([temporal / metadata(clip).sampled_fps for clip in clips])
