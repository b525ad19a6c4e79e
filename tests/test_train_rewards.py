"""The three rewards as trl calls them. A thought is the number that the listener will say: `p_first`, or nan."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from PIL import Image

from listener_reward.chat import ChatFormat
from listener_reward.errors import JudgeError, UnreachableError
from listener_reward.listener import Listener
from listener_reward.train.rewards import ShapedReward, text_of

FORMAT = ChatFormat()


class ParrotVLM:
    """Believes whatever number the thought holds, and `silent` without a thought."""

    reserved: frozenset[str] = frozenset()
    silent: float = 0.5

    def __init__(self) -> None:
        self.readings: list[list[float]] = []

    def generate(self, *_: Any, **__: Any) -> list[str]:
        raise AssertionError("a listener does not speak")

    def read(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("no weight is put on how likely the thought was")

    def label_logprobs(self, chats: Any, prefixes: Any, labels: Any) -> torch.Tensor:
        said = [float((re.findall(r"nan|[0-9.]+", prefix) or [self.silent])[0]) for prefix in prefixes]
        self.readings.append(said)
        return torch.tensor([[p, 1 - p] for p in said]).log()


def says(p: float | str, answer: int) -> str:
    return f"<think>{p}</think><answer>{answer}</answer>"


class Batch:
    """A batch of completions as trl hands it to reward functions, and what they logged."""

    def __init__(self, *rows: tuple[str, float]):
        self.completions = [[{"role": "assistant", "content": text}] for text, _ in rows]
        self.columns = {
            "p_first": [p_first for _, p_first in rows],
            "id": [f"pair-{index}" for index in range(len(rows))],
            "caption": ["two red circles"] * len(rows),
            "images": [[Image.new("RGB", (4, 4))] * 2] * len(rows),
            "prompts": [[]] * len(rows),
            "trainer_state": None,
        }
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.logged: dict[str, list[float]] = defaultdict(list)

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric's values, as trl logs it."""
        return {name: sum(values) / len(values) for name, values in self.logged.items()}

    def through(self, reward: ShapedReward) -> list[tuple[float | None, ...]]:
        """(format, accuracy, listener) of each row."""
        logs = {
            "log_extra": lambda name, values: self.extra[name].extend(values),
            "log_metric": lambda name, value: self.logged[name].append(value),
        }
        parts = [part(completions=self.completions, **self.columns, **logs) for part in reward.functions]
        return list(zip(*parts, strict=True))


@pytest.fixture
def parrot() -> ParrotVLM:
    return ParrotVLM()


@pytest.fixture
def reward(parrot: ParrotVLM) -> ShapedReward:
    return ShapedReward(FORMAT, Listener(parrot, FORMAT))


@pytest.mark.parametrize(
    ("completion", "p_first", "expected"),
    [
        (says(0.8, 1), 1.0, (1, 1, 0.8)),  # right, and 0.8 of the listener is with people
        (says(0.8, 2), 1.0, (1, 0, 0.8)),  # wrong, though the thought convinces of the right image
        (says(0.8, 1), 0.0, (1, 0, 0.2)),  # wrong, and convincing
        (says(0.25, 2), 0.4, (1, 0.6, 0.85)),  # votes: 60 % agree; 1 - |0.25 - 0.4|
        (says(0.5, 1), 0.5, (1, 0.5, 1)),  # a tie: every answer is half right, and so should the listener feel
        ("0.8 <answer>1</answer>", 1.0, (0, 0, 0)),
        (says(0.8, 3), 1.0, (0, 0, 0)),
        (says(0.8, 1) + " and more", 1.0, (0, 0, 0)),
        (says(0.8, 1) * 2, 1.0, (0, 0, 0)),
        ("", 1.0, (0, 0, 0)),
    ],
)
def test_parts_by_hand(reward: ShapedReward, completion: str, p_first: float, expected: tuple[float, ...]):
    (row,) = Batch((completion, p_first)).through(reward)
    assert row == pytest.approx(expected)


