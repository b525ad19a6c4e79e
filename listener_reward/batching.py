"""`BatchingJudge`: callers that come at once are judged together.

Trainers' threads, a server's requests and several rewards each bring a pair or two. One by one, each pays for a call of
the models, and they wait for one another. Together they are one batch.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.storyboards import to_visuals
from listener_reward.pairs import check_questions
from listener_reward.ranking import Ranking, RankingJudge, rank_by
from listener_reward.verdict import PairJudge, Verdict

LONGEST_WAIT = 20
"""A batch is gathered for at most so many times `wait`, while callers come."""

Observer = Callable[[int, float, "Sequence[Verdict] | None"], None]
"""Told of each call of the judge: how many pairs, how many seconds, and the verdicts; None where the judge broke."""


class Unwanted(Exception):
    """Nobody waits for the verdicts any more. It is the fault of neither the input nor the judge."""


_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def while_wanted(check: Callable[[], None]) -> Generator[None]:
    """What is asked of a `BatchingJudge` inside is begun only as long as `check` does not raise `Unwanted`.

    `check` is called from other threads, too, right before a batch.
    """
    token = _CHECK.set(check)
    try:
        yield
    finally:
        _CHECK.reset(token)


@dataclass(slots=True, eq=False)
class _Call:
    """A caller, who waits."""

    prompts: Sequence[str]
    firsts: Sequence[Any]
    seconds: Sequence[Any]
    think: bool | None
    check: Callable[[], None] | None
    came: float = field(default_factory=time.monotonic)
    verdicts: list[Verdict] | None = None
    error: BaseException | None = None
    leads: bool = False
    """Whether its thread is to work for all who wait."""
    turn: threading.Event = field(default_factory=threading.Event)
    """Set when it is done, or is to lead."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def done(self) -> bool:
        return self.verdicts is not None or self.error is not None

    def end(self, verdicts: list[Verdict] | None = None, error: BaseException | None = None) -> None:
        self.verdicts, self.error = verdicts, error
        self.turn.set()


