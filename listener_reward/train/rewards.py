"""The parts of the shaped reward as trl reward functions: the paper's three, and what a configuration adds.

They also work with a stock `GRPOTrainer` whose data set has the columns `caption`, `images`, `p_first` and `id`. In
`images` stand a prompt's sources, where it has some, and then the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import JudgeError, UnreachableError
from listener_reward.listener import Listener
from listener_reward.media.images import to_picture
from listener_reward.models.vlm import check_finite
from listener_reward.pairs import prompt_with
from listener_reward.shaping import accuracy_reward, contradicted, format_reward, gain_reward, listener_reward
from listener_reward.trace import Trace, parse


class View(NamedTuple):
    """What the listener says about one completion, as probabilities of the image in first place."""

    p: float
    """Having read the thought."""
    p_alone: float | None = None
    """Without a thought; None where no reward needs it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A batch of completions, parsed and listened to once for all parts."""

    traces: list[Trace]
    views: list[View | None]
    """The listener's; None for a malformed trace, without a listener, or where it failed."""
    failed: list[bool]
    """Whether the listener failed on this completion. Such a row gets no reward of any part."""

    @property
    def p_listener(self) -> list[float | None]:
        """The listener's probability of the image in first place; None where there is no view."""
        return [None if view is None else view.p for view in self.views]


class ShapedReward:
    """Format, accuracy and listener rewards, sharing one reading of each batch.

    Hand `functions` to trl as `reward_funcs`, with `reward_weights` [1, 0.5, 0.5], and the gain's after them. A part
    returns None for a row whose listener failed; trl then leaves the row out of its group, which a zero would not.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        listener: Listener | None,
        *,
        on_failure: str = "mask",
        opened: str = "",
        gain: bool = False,
    ):
        """
        Args:
            chat_format: how completions are written.
            listener: who reads the thoughts; None for nobody.
            on_failure: "mask" or "raise", when the listener breaks.
            opened: what the generation prompt itself writes of each completion (`processing.opened_by_template`).
            gain: beyond the paper: whether there is a part for what the listener gains over its view without a
                thought, which it is then asked for once a pair.
        """
        self.opened = opened
        self.chat_format = chat_format
        self.listener = listener
        self.on_failure = on_failure
        self.gain = gain
        self._last: tuple[Any, Scored] | None = None
        self.functions: list[Callable[..., list[float | None]]] = [
            _Part("format", self, lambda trace, p_first, view: format_reward(trace)),
            _Part("accuracy", self, lambda trace, p_first, view: accuracy_reward(trace, p_first)),
            _Part("listener", self, _listened),
        ]
        if gain:
            self.functions.append(_Part("gain", self, _gained))

    def read(self, completions: Sequence[Any], **columns: Any) -> Scored:
        """The batch's traces and the listener's probabilities, computed for the first part and reused by the others."""
        if self._last is None or self._last[0] is not completions:
            scored = self._read(completions, **columns)
            self._last = completions, scored
            _log(scored, **columns)
        return self._last[1]

    @property
    def last_completion(self) -> str:
        """One completion of the batch that was read last, as it was parsed; "" before the first."""
        return self.opened + text_of(self._last[0][0]) if self._last is not None and len(self._last[0]) else ""

    def _read(
        self,
        completions: Sequence[Any],
        *,
        caption: Sequence[str],
        images: Sequence[Any],
        criterion: Sequence[str | None] | None = None,
        **_: Any,
    ) -> Scored:
        traces = [parse(self.opened + text_of(completion), self.chat_format) for completion in completions]
        views: list[View | None] = [None] * len(traces)
        failed = [False] * len(traces)
        rows = [row for row, trace in enumerate(traces) if trace.well_formed]
        if self.listener is not None and rows:
            asked = caption, images, criterion or [None] * len(traces)
            for row, view in zip(rows, self._views(self.listener, rows, traces, *asked), strict=True):
                views[row], failed[row] = view, view is None
        return Scored(traces, views, failed)

    def _views(
        self,
        listener: Listener,
        rows: list[int],
        traces: list[Trace],
        caption: Sequence[str],
        images: Sequence[Any],
        criterion: Sequence[str | None],
    ) -> list[View | None]:
        """The listener's view of each of `rows`; None where it failed in any of its readings."""
        pictures = {id(image): to_picture(image) for row in rows for image in images[row]}  # a group's rows share them

        def chat(row: int) -> Chat:
            *sources, first, second = (pictures[id(image)] for image in images[row])
            asked = prompt_with(caption[row], tuple(sources), criterion[row])
            return listener.chat_format.chat(asked, first, second, listener.vlm.reserved)

        after = self._listen(listener, [chat(row) for row in rows], [traces[row] for row in rows])
        if not self.gain:
            return [None if p is None else View(p) for p in after]
        pairs = [(caption[row], criterion[row], *map(id, images[row])) for row in rows]
        firsts = {pair: row for pair, row in zip(reversed(pairs), reversed(rows), strict=True)}
        said = self._listen(listener, [chat(row) for row in firsts.values()], [Trace("", None)] * len(firsts))
        alone = dict(zip(firsts, said, strict=True))  # once for each pair, whose rows are many
        return [
            None if p is None or alone[pair] is None else View(p, alone[pair])
            for p, pair in zip(after, pairs, strict=True)
        ]

    def _listen(self, listener: Listener, chats: list[Chat], traces: list[Trace]) -> list[float | None]:
        try:
            return check_finite(listener.p_first(chats, traces), "the listener").tolist()
        except JudgeError as error:
            if self.on_failure == "raise":
                raise
            warnings.warn(f"{error} These completions are left out of their groups.", stacklevel=2)
            if isinstance(error, UnreachableError):  # the next batch asks again
                return [None] * len(chats)
        # One failing row must not cost the other rows their reward: each row is read again alone.
        return [_alone(listener, chat, trace) for chat, trace in zip(chats, traces, strict=True)]