def test_trl_logs_the_parts_by_name(reward: ShapedReward):
    assert [part.__name__ for part in reward.functions] == ["format", "accuracy", "listener"]


def test_the_listener_reads_a_batch_once_and_malformed_rows_never(reward: ShapedReward, parrot: ParrotVLM):
    Batch((says(0.8, 1), 1.0), ("no tags 0.1", 1.0), (says(0.3, 2), 0.0)).through(reward)
    assert parrot.readings == [[0.8, 0.3]]


def test_an_equal_batch_is_another_batch(reward: ShapedReward, parrot: ParrotVLM):
    for _ in range(2):
        Batch((says(0.8, 1), 1.0)).through(reward)
    assert parrot.readings == [[0.8], [0.8]]


def test_a_wholly_malformed_batch_needs_no_listener(reward: ShapedReward, parrot: ParrotVLM):
    batch = Batch(("", 1.0), ("1", 0.0))
    assert batch.through(reward) == [(0, 0, 0)] * 2
    assert parrot.readings == []
    assert batch.metrics == {"malformed_rate": 1, "listener_failures": 0}


# --- what is logged


def test_metrics_by_hand(reward: ShapedReward):
    batch = Batch(
        (says(0.8, 1), 1.0),  # right, with the listener
        (says(0.3, 1), 1.0),  # right, contradicted
        (says(0.9, 2), 0.75),  # a quarter right, contradicted
        ("malformed", 1.0),
    )
    batch.through(reward)
    assert batch.metrics == pytest.approx(
        {
            "malformed_rate": 1 / 4,
            "accuracy": (1 + 1 + 0.25) / 3,
            "contradiction_rate": 2 / 3,
            "listener_confidence": (0.8 + 0.3 + 0.85) / 3,
            "listener_failures": 0,
        }
    )


def test_completions_are_logged_with_their_pairs(reward: ShapedReward):
    batch = Batch((says(0.5, 1), 1.0), ("malformed", 0.5))
    batch.through(reward)
    assert batch.extra == {"id": ["pair-0", "pair-1"], "p_first": [1.0, 0.5], "listener_p_first": [0.5, None]}


def test_rewards_need_no_log(reward: ShapedReward):
    batch = Batch((says(0.8, 1), 1.0))
    part = reward.functions[0]
    assert part(completions=batch.completions, **batch.columns) == [1]


# --- without a listener, and with a broken one


def test_without_a_listener_its_part_is_zero_and_nothing_is_said_of_it():
    batch = Batch((says(0.8, 1), 1.0), (says(0.8, 2), 1.0))
    assert batch.through(ShapedReward(FORMAT, None)) == [(1, 1, 0), (1, 0, 0)]
    assert set(batch.metrics) == {"malformed_rate", "accuracy", "listener_failures"}


def test_a_failed_row_gets_no_reward_of_any_part_and_costs_the_others_nothing(reward: ShapedReward):
    rows = [(says(0.8, 1), 1.0), (says("nan", 1), 1.0), ("malformed", 1.0), (says(0.3, 2), 0.0)]
    batch = Batch(*rows)
    with pytest.warns(UserWarning, match="NaN or infinite probabilities for 1 of 3 inputs.*left out of their groups"):
        parts = batch.through(reward)
    assert parts[1] == (None, None, None)
    assert [parts[0], *parts[2:]] == Batch(rows[0], *rows[2:]).through(reward)
    assert batch.metrics["listener_failures"] == 1
    assert batch.extra["listener_p_first"][1] is None
    assert all(math.isfinite(value) for value in batch.metrics.values())


