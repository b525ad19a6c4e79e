"""What holds for every input, tried on random ones: symmetry, harmless text, round trips, budgets, ties, pictures.

hypothesis draws the inputs and shrinks what fails. An input that once broke a property stays as an `@example`.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from listener_reward.calibration.maps import Calibration, Curve, Platt
from listener_reward.card import Card
from listener_reward.chat import FOREIGN_RESERVED, MOST_REPEATS, QWEN_RESERVED, Chat, ChatFormat, neutralise
from listener_reward.conclude import Judgement, on_grid, settled, verdict_of
from listener_reward.errors import InputError
from listener_reward.evaluate import protocols
from listener_reward.evaluate.judged import JudgedPairs, choose_tie_threshold
from listener_reward.judge import Judge
from listener_reward.listener import Listener
from listener_reward.media.images import MAX_ASPECT, MAX_SIDE, to_pil
from listener_reward.prefix.rows import budgeted
from listener_reward.ranking import fit_bradley_terry, rank_images
from listener_reward.trace import Trace, parse
from listener_reward.verdict import LISTENING, Mode, Verdict

PROBABILITY = st.floats(0, 1).map(on_grid)


# ---------------------------------------------------------------- swapping the images mirrors the verdict


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    steps = draw(st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 5)), max_size=4))
    return Curve(tuple(zip(*(np.cumsum(axis).tolist() for axis in zip(*steps, strict=True)), strict=True)))


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    platt = st.builds(Platt, st.floats(0.05, 20), st.floats(-4, 4))
    return draw(st.builds(Calibration, platt, curves(), platt, curves(), curves(), st.sampled_from([0.0, 0.05, 0.5])))


@st.composite
def answered(draw: st.DrawFn) -> tuple[list[Judgement], Mode]:
    """Answers to one pair, as a judge gathers them, and the way to conclude from them."""
    mode = draw(
        st.builds(
            Mode,
            thoughts=st.integers(1, 4),
            aggregate=st.sampled_from(["mean", "majority", "listener", "both"]),
            orders=st.sampled_from(["both", "one"]),
            early_stop=st.sampled_from([None, 0.8, 1.0]),
        )
    )
    listens = mode.aggregate in LISTENING or draw(st.booleans())
    first = draw(st.booleans())
    traces = st.builds(Trace, st.text(max_size=5), st.sampled_from([1, 2, None]))
    judgements = [
        Judgement(flipped, number, draw(traces), draw(PROBABILITY), draw(PROBABILITY) if listens else None)
        for flipped in ([first, not first] if mode.orders == "both" else [first])
        for number in range(draw(st.integers(1, mode.thoughts)))
    ]
    return judgements, mode


def assert_mirrored(one: Verdict, other: Verdict) -> None:
    """Equality to the last bit, in both directions."""
    assert other.p_first == 1 - one.p_first and one.p_first == 1 - other.p_first and 0 < one.p_first < 1
    assert (one.preferred, other.preferred) in ((1, 2), (2, 1), (None, None))
    if one.listener_p_first is None:
        assert other.listener_p_first is None
    else:
        assert other.listener_p_first == 1 - one.listener_p_first
    assert (one.contradicted, one.malformed) == (other.contradicted, other.malformed)
    assert (one.position_gap == other.position_gap) or (math.isnan(one.position_gap) and math.isnan(other.position_gap))
    for mine, yours in zip(one.thoughts, other.thoughts, strict=True):
        assert (mine.text, mine.contradicted) == (yours.text, yours.contradicted)
        assert {mine.order, yours.order} == {"as given", "swapped"}
        assert (mine.answer, yours.answer) in ((1, 2), (2, 1), (None, None))
        assert mine.p_first == 1 - yours.p_first


@given(answered(), calibrations())
def test_the_arithmetic_of_a_verdict_is_symmetric(answered: tuple[list[Judgement], Mode], calibration: Calibration):
    judgements, mode = answered
    swapped = [replace(judgement, flipped=not judgement.flipped) for judgement in judgements]
    assert_mirrored(verdict_of(judgements, mode, calibration), verdict_of(swapped, mode, calibration))
    assert settled(judgements, mode, calibration) == settled(swapped, mode, calibration)


class HashVLM:
    """Thinks and answers by a hash of what it is shown: anything, but the same for the same chat and thought."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, salt: int, sureness: float):
        self.salt, self.sureness = salt, sureness

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        return [self._think(self._hash(chat, str(seed))) for chat, seed in zip(chats, seeds, strict=True)]

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        rows = [self._hash(*row) for row in zip(chats, prefixes, strict=True)]
        gaps = [self.sureness * (row % 2001 - 1000) / 1000 for row in rows]
        return torch.tensor([[gap, 0.0] for gap in gaps]).reshape(-1, 2).log_softmax(-1)

    def read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.label_logprobs(chats, prefixes, labels), torch.zeros(len(chats))

    def _hash(self, chat: Chat, word: str) -> int:
        shown = b"".join(picture.digest for picture in chat.images)
        key = f"{self.salt}/{chat.prompt}/{word}/".encode("utf-8", "replace") + shown
        return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest())

    @staticmethod
    def _think(number: int) -> str:
        return ("Hm", "<think>a</think><answer>1</answer>", "<think>b</think><answer>2</answer>")[number % 3]


