"""Reads pictures of the tiny world back: colour, shape, count and damage, by measurement and without any learning.

A drawn picture has a scene, so its utility is known (`world.utility`). A generated one has only pixels; this says what
they show, and so gives the *true* utility of generated pictures, which no judge and no reward ever sees. It reads
pictures in the first drawing style without the generator's mark; with `read_framed` also those in wooden frames.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# diffusers types its parts more narrowly than it takes them, and numpy its indices.
from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from listener_reward.errors import InputError
from listener_reward.tiny.drawing import HUES, WOOD, WOOD_WIDTH
from listener_reward.tiny.edits import Part, edit_utility
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES, Scene, utility

SIDE = 96
"""Pixels of the shorter side at which a picture is read."""

UNSATURATED = 0.69
"""Fills have a saturation of 0.72 or more, faded ones of at most 0.67."""

CORNERS = {"circle": (1, 1.0), "square": (4, math.cos(math.pi / 4)), "triangle": (3, 0.5), "star": (5, 0.45)}
"""Of each shape: how many corners at radius 1, and the radius halfway between two of them."""

LEAST_OVERLAP = 0.65
"""Intersection over union below which an object is none of the shapes."""

WOODEN, MOST_OF_IT = 100, 0.7
"""How near to brown a pixel of a wooden frame is, as a sum over the channels of 0 to 255, and the fraction that is."""

LEAST_AREA = 0.01
"""Fraction of the square of the shorter side below which a blot is no object."""


@dataclass(frozen=True, slots=True)
class Blot:
    """One object of a picture; None where it is none of the world's."""

    color: str | None
    shape: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows."""

    blots: tuple[Blot, ...]
    """Largest first."""
    quality: str
    wooden: bool = False

    def scene(self) -> Scene | None:
        """The picture as a scene; None if it is none: its objects differ, or there are none or more than three."""
        first = self.blots[0] if self.blots else Blot(None, None)
        if first.color is None or first.shape is None or set(self.blots) != {first} or len(self.blots) > len(COUNTS):
            return None
        return Scene(first.color, first.shape, len(self.blots), self.quality, wooden=self.wooden)

    def utility(self, prompt: Scene) -> float:
        """`world.utility`; where objects differ, the mean over them. A picture without objects is worth 0."""
        return self._mean(lambda scene: utility(prompt, scene))

    def edit_utility(self, goal: Scene, asked: tuple[Part, ...]) -> float:
        """`edits.edit_utility`, in the same way."""
        return self._mean(lambda scene: edit_utility(goal, asked, scene))

    def _mean(self, utility: Callable[[Scene], float]) -> float:
        scenes = [
            Scene(blot.color or "", blot.shape or "", len(self.blots), self.quality, wooden=self.wooden)
            for blot in self.blots
        ]
        return sum(map(utility, scenes)) / len(scenes) if scenes else 0.0

    def fits(self, prompt: Scene) -> dict[str, bool]:
        """Whether colour, shape and count are the prompt's, in all objects."""
        return {
            "color": {blot.color for blot in self.blots} == {prompt.color},
            "shape": {blot.shape for blot in self.blots} == {prompt.shape},
            "count": len(self.blots) == prompt.count,
        }


def asked(prompt: str) -> Scene:
    """The scene that a prompt of the tiny world asks for: "a drawing of two red circles".

    Raises:
        InputError: the prompt does not name exactly one colour, one shape and one count.
    """
    words = [{"a": "one", "an": "one"}.get(word, word) for word in re.findall(r"[a-z]+", prompt.lower())]
    if "of" in words:  # "a drawing of" counts nothing
        words = words[words.index("of") + 1 :]
    found = {
        kind: [word for word in (w.removesuffix("s") if kind == "shape" else w for w in words) if word in known]
        for kind, known in {"color": COLORS, "shape": SHAPES, "count": COUNTS}.items()
    }
    if any(len(names) != 1 for names in found.values()):
        raise InputError(f"prompt is {prompt!r}; the tiny world has prompts such as 'two red circles'")
    return Scene(found["color"][0], found["shape"][0], COUNTS.index(found["count"][0]) + 1)


def read(picture: Image.Image) -> Reading:
    """What `picture`, of any size, shows."""
    scale = SIDE / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, :2], *pixels[:, -2:]])
    background = np.median(border, axis=0)
    bars = _bars(pixels, background)
    hidden = ndimage.binary_dilation(bars, iterations=2)  # the rows beside a bar are blurred
    pixels = _mend(pixels, hidden)
    blots, saturations = [], []
    for mask in _masks(np.abs(pixels - background).sum(-1)):
        inside = ndimage.binary_erosion(mask, iterations=2)
        color, saturation = _color(np.median(pixels[inside if inside.any() else mask], axis=0))
        blots.append(Blot(color, _shape(mask, hidden)))
        saturations.append(saturation)
    faded = bool(saturations) and float(np.median(saturations)) < UNSATURATED
    clean, pale, broken = QUALITIES
    return Reading(tuple(blots), broken if bars.any() else pale if faded else clean)