_Score = Callable[[Trace, float, View | None], float]
"""A trace, its label and the listener's view to a reward; the view is None of a malformed trace, or without a
listener."""


def _listened(trace: Trace, p_first: float, view: View | None) -> float:
    return 0.0 if view is None else listener_reward(trace, p_first, view.p)


def _gained(trace: Trace, p_first: float, view: View | None) -> float:
    if view is None:
        return 0.0
    assert view.p_alone is not None
    return gain_reward(trace, p_first, view.p, view.p_alone)


class _Part:
    """One part as a trl reward function; trl logs it by `__name__`."""

    def __init__(self, name: str, whole: ShapedReward, score: _Score):
        self.__name__ = name
        self.whole = whole
        self.score = score

    def __call__(self, completions: Sequence[Any], p_first: Sequence[float], **columns: Any) -> list[float | None]:
        scored = self.whole.read(completions, p_first=p_first, **columns)
        return [
            None if failed else self.score(trace, label, view)
            for trace, label, view, failed in zip(scored.traces, p_first, scored.views, scored.failed, strict=True)
        ]


def text_of(completion: Any) -> str:
    """The text of a completion, conversational or plain."""
    if isinstance(completion, str):
        return completion
    content = completion[0]["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def _alone(listener: Listener, chat: Any, trace: Trace) -> float | None:
    try:
        return check_finite(listener.p_first([chat], [trace]), "the listener").item()
    except JudgeError:
        return None


def _log(
    scored: Scored,
    *,
    p_first: Sequence[float],
    id: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> None:
    """Adds the listener's view to trl's completions table and metrics."""
    if log_extra is not None:
        log_extra("id", list(id))
        log_extra("p_first", list(p_first))
        log_extra("listener_p_first", list(scored.p_listener))
    if log_metric is None:
        return
    # One value for each completion, of which trl takes the mean over all processes: the mean of each process's means
    # would weigh a completion by how few others its process had.
    for trace, label, p in zip(scored.traces, p_first, scored.p_listener, strict=True):
        log_metric("malformed_rate", float(not trace.well_formed))
        if trace.well_formed:
            log_metric("accuracy", accuracy_reward(trace, label))
        if p is not None:
            log_metric("contradiction_rate", float(bool(contradicted(trace, p))))
            log_metric("listener_confidence", listener_reward(trace, label, p))
    log_metric("listener_failures", float(sum(scored.failed)))