PICTURES = [Image.new("RGB", size, color) for size in ((4, 4), (4, 6)) for color in ("red", "blue", "white")]


@given(
    st.text(max_size=20),
    st.lists(st.tuples(st.sampled_from(PICTURES), st.sampled_from(PICTURES)), min_size=1, max_size=4),
    st.integers(0, 2**16),
    st.sampled_from([0.1, 3.0, 90.0]),
    st.builds(
        Card,
        thoughts=st.integers(1, 3),
        aggregate=st.sampled_from(["mean", "majority", "listener", "both"]),
        orders=st.sampled_from(["both", "one"]),
        early_stop=st.sampled_from([None, 0.8, 1.0]),
        calibration=calibrations(),
    ),
    st.booleans(),
)
def test_a_judge_is_symmetric(prompt, pairs, salt, sureness, card, think):
    listener = Listener(HashVLM(salt + 1, sureness), ChatFormat())
    judge = Judge(HashVLM(salt, sureness), listener, card, think=think)
    firsts, seconds = map(list, zip(*pairs, strict=True))
    straight = judge.compare_many([prompt] * len(pairs), firsts, seconds)
    swapped = judge.compare_many([prompt] * len(pairs), seconds, firsts)
    for first, second, one, other in zip(firsts, seconds, straight, swapped, strict=True):
        if first is second:
            assert one == other and one.p_first == 0.5 and one.preferred is None
        else:
            assert_mirrored(one, other)


# ---------------------------------------------------------------- untrusted text

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESERVED = frozenset((*QWEN_RESERVED, *FOREIGN_RESERVED, *TAGS, "aba", "<<", "\N{KELVIN SIGN}x".lower()))

PIECES = st.one_of(
    st.sampled_from(sorted(RESERVED)),
    st.sampled_from(sorted(RESERVED)).flatmap(lambda token: st.integers(1, len(token)).map(lambda k: token[:k])),
    st.sampled_from(sorted(RESERVED)).flatmap(lambda token: st.integers(1, len(token)).map(lambda k: token[-k:])),
    st.sampled_from([" ", "\n", "\t", "\0", "\x1b", "\x85", "\u0301", "\u200b", "\u202e", "\ud83d", "\N{KELVIN SIGN}"]),
    st.text(st.characters(), max_size=6),
)


