"""The pairs of an evaluation worth looking at, found in one pass: its worst mistakes, and right verdicts beside them.

Memory holds the pairs that are kept and no more, with their pictures shrunken and their texts cut short, however long
the data: a bounded heap has the worst so far. A pair is a mapping as `report.write_report` takes it.
"""

from __future__ import annotations

import base64
import heapq
import io
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from listener_reward.errors import InputError
from listener_reward.evaluate.run import side
from listener_reward.media.storyboards import as_picture
from listener_reward.verdict import Verdict

if TYPE_CHECKING:
    import datasets

    from listener_reward.evaluate.run import Evaluation

PICTURE_SIDE = 320
"""Longest side of a kept picture, in pixels: twice what the page shows, for screens with two pixels to the point."""

LOSSLESS_BELOW = 192
"""Pictures no larger than this are kept as PNG, pixel by pixel: JPEG would smear the little there is."""

TEXT_LENGTH = 4000
"""Characters of a prompt or a thought that are kept."""

_Kept = list[tuple[float, int, dict[str, Any]]]


@dataclass
class Gallery:
    """Gathers pairs batch by batch: `evaluate(judge, pairs, watch=gallery.add)`."""

    model: str
    """The judge's name on the page."""
    mistakes: int = 24
    """How many wrong verdicts to keep: those farthest from the people's votes, which are the surest on the clearest
    pairs. A verdict that prefers neither picture is wrong; pairs on which people are split evenly are left out."""
    right: int = 6
    """How many right verdicts to keep for contrast, drawn at random with a fixed seed."""
    _wrong: _Kept = field(default_factory=list, init=False, repr=False)
    _right: _Kept = field(default_factory=list, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)
    _random: random.Random = field(default_factory=lambda: random.Random(0), init=False, repr=False)

    def add(self, rows: Mapping[str, Sequence[Any]], verdicts: Sequence[Verdict]) -> None:
        """A batch: column to list, and its verdicts."""
        for place, (people, verdict) in enumerate(zip(rows["p_first"], verdicts, strict=True)):
            self._seen += 1
            if people == 0.5:
                continue
            row = {name: values[place] for name, values in rows.items()}
            if verdict.preferred == (1 if people > 0.5 else 2):
                self._offer(self._right, self.right, self._random.random(), row, verdict)
            else:
                self._offer(self._wrong, self.mistakes, abs(verdict.p_first - people), row, verdict)

    def _offer(self, kept: _Kept, size: int, worth: float, row: Mapping[str, Any], verdict: Verdict) -> None:
        if len(kept) < size:
            heapq.heappush(kept, (worth, -self._seen, pair_entry(self.model, row, verdict.to_dict())))
        elif kept and worth > kept[0][0]:
            heapq.heapreplace(kept, (worth, -self._seen, pair_entry(self.model, row, verdict.to_dict())))

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The mistakes, the worst first, then the right ones in the order of the data."""
        wrong = sorted(self._wrong, key=lambda one: one[:2], reverse=True)
        right = sorted(self._right, key=lambda one: -one[1])
        return [pair for _, _, pair in (*wrong, *right)]


def scored_gallery(
    evaluation: Evaluation, pairs: datasets.Dataset | datasets.IterableDataset, *, mistakes: int = 24, right: int = 6
) -> list[dict[str, Any]]:
    """The same for a file of scores, whose verdicts are known at once: only the pairs that are kept are read.

    Scores have no scale of their own, so a margin counts by its fraction of the largest one. A picture that is not
    there stays away from the page. A stream is read a second time.

    Raises:
        InputError: the evaluation has no answers.
    """
    judged = evaluation.judged
    if judged is None:
        raise InputError("an evaluation has no judged pairs to look at; take it as evaluate_scores returned it")
    decided = np.flatnonzero(~np.isnan(judged.judge) & (judged.people != 0))
    margins, people = judged.judge[decided], judged.people[decided]
    preferred = side(margins / 2 + 0.5)
    largest = np.abs(margins).max(initial=0.0) if judged.unit == "score" else 1.0
    wrong = preferred != side(people + 0.5)
    surprise = np.abs(margins) / (largest or 1.0) / 2 + np.abs(people)
    worst = np.argsort(-np.where(wrong, surprise, -np.inf), kind="stable")[: min(mistakes, int(wrong.sum()))]
    others = np.flatnonzero(~wrong)
    drawn = np.random.default_rng(0).choice(others, min(right, len(others)), replace=False)
    chosen = [int(place) for place in (*worst, *np.sort(drawn))]
    rows = _rows(pairs, decided[chosen].tolist())
    return [
        pair_entry(evaluation.judge, rows[int(decided[place])], _scored(judged.unit, margins[place], preferred[place]))
        for place in chosen
    ]


def pair_entry(model: str, row: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a data set and `Verdict.to_dict()` as a pair of the page; what cannot be read becomes None."""
    first, second = row["images"]
    thoughts = [dict(thought) | {"text": _cut(thought["text"])} for thought in verdict["thoughts"]]
    return {
        "model": model,
        "split": row.get("dataset"),
        "id": _cut(str(row["id"])) if row.get("id") is not None else None,
        "prompt": _cut(row["prompt"]),
        "criterion": row.get("criterion"),
        "source_pngs": [_shrunken(source) for source in row.get("sources") or ()],
        "p_first": float(row["p_first"]),
        "first_png": _shrunken(first),
        "second_png": _shrunken(second),
        "verdict": dict(verdict) | {"thoughts": thoughts},
    }


def _scored(unit: str, margin: float, preferred: int) -> dict[str, Any]:
    """What a file says of a pair, in the words of a verdict."""
    return {
        "p_first": float(margin) / 2 + 0.5 if unit == "probability" else None,
        "margin": float(margin) if unit == "score" else None,
        "preferred": int(preferred) or None,
        "thoughts": [],
    }


def _rows(pairs: datasets.Dataset | datasets.IterableDataset, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The rows of these numbers."""
    select: Callable[[Any], Any] | None = getattr(pairs, "select", None)
    if select is not None:
        return dict(zip(numbers, select(numbers), strict=True))
    wanted = set(numbers)
    stream = itertools.islice(pairs, 1 + max(wanted, default=-1))
    return {number: dict(row) for number, row in enumerate(stream) if number in wanted}


def _cut(text: str) -> str:
    more = len(text) - TEXT_LENGTH
    return text if more <= 0 else f"{text[:TEXT_LENGTH]} \N{HORIZONTAL ELLIPSIS} ({more} characters more)"


def _shrunken(image: Any) -> str | None:
    """The picture as base64 of a small PNG or JPEG; None where there is none to read."""
    try:
        picture = as_picture(image).copy()
    except InputError:
        return None
    small = max(picture.size) <= LOSSLESS_BELOW
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=82)
    return base64.b64encode(file.getvalue()).decode()