class BatchingJudge:
    """A judge for many callers at once, made of one that takes one caller at a time.

    Pairs are judged in the order in which they came. Where a batch fails, it is halved until the caller whose pair
    failed stands alone. There is no thread of its own: the caller who has waited longest works for all. Memory is what
    the callers hold while they wait.

    A `ListenerReward` puts one around its judge by itself. Several rewards that share a judge need one of these between
    them: `judge = BatchingJudge(Judge.from_pretrained("tiny"))`.
    """

    def __init__(self, judge: PairJudge, *, limit: int = 64, wait: float = 0.01, observe: Observer | None = None):
        """
        Args:
            judge: who judges.
            limit: pairs of one call of the judge, unless a caller has more. It bounds how long the first of them waits.
            wait: a batch begins when nobody has come for so many seconds, or when the one who has waited longest has
                waited `LONGEST_WAIT` times as many. A lone caller loses no more than this. 0 gathers only those who
                come while the judge is busy.
            observe: told of each call of the judge.

        Raises:
            InputError: a limit below 1, a negative wait, or a judge that batches already.
        """
        if isinstance(judge, BatchingJudge):
            raise InputError("judge is a BatchingJudge already; give it as it is")
        if limit < 1 or wait < 0:
            raise InputError(f"limit is {limit} and wait {wait}; give 1 pair or more, and 0 seconds or more")
        self.judge, self.name, self.limit, self.wait, self.observe = judge, judge.name, limit, wait, observe
        self._stopped = False
        self._begin()
        _MADE.add(self)

    def _begin(self) -> None:
        self._queue: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._led = False
        self._judging = threading.Lock()

    def after_fork(self) -> None:
        """For the child of a fork: the threads that wait and judge were not copied."""
        self._stopped |= self._judging.locked()
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.judge, limit=self.limit, wait=self.wait), ()

    @property
    def waiting(self) -> int:
        """Pairs that came and were not handed to the judge yet."""
        with self._lock:
            return sum(map(len, self._queue))

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        """As of the judge, which may get the pairs of other callers in the same call.

        Raises:
            InputError, JudgeError: as the judge, about this caller's pairs.
            Unwanted: by `while_wanted`.
        """
        check_questions(prompts, firsts, seconds)
        if self._stopped:
            raise JudgeError(
                "this process was forked while another thread scored, so its copy of the judge stopped halfway; give "
                "the judge by name, which loads another, or make the reward after the fork"
            )
        if not prompts:
            return []
        call = _Call(prompts, firsts, seconds, think, _CHECK.get())
        with self._lock:
            self._queue.append(call)
            call.leads, self._led = not self._led, True
            self._more.notify()
        try:
            if not call.leads:
                call.turn.wait()
            while not call.done:
                self._work()
            if call.verdicts is None:
                raise call.error or AssertionError("it is done")
            return call.verdicts
        finally:
            # An error must not be found in what its own traceback holds: that would keep the pictures alive.
            call.error = None
            self._leave(call)

    def rank(self, prompt: str, images: Sequence[Any], *, budget: int | None = None) -> Ranking:
        """Orders images or clips of one prompt, as the judge does.

        The comparisons of a judge that thinks are batched with others'. Any other judge with a `rank` of its own may go
        by more than its verdicts say, and ranks alone.
        """
        if not isinstance(self.judge, RankingJudge) or getattr(self.judge, "think", None) is True:
            return rank_by(self, prompt, to_visuals(images), budget=budget)
        with self._judging:
            start = time.monotonic()
            ranking = self.judge.rank(prompt, images, budget=budget)
        if self.observe is not None:
            self.observe(ranking.comparisons, time.monotonic() - start, [])
        return ranking

    def _leave(self, call: _Call) -> None:
        """The longest-waiting of the others leads from now on, where `call` did."""
        with self._lock:
            if call in self._queue:  # an interrupt
                self._queue.remove(call)
            if not call.leads:
                return
            self._led = bool(self._queue)
            if self._queue:
                self._queue[0].leads = True
                self._queue[0].turn.set()

    def _work(self) -> None:
        """One batch of those who have waited longest."""
        with self._lock:
            end = self._queue[0].came + LONGEST_WAIT * self.wait
            while sum(map(len, self._queue)) < self.limit:
                left = min(self._queue[-1].came + self.wait, end) - time.monotonic()
                if left <= 0:
                    break
                self._more.wait(left)
            calls = self._take()
        try:
            self._judge(calls)
        except BaseException:  # an interrupt of this thread, which the others have no part in
            with self._lock:
                self._queue.extendleft(call for call in reversed(calls) if not call.done)
            raise

    def _take(self) -> list[_Call]:
        """Who is due, without those who no longer want it; with the lock held."""
        calls: list[_Call] = []
        room = self.limit
        while self._queue:
            call = self._queue[0]
            if calls and (len(call) > room or call.think != calls[0].think):
                break
            self._queue.popleft()
            try:
                if call.check is not None:
                    call.check()
            except Unwanted as error:
                call.end(error=error)
            else:
                calls.append(call)
                room -= len(call)
        return calls

    def _judge(self, calls: Sequence[_Call]) -> None:
        """Ends these calls."""
        if not calls:
            return
        prompts = [prompt for call in calls for prompt in call.prompts]
        firsts = [first for call in calls for first in call.firsts]
        seconds = [second for call in calls for second in call.seconds]
        with self._judging:
            start, verdicts = time.monotonic(), None
            try:
                verdicts = self.judge.compare_many(prompts, firsts, seconds, think=calls[0].think)
                if (count := len(verdicts)) != len(prompts):
                    verdicts = None
                    raise JudgeError(f"the judge gave {count} verdicts on {len(prompts)} pairs")
            except Exception as error:
                if len(calls) == 1:
                    calls[0].end(error=error)
            finally:
                if self.observe is not None:
                    self.observe(len(prompts), time.monotonic() - start, verdicts)
        if verdicts is not None:
            given = iter(verdicts)
            for call in calls:
                call.end([next(given) for _ in range(len(call))])
        elif len(calls) > 1:
            half = len(calls) // 2
            self._judge(calls[:half])
            self._judge(calls[half:])


_MADE: weakref.WeakSet[BatchingJudge] = weakref.WeakSet()


def _after_fork() -> None:
    for judge in _MADE:
        judge.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
