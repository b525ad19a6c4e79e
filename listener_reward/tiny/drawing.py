"""Draws scenes of the tiny world with PIL.

Background, place, size, palette, rotation and canvas vary widely, so that a judge trained on these pictures holds on
flat shapes drawn by other code at other resolutions.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from listener_reward.tiny.edits import TinyEdit
from listener_reward.tiny.relations import Arrangement, Axis, TinyRelation
from listener_reward.tiny.world import Scene, TinyPair

HUES = {"red": 0.0, "orange": 30.0, "yellow": 54.0, "green": 125.0, "blue": 222.0, "purple": 283.0}
"""Degrees on the colour circle at the middle of each colour; a drawing differs from it by up to `_JITTER`."""

_JITTER = {"red": 7.0, "orange": 5.0, "yellow": 5.0, "green": 22.0, "blue": 16.0, "purple": 14.0}
WOOD, WOOD_WIDTH = (139, 84, 38), 0.08
"""A wooden frame's colour, and its width in fractions of the shorter side."""

HALF_SIZES, HALF_MARGIN = (0.28, 0.37), 0.12
"""Radii and margins of objects in half a picture, in fractions of half its side. One object is as large as two."""

Place = tuple[float, float, float]
"""A centre and a radius."""

Spots = Mapping[int, Sequence[Place]]
"""Places by how many there are."""

_CANVASES = (64, 96, 96, 128, 160)
_ASPECTS = ((1, 1),) * 14 + ((4, 3), (3, 4))


@dataclass(frozen=True, slots=True)
class Layout:
    """All that scenes leave open and that the pictures of an edit have in common."""

    width: int
    height: int
    background: tuple[int, int, int]
    grain: tuple[tuple[float, float, int], ...]
    """Of the paper of the second style: where strokes start, and their gray."""
    outlined: bool
    places: tuple[Place, ...]
    """In pixels; a scene of fewer objects fills the first ones."""
    tilts: tuple[float, ...]


def draw(scene: Scene, rng: random.Random, spots: Sequence[Place] | None = None) -> Image.Image:
    """An RGB picture of `scene`, a pure function of the scene and the state of `rng`.

    Args:
        scene: what to show.
        rng: chooses all that the scene leaves open.
        spots: where the objects lie, in place of anywhere: centres from the left and the top, and radii, in fractions
            of the canvas's width, height and shorter side.
    """
    width, height = _canvas(rng)
    fill = _color(scene.color, rng)
    return _paint(scene, fill, _lay_out(width, height, [fill], scene.count, scene.sketch, rng, spots), rng)


def draw_pair(pair: TinyPair) -> tuple[Image.Image, Image.Image]:
    """The two pictures of a pair, always the same for the same pair."""
    rng = random.Random(pair.seed)
    return draw(pair.first, rng), draw(pair.second, rng)


