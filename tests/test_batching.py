"""BatchingJudge: who is judged with whom, in which order, and what a failure, an interrupt or a fork costs others."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from listener_reward.batching import BatchingJudge, Unwanted, while_wanted
from listener_reward.errors import InputError, JudgeError, UnreachableError
from listener_reward.judge import Judge
from listener_reward.media.images import Picture
from listener_reward.media.storyboards import to_visuals
from listener_reward.ranking import rank_by
from listener_reward.reward import ListenerReward


@pytest.fixture(params=[False, True], ids=["in a caller's thread", "in its own thread"], autouse=True)
def own_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test runs in both ways."""
    keywords: dict[str, Any] = {**(BatchingJudge.__init__.__kwdefaults__ or {}), "own_thread": request.param}
    monkeypatch.setattr(BatchingJudge.__init__, "__kwdefaults__", keywords)
    return request.param


class Held:
    """Holds a judge's first call until `go`, so that others queue behind it in a known order."""

    def __init__(self, judge: Any, **options: Any):
        self.judge, self.began, self.go = judge, threading.Event(), threading.Event()
        inner = judge.compare_many

        def compare_many(*args: Any, **named: Any) -> Any:
            self.began.set()
            assert self.go.wait(30)
            return inner(*args, **named)

        judge.compare_many = compare_many
        self.batching = BatchingJudge(judge, wait=0, **options)
        self.pool = ThreadPoolExecutor(64)

    def come(self, *args: Any, **named: Any) -> Any:
        """A caller who is in the queue, or in the judge, when this returns."""
        first = not self.began.is_set()
        before = self.batching.waiting
        done = self.pool.submit(self.batching.compare_many, *args, **named)
        if first:
            assert self.began.wait(30)
        while not first and self.batching.waiting == before and not done.done():
            time.sleep(0.001)
        return done


def pair(shade: Any, red: int, prompt: str = "a") -> tuple[list[str], list[Any], list[Any]]:
    return [prompt], [shade(red)], [shade(0)]


def test_callers_that_come_while_the_judge_is_busy_are_judged_together_in_order(FakeJudge, shade):
    judge = FakeJudge()
    held = Held(judge, limit=4)
    calls = [held.come(*pair(shade, red)) for red in range(1, 11)]
    calls.append(held.come(["a"] * 6, [shade(red) for red in range(11, 17)], [shade(0)] * 6))
    held.go.set()
    reds = [[verdict.p_first for verdict in call.result(30)] for call in calls]
    assert [[first for _, first, _ in call] for call in judge.calls] == [
        [1], [2, 3, 4, 5], [6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16],
    ]  # fmt: skip
    assert [p for one in reds for p in one] == sorted(p for one in reds for p in one) and len(reds[-1]) == 6


def test_a_lone_caller_waits_no_longer_than_it_was_told(FakeJudge, shade):
    judge = FakeJudge()
    start = time.monotonic()
    BatchingJudge(judge, wait=0.2).compare_many(*pair(shade, 9))
    assert 0.2 <= time.monotonic() - start < 1
    start = time.monotonic()
    BatchingJudge(judge, wait=30, limit=1).compare_many(*pair(shade, 9))  # a full batch does not wait
    assert time.monotonic() - start < 5


def test_callers_that_come_within_the_wait_are_judged_together(FakeJudge, shade):
    judge = FakeJudge()
    batching = BatchingJudge(judge, wait=30, limit=8)
    with ThreadPoolExecutor(8) as pool:
        verdicts = [*pool.map(lambda red: batching.compare_many(*pair(shade, red)), range(8))]
    assert len(judge.calls) == 1 and [one[0].p_first for one in verdicts] == sorted(one[0].p_first for one in verdicts)


def test_a_failed_pair_fails_alone(FakeJudge, shade):
    judge = FakeJudge(breaks_on=lambda prompt, first, second: first == 7)
    held = Held(judge)
    calls = [held.come(*pair(shade, red)) for red in range(1, 17)]
    held.go.set()
    for red, call in enumerate(calls, 1):
        if red == 7:
            with pytest.raises(JudgeError, match="broke on 'a'"):
                call.result(30)
        else:
            assert call.result(30)[0].p_first > 0.5
    assert [1] in [[first for _, first, _ in call] for call in judge.calls]


def test_a_server_that_has_gone_is_not_asked_for_every_caller(FakeJudge, shade):
    class Gone(FakeJudge):
        asked = 0

        def compare_many(self, *args, **options):
            self.asked += 1
            raise UnreachableError("no response in 6 tries")

    judge = Gone()
    held = Held(judge)
    calls = [held.come(*pair(shade, red)) for red in range(1, 6)]
    held.go.set()
    for call in calls:
        with pytest.raises(UnreachableError):
            call.result(30)
    assert judge.asked == 2  # the first caller's, and all who came in the meantime