def floods(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    many = st.integers(MOST_REPEATS - 1, 2 * MOST_REPEATS + 1)
    return st.one_of(
        st.lists(children, max_size=4).map("".join), st.tuples(children, many).map(lambda pair: pair[0] * pair[1])
    )


TEXTS = st.recursive(PIECES, floods, max_leaves=6)


@given(TEXTS, PIECES, PIECES)
@example("<s>< s>" * 8, "", "")  # eight times two become sixteen times one, once the tokens are broken
@example("a a a a a a a a a", "<", "")
def test_neutralised_text_holds_nothing_reserved_and_stays_as_it_is(text: str, before: str, after: str):
    before, after = (neutralise(side, RESERVED) for side in (before, after))
    safe = neutralise(text, RESERVED, before=before, after=after)
    safe.encode("utf-8")  # no unpaired surrogate
    assert not [char for char in safe if unicodedata.category(char) == "Cc" and char not in "\t\n\r"]
    assert neutralise(safe, RESERVED, before=before, after=after) == safe
    whole = unicodedata.normalize("NFC", before + safe + after)  # as tokenizers read it
    found = [token for token in RESERVED if token in whole]
    assert not found
    letters = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    assert set(safe) <= {*letters, " "}


def most_in_a_row(text: str, length: int) -> int:
    """How many times any piece of `length` characters comes in a row, at the most."""
    longest = run = 0
    for char, later in zip(text, text[length:], strict=False):
        run = run + 1 if char == later else 0
        longest = max(longest, run)
    return longest // length + 1


@given(TEXTS, st.text(st.sampled_from("ab <x>"), min_size=1, max_size=64), st.integers(1, 40), TEXTS)
@example("", "<", 10, "")  # broken at "<<", the tokens of one character become pieces of two
def test_no_flood_is_left(left: str, piece: str, copies: int, right: str):
    safe = neutralise(left + piece * copies + right, RESERVED)
    assert max(most_in_a_row(safe, length) for length in range(2, 65)) <= MOST_REPEATS


# ---------------------------------------------------------------- what was rendered is read back

WORDS = st.text(st.characters(exclude_categories=["Z", "C", "Cs"], exclude_characters="<>"), min_size=1, max_size=6)


@st.composite
def formats(draw: st.DrawFn) -> ChatFormat:
    think, answer, one, two = draw(st.lists(WORDS, min_size=4, max_size=4, unique=True))
    return ChatFormat(
        question="{first}{second}{prompt}",
        labels=(one, two),
        think=(f"<{think}>", f"</{think}>"),
        answer=(f"<{answer}>", f"</{answer}>"),
    )


@given(st.one_of(st.just(ChatFormat()), formats()), TEXTS, st.sampled_from([1, 2]), st.text(" \n\t", max_size=3))
def test_a_completion_that_was_rendered_is_read_back(chat_format: ChatFormat, thought: str, answer: Any, gap: str):
    tags = (*chat_format.think, *chat_format.answer)
    rendered = (
        f"{gap}{chat_format.think[0]}{gap}{thought}{gap}{chat_format.think[1]}{gap}{chat_format.answer[0]}{gap}"
        f"{chat_format.labels[answer - 1]}{gap}{chat_format.answer[1]}{gap}"
    )
    if any(tag in thought for tag in tags):
        assert not parse(rendered, chat_format).well_formed
    else:
        assert parse(rendered, chat_format) == Trace(thought.strip(), answer)
        closed = f"{chat_format.answer_slot(thought)}{chat_format.labels[answer - 1]}{chat_format.answer[1]}"
        assert parse(closed, chat_format) == Trace(thought.strip(), answer)


@given(st.one_of(st.just(ChatFormat()), formats()), TEXTS)
def test_any_completion_is_read_and_a_malformed_one_keeps_no_tag(chat_format: ChatFormat, completion: str):
    trace = parse(completion, chat_format)
    assert trace.thought == trace.thought.strip()
    if not trace.well_formed:
        assert len(trace.thought) <= len(completion)


# ---------------------------------------------------------------- token budgets


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=8)), max_size=8), st.integers(1, 80)
)
def test_rows_hold_every_continuation_once_within_the_budget(lengths: list[tuple[int, list[int]]], budget: int):
    rows = list(budgeted(lengths, budget))
    members = [(group, member) for row in rows for group, parts in row for member in parts]
    assert members == [
        (group, k) for group, (_, continuations) in enumerate(lengths) for k in range(len(continuations))
    ]
    for row in rows:
        assert row and all(parts for _, parts in row)
        used = sum(lengths[group][0] + sum(lengths[group][1][k] for k in parts) for group, parts in row)
        assert used <= budget or sum(len(parts) for _, parts in row) == 1


# ---------------------------------------------------------------- tie thresholds

MARGINS = st.one_of(st.sampled_from([0.0, 0.1, -0.1, 0.3, -0.3, 0.5, -0.5, math.nan]), st.floats(-1, 1))
PEOPLE = st.sampled_from([-0.5, -0.2, 0.0, 0.2, 0.5])


def credit_by_hand(judge: float, people: float, threshold: float, half: float) -> float:
    """What one pair earns: a point for the same side or for a tie of both, `half` for a tie that only one side sees."""
    if math.isnan(judge):
        return 0.0
    tie, human = abs(judge) <= threshold, people == 0
    if tie or human:
        return 1.0 if tie and human else half
    return float((judge > 0) == (people > 0) and judge != 0)