def test_a_listener_that_returns_nan_instead_of_raising_has_failed_too(parrot: ParrotVLM):
    class Numb(Listener):
        def p_first(self, chats: Any, traces: Any) -> torch.Tensor:
            return torch.tensor([float(trace.thought) for trace in traces])

    batch = Batch((says("nan", 1), 1.0), (says(0.75, 1), 1.0))
    with pytest.warns(UserWarning, match="left out of their groups"):
        assert batch.through(ShapedReward(FORMAT, Numb(parrot, FORMAT))) == [(None, None, None), (1, 1, 0.75)]


def test_a_batch_that_fails_as_a_whole_is_data_too(reward: ShapedReward):
    batch = Batch((says("nan", 1), 1.0), (says("nan", 2), 1.0))
    with pytest.warns(UserWarning, match="2 of 2"):
        assert batch.through(reward) == [(None, None, None)] * 2
    assert batch.metrics == {"malformed_rate": 0, "accuracy": 0.5, "listener_failures": 2}


def test_a_listener_whose_server_has_gone_is_asked_once_a_batch(parrot: ParrotVLM):
    class Served(Listener):
        calls, up = 0, False

        def p_first(self, chats: Any, traces: Any) -> torch.Tensor:
            self.calls += 1
            if not self.up:
                raise UnreachableError("the server gave no response in 6 tries.")
            return super().p_first(chats, traces)

    listener = Served(parrot, FORMAT)
    reward = ShapedReward(FORMAT, listener)
    rows = [(says(0.75, 1), 1.0)] * 3 + [("malformed", 1.0)]
    for calls in (1, 2):
        batch = Batch(*rows)
        with pytest.warns(UserWarning, match="no response in 6 tries. These completions are left out of their groups"):
            assert batch.through(reward) == [(None, None, None)] * 3 + [(0, 0, 0)]
        assert batch.metrics["listener_failures"] == 3 and listener.calls == calls
    listener.up = True
    assert Batch(*rows).through(reward) == [(1, 1, pytest.approx(0.75))] * 3 + [(0, 0, 0)]
    listener.up = False
    with pytest.raises(JudgeError, match="no response"):
        Batch(*rows).through(ShapedReward(FORMAT, listener, on_failure="raise"))


def test_a_failure_can_stop_the_run(parrot: ParrotVLM):
    with pytest.raises(JudgeError, match="the listener gave NaN"):
        Batch((says("nan", 1), 1.0)).through(ShapedReward(FORMAT, Listener(parrot, FORMAT), on_failure="raise"))


# --- beyond the paper


def test_the_view_without_a_thought_is_asked_once_for_each_pair(parrot: ParrotVLM):
    parrot.silent = 0.4
    reward = ShapedReward(FORMAT, Listener(parrot, FORMAT), gain=True)
    assert [part.__name__ for part in reward.functions] == ["format", "accuracy", "listener", "gain"]
    batch = Batch((says("0.9", 1), 1.0), (says("0.3", 1), 1.0), (says("0.9", 2), 1.0), ("no", 1.0))
    batch.columns["images"] = [[Image.new("RGB", (4, 4), color) for color in ("red", "blue")]] * 4
    assert [row[3] for row in batch.through(reward)] == pytest.approx([0.5, 0.0, 0.5, 0.0])
    assert parrot.readings == [[0.9, 0.3, 0.9], [0.4]]


def test_a_second_reading_that_fails_is_a_failure(parrot: ParrotVLM):
    parrot.silent = float("nan")
    reward = ShapedReward(FORMAT, Listener(parrot, FORMAT), gain=True)
    batch = Batch((says("0.9", 1), 1.0))
    with pytest.warns(UserWarning, match="1 of 1 inputs"):
        assert batch.through(reward) == [(None,) * 4]
    assert batch.metrics["listener_failures"] == 1


@pytest.mark.parametrize(
    "completion",
    [
        "a thought",
        [{"role": "assistant", "content": "a thought"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "thought"}]}],
    ],
)
def test_text_of(completion: Any):
    assert text_of(completion) == "a thought"
