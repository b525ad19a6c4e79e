"""Files of scores: what any other reward model said of the pairs of a data set, so that it can be compared.

One row a pair, named by the pair's `id`, or one row an image, named by its published path or id. JSONL, JSON, CSV or
Parquet. *First* is the first image as the data set's own file has it; the loader's shuffle is undone here.

| row | columns | unit of the margin |
| --- | --- | --- |
| a pair | `id`, `p_first`; optionally `p_first_swapped`, the same image's probability when shown second | probability |
| a pair | `id`, `score_first`, `score_second` | score |
| a pair | `id`, `margin` | score |
| a pair | `id`, `answer`: 1, 2, "first", "second", "tie", A, B, or a text with a GenAI-Bench label | answer |
| an image | `image`, `score`; optionally `group` or `prompt` where one image answers several prompts | score |

An empty cell, null or NaN is an answer that was not given. This loads neither torch nor a picture.
"""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from listener_reward.errors import InputError

MAX_MISSING = 0.2
"""Above this fraction of pairs without a score the file is refused: it is for other data, or names pairs
differently."""

Unit = Literal["probability", "score", "answer"]

_WORDS = {"1": 1.0, "first": 1.0, "a": 1.0, "2": -1.0, "second": -1.0, "b": -1.0, "tie": 0.0}
_LABEL = re.compile(r"\[\[.*\]\]")
_LABELS = {"[[A>B]]": 1.0, "[[A>>B]]": 1.0, "[[B>A]]": -1.0, "[[B>>A]]": -1.0}
_TIES = ("[[A=B]]", "[[A=B=Good]]", "[[A=B=Bad]]")