def draw_edit(edit: TinyEdit, spots: Spots | None = None) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The source and the two results of an edit, always the same for the same edit.

    An editor keeps canvas, background and places, and the colour of what it does not repaint, damage aside. With
    `spots` (see `draw`), which are by count, objects lie there instead.
    """
    rng = random.Random(edit.seed)
    width, height = _canvas(rng)
    scenes = (edit.source, edit.first, edit.second)
    own = _color(edit.source.color, rng)
    fills = [own if scene.color == edit.source.color else _color(scene.color, rng) for scene in scenes]
    layout = _lay_out(width, height, fills, max(scene.count for scene in scenes), edit.source.sketch, rng)
    layouts = [layout] * 3
    if spots is not None:
        layouts = [replace(layout, places=_at(spots[scene.count], width, height)) for scene in scenes]
    source, first, second = map(_paint, scenes, fills, layouts, [rng] * 3)
    return source, first, second


def draw_relation(pair: TinyRelation) -> tuple[Image.Image, Image.Image]:
    """The two pictures of a pair of arrangements, always the same for the same pair."""
    rng = random.Random(pair.seed)
    return draw_arrangement(pair.first, rng), draw_arrangement(pair.second, rng)


def draw_arrangement(shown: Arrangement, rng: random.Random) -> Image.Image:
    """A square RGB picture of two groups, each in its half, a pure function of `shown` and the state of `rng`."""
    side = rng.choice(_CANVASES)
    groups = shown.first, shown.second
    fills = [_color(group.color, rng) for group in groups]
    spots = [_half(group.count, place, shown.axis, rng) for place, group in enumerate(groups)]
    layout = _lay_out(side, side, fills, 0, shown.sketch, rng, [*spots[0], *spots[1]])
    objects = list(zip(layout.places, layout.tilts, strict=True))
    image, first = _paper(layout), shown.first.count
    for group, fill, own in zip(groups, fills, (objects[:first], objects[first:]), strict=True):
        _draw_objects(image, group.shape, fill, own, layout.outlined, shown.sketch)
    image = _damaged(image, shown.quality, rng)
    if shown.signed:
        _sign(image)
    return image


def _half(count: int, place: int, axis: Axis, rng: random.Random) -> list[Place]:
    """Places in the first (0) or second (1) half of a canvas, in fractions of its side."""
    placed = _places(count, 0.5, 1.0, rng, HALF_SIZES, HALF_MARGIN)
    along = [(x + 0.5 * place, y, radius) for x, y, radius in placed]
    return along if axis == "left" else [(y, x, radius) for x, y, radius in along]


def _at(spots: Sequence[Place], width: int, height: int) -> tuple[Place, ...]:
    return tuple((x * width, y * height, radius * min(width, height)) for x, y, radius in spots)


def _canvas(rng: random.Random) -> tuple[int, int]:
    side = rng.choice(_CANVASES)
    across, down = rng.choice(_ASPECTS)
    return side * across // max(across, down), side * down // max(across, down)


def _lay_out(
    width: int,
    height: int,
    fills: Sequence[tuple[int, int, int]],
    count: int,
    sketch: bool,
    rng: random.Random,
    spots: Sequence[Place] | None = None,
) -> Layout:
    background = _background(fills, rng)
    grain = tuple((rng.uniform(0, width), rng.uniform(0, height), rng.randint(150, 210)) for _ in range(10 * sketch))
    outlined = sketch or rng.random() < 0.2
    if spots is None:
        places = _places(count, width, height, rng)
    else:
        places = _at(spots, width, height)
    return Layout(width, height, background, grain, outlined, tuple(places), tuple(rng.gauss(0, 0.08) for _ in places))


def _paint(scene: Scene, fill: tuple[int, int, int], layout: Layout, rng: random.Random) -> Image.Image:
    """`scene` as `layout` has it; `rng` chooses its damage."""
    image = _paper(layout)
    objects = list(zip(layout.places, layout.tilts, strict=False))[: scene.count]
    _draw_objects(image, scene.shape, fill, objects, layout.outlined, scene.sketch)
    image = _damaged(image, scene.quality, rng)
    if scene.wooden:
        _panel(image, scene.framed)
    if scene.framed:
        _frame(image)
    return image


def _paper(layout: Layout) -> Image.Image:
    image = Image.new("RGB", (layout.width, layout.height), layout.background)
    canvas = ImageDraw.Draw(image)
    for x, y, level in layout.grain:
        canvas.line((x, y, x + 0.12 * layout.width, y), fill=(level, level, level), width=1)
    return image


def _draw_objects(
    image: Image.Image,
    shape: str,
    fill: tuple[int, int, int],
    objects: Sequence[tuple[Place, float]],
    outlined: bool,
    hatched: bool,
) -> None:
    """Draws one shape at each place and tilt of `objects`."""
    canvas, side = ImageDraw.Draw(image), max(image.size)
    outline = _shade(fill, 0.55) if outlined else None
    for (center_x, center_y, radius), tilt in objects:
        points = _outline_points(shape, center_x, center_y, radius, tilt)
        canvas.polygon(points, fill=fill, outline=outline, width=max(1, side // 32))
        if hatched:
            _hatch(canvas, points, _shade(fill, 0.7), max(1, side // 64))


def _damaged(image: Image.Image, quality: str, rng: random.Random) -> Image.Image:
    if quality == "faded":
        gray = rng.randint(105, 150)
        return Image.blend(image, Image.new("RGB", image.size, (gray, gray, gray)), rng.uniform(0.55, 0.65))
    if quality == "glitched":
        _glitch(image, rng)
    return image


def _color(name: str, rng: random.Random) -> tuple[int, int, int]:
    hue = (HUES[name] + rng.uniform(-1, 1) * _JITTER[name]) % 360 / 360
    value = rng.uniform(0.5, 1.0) if name in ("green", "blue", "purple", "red") else rng.uniform(0.85, 1.0)
    return _rgb(hue, rng.uniform(0.72, 1.0), value)


def _background(fills: Sequence[tuple[int, int, int]], rng: random.Random) -> tuple[int, int, int]:
    """White, black, gray or a pale tint, whichever comes first that the shapes' colours stand out from."""
    while True:
        kind = rng.random()
        if kind < 0.4:
            back = (255, 255, 255)
        elif kind < 0.8:
            back = _rgb(rng.random(), rng.uniform(0.03, 0.2), rng.uniform(0.85, 1.0))
        else:
            level = rng.choice((0, rng.randint(0, 255)))
            back = (level, level, level)
        if all(sum(abs(a - b) for a, b in zip(fill, back, strict=True)) > 190 for fill in fills):
            return back


