"""Vision features of a frozen model, computed once for each image or video however many chats it is in."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

from torch import Tensor
from torch.nn.functional import linear
from transformers.modeling_outputs import BaseModelOutputWithPooling

from listener_reward.media.clips import Clip, Visual
from listener_reward.models.older_transformers import give_features, parts_of, take_features

MAX_PATCHES = 16384
"""Patches that the vision tower sees in one pass: about ten images of 512 pixels."""

PREPARED = 2**24
"""Bytes of decoded pictures that become patches at a time: four of 1024 pixels a side, 16 of 512."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image or video as the language model sees it."""

    grid: Tensor
    """Patches in time, height and width, (3,) int64, on the CPU."""
    features: Tensor
    """(tokens, hidden)."""
    deeper: tuple[Tensor, ...] = ()
    """Features that Qwen3-VL adds to its first layers, each (tokens, hidden)."""
    moving: bool = False
    """Whether it is a video, which has placeholders of its own."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.features, *self.deeper))


class ImageFeatures:
    """Encodes images and clips with a model's vision tower and keeps the latest, up to `max_bytes`.

    Only for weights that do not change: what is kept is not computed again. `clear()` forgets it.
    """

    def __init__(self, core: Any, image_processor: Any, video_processor: Any = None, *, max_bytes: int = 2**29):
        """
        Args:
            core: the model that has `get_image_features` and `get_video_features` (`model.model` of a Qwen-VL).
            image_processor: turns PIL images into `pixel_values` and `image_grid_thw`.
            video_processor: turns lists of frames into `pixel_values_videos` and `video_grid_thw`; None where no clip
                comes.
            max_bytes: how much of the features to keep between calls.
        """
        take_features(core)
        self.core = core
        self.image_processor = image_processor
        self.video_processor = video_processor
        self.max_bytes = max_bytes
        self.encoded = 0
        """Images and clips that went through the vision tower so far."""
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()

    def __call__(self, visuals: Sequence[Visual]) -> list[Encoded]:
        """One entry for each picture or clip; equal ones share it. A clip's times are no part of it."""
        digests = [each.looks if isinstance(each, Clip) else each.digest for each in visuals]
        found = {key: self._kept[key] for key in digests if key in self._kept}
        missing = {key: each for key, each in zip(digests, visuals, strict=True) if key not in found}
        if missing:
            found.update(zip(missing, self._encode(list(missing.values())), strict=True))
        for key in dict.fromkeys(digests):
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        size = sum(entry.nbytes for entry in self._kept.values())
        while size > self.max_bytes:
            size -= self._kept.popitem(last=False)[1].nbytes
        return [found[key] for key in digests]

    def clear(self) -> None:
        self._kept.clear()

    def _encode(self, visuals: list[Visual]) -> list[Encoded]:
        """Patches take eight times the memory of the pictures that they are made of: `PREPARED` bytes at a time."""
        self.encoded += len(visuals)
        pictures = [each for each in visuals if not isinstance(each, Clip)]
        clips = [each for each in visuals if isinstance(each, Clip)]
        still: list[Encoded] = []
        moving: list[Encoded] = []
        for some in _runs([picture.nbytes for picture in pictures], PREPARED):
            batch = self.image_processor(images=[pictures[k].image for k in some], return_tensors="pt")
            still += self._look(self.core.get_image_features, batch["pixel_values"], batch["image_grid_thw"])
        for some in _runs([clip.nbytes for clip in clips], PREPARED):
            batch = self.video_processor([[frame.image for frame in clips[k].frames] for k in some])
            features = self.core.get_video_features
            found = self._look(features, batch["pixel_values_videos"], batch["video_grid_thw"])
            moving += [replace(each, moving=True) for each in found]
        in_turn = {True: iter(moving), False: iter(still)}
        return [next(in_turn[isinstance(each, Clip)]) for each in visuals]

    def _look(self, features_of: Callable[..., Any], pixels: Tensor, grids: Tensor) -> list[Encoded]:
        """Patches through the vision tower, at most `MAX_PATCHES` at a time where one image or clip is not more."""
        patches: list[int] = cast("Any", grids.prod(-1)).tolist()
        encoded: list[Encoded] = []
        for some in _runs(patches, MAX_PATCHES):
            first, last = sum(patches[: some.start]), sum(patches[: some.stop])
            with patches_by_product(self.core.visual):
                output = features_of(
                    pixels[first:last].to(self.core.device), grids[some.start : some.stop].to(self.core.device)
                )
            sizes = [len(features) for features in output.pooler_output]
            layers = [parts_of(layer, sizes) for layer in getattr(output, "deepstack_features", None) or ()]
            deeper = list(zip(*layers, strict=True)) or [()] * len(some)
            for row, features, more in zip(some, output.pooler_output, deeper, strict=True):
                encoded.append(Encoded(grids[row], features.clone(), tuple(layer.clone() for layer in more)))
        return encoded


@contextlib.contextmanager
def patches_by_product(tower: Any) -> Generator[None]:
    """Inside, `tower` embeds its patches by one matrix product.

    That is what its three-dimensional convolution comes to, whose kernel is a whole patch; torch's own takes seven
    times as long on a CPU.
    """
    embed = tower.patch_embed
    own: Any = cast("dict[str, Any]", vars(embed)).get("forward")  # accelerate's, where it has put hooks on the layers
    kernel = embed.proj.weight

    def forward(patches: Tensor) -> Tensor:
        return linear(patches.view(-1, kernel[0].numel()).to(kernel.dtype), kernel.flatten(1), embed.proj.bias)

    embed.forward = forward
    try:
        yield
    finally:
        del embed.forward
        if own is not None:
            embed.forward = own


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What a vision tower gives. transformers hands it on as an output of its own, so a plain object will not do.

    `pooler_output` is a list of (tokens, hidden), one for each image; `deepstack_features` has such a list for each
    of the first layers of a Qwen3-VL, and is empty for a Qwen2.5-VL.
    """

    deepstack_features: list[list[Tensor]] | None = None


def as_encoder_output(encoded: Iterable[Encoded]) -> dict[str, Any]:
    """The forward pass's argument that puts images and videos, in order, at their placeholders; none for none."""
    kinds: dict[str, list[Encoded]] = {}
    for entry in encoded:
        kinds.setdefault("video" if entry.moving else "image", []).append(entry)
    outputs: dict[str, Any] = {}
    for kind, entries in kinds.items():
        deeper = [list(layer) for layer in zip(*(entry.deeper for entry in entries), strict=True)]
        features: Any = [entry.features for entry in entries]
        outputs[kind] = EncoderOutput(pooler_output=features, deepstack_features=deeper)
    return give_features(outputs)


def _runs(sizes: Sequence[int], budget: int) -> Iterable[range]:
    """Neighbours that fit the budget together; one that alone exceeds it stands alone."""
    start, used = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and used + size > budget:
            yield range(start, stop)
            start, used = stop, 0
        used += size
    if start < len(sizes):
        yield range(start, len(sizes))
