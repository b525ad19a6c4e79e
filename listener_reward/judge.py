"""The judge: a reasoner and a listener give one verdict about two images, in both orders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from listener_reward.chat import Chat, ChatFormat
from listener_reward.checkpoint import Card, resolve
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
class _Shown:
    """One question to the models: a pair in one of its two orders, with the seed of one thought."""

    pair: int
    flipped: bool
    """Whether the caller's second image is shown first."""
    chat: Chat
    heard: Chat | None
    """The same question in the listener's own words; None without a listener."""
    seed: int
    twin: bool
    """Whether the two pictures are equal, so that this view stands for both orders."""


class Judge:
    """Compares two images as answers to a prompt, the way people would.

    Each pair is shown in both orders with the same seeds, and the log-odds' probabilities are averaged, so position
    cannot win and swapping the images gives exactly `1 - p_first`.
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
        thoughts: int | None = None,
        think: bool = True,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Judge:
        """Loads a judge by embedded name ("tiny"), folder, or Hub name.

        Args:
            name: the reasoner's checkpoint. Its `listener_reward.json` says how it is asked and who listens.
            listener: another listener than the checkpoint's own; "none" for no listener.
            device, dtype, batch_size: where and how both models run.
            thoughts: thoughts sampled in each order; None takes the checkpoint's own number.
            think: False for the fast mode.
            max_new_tokens: the longest completion; None takes the checkpoint's own.
            seed: seeds the thoughts, together with the pair's content.

        Raises:
            InputError: a checkpoint that cannot be found, reached or read.
        """
        folder = resolve(name)
        card = Card.load(folder)
        given = {"thoughts": thoughts, "max_new_tokens": max_new_tokens}
        card = replace(card, **{name: value for name, value in given.items() if value is not None})
        options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
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
        if isinstance(prompts, str):
            raise InputError(f"prompts is the single text {prompts[:40]!r}; give a list with one prompt for each pair")
        if not len(prompts) == len(firsts) == len(seconds):
            raise InputError(
                f"prompts, firsts and seconds have lengths {len(prompts)}, {len(firsts)} and {len(seconds)}; each pair "
                "needs one of each"
            )
        shown = [
            view
            for index, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True))
            for view in self._views(index, prompt, first, second, self.card.thoughts if self._thinks(think) else 1)
        ]
        chats = [view.chat for view in shown]
        if self._thinks(think):
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
        gathered: list[list[_Answered]] = [[] for _ in prompts]
        for view, trace, p_own, p_heard in zip(shown, traces, own, heard, strict=True):
            answered = _Answered(view.flipped, trace, _on_grid(p_own), None if p_heard is None else _on_grid(p_heard))
            gathered[view.pair].append(answered)
            if view.twin:
                gathered[view.pair].append(replace(answered, flipped=True))
        return [_verdict(views, self._thinks(think)) for views in gathered]

    def rank(self, prompt: str, images: Sequence[ImageLike]) -> Ranking:
        """Orders images of one prompt by comparing every pair; see `listener_reward.ranking`."""
        pictures = to_pil_batch(images)

        def compare_batch(pairs: Sequence[tuple[int, int]]) -> list[float]:
            verdicts = self.compare_many(
                [prompt] * len(pairs), [pictures[i] for i, _ in pairs], [pictures[j] for _, j in pairs]
            )
            return [verdict.p_first for verdict in verdicts]

        return rank_images(compare_batch, len(pictures))

    def _thinks(self, think: bool | None) -> bool:
        return self.think if think is None else think

    def _views(self, index: int, prompt: str, first: ImageLike, second: ImageLike, thoughts: int) -> list[_Shown]:
        """Both orders of a pair, `thoughts` times each, in an order that does not depend on which image came first.

        The seed of a thought comes from what is shown. Two equal pictures have one order, asked once, because the same
        question in two rows of a batch may differ by rounding.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{index}] is a {type(prompt).__name__}; a prompt is a string")
        pictures = to_pil(first, field=f"firsts[{index}]"), to_pil(second, field=f"seconds[{index}]")
        digests = [hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest() for picture in pictures]
        twin = digests[0] == digests[1]
        orders = [(0, 1)] if twin else [(0, 1), (1, 0)] if digests[0] < digests[1] else [(1, 0), (0, 1)]
        views = []
        for left, right in orders:
            placed = prompt, pictures[left], pictures[right]
            chat = self.card.format.chat(*placed, self.reasoner.reserved)
            heard = self.listener and self.listener.chat_format.chat(*placed, self.listener.vlm.reserved)
            for number in range(thoughts):
                key = f"{self.seed}/{number}/".encode() + prompt.encode("utf-8", "replace")
                seed = hashlib.blake2b(key + digests[left] + digests[right], digest_size=8).digest()
                views.append(_Shown(index, left == 1, chat, heard, int.from_bytes(seed), twin))
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


@dataclass(frozen=True, slots=True)
class _Answered:
    """One thought and what the two models made of it, both about the image that was shown first."""

    flipped: bool
    trace: Trace
    p_own: float
    p_heard: float | None


def _verdict(views: Sequence[_Answered], thought: bool) -> Verdict:
    """Averages over thoughts within each order, then over the two orders."""
    p_first, position_gap = _both_orders([(view.flipped, view.p_own) for view in views])
    heard = [(view.flipped, view.p_heard) for view in views if view.p_heard is not None]
    listener_p_first = _both_orders(heard)[0] if heard else None
    preferred: Literal[1, 2] | None = None if p_first == 0.5 else 1 if p_first > 0.5 else 2
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


def _both_orders(shown_first: Sequence[tuple[bool, float]]) -> tuple[float, float]:
    """p(caller's first), and how much more it got when shown first than when shown second.

    `shown_first` holds (flipped, p(image shown first)).
    """
    as_given = [p for flipped, p in shown_first if not flipped]
    swapped = [p for flipped, p in shown_first if flipped]
    straight, reverse = sum(as_given) / len(as_given), sum(swapped) / len(swapped)
    half = abs(straight - reverse) / 2
    # |difference| first, then the grid, so that swapping the images gives 1 - p to the last bit.
    high = _on_grid(0.5 + half)
    return (high if straight >= reverse else 1.0 - high), straight + reverse - 1.0


def _on_grid(p: float) -> float:
    """The multiple of 1 / _GRID nearest to `p`, in (0, 1): float32 rounds a sure answer to 0 or 1, which nobody is."""
    return min(max(round(p * _GRID), 1), _GRID - 1) / _GRID


def _thought(view: _Answered) -> Thought:
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
