"""The tiny world in motion: a scene that the camera passes by."""

from __future__ import annotations

import random

from PIL import Image

from listener_reward.tiny.drawing import draw
from listener_reward.tiny.world import Scene


def draw_clip(scene: Scene, rng: random.Random, frames: int = 8) -> list[Image.Image]:
    """`frames` RGB pictures of one size, over which `scene` drifts in a straight line and stays in view.

    A pure function of the scene and the state of `rng`, like `draw`.
    """
    still = draw(scene, rng)
    margin = still.width // 5, still.height // 5
    start, end = [(rng.randint(0, margin[0]), rng.randint(0, margin[1])) for _ in range(2)]
    backdrop = still.getpixel((still.width - 1, 0))
    clip = []
    for k in range(frames):
        progress = k / max(frames - 1, 1)
        frame = Image.new("RGB", (still.width + margin[0], still.height + margin[1]), backdrop)
        left, top = (round(a + (b - a) * progress) for a, b in zip(start, end, strict=True))
        frame.paste(still, (left, top))
        clip.append(frame)
    return clip
