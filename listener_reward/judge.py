"""The judge: a reasoner and a listener give one verdict about two images, in both orders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.special import stdtr

from listener_reward.calibration import Calibration, Curve
from listener_reward.chat import Chat, ChatFormat
from listener_reward.checkpoint import Aggregate, Card, Orders, resolve
from listener_reward.errors import InputError
from listener_reward.images import ImageLike, to_pil, to_pil_batch
from listener_reward.listener import Listener, read_answers
from listener_reward.ranking import Ranking, rank_images
from listener_reward.shaping import contradicted
from listener_reward.trace import Trace, parse
from listener_reward.verdict import Thought, Verdict
from listener_reward.vlm import VLM, TransformersVLM, check_finite

_GRID = 2**40
"""Probabilities are rounded to multiples of 1 / _GRID, on which 1 - p is exact in both directions."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One thought and what the two models made of it, before any calibration, about the image that was shown first."""

    flipped: bool
    """Whether the caller's second image was shown first."""
    number: int
    """Which of the thoughts of its order it is, from 0."""
    trace: Trace
    p_own: float
    """The reasoner's probability at its answer slot, in (0, 1)."""
    p_heard: float | None
    """The listener's; None without one."""

    @property
    def vote(self) -> float:
        """1 for the image shown first, 0 for the other: the answer given, or where that is malformed the likelier."""
        if self.trace.answer is not None:
            return float(self.trace.answer == 1)
        return 0.5 if self.p_own == 0.5 else float(self.p_own > 0.5)


@dataclass(frozen=True, slots=True)
class _Shown:
    """One question to the models: a pair in one of its two orders, with the seed of one thought."""

    pair: int
    flipped: bool
    """Whether the caller's second image is shown first."""
    chat: Chat
    heard: Chat | None
    """The same question in the listener's own words; None without a listener."""
    number: int
    seed: int
    twin: bool
    """Whether the two pictures are equal, so that this view stands for both orders."""