@given(st.lists(st.tuples(MARGINS, PEOPLE), min_size=1, max_size=12), st.sampled_from([0.0, 0.5]))
def test_the_best_tie_threshold_is_that_of_all_there_are(pairs: list[tuple[float, float]], half: float):
    judge, people = (np.array(column) for column in zip(*pairs, strict=True))
    total = lambda threshold: sum(credit_by_hand(*pair, threshold, half) for pair in pairs)  # noqa: E731
    tried = [-1.0, *sorted({abs(margin) for margin, _ in pairs if not math.isnan(margin)})]
    best = max(total(threshold) for threshold in tried)
    found = protocols.best_tie_threshold(judge, people, half=half)
    assert found == next(threshold for threshold in tried if total(threshold) == best)
    for threshold in (*tried, found):
        credits = protocols.with_ties(judge, people, threshold, half=half)
        assert credits.earned.sum() == total(threshold) and credits.possible.sum() == len(pairs)


@given(st.lists(st.tuples(MARGINS, PEOPLE), min_size=1, max_size=12))
def test_pickscores_threshold_is_the_best_of_its_grid(pairs: list[tuple[float, float]]):
    judge, people = (np.array(column) for column in zip(*pairs, strict=True))
    grid = protocols.PICKSCORE_GRID.tolist()
    totals = [sum(credit_by_hand(*pair, threshold, 0.5) for pair in pairs) for threshold in grid]
    judged = JudgedPairs(judge=judge, people=people, prompts=np.arange(len(pairs)))
    assert choose_tie_threshold(judged) == grid[totals.index(max(totals))]


# ---------------------------------------------------------------- pictures

SHAPES = st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    st.permutations([1, 3, 4, 2]).map(lambda sides: tuple(sides[:3])),
    st.tuples(st.integers(1, 2 * MAX_SIDE), st.just(1)),
    st.tuples(st.integers(1, 3), st.integers(1, 2 * MAX_SIDE), st.just(3)),
)
NUMPY_DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    st.just(np.dtype(object)),
    st.just(np.dtype("f4,u1")),
    st.just(np.dtype(np.longdouble)),
    st.sampled_from([np.dtype(np.uint8), np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]),
)
TORCH_DTYPES = [
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
]
VALUES = st.sampled_from([0.0, 0.25, 1.0, 1.005, -0.005, 1.5, -1.0, 255.0, math.nan, math.inf, -math.inf, 1e300])


def fill(shape: tuple[int, ...], values: Sequence[float]) -> np.ndarray:
    """An array of that shape that repeats these values."""
    return np.resize(np.array(values), shape)


