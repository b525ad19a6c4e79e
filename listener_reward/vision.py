"""Vision features of a frozen model, computed once for each image however many chats it is in."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from PIL import Image
from torch import Tensor

MAX_PATCHES = 16384
"""Patches that the vision tower sees in one pass: about ten images of 512 pixels."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as the language model sees it."""

    grid: Tensor
    """Patches in time, height and width, (3,) int64, on the CPU."""
    features: Tensor
    """(tokens, hidden)."""
    deeper: tuple[Tensor, ...] = ()
    """Features that Qwen3-VL adds to its first layers, each (tokens, hidden)."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.features, *self.deeper))


class ImageFeatures:
    """Encodes images with a model's vision tower and keeps the latest, up to `max_bytes`.

    Only for weights that do not change: what is kept is not computed again. `clear()` forgets it.
    """

    def __init__(self, core: Any, image_processor: Any, *, max_bytes: int = 2**29):
        """
        Args:
            core: the model that has `get_image_features` (`model.model` of a Qwen-VL).
            image_processor: turns PIL images into `pixel_values` and `image_grid_thw`.
            max_bytes: how much of the features to keep between calls.
        """
        self.core = core
        self.image_processor = image_processor
        self.max_bytes = max_bytes
        self.encoded = 0
        """Images that went through the vision tower so far."""
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()

    def __call__(self, images: Sequence[Image.Image]) -> list[Encoded]:
        """One entry for each image; equal images share one."""
        by_object: dict[int, bytes] = {}
        for image in images:
            if id(image) not in by_object:
                by_object[id(image)] = digest(image)
        digests = [by_object[id(image)] for image in images]
        found = {key: self._kept[key] for key in digests if key in self._kept}
        missing = {key: image for key, image in zip(digests, images, strict=True) if key not in found}
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

    def _encode(self, images: list[Image.Image]) -> list[Encoded]:
        self.encoded += len(images)
        batch = self.image_processor(images=images, return_tensors="pt")
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        patches = grids.prod(-1).tolist()
        encoded: list[Encoded] = []
        for some in _runs(patches, MAX_PATCHES):
            first, last = sum(patches[: some.start]), sum(patches[: some.stop])
            output = self.core.get_image_features(
                pixels[first:last].to(self.core.device), grids[some.start : some.stop].to(self.core.device)
            )
            layers = zip(*(getattr(output, "deepstack_features", None) or ()), strict=True)
            deeper = list(layers) or [()] * len(some)
            for row, features, more in zip(some, output.pooler_output, deeper, strict=True):
                encoded.append(Encoded(grids[row], features.clone(), tuple(layer.clone() for layer in more)))
        return encoded


def as_encoder_output(encoded: Iterable[Encoded]) -> dict[str, Any]:
    """The forward pass's argument that puts these images, in order, where the placeholders stand; none for none."""
    encoded = list(encoded)
    if not encoded:
        return {}
    deeper = [list(layer) for layer in zip(*(entry.deeper for entry in encoded), strict=True)]
    output = SimpleNamespace(pooler_output=[entry.features for entry in encoded], deepstack_features=deeper)
    return {"mm_encoder_outputs": {"image": output}}


def digest(image: Image.Image) -> bytes:
    """Equal for equal pictures, whatever object holds them."""
    return hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=16).digest()


def _runs(sizes: Sequence[int], budget: int) -> Iterable[range]:
    """Neighbours that fit the budget together; one that alone exceeds it stands alone."""
    start, used = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and used + size > budget:
            yield range(start, stop)
            start, used = stop, 0
        used += size
    yield range(start, len(sizes))
