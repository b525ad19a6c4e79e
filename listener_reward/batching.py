"""`BatchingJudge`: callers that come at once are judged together.

Trainers' threads, a server's requests and several rewards each bring a pair or two. One by one, each pays for a call of
the models, and they wait for one another. Together they are one batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from listener_reward.errors import InputError, JudgeError, UnreachableError
from listener_reward.forks import renew
from listener_reward.media.storyboards import to_visuals
from listener_reward.pairs import PromptLike, check_questions
from listener_reward.ranking import Ranking, RankingJudge, rank_by
from listener_reward.verdict import PairJudge, Verdict

LONGEST_WAIT = 20
"""A batch is gathered for at most so many times `wait`, while callers come."""

P = ParamSpec("P")
T = TypeVar("T")

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

    prompts: Sequence[PromptLike]
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
    failed stands alone. Memory is what the callers hold while they wait.

    A `ListenerReward` puts one around its judge by itself. Several rewards that share a judge need one of these between
    them: `judge = BatchingJudge(Judge.from_pretrained("tiny"))`.
    """

    def __init__(
        self,
        judge: PairJudge,
        *,
        limit: int = 64,
        wait: float = 0.01,
        at_once: int = 1,
        own_thread: bool = True,
        observe: Observer | None = None,
    ):
        """
        Args:
            judge: who judges.
            limit: pairs of one call of the judge, unless a caller has more. It bounds how long the first of them waits.
            wait: a batch begins when nobody has come for so many seconds, or when the one who has waited longest has
                waited `LONGEST_WAIT` times as many. A lone caller loses no more than this. 0 gathers only those who
                come while the judge is busy.
            at_once: how many batches the judge takes at once: 1 for models on one device, and as many as there are
                replicas for a judge that hands its pairs to some. Who waits is shared out among the free ones.
            own_thread: whether the judge is called from a thread of its own, or from whichever caller works for all.
                With hundreds of callers, each would get what torch and the allocator keep for a thread that computes.
            observe: told of each call of the judge.

        Raises:
            InputError: a limit or `at_once` below 1, a negative wait, or a judge that batches already.
        """
        if isinstance(judge, BatchingJudge):
            raise InputError("judge is a BatchingJudge already; give it as it is")
        if limit < 1 or wait < 0 or at_once < 1:
            raise InputError(
                f"limit is {limit}, wait {wait} and at_once {at_once}; give 1 pair or more, 0 seconds or more, and 1 "
                "batch or more"
            )
        self.judge, self.name = judge, judge.name
        self.limit, self.wait, self.at_once, self.own_thread, self.observe = limit, wait, at_once, own_thread, observe
        self._stopped = False
        self._begin()
        renew(self)

    def _begin(self) -> None:
        self._queue: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._leaders = 0
        self._free = threading.Semaphore(self.at_once)
        self._busy = 0
        # Its threads end with it: they hold no reference to the judge while there is nothing to do.
        self._threads = ThreadPoolExecutor(self.at_once, "listener-reward-judge") if self.own_thread else None

    def after_fork(self) -> None:
        """For the child of a fork: the threads that wait and judge were not copied."""
        self._stopped |= self._busy > 0
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"limit": self.limit, "wait": self.wait, "at_once": self.at_once, "own_thread": self.own_thread}
        return partial(type(self), self.judge, **options), ()

    @property
    def identity(self) -> str:
        """The judge's own; see `anchors.identity_of`."""
        return getattr(self.judge, "identity", None) or self.name

    @property
    def waiting(self) -> int:
        """Pairs that came and were not handed to the judge yet."""
        with self._lock:
            return sum(map(len, self._queue))

    def compare_many(
        self, prompts: Sequence[PromptLike], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
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
            if self._leaders < self.at_once:
                self._leaders, call.leads = self._leaders + 1, True
            self._more.notify_all()
        try:
            while not call.done:
                if call.leads:
                    self._work(call)
                else:
                    call.turn.wait()
            if call.verdicts is None:
                raise call.error or AssertionError("it is done")
            return call.verdicts
        finally:
            # An error must not be found in what its own traceback holds: that would keep the pictures alive.
            call.error = None
            with self._lock:
                if call in self._queue:  # an interrupt
                    self._queue.remove(call)
                self._resign(call)

    def rank(self, prompt: PromptLike, images: Sequence[Any], *, budget: int | None = None) -> Ranking:
        """Orders images or clips of one prompt, as the judge does.

        The comparisons of a judge that thinks are batched with others'. Any other judge with a `rank` of its own may go
        by more than its verdicts say, and ranks alone.
        """
        if not isinstance(self.judge, RankingJudge) or getattr(self.judge, "think", None) is True:
            return rank_by(self, prompt, to_visuals(images), budget=budget)
        with self._turn():
            start = time.monotonic()
            ranking = self._run(self.judge.rank, prompt, images, budget=budget)
        if self.observe is not None:
            self.observe(ranking.comparisons, time.monotonic() - start, [])
        return ranking

    @contextmanager
    def _turn(self) -> Generator[None]:
        """One of the `at_once` places in the judge."""
        with self._free:
            with self._lock:
                self._busy += 1
            try:
                yield
            finally:
                with self._lock:
                    self._busy -= 1

    def _run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        if self._threads is None:
            return function(*arguments, **options)
        return self._threads.submit(function, *arguments, **options).result()

    def _resign(self, call: _Call) -> None:
        """The longest-waiting of those who do not lead yet leads in the place of `call`; with the lock held."""
        if not call.leads:
            return
        call.leads = False
        successor = next((one for one in self._queue if not one.leads), None)
        if successor is None:
            self._leaders -= 1
        else:
            successor.leads = True
            successor.turn.set()

    def _work(self, leader: _Call) -> None:
        """One batch of those who have waited longest."""
        with self._lock:
            end = leader.came + LONGEST_WAIT * self.wait
            while leader in self._queue and sum(map(len, self._queue)) < self.limit:
                left = min(self._queue[-1].came + self.wait, end) - time.monotonic()
                if left <= 0:
                    break
                self._more.wait(left)
            if leader not in self._queue:  # another leader took it along
                leader.turn.clear()
                return self._resign(leader)
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
        room = min(self.limit, -(-sum(map(len, self._queue)) // max(self.at_once - self._busy, 1)))
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
        with self._turn():
            start, verdicts = time.monotonic(), None
            try:
                verdicts = self._run(self.judge.compare_many, prompts, firsts, seconds, think=calls[0].think)
                if (count := len(verdicts)) != len(prompts):
                    verdicts = None
                    raise JudgeError(f"the judge gave {count} verdicts on {len(prompts)} pairs")
            except Exception as error:
                if len(calls) == 1 or isinstance(error, UnreachableError):
                    for call in calls:
                        call.end(error=error)
                    calls = []
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