class Judge:
    """Compares two images as answers to a prompt, the way people would.

    Each pair is shown in both orders and the answers are averaged, so position cannot win; swapping the images gives
    exactly `1 - p_first`. How many thoughts, orders and rounds a verdict takes is in the card; docs/judging.md has what
    each choice costs and gives.
    """

    def __init__(
        self,
        reasoner: VLM,
        listener: Listener | None = None,
        card: Card | None = None,
        *,
        name: str = "judge",
        think: bool = True,
        seed: int = 0,
    ):
        self.reasoner = reasoner
        self.listener = listener
        self.card = card or Card()
        self.name = name
        self.think = think
        """False skips the reasoning and reads the answer's probability from one forward pass: the fast mode."""
        self.seed = seed
        self._origin: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        listener: str | Path | Listener | Literal["none"] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 32,
        shared_prefix: bool = True,
        token_budget: int = 16384,
        vision_bytes: int = 2**29,
        thoughts: int | None = None,
        aggregate: Aggregate | None = None,
        orders: Orders | None = None,
        early_stop: float | None = None,
        think: bool = True,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Judge:
        """Loads a judge by embedded name ("tiny"), folder, or Hub name.

        Args:
            name: the reasoner's checkpoint. Its `listener_reward.json` says how it is asked and who listens.
            listener: another listener than the checkpoint's own; "none" for no listener.
            device, dtype, batch_size, shared_prefix, token_budget, vision_bytes: where and how both models run; see
                `TransformersVLM`.
            thoughts: thoughts sampled in each order; None takes the checkpoint's own number, here and below.
            aggregate: "mean" averages the thoughts' probabilities, "majority" counts their answers.
            orders: "both", or "one" for a random order at half the cost.
            early_stop: how sure to be, in (0.5, 1], before no further thought is asked for; 1 only saves those that can
                change nothing.
            think: False for the fast mode.
            max_new_tokens: the longest completion.
            seed: seeds the thoughts, together with the pair's content.

        Raises:
            InputError: a checkpoint that cannot be found, reached or read.
        """
        folder = resolve(name)
        card = Card.load(folder)
        given = {
            "thoughts": thoughts,
            "aggregate": aggregate,
            "orders": orders,
            "early_stop": early_stop,
            "max_new_tokens": max_new_tokens,
        }
        card = replace(card, **{name: value for name, value in given.items() if value is not None})
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "shared_prefix": shared_prefix,
            "token_budget": token_budget,
            "vision_bytes": vision_bytes,
        }
        reasoner = TransformersVLM.from_pretrained(folder, **options)
        if not isinstance(listener, Listener):
            chosen = card.listener if listener is None else None if listener == "none" else str(listener)
            loaded = None if chosen is None else load_listener(chosen, card, **options)
        else:
            loaded = listener
        judge = cls(reasoner, loaded, card, name=str(name), think=think, seed=seed)
        if loaded is not listener or listener is None:
            judge._origin = {"name": name, "listener": listener, **options, **given}
        return judge

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by configuration: the copy loads its weights from where this judge got them."""
        if self._origin is None:
            raise TypeError(
                f"the judge {self.name!r} was put together from loaded models, which do not pickle by configuration; "
                "save them to folders and load it by Judge.from_pretrained, or hand on the folder's name"
            )
        return partial(type(self).from_pretrained, **self._origin, think=self.think, seed=self.seed), ()

    def compare(self, prompt: str, first: ImageLike, second: ImageLike, *, think: bool | None = None) -> Verdict:
        """The verdict on one pair; see `compare_many`."""
        pictures = to_pil(first, field="first"), to_pil(second, field="second")
        return self.compare_many([prompt], [pictures[0]], [pictures[1]], think=think)[0]

    def compare_many(
        self,
        prompts: Sequence[str],
        firsts: Sequence[ImageLike],
        seconds: Sequence[ImageLike],
        *,
        think: bool | None = None,
    ) -> list[Verdict]:
        """One verdict per pair, judged in batches.

        A malformed thought of the reasoner is closed where it ended and its answer slot is read like any other; it is
        counted in the verdict. A verdict is a function of the pair, the seed and the models, not of the batch.

        Raises:
            InputError: unequal lengths, a prompt that is no text, or an image that cannot be read.
            JudgeError: the reasoner or the listener gave NaN or infinite probabilities.
        """
        answers = self.answers(prompts, firsts, seconds, think=think, early_stop=self.card.early_stop)
        return [self.conclude(views, think=think) for views in answers]

    def answers(
        self,
        prompts: Sequence[str],
        firsts: Sequence[ImageLike],
        seconds: Sequence[ImageLike],
        *,
        think: bool | None = None,
        early_stop: float | None = None,
    ) -> list[list[Answer]]:
        """What the models say of each pair, before it is calibrated and put together; see `compare_many`.

        With `early_stop` thoughts are asked for in rounds, one in each order of every pair that is still open.
        """
        if isinstance(prompts, str):
            raise InputError(f"prompts is the single text {prompts[:40]!r}; give a list with one prompt for each pair")
        if not len(prompts) == len(firsts) == len(seconds):
            raise InputError(
                f"prompts, firsts and seconds have lengths {len(prompts)}, {len(firsts)} and {len(seconds)}; each pair "
                "needs one of each"
            )
        thinks = self._thinks(think)
        thoughts = self.card.thoughts if thinks else 1
        shown = [
            view
            for index, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True))
            for view in self._views(index, prompt, first, second, thoughts)
        ]
        gathered: list[list[Answer]] = [[] for _ in prompts]
        if early_stop is None:
            self._ask(shown, thinks, gathered)
        else:
            for number in range(thoughts):
                due = [view for view in shown if view.number == number]
                due = [view for view in due if number == 0 or not (view.twin or self._settled(gathered[view.pair]))]
                self._ask(due, thinks, gathered)
        return gathered

    def conclude(
        self, answers: Sequence[Answer], *, think: bool | None = None, calibration: Calibration | None = None
    ) -> Verdict:
        """The verdict that the answers about one pair amount to; arithmetic only.

        Args:
            answers: one element of what `answers` returns.
            think: whether they come with thoughts; None is the judge's own setting.
            calibration: another than the card's.
        """
        thinks = self._thinks(think)
        if calibration is None:
            calibration = self.card.calibration if thinks else self.card.fast_calibration
        needed = self._needed(answers, calibration) if thinks else answers
        return _verdict(_in_order(needed), thinks, self.card.aggregate, calibration)

    def rank(self, prompt: str, images: Sequence[ImageLike], *, budget: int | None = None) -> Ranking:
        """Orders images of one prompt by comparing every pair, or `budget` pairs chosen as it goes; see `ranking`."""
        pictures = to_pil_batch(images)

        def compare_batch(pairs: Sequence[tuple[int, int]]) -> list[float]:
            verdicts = self.compare_many(
                [prompt] * len(pairs), [pictures[i] for i, _ in pairs], [pictures[j] for _, j in pairs]
            )
            return [verdict.p_first for verdict in verdicts]

        return rank_images(compare_batch, len(pictures), budget=budget)

    def _thinks(self, think: bool | None) -> bool:
        return self.think if think is None else think

    def _ask(self, shown: Sequence[_Shown], thinks: bool, gathered: list[list[Answer]]) -> None:
        """Puts `shown` to both models in one batch, and the answers where they belong."""
        if not shown:
            return
        chats = [view.chat for view in shown]
        if thinks:
            completions = self.reasoner.generate(
                chats,
                seeds=[view.seed for view in shown],
                max_new_tokens=self.card.max_new_tokens,
                temperature=self.card.sampling_temperature,
            )
            traces = [parse(completion, self.card.format) for completion in completions]
        else:
            traces = [Trace("", None)] * len(chats)
        own = read_answers(
            self.reasoner,
            self.card.format,
            chats,
            [trace.thought for trace in traces],
            temperature=self.card.temperature,
            who="the reasoner",
        ).tolist()
        heard: list[Any] = [None] * len(chats)
        if self.listener is not None:
            asked = [view.heard for view in shown if view.heard is not None]
            heard = check_finite(self.listener.p_first(asked, traces), "the listener").tolist()
        for view, trace, p_own, p_heard in zip(shown, traces, own, heard, strict=True):
            p_heard = None if p_heard is None else _on_grid(p_heard)
            answer = Answer(view.flipped, view.number, trace, _on_grid(p_own), p_heard)
            gathered[view.pair].append(answer)
            if view.twin:
                gathered[view.pair].append(replace(answer, flipped=True))

    def _needed(self, answers: Sequence[Answer], calibration: Calibration) -> Sequence[Answer]:
        """Those that would have been asked for, where all were: calibration replays early stopping on them."""
        if self.card.early_stop is None:
            return answers
        needed: list[Answer] = []
        for number in range(1 + max(answer.number for answer in answers)):
            if not self._settled(needed, calibration):
                needed += [answer for answer in answers if answer.number == number]
        return needed

    def _settled(self, answers: Sequence[Answer], calibration: Calibration | None = None) -> bool:
        """Whether a pair with these thoughts needs no more of them."""
        if not answers or self.card.early_stop is None:
            return False
        scale = (calibration or self.card.calibration).answer
        counted = self.card.aggregate == "majority"
        support = [answer.vote if counted else _on_grid(scale(answer.p_own)) for answer in answers]
        support = [1 - p if answer.flipped else p for answer, p in zip(answers, support, strict=True)]
        remaining = self.card.thoughts * (2 if self.card.orders == "both" else 1) - len(answers)
        return is_sure(support, remaining, self.card.early_stop)

    def _views(self, index: int, prompt: str, first: ImageLike, second: ImageLike, thoughts: int) -> list[_Shown]:
        """Both orders of a pair, `thoughts` times each, in an order that does not depend on which image came first.

        The seed of a thought comes from what is shown, and so does the order where there is to be one. Two equal
        pictures have one order, asked once, because the same question in two rows of a batch may differ by rounding.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{index}] is a {type(prompt).__name__}; a prompt is a string")
        pictures = to_pil(first, field=f"firsts[{index}]"), to_pil(second, field=f"seconds[{index}]")
        digests = [hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest() for picture in pictures]
        twin = digests[0] == digests[1]
        orders = [(0, 1)] if twin else [(0, 1), (1, 0)] if digests[0] < digests[1] else [(1, 0), (0, 1)]
        if self.card.orders == "one" and not twin:
            key = f"{self.seed}/order/".encode() + prompt.encode("utf-8", "replace")
            coin = hashlib.blake2b(key + b"".join(sorted(digests)), digest_size=1).digest()[0] & 1
            orders = orders[coin : coin + 1]
        views = []
        for left, right in orders:
            placed = prompt, pictures[left], pictures[right]
            chat = self.card.format.chat(*placed, self.reasoner.reserved)
            heard = self.listener and self.listener.chat_format.chat(*placed, self.listener.vlm.reserved)
            for number in range(thoughts):
                key = f"{self.seed}/{number}/".encode() + prompt.encode("utf-8", "replace")
                seed = hashlib.blake2b(key + digests[left] + digests[right], digest_size=8).digest()
                views.append(_Shown(index, left == 1, chat, heard, number, int.from_bytes(seed), twin))
        return views


