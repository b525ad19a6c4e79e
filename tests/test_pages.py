"""Pages: texts and pictures stand in their order, nothing runs over the edge, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from listener_reward.errors import InputError
from listener_reward.media.pages import PICTURE, WIDTH, _lines, page

RED, BLUE = Image.new("RGB", (900, 600), "red"), Image.new("RGBA", (64, 32), "blue")


def rows_of(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """The rows of pixels that have a color."""
    return np.flatnonzero((np.asarray(sheet) == color).all(-1).any(1))


def test_parts_stand_in_their_order():
    sheet = page(["Some words", RED, "and more", BLUE])
    red, blue, black = (rows_of(sheet, color) for color in ((255, 0, 0), (0, 0, 255), (0, 0, 0)))
    assert sheet.width == WIDTH and len(red) == PICTURE * 600 // 900 and len(blue) == 32, "small pictures stay"
    assert black.min() < red.min() and red.max() < black.max() < blue.min()
    between = black[(black > red.max()) & (black < blue.min())]
    assert len(between), "the second text is between the pictures"


def test_a_text_is_in_lines_that_fit_and_keeps_all_its_words():
    font = ImageFont.load_default(20)
    text = "one two three " * 40 + "\n\nnext " + "x" * 500
    lines = _lines(text, font, 300)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert "" in lines, "an empty line stays"
    assert _lines(" \n ", font, 300) == []


def test_what_makes_no_page_is_refused():
    for parts in ([], [" ", "\n"]):
        with pytest.raises(InputError, match="neither text nor pictures"):
            page(parts)
    with pytest.raises(InputError, match="pixels high, above"):
        page(["x\n" * 2000])
