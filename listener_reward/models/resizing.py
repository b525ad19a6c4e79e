"""Pictures as a checkpoint's own processor resizes them, for engines that would resize by another library.

Two libraries round a resized pixel differently, by one level of 255, and log-probabilities then differ by 1e-4 and
more. An engine leaves a picture alone that has the right size already. It is smaller to send, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def resizes(image_processor: Any) -> bool:
    """Whether `resized` knows how this processor resizes: one of the Qwen-VL family."""
    known = all(isinstance(size, int) for size in _sizes(image_processor))
    return known and bool(getattr(image_processor, "do_resize", False))


def resized(image: Image.Image, image_processor: Any) -> Image.Image:
    """`image` in the size and with the pixels that the processor's patches are cut from.

    A processor that is none of the Qwen-VL family's gets the picture as it is.
    """
    if not resizes(image_processor):
        return image
    patch, merge, times = _sizes(image_processor)
    found = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    patches = np.asarray(found["pixel_values"])
    _, high, wide = (int(number) for number in np.asarray(found["image_grid_thw"])[0])
    # The reverse of how patches are laid out: blocks of merge x merge patches, each with its channels and times.
    blocks = patches.reshape(high // merge, wide // merge, merge, merge, -1, times, patch, patch)[:, :, :, :, :, 0]
    pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(high * patch, wide * patch, -1)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def resized_for_good(image: Image.Image, image_processor: Any) -> Image.Image:
    """`resized`, unless the processor would resize that once more: then `image` as it is.

    A narrow range of allowed sizes has such pictures, as the embedded judge's has. The range of released checkpoints
    has none but extreme ones.
    """
    once = resized(image, image_processor)
    return once if once is image or resized(once, image_processor).size == once.size else image


def _sizes(image_processor: Any) -> list[Any]:
    """A patch's side in pixels, a token's side in patches, and a patch's frames; None for each that is not said."""
    return [getattr(image_processor, name, None) for name in ("patch_size", "merge_size", "temporal_patch_size")]