def load_listener(name: str | Path, card: Card, **options: Any) -> Listener:
    """The listener of a judge: asked in its own format where it has a card, else in the judge's."""
    folder = resolve(name)
    own = Card.load(folder)
    chat_format: ChatFormat = card.format if own == Card() else own.format
    vlm = TransformersVLM.from_pretrained(folder, **options)
    return make_listener(vlm, chat_format, card)


def make_listener(vlm: VLM, chat_format: ChatFormat, card: Card) -> Listener:
    """A listener as the judge's card wants it."""
    return Listener(
        vlm,
        chat_format,
        temperature=card.listener_temperature,
        masking=card.masking,
        grounding=card.listener_grounding,
    )


def is_sure(support: Sequence[float], remaining: int, sureness: float) -> bool:
    """Whether the thoughts so far settle which image is preferred.

    `support` holds what each thought gives the caller's first image, in [0, 1]. They settle it where the `remaining`
    thoughts cannot change the side of the mean even if all of them went the other way. Below a `sureness` of 1 they
    also do where the mean of all thoughts would be on the same side with that probability, by a t-test: the mean so
    far against its standard error, for a finite number of thoughts. The variance is pooled with one thought of the
    largest variance there is, 1/4, because a few thoughts may agree by chance.
    """
    n, lead = len(support), math.fsum(p - 0.5 for p in support)
    if abs(lead) > remaining / 2:
        return True
    if sureness >= 1 or lead == 0:
        return False
    mean = lead / n
    variance = (math.fsum((p - 0.5 - mean) ** 2 for p in support) + 0.25) / n
    statistic = abs(mean) / math.sqrt(variance * remaining / (n * (n + remaining)))
    return float(stdtr(n, statistic)) >= sureness