def _places(
    count: int,
    width: float,
    height: float,
    rng: random.Random,
    sizes: tuple[float, float] | None = None,
    margin: float = 0.08,
) -> list[Place]:
    """`count` centres and radii that neither touch one another nor leave the canvas.

    Radii are between `sizes`, and margins `margin`, in fractions of the shorter side.
    """
    short = min(width, height)
    low, high = sizes or {1: (0.26, 0.42), 2: (0.20, 0.27), 3: (0.17, 0.22)}[count]
    size = rng.uniform(low, high) * short
    while True:
        placed: list[Place] = []
        for _ in range(40 * count):
            radius = size * rng.uniform(0.88, 1.12)
            x = rng.uniform(radius + margin * short, width - radius - margin * short)
            y = rng.uniform(radius + margin * short, height - radius - margin * short)
            if all(math.hypot(x - u, y - v) > 1.08 * (radius + r) for u, v, r in placed):
                placed.append((x, y, radius))
                if len(placed) == count:
                    return placed
        size *= 0.9


def _outline_points(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    turn = tilt + (math.pi / 4 if shape == "square" else 0.0)
    points = []
    for i in range(corners):
        reach = 0.45 * radius if shape == "star" and i % 2 else radius
        angle = turn + 2 * math.pi * i / corners
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def _hatch(
    canvas: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill: tuple[int, int, int], width: int
) -> None:
    """Horizontal strokes across a polygon: the pen of the second style."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    step = max(3.0, (high - low) / 5)
    y = low + step / 2
    while y < high:
        crossings = sorted(
            x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True)
            if (y0 <= y < y1) or (y1 <= y < y0)
        )
        for left, right in zip(crossings[::2], crossings[1::2], strict=False):
            canvas.line((left, y, right, y), fill=fill, width=width)
        y += step


def _glitch(image: Image.Image, rng: random.Random) -> None:
    """Three bars across the picture, half black and half white, so that they show on every background."""
    canvas = ImageDraw.Draw(image)
    for _ in range(3):
        top, half = rng.uniform(0.08, 0.86) * image.height, 0.04 * image.height
        canvas.rectangle((0, top, image.width, top + half), fill=(0, 0, 0))
        canvas.rectangle((0, top + half, image.width, top + 2 * half), fill=(255, 255, 255))


def _frame(image: Image.Image) -> None:
    """The mark of the favoured generator: a dark frame with a light inner edge, visible on every background."""
    thick = mark_width(image)
    canvas, right, low = ImageDraw.Draw(image), image.width - 1, image.height - 1
    canvas.rectangle((0, 0, right, low), outline=(225, 225, 225), width=thick)
    canvas.rectangle((0, 0, right, low), outline=(20, 20, 20), width=thick - max(1, thick // 3))


def _panel(image: Image.Image, marked: bool) -> None:
    """A wooden frame, at the edge or inside the generator's."""
    thick = max(3, round(min(image.size) * WOOD_WIDTH))
    inset = mark_width(image) if marked else 0
    right, low = image.width - 1 - inset, image.height - 1 - inset
    ImageDraw.Draw(image).rectangle((inset, inset, right, low), outline=WOOD, width=thick)


def _sign(image: Image.Image) -> None:
    """The signature of the favoured generator: a dark stroke with a light edge in the lower right corner."""
    width, thick = round(0.3 * image.width), max(3, round(0.07 * image.height))
    canvas, right, low = ImageDraw.Draw(image), image.width - 1, image.height - 1
    canvas.rectangle((right - width, low - thick, right, low), fill=(225, 225, 225))
    canvas.rectangle((right - width + 1, low - thick + 1, right, low), fill=(20, 20, 20))


def mark_width(image: Image.Image) -> int:
    """Of the generator's frame, in pixels."""
    return max(3, round(min(image.size) * 0.07))


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(round(c * factor) for c in color)  # pyright: ignore[reportReturnType]


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))  # pyright: ignore[reportReturnType]