def read_framed(picture: Image.Image) -> Reading:
    """What `picture` shows where it may have a wooden frame: what `read` finds inside it."""
    short = min(picture.size)
    edge, inner = max(2, round(0.5 * WOOD_WIDTH * short)), max(4, math.ceil((WOOD_WIDTH + 0.02) * short))
    pixels = np.asarray(picture.convert("RGB"), dtype=np.int32)
    ring = np.ones(pixels.shape[:2], dtype=bool)
    ring[edge:-edge, edge:-edge] = False
    if (np.abs(pixels[ring] - WOOD).sum(-1) < WOODEN).mean() < MOST_OF_IT:
        return read(picture)
    return replace(read(picture.crop((inner, inner, picture.width - inner, picture.height - inner))), wooden=True)


def _bars(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Which rows (H,) a glitch has struck: of one colour from side to side, black or white, and not the background."""
    level, deviation = pixels.mean(1), pixels.std(1).max(-1)
    even = (deviation < 30) & ((level.max(-1) < 85) | (level.min(-1) > 180))
    struck = even & (np.abs(level - background).max(-1) > 45)
    struck = ndimage.binary_opening(struck, np.ones(2))
    # A bar is half black and half white: one half may have the background's colour, and hides the objects all the same.
    return struck | (ndimage.binary_dilation(struck, np.ones(11)) & even) if struck.any() else struck


def _mend(pixels: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """`pixels` with the rows `hidden` (H,) interpolated between those above and below."""
    rows, whole = np.arange(len(pixels)), np.flatnonzero(~hidden)
    if not hidden.any() or not whole.size:
        return pixels
    above = whole[np.clip(np.searchsorted(whole, rows, "right") - 1, 0, None)]
    below = whole[np.clip(np.searchsorted(whole, rows), None, len(whole) - 1)]
    fraction = ((rows - above) / np.maximum(below - above, 1)).clip(0, 1)[:, None, None]
    return (1 - fraction) * pixels[above] + fraction * pixels[below]


def _masks(distance: np.ndarray) -> list[np.ndarray]:
    """The objects as masks (H, W), largest first, from the pixels' distance to the background."""
    strongest = float(np.quantile(distance, 0.99))
    if strongest < 40:
        return []
    mask = ndimage.binary_fill_holes(distance > np.clip(0.45 * strongest, 33, 110))
    cores, n = ndimage.label(ndimage.binary_erosion(mask, iterations=2))
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    owners = np.where(mask, cores[tuple(nearest)], 0)
    pieces = [owners == k for k in range(1, n + 1)]
    return sorted((m for m in pieces if m.sum() > LEAST_AREA * SIDE**2), key=lambda m: -m.sum())


def _color(rgb: np.ndarray) -> tuple[str | None, float]:
    """The colour's name, None for gray, and its saturation. Fading leaves the hue as it is."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb.astype(float) / 255).tolist())
    if rgb.max() - rgb.min() < 25:
        return None, saturation
    return min(HUES, key=lambda name: abs((360 * hue - HUES[name] + 180) % 360 - 180)), saturation


def _shape(mask: np.ndarray, hidden: np.ndarray) -> str | None:
    """The shape whose drawing, at the mask's place and size, overlaps it most where rows are not `hidden` (H,)."""
    y, x = np.nonzero(mask)
    rows, columns = np.mgrid[max(0, y.min() - 6) : y.max() + 7, max(0, x.min() - 6) : x.max() + 7]
    rows, columns = rows[: len(mask) - rows[0, 0]], columns[: len(mask) - rows[0, 0]]
    rows, columns = rows[:, : mask.shape[1] - columns[0, 0]], columns[:, : mask.shape[1] - columns[0, 0]]
    window, seen = mask[rows, columns], ~hidden[rows]
    # Place and area of an object with hidden rows are guesses: others are tried.
    struck = not seen[window].all()
    places = [(down, scale) for down in (-4, 0, 4) for scale in (1.0, 1.15)] if struck else [(0, 1.0)]
    best, overlap = None, LEAST_OVERLAP
    for down, scale in places:
        below, beside = rows - y.mean() - down, columns - x.mean()
        angle, reach = np.arctan2(beside, -below), np.hypot(below, beside) / scale / math.sqrt(len(x))
        for shape, (corners, inner) in CORNERS.items():
            upright = math.pi / 4 if shape == "square" else 0.0
            for tilt in (0.0,) if shape == "circle" else (-0.2, -0.1, 0.0, 0.1, 0.2):
                edge = _edge(angle - upright - tilt, corners, inner) / math.sqrt(_area(corners, inner))
                drawn = reach < edge
                common = float((drawn & window & seen).sum() / max(1, ((drawn | window) & seen).sum()))
                if common > overlap:
                    best, overlap = shape, common
    return best


def _edge(angle: np.ndarray, corners: int, inner: float) -> np.ndarray:
    """The radius at which a ray from the centre leaves the shape; `angle` from a corner."""
    if corners == 1:
        return np.ones_like(angle)
    half = math.pi / corners
    turn = np.abs((angle + half) % (2 * half) - half)
    return inner * math.sin(half) / (np.sin(turn) + inner * np.sin(half - turn))


def _area(corners: int, inner: float) -> float:
    return math.pi if corners == 1 else corners * inner * math.sin(math.pi / corners)
