"""Pages: texts and pictures in turn as one picture, so that what looks at images can look at an illustrated text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from listener_reward.errors import InputError

WIDTH = 1024
"""Of a page, in pixels."""

PICTURE = 512
"""The longest side of a picture on a page. Smaller ones stay as they are."""

HEIGHT = 2**15
"""Of a page, at most: who looks at it sees it reduced, and could read nothing of a longer one."""

_MARGIN, _GAP, _FONT, _LINE = 16, 12, 20, 26


def page(parts: Sequence[str | Image.Image]) -> Image.Image:
    """Texts and pictures from top to bottom on white, WIDTH pixels wide, RGB.

    Letters are those of Pillow's own font, which has Latin script; what it lacks is a box.

    Raises:
        InputError: there is neither a text nor a picture, or more than a page of HEIGHT holds.
    """
    font, room = ImageFont.load_default(_FONT), WIDTH - 2 * _MARGIN
    blocks = [_reduced(part) if isinstance(part, Image.Image) else _lines(part, font, room) for part in parts]
    blocks = [block for block in blocks if block]
    if not blocks:
        raise InputError("a page has neither text nor pictures; give it a part")
    heights = [block.height if isinstance(block, Image.Image) else _LINE * len(block) for block in blocks]
    height = sum(heights) + _GAP * (len(blocks) - 1) + 2 * _MARGIN
    if height > HEIGHT:
        raise InputError(f"a page would be {height} pixels high, above {HEIGHT}; give fewer or shorter parts")
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for block, height in zip(blocks, heights, strict=True):
        if isinstance(block, Image.Image):
            sheet.paste(block, (_MARGIN, top))
        else:
            for number, line in enumerate(block):
                draw.text((_MARGIN, top + number * _LINE), line, fill="black", font=font)
        top += height + _GAP
    return sheet


def _reduced(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    return small


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    """The text in lines that fit, its own line breaks kept; a word that is wider than a line is cut."""
    lines: list[str] = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > room:
                fits = max(1, bisect_right(range(len(word)), room, key=lambda n: font.getlength(word[:n])) - 1)
                lines += [line] * bool(line) + [word[:fits]]
                line, word = "", word[fits:]
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > room:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines if any(lines) else []
