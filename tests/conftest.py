"""A judge without a model, and images whose quality is one number."""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from listener_reward.errors import JudgeError
from listener_reward.images import to_pil
from listener_reward.ranking import Ranking, rank_images
from listener_reward.verdict import Thought, Verdict


def shade_image(red: int, size: int = 4) -> Image.Image:
    """A plain picture; `FakeJudge` likes it the more, the redder it is (0 to 255)."""
    return Image.new("RGB", (size, size), (red, 0, 0))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class FakeJudge:
    """Prefers the redder image: p_first = sigmoid(slope * (red_first - red_second) / 255), mean red over the picture.

    Args:
        slope: how sure it is of itself.
        bias: added to p_first whichever image comes first, so that it is no longer symmetric; also its position gap.
        noise: standard deviation of log-odds noise, a function of the pair, with its sign flipped by a swap.
        listener_slope: the listener's own slope; None for no listener, negative for one that contradicts.
        malformed: gives every verdict a second, malformed thought.
        breaks_on: prompts, or pictures by their red value, on which the judge raises `JudgeError`.
        answers_nan: gives NaN where it would break, instead of raising.
        delay: seconds that a call takes.
    """

    def __init__(
        self,
        *,
        slope: float = 4.0,
        bias: float = 0.0,
        noise: float = 0.0,
        listener_slope: float | None = None,
        malformed: bool = False,
        breaks_on: Callable[[str, int, int], bool] = lambda prompt, first, second: False,
        answers_nan: bool = False,
        delay: float = 0.0,
        name: str = "fake",
    ):
        self.name = name
        self.slope, self.bias, self.noise, self.listener_slope = slope, bias, noise, listener_slope
        self.malformed, self.breaks_on, self.answers_nan, self.delay = malformed, breaks_on, answers_nan, delay
        self.calls: list[list[tuple[str, int, int]]] = []
        """For each call of `compare_many`, the pairs it got: prompt and red values."""
        self.think: list[bool | None] = []
        self._busy = threading.Lock()

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        assert self._busy.acquire(blocking=False), "two threads are in the judge"
        try:
            time.sleep(self.delay)
            pairs = [(p, _red(a), _red(b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
            self.calls.append(pairs)
            self.think.append(think)
            return [self._verdict(*pair) for pair in pairs]
        finally:
            self._busy.release()

    def compare(self, prompt: str, first: Any, second: Any, *, think: bool | None = None) -> Verdict:
        return self.compare_many([prompt], [first], [second], think=think)[0]

    def rank(self, prompt: str, images: Sequence[Any]) -> Ranking:
        def compare_batch(pairs: list[tuple[int, int]]) -> list[float]:
            firsts, seconds = [images[i] for i, _ in pairs], [images[j] for _, j in pairs]
            return [verdict.p_first for verdict in self.compare_many([prompt] * len(pairs), firsts, seconds)]

        return rank_images(compare_batch, len(images))

    def _verdict(self, prompt: str, first: int, second: int) -> Verdict:
        broken = self.breaks_on(prompt, first, second)
        if broken and not self.answers_nan:
            raise JudgeError(f"the fake judge broke on {prompt!r}")
        gap = (first - second) / 255
        p_first = math.nan if broken else sigmoid(self.slope * gap + self._noise(first, second)) + self.bias
        preferred = None if p_first == 0.5 else 1 if p_first > 0.5 else 2
        heard = None if self.listener_slope is None else sigmoid(self.listener_slope * gap)
        contradicted = None if heard is None or preferred is None else (heard > 0.5) != (preferred == 1)
        thoughts = [Thought("The first is redder.", "as given", preferred, p_first, heard, contradicted)]
        if self.malformed:
            thoughts.append(Thought("Well", "swapped", None, 0.5, heard, None))
        return Verdict(p_first, preferred, tuple(thoughts), heard, contradicted, self.bias, int(self.malformed))

    def _noise(self, first: int, second: int) -> float:
        low, high = sorted((first, second))
        seed = hashlib.blake2b(f"{low}/{high}".encode(), digest_size=8).digest()
        draw = random.Random(seed).gauss(0, self.noise)
        return draw if (first, second) == (low, high) else -draw


def _red(image: Any) -> int:
    values = list(to_pil(image).getchannel("R").tobytes())
    return round(sum(values) / len(values))


@pytest.fixture(name="FakeJudge")
def _fake_judge() -> type[FakeJudge]:
    """The class, for tests to build the judge they need."""
    return FakeJudge


@pytest.fixture
def shade() -> Callable[..., Image.Image]:
    return shade_image