def read(image: Any) -> Image.Image | None:
    """The picture, or None where it was refused. Any other exception fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is all but black")
        try:
            picture = to_pil(image)
        except InputError as error:
            assert str(error).startswith("image ")
            return None
    assert type(picture) is Image.Image and picture.mode == "RGB"
    assert max(picture.size) <= MAX_SIDE and max(picture.size) <= MAX_ASPECT * min(picture.size)
    return picture


def size_by_rule(shape: tuple[int, ...], floating: bool) -> tuple[int, int] | None:
    """Width and height by what the documentation says of arrays; None where it wants an `InputError`."""
    if len(shape) not in (2, 3) or 0 in shape:
        return None
    if len(shape) == 3:
        ends = {channels: [axis for axis in (0, 2) if shape[axis] == channels] for channels in (3, 4, 1)}
        axes = next((axes for axes in ends.values() if axes), None)
        if axes is None:
            return None
        axis = axes[0 if floating else -1]
        shape = shape[:axis] + shape[axis + 1 :]
    height, width = shape
    if max(shape) > MAX_SIDE:
        width, height = (max(1, round(side * MAX_SIDE / max(shape))) for side in (width, height))
    least = math.ceil(max(width, height) / MAX_ASPECT)
    return max(width, least), max(height, least)


@given(NUMPY_DTYPES, SHAPES, st.lists(VALUES, min_size=1, max_size=3))
def test_any_array_becomes_a_picture_or_an_input_error(dtype: np.dtype, shape: tuple[int, ...], values: list[float]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array = fill(shape, values).astype(dtype)
        except (TypeError, ValueError, OverflowError):  # NaN has no integer, and a number no date
            array = np.zeros(shape, dtype)
    picture = read(array)
    readable = dtype == np.uint8 or (
        dtype.kind == "f" and array.size > 0 and array.min() >= -0.01 and array.max() <= 1.01
    )
    expected = size_by_rule(shape, dtype.kind == "f") if readable else None
    assert (picture.size if picture else None) == expected


@given(st.sampled_from(TORCH_DTYPES), SHAPES, st.lists(VALUES, min_size=1, max_size=3))
def test_any_tensor_becomes_a_picture_or_an_input_error(
    dtype: torch.dtype, shape: tuple[int, ...], values: list[float]
):
    tensor = torch.from_numpy(fill(shape, values)).to(dtype)
    picture = read(tensor)
    numbers = tensor.float() if tensor.is_floating_point() else tensor
    readable = dtype == torch.uint8 or (
        dtype.is_floating_point and tensor.numel() > 0 and bool(((numbers >= -0.01) & (numbers <= 1.01)).all())
    )
    expected = size_by_rule(shape, dtype.is_floating_point) if readable else None
    assert (picture.size if picture else None) == expected


@given(
    st.sampled_from(
        ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "F"]
    )
    | st.sampled_from(["I", "I;16", "I;16B", "I;16L", "I;16N"]),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.integers(0, 255),
)
def test_any_pil_mode_becomes_a_picture_of_its_size(mode: str, size: tuple[int, int], value: int):
    image = Image.new(mode, size)
    if image.mode in ("L", "P", "I", "I;16"):
        image.paste(value, (0, 0, *size))
    picture = read(image)
    assert (picture.size if picture else None) == (size if 0 not in size else None)


@given(st.one_of(st.binary(max_size=300), st.none(), st.integers(), st.floats(), st.text(max_size=50), st.booleans()))
def test_what_is_no_picture_is_an_input_error(thing: Any):
    assert read(thing) is None


# ---------------------------------------------------------------- ranking


@st.composite
def tournaments(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, float]]]:
    n = draw(st.integers(1, 7))
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=15))
    return n, [(i, j, draw(st.floats(0, 1))) for i, j in pairs if i != j]


@given(tournaments(), st.randoms(use_true_random=False), st.sampled_from([0.5, 2.0]), st.sampled_from([1.0, 16.0]))
def test_bradley_terry_scores_follow_their_images(tournament, rng, prior_std, votes):
    n, outcomes = tournament
    scores, errors = fit_bradley_terry(n, outcomes, prior_std=prior_std, votes=votes)
    assert scores.shape == errors.shape == (n,) and (errors > 0).all()
    assert scores.sum() == pytest.approx(0, abs=1e-9)
    place = list(range(n))
    rng.shuffle(place)
    moved = [(place[i], place[j], p) for i, j, p in outcomes]
    rng.shuffle(moved)
    for options in ({}, {"swap": True}):
        turned = [(j, i, 1 - p) for i, j, p in moved] if options else moved
        again, their_errors = fit_bradley_terry(n, turned, prior_std=prior_std, votes=votes)
        assert again[place] == pytest.approx(scores, abs=1e-6) and their_errors[place] == pytest.approx(
            errors, abs=1e-6
        )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(1, 30), st.floats(0.1, 8))
def test_a_judge_that_is_consistent_is_ranked_as_it_says(worth: list[int], budget: int, slope: float):
    asked: list[tuple[int, int]] = []

    def compare(pairs: list[tuple[int, int]]) -> list[float]:
        asked.extend(pairs)
        return [1 / (1 + math.exp(-slope * (worth[i] - worth[j]))) for i, j in pairs]

    n = len(worth)
    for limit in (None, budget):
        asked.clear()
        ranking = rank_images(compare, n, budget=limit)
        every = n * (n - 1) // 2
        assert ranking.comparisons == len(asked) == len({frozenset(pair) for pair in asked})
        assert ranking.comparisons == (every if limit is None else min(limit, every))
        assert sorted(ranking.order) == list(range(n)) and sum(ranking.scores) == pytest.approx(0, abs=1e-9)
        if ranking.comparisons == every:
            assert [worth[k] for k in ranking.order] == sorted(worth, reverse=True)
            assert all(worth[i] != worth[j] or i < j for i, j in zip(ranking.order, ranking.order[1:], strict=False))