def test_too_few_verdicts_and_bad_input_are_their_callers_fault(FakeJudge, shade):
    class Forgetful(FakeJudge):
        def compare_many(self, prompts, *args, **options):
            if "x" in prompts:
                raise InputError("x is no prompt")
            return super().compare_many(prompts, *args, **options)[: None if "b" not in prompts else -1]

    held = Held(Forgetful())
    fine, short, bad, also = (held.come(*pair(shade, 9, prompt)) for prompt in "abxa")
    held.go.set()
    assert len(fine.result(30)) == len(also.result(30)) == 1
    with pytest.raises(JudgeError, match="0 verdicts on 1 pairs"):
        short.result(30)
    with pytest.raises(InputError, match="x is no prompt"):
        bad.result(30)
    with pytest.raises(InputError, match="lengths 2, 1 and 1"):
        held.batching.compare_many(["a", "b"], [shade(1)], [shade(2)])
    assert held.batching.compare_many([], [], []) == []


def test_thinking_and_not_thinking_are_not_mixed(FakeJudge, shade):
    judge = FakeJudge()
    held = Held(judge)
    calls = [held.come(*pair(shade, 9), think=think) for think in (None, True, True, False, True)]
    held.go.set()
    for call in calls:
        call.result(30)
    assert judge.think == [None, True, False, True] and [*map(len, judge.calls)] == [1, 2, 1, 1]


def test_a_judge_of_several_replicas_gets_several_batches_at_once(FakeJudge, shade):
    """Three places, which wait for one another: nobody could pass if batches came one by one."""
    together = threading.Barrier(3, timeout=20)
    sizes: list[int] = []

    class Replicas:
        name = "replicas"

        def compare_many(self, prompts, firsts, seconds, *, think=None):
            sizes.append(len(prompts))
            if len(sizes) <= 3:
                together.wait()
            return FakeJudge().compare_many(prompts, firsts, seconds, think=think)

    batching = BatchingJudge(Replicas(), wait=0.05, at_once=3)
    with ThreadPoolExecutor(60) as pool:
        verdicts = [*pool.map(lambda red: batching.compare_many(*pair(shade, red))[0].p_first, range(60))]
    assert verdicts == sorted(verdicts) and sum(sizes) == 60
    assert len(sizes) < 30
    assert (batching._leaders, batching._busy, batching.waiting) == (0, 0, 0)


def test_what_is_no_longer_wanted_is_not_begun(FakeJudge, shade):
    judge = FakeJudge()
    held = Held(judge)
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise Unwanted

    def asks(red: int) -> Any:
        with while_wanted(check):
            return held.batching.compare_many(*pair(shade, red))

    first = held.pool.submit(asks, 1)
    assert held.began.wait(30)
    second = held.pool.submit(asks, 2)
    while held.batching.waiting < 1:
        time.sleep(0.001)
    third = held.come(*pair(shade, 3))
    gone.set()
    held.go.set()
    assert first.result(30) and third.result(30), "what was begun is ended"
    with pytest.raises(Unwanted):
        second.result(30)
    assert [[red for _, red, _ in call] for call in judge.calls] == [[1], [3]]


def test_an_interrupt_of_one_caller_costs_the_others_nothing(FakeJudge, shade):
    """Ctrl-C reaches the thread that works for all."""
    interrupted: list[int] = []

    class Interrupted(FakeJudge):
        def compare_many(self, prompts, *args, **options):
            if len(prompts) > 1 and not interrupted:
                interrupted.append(len(prompts))
                raise KeyboardInterrupt
            return super().compare_many(prompts, *args, **options)

    judge = Interrupted()
    held = Held(judge)
    calls = [held.come(*pair(shade, red)) for red in range(1, 6)]
    held.go.set()
    calls[0].result(30)
    with pytest.raises(KeyboardInterrupt):
        calls[1].result(30)
    assert [len(call.result(30)) for call in calls[2:]] == [1, 1, 1] and interrupted == [4]
    assert len(held.batching.compare_many(*pair(shade, 9))) == 1


def test_what_a_failed_call_held_is_freed_without_a_garbage_collection(FakeJudge):
    def fails() -> None:
        image = Image.new("RGB", (4, 4))
        refs.append(weakref.ref(image))
        with pytest.raises(JudgeError):
            batching.compare_many(["a"], [Picture(image, b"1")], [Picture(image, b"2")])

    refs: list[weakref.ref[Any]] = []
    batching = BatchingJudge(FakeJudge(breaks_on=lambda *_: True), wait=0)
    gc.collect()
    gc.disable()
    try:
        fails()
        assert refs[0]() is None
    finally:
        gc.enable()