@dataclass(frozen=True, slots=True)
class Scores:
    """A file of scores. Margins are about the published order: positive prefers the first image."""

    name: str
    unit: Unit
    pairs: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Pair's id to its margin, and to the margin of the same image with the two shown swapped; NaN for no answer."""
    words: dict[str, str | None] = field(default_factory=dict)
    """Pair's id to the judge's output, where the file has GenAI-Bench labels."""
    images: dict[str, float] = field(default_factory=dict)
    """Image to its score, for a file with one row an image. A key is the image, or group or prompt, tab, and image."""

    def margins(self, labels: Mapping[str, list[Any]], asked: Iterable[Sequence[str]] = ()) -> dict[str, Any]:
        """The margins for pairs as they are shown: the arguments of `judged.JudgedPairs` that a judge gives.

        Args:
            labels: the columns `id`, `swapped`, `item_first` and `item_second` of the pairs, as far as there are any.
            asked: what each pair was asked, for images that answer several prompts: its group where it has one, and its
                prompt. A file may use either.

        Raises:
            InputError: more than `MAX_MISSING` of the pairs have no score, or the data lacks a column needed to tell.
        """
        if self.images:
            margins, unnamed = self._by_image(labels, list(asked))
            self._complain(np.isnan(margins), unnamed)
            return {"judge": margins, "unit": self.unit}
        ids = [str(name) for name in _column(labels, "id", self.name)]
        swapped = np.array(_column(labels, "swapped", self.name), dtype=bool)
        found = [self.pairs.get(name) for name in ids]
        forward = np.array([math.nan if pair is None else pair[0] for pair in found])
        reverse = np.array([math.nan if pair is None or pair[1] is None else pair[1] for pair in found])
        both, sign = np.stack([forward, reverse]), np.where(swapped, -1.0, 1.0)
        given = (~np.isnan(both)).sum(0)
        margins = np.where(given > 0, np.nansum(both, 0) / np.maximum(given, 1), np.nan)
        unnamed = [name for name, pair in zip(ids, found, strict=True) if pair is None]
        # An answer that says none of the labels was given all the same, and is wrong; only rows can be missing there.
        self._complain(np.array([pair is None for pair in found]) if self.unit == "answer" else given == 0, unnamed)
        fields: dict[str, Any] = {"judge": margins * sign, "unit": self.unit}
        if any(pair is not None and pair[1] is not None for pair in found):
            # What is shown first here is what was second in the file, so the file's orders change places with it.
            fields["forward"] = np.where(swapped, -reverse, forward)
            fields["reverse"] = np.where(swapped, -forward, reverse)
        if self.words:
            outputs = [self.words.get(name) for name in ids]
            fields["words"] = [_turned(word) if turn else word for word, turn in zip(outputs, swapped, strict=True)]
        return fields

    def _by_image(self, labels: Mapping[str, list[Any]], asked: list[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        firsts, seconds = (_column(labels, name, self.name) for name in ("item_first", "item_second"))
        short = _short_names(self.images)
        unnamed: list[str] = []

        def score(words: Sequence[str], item: str) -> float:
            before = [*(f"{word}\t" for word in words), ""]
            for key in (*(word + item for word in before), *(short.get(word + _file_name(item)) for word in before)):
                if key is not None and key in self.images:
                    return self.images[key]
            unnamed.append(item)
            return math.nan

        scored = [
            score(words, str(first)) - score(words, str(second))
            for words, first, second in zip(asked or [()] * len(firsts), firsts, seconds, strict=True)
        ]
        return np.array(scored), unnamed

    def _complain(self, gone: np.ndarray, unnamed: list[str]) -> None:
        missing = int(gone.sum())
        if not missing:
            return
        names = list(dict.fromkeys(unnamed))
        examples = f", such as {', '.join(map(reprlib.repr, names[:3]))}" if names else " (empty cells)"
        summary = f"{self.name} has no score for {missing} of {len(gone)} pairs{examples}"
        if missing > MAX_MISSING * len(gone):
            raise InputError(f"{summary}. More than {MAX_MISSING:.0%} cannot be right; check that ids and data match")
        warnings.warn(f"{summary}. They count as wrong, except by the protocol mmrb2", stacklevel=4)


def read_scores(path: str | Path) -> Scores:
    """Reads a file of scores, or the files of a pattern such as `scores-*.parquet`; see the table at the top of this
    module.

    Raises:
        InputError: there is no such file, it does not parse, or a row has no name, no score, or one that is no number.
    """
    from listener_reward.datasets.rows import find_files, read_file

    path = Path(path)
    scores: Scores | None = None
    for number, row in enumerate(row for file in find_files(str(path)) for row in read_file(file)):
        try:
            unit = _unit(row)
            if scores is None:
                scores = Scores(path.name, unit)
            elif scores.unit != unit:
                raise InputError(f"it gives a {unit} where the rows above give a {scores.unit}; use one kind a file")
            _add(scores, row)
        except InputError as error:
            raise InputError(f"{path.name}, row {number}: {error}") from error
    if scores is None:
        raise InputError(f"{path.name} holds no rows; give one for each pair or image")
    return scores


def _unit(row: Mapping[str, Any]) -> Unit:
    if "p_first" in row:
        return "probability"
    if "margin" in row or {"score_first", "score_second"} <= row.keys() or ("score" in row and "image" in row):
        return "score"
    if "answer" in row:
        return "answer"
    raise InputError(
        f"no score in the columns {', '.join(map(str, row))}; give id and p_first, margin, score_first and "
        "score_second, or answer; or image and score"
    )


def _add(scores: Scores, row: Mapping[str, Any]) -> None:
    if "image" in row and "score" in row:
        image, score = _name(row, "image"), _number(row, "score")
        words = [str(row[column]) for column in ("group", "prompt") if row.get(column) not in (None, "")]
        for key in dict.fromkeys(f"{word}\t{image}" for word in words) or (image,):
            _put(scores.images, key, score)
        return
    name, reverse = _name(row, "id"), None
    if "p_first" in row:
        margin = 2 * _probability(row, "p_first") - 1
        if "p_first_swapped" in row:
            reverse = 2 * _probability(row, "p_first_swapped") - 1
    elif "margin" in row:
        margin = _number(row, "margin")
    elif "score_first" in row:
        margin = _number(row, "score_first") - _number(row, "score_second")
    else:
        margin = _preference(row["answer"])
        if "[[" in str(row["answer"]):
            scores.words[name] = str(row["answer"])
    _put(scores.pairs, name, (margin, reverse))


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if name in table and repr(table[name]) != repr(value):
        raise InputError(f"{name.split(chr(9))[-1]!r} was scored above, and differently; keep one of the rows")
    table[name] = value


def _name(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        raise InputError(f"{column} is missing or empty; it names what is scored")
    if isinstance(value, float) and value.is_integer():  # what a table makes of integers beside an empty cell
        value = int(value)
    return str(value)


def _number(row: Mapping[str, Any], column: str) -> float:
    """The cell as a float, NaN for an empty one."""
    value = row.get(column)
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{column} is {reprlib.repr(value)}; give a number, or nothing") from error
    if math.isinf(number):
        raise InputError(f"{column} is {value}; give a finite number, or nothing")
    return number


def _probability(row: Mapping[str, Any], column: str) -> float:
    value = _number(row, column)
    if not (math.isnan(value) or 0 <= value <= 1):
        raise InputError(f"{column} is {value}; give a probability in [0, 1], or use the column margin for scores")
    return value


def _preference(output: Any) -> float:
    """The margin of an answer in words: 1, -1, 0 for a tie, NaN for one that says none of these: nothing is guessed."""
    text = "" if output is None else str(output).strip()
    if found := _LABEL.search(text):
        return 0.0 if found[0] in _TIES else _LABELS.get(found[0], math.nan)
    return _WORDS.get(text.lower(), math.nan)


def _turned(output: str | None) -> str | None:
    """The same answer about the pair with its images exchanged."""
    return None if output is None else re.sub(r"[AB](?=>)|(?<=>)[AB]", lambda side: "BA"["AB".index(side[0])], output)


def _short_names(images: Mapping[str, float]) -> dict[str, str]:
    """Key with the bare file name to whole key, where only one image has it: scores are often written from another
    folder. What the image was asked stays in the key, for its score under another prompt is another score."""
    short: dict[str, str | None] = {}
    for key in images:
        words, tab, image = key.rpartition("\t")
        name = words + tab + _file_name(image)
        short[name] = None if name in short else key
    return {name: key for name, key in short.items() if key is not None}


def _file_name(image: str) -> str:
    return PurePosixPath(image.replace("\\", "/")).name


def _column(labels: Mapping[str, list[Any]], name: str, file: str) -> list[Any]:
    if name not in labels:
        raise InputError(f"{file} cannot be matched to this data, which has no column {name}; see docs/evaluation.md")
    return labels[name]