def _in_order(answers: Sequence[Answer]) -> list[Answer]:
    """All thoughts of one order, then those of the other; `_views` decided which is first."""
    return sorted(answers, key=lambda answer: (answer.flipped != answers[0].flipped, answer.number))


def _verdict(raw: Sequence[Answer], thought: bool, aggregate: Aggregate, calibration: Calibration) -> Verdict:
    """Calibrates the answers, puts them together within each order and over both, and calibrates what comes of it."""
    views = [
        replace(
            view,
            p_own=_on_grid(calibration.answer(view.p_own)),
            p_heard=None if view.p_heard is None else _on_grid(calibration.heard(view.p_heard)),
        )
        for view in raw
    ]
    margin, position_gap = _over_orders([(view.flipped, view.p_own) for view in views])
    if aggregate == "majority" and thought:
        # Laplace's rule of succession: n votes of n are no certainty.
        margin = _over_orders([(view.flipped, view.vote) for view in views])[0] * len(views) / (len(views) + 2)
    p_first = _probability(margin, calibration.verdict)
    heard = [(view.flipped, view.p_heard) for view in views if view.p_heard is not None]
    listener_p_first = _probability(_over_orders(heard)[0], calibration.listener) if heard else None
    preferred: Literal[1, 2] | None = None
    if abs(p_first - 0.5) > calibration.tie_band:
        preferred = 1 if p_first > 0.5 else 2
    return Verdict(
        p_first=p_first,
        preferred=preferred,
        thoughts=tuple(_thought(view) for view in views) if thought else (),
        listener_p_first=listener_p_first,
        contradicted=None
        if listener_p_first is None or preferred is None
        else (listener_p_first < 0.5 if preferred == 1 else listener_p_first > 0.5),
        position_gap=position_gap,
        malformed=sum(not view.trace.well_formed for view in views) if thought else 0,
    )


def _over_orders(shown_first: Sequence[tuple[bool, float]]) -> tuple[float, float]:
    """p(caller's first) - 1/2, and how much more it got when shown first than when shown second (NaN of one order).

    `shown_first` holds (flipped, p(image shown first)). The two are differences of what the orders gave, so swapping
    the images turns the sign of the first and changes nothing else, to the last bit.
    """
    as_given = [p for flipped, p in shown_first if not flipped]
    swapped = [p for flipped, p in shown_first if flipped]
    if not swapped:
        return math.fsum(as_given) / len(as_given) - 0.5, math.nan
    if not as_given:
        return 0.5 - math.fsum(swapped) / len(swapped), math.nan
    straight, reverse = math.fsum(as_given) / len(as_given), math.fsum(swapped) / len(swapped)
    return (straight - reverse) / 2, straight + reverse - 1.0


def _probability(margin: float, curve: Curve) -> float:
    """The calibrated probability for a margin over 1/2. The size first, then the grid, so that 1 - p is exact."""
    if margin == 0:
        return 0.5
    high = _on_grid(curve(_on_grid(0.5 + abs(margin))))
    return high if margin > 0 else 1.0 - high


def _on_grid(p: float) -> float:
    """The multiple of 1 / _GRID nearest to `p`, in (0, 1): float32 rounds a sure answer to 0 or 1, which nobody is."""
    return min(max(round(p * _GRID), 1), _GRID - 1) / _GRID


def _thought(view: Answer) -> Thought:
    """A thought in the caller's numbering."""
    trace, p_heard = view.trace, view.p_heard
    answer: Literal[1, 2] | None = trace.answer
    if view.flipped and answer is not None:
        answer = 2 if answer == 1 else 1
    return Thought(
        text=trace.thought,
        order="swapped" if view.flipped else "as given",
        answer=answer,
        p_first=1.0 - view.p_own if view.flipped else view.p_own,
        listener_p_first=None if p_heard is None else (1.0 - p_heard if view.flipped else p_heard),
        contradicted=None if p_heard is None else contradicted(trace, p_heard),
    )