def test_rewards_share_a_judge_and_every_scheme_is_batched(FakeJudge, shade):
    judge = FakeJudge(slope=3.0, delay=0.02)
    shared = BatchingJudge(judge)
    group = ListenerReward(shared, scheme="group")
    alone = ListenerReward(shared, scheme="reference", reference={"b": shade(0)})
    with ThreadPoolExecutor(32) as pool:
        groups = [pool.submit(group, [shade(red), shade(red + 85)], ["a", "a"]) for red in range(16)]
        lone = [pool.submit(alone, [shade(red)], ["b"]) for red in range(16)]
    expected = ListenerReward(FakeJudge(slope=3.0), scheme="group")([shade(0), shade(85)], ["a", "a"])[0]
    assert all(one.result()[0] == pytest.approx(expected, abs=1e-6) for one in groups)
    assert [one.result()[0].item() for one in lone] == pytest.approx([3 * red / 255 for red in range(16)], abs=1e-4)
    assert sum(map(len, judge.calls)) == 32 and len(judge.calls) < 16


def test_one_of_many_callers_opens_a_prompt_and_all_are_held_against_its_image(FakeJudge, shade):
    judge = FakeJudge(slope=3.0, delay=0.01)
    reward = ListenerReward(judge, scheme="reference")
    with ThreadPoolExecutor(16) as pool:
        scores = [*pool.map(lambda red: reward([shade(red), shade(red)], ["a", "a"])[0], range(10, 26))]
    first = next(red for red, (score, _) in enumerate(scores, 10) if score == 0)
    assert [one[1] for one in scores] == pytest.approx([3 * (red - first) / 255 for red in range(10, 26)], abs=1e-4)
    assert len(reward.state_dict()["references"]) == 1


class Compares:
    """A judge that has no `rank` of its own."""

    name = "compares"

    def __init__(self, judge: Any):
        self.compare_many = judge.compare_many


def test_ranks_as_the_judge_does(FakeJudge, shade):
    images = [shade(red) for red in (10, 200, 90)]
    judge = FakeJudge()
    assert BatchingJudge(judge).rank("a", images) == judge.rank("a", images)
    plain = Compares(judge)
    assert BatchingJudge(plain).rank("a", images) == rank_by(plain, "a", to_visuals(images))
    assert BatchingJudge(plain).rank("a", images).order == [1, 2, 0]


@pytest.mark.parametrize("think", [False, True])
def test_ranks_as_a_real_judge_does(random_judge, shade, think):
    judge = Judge.from_pretrained(random_judge, think=think, max_new_tokens=4)
    images = [shade(red, 32) for red in (10, 200, 90)]
    assert BatchingJudge(judge).rank("a", images) == judge.rank("a", images)


def test_the_judge_is_called_from_one_thread_which_ends_with_it(FakeJudge, shade):
    seen: set[threading.Thread] = set()

    class Watched(FakeJudge):
        def compare_many(self, *args, **options):
            seen.add(threading.current_thread())
            return super().compare_many(*args, **options)

    def judges() -> tuple[Any, Any]:
        batching = BatchingJudge(Watched(), wait=0, own_thread=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda red: batching.compare_many(*pair(shade, red)), range(16)))
        return weakref.ref(batching), weakref.ref(batching.judge)

    refs = judges()
    (thread,) = seen
    end = time.monotonic() + 20
    while thread.is_alive():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [ref() for ref in refs] == [None, None]


def test_observes_each_call_of_the_judge(FakeJudge, shade):
    seen: list[Any] = []
    judge = FakeJudge(breaks_on=lambda prompt, *_: prompt == "b")
    batching = BatchingJudge(judge, wait=0, observe=lambda *what: seen.append(what))
    batching.compare_many(*pair(shade, 9))
    with pytest.raises(JudgeError):
        batching.compare_many(*pair(shade, 9, "b"))
    batching.rank("a", [shade(1), shade(2)])
    assert [(pairs, None if verdicts is None else len(verdicts)) for pairs, _, verdicts in seen] == [
        (1, 1), (1, None), (1, 0),
    ]  # fmt: skip
    assert all(0 <= seconds < 5 for _, seconds, _ in seen)


@pytest.mark.parametrize("options", [{"limit": 0}, {"wait": -1}, {"at_once": 0}])
def test_options_that_make_no_sense(FakeJudge, options):
    with pytest.raises(InputError, match=r"limit is .*, wait .* and at_once"):
        BatchingJudge(FakeJudge(), **options)
    with pytest.raises(InputError, match="BatchingJudge already"):
        BatchingJudge(BatchingJudge(FakeJudge()))


class Nobody:
    name = "nobody"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        raise AssertionError


def test_pickles_with_its_judge():
    copy = pickle.loads(pickle.dumps(BatchingJudge(Nobody(), limit=3, wait=1)))
    assert (copy.judge.name, copy.name, copy.limit, copy.wait) == ("nobody", "nobody", 3, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_it_judges_is_said_in_the_child(FakeJudge, shade):
    held = Held(FakeJudge())
    call = held.come(*pair(shade, 9))
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # which ends a child that hangs
        try:
            held.batching.compare_many(*pair(shade, 9))
        except JudgeError as error:
            os._exit(2 if "forked while another thread scored" in str(error) else 3)
        finally:
            os._exit(4)
    status = os.waitpid(pid, 0)[1]
    held.go.set()
    assert os.waitstatus_to_exitcode(status) == 2 and len(call.result(30)) == 1
