"""The README stays what a visitor reads in three minutes: short, with pictures that load at once."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_at_most_two_hundred_lines():
    assert len(README.splitlines()) <= 200


def test_its_pictures_are_there_and_small():
    pictures = [ROOT / path for path in re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", README, re.M)]
    assert {path.stem for path in pictures} == {"pairs", "best-of-16", "ddpo", "drawn", "report"}
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) < 250_000
    assert sum(sizes) < 700_000
