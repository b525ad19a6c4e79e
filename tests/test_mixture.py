"""Several rewards as one: names, sums, groups, failures, and the roads by which a mixture reaches a trainer."""

from __future__ import annotations

import functools
import logging
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from adapter_hosts import serving

from listener_reward import ListenerReward, Mixture, RemoteReward
from listener_reward.advantages import group_advantages, normalised_sum
from listener_reward.batching import Unwanted
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.flow_grpo import listener_multi_score

NAN = math.nan


def red(images: Sequence[Any], prompts: Sequence[str], metadata: Any) -> tuple[Any, dict[str, Any]]:
    """The red of shade_image, 0 to 255."""
    return [image.getpixel((0, 0))[0] for image in images], {"even": [1.0] * len(images), "note": "none"}


class PromptLength:
    def __call__(self, images: Any, prompts: Sequence[str], metadata: Any) -> tuple[Any, dict[str, Any]]:
        return np.array([len(prompt) for prompt in prompts]), {}


class Net(torch.nn.Module):
    def forward(self, images: Any, prompts: Sequence[str], metadata: Any) -> tuple[Any, dict[str, Any]]:
        return torch.zeros(len(prompts)), {}


class Says:
    """Gives the same scores in every call; an exception is raised."""

    def __init__(self, *scores: float, scheme: str | None = None, errors: Any = None, raises: Any = None):
        self.scores, self.errors, self.raises, self.seen = scores, errors, raises, []
        if scheme:
            self.scheme = scheme

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        self.seen.append(metadata)
        if self.raises:
            raise self.raises
        return list(self.scores), {} if self.errors is None else {"standard_error": self.errors}


FOUR, PROMPTS = [None] * 4, ["a", "a", "b", "b"]


def listed(values: Any) -> list:
    """As a list, in which NaN equals NaN."""
    return [None if math.isnan(value) else pytest.approx(value, abs=1e-3) for value in values]


# --- names and weights


def test_scores_are_a_weighted_sum_and_every_component_is_in_the_info(shade: Any):
    scores, info = Mixture({red: 0.1, PromptLength(): -2.0})([shade(10), shade(30)], ["a", "abc"])
    assert scores.dtype == np.float32 and scores.tolist() == [1 - 2, 3 - 6]
    assert {name: values.tolist() for name, values in info.items()} == {
        "failed": [0, 0],
        "dropped": [0, 0],
        "red/score": [10, 30],
        "red/missing": [0, 0],
        "red/even": [1, 1],  # "note" is no number for each image
        "prompt_length/score": [1, 3],
        "prompt_length/missing": [0, 0],
    }
    assert all(values.dtype == np.float32 for values in info.values())


def test_components_without_a_name_get_one_that_is_readable_and_unique():
    fake, other = ListenerReward("tiny"), ListenerReward("tiny")
    mixture = Mixture({fake: 1, other: 2, functools.partial(red): 3, (lambda *_: None): 4, "red": (red, 5)})
    assert mixture.weights == {"listener_reward": 1, "listener_reward_2": 2, "red_2": 3, "lambda": 4, "red": 5}
    assert mixture.rewards["listener_reward_2"] is other
    assert repr(Mixture({"clip": (red, 0.5)})) == "Mixture(clip=0.5, combine='sum', on_failure='raise')"


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards is {}"),
        ([red], "give {reward: weight}"),
        ({"red": 1.0}, r"rewards\['red'\] is 1.0; give \(reward, weight\)"),
        ({"red": ("red", 1.0)}, "component 'red' is a str"),
        ({"a/b": (red, 1.0)}, "without '/'"),
        ({red: 0}, "the weight of 'red' is 0"),
        ({red: NAN}, "the weight of 'red' is nan"),
        ({red: True}, "the weight of 'red' is True"),
        ({red: (red, 1.0)}, "the weight of 'red' is"),
    ],
)
def test_what_cannot_be_mixed_is_named(rewards: Any, message: str):
    with pytest.raises(InputError, match=message):
        Mixture(rewards)


@pytest.mark.parametrize("choice", [{"combine": "mean"}, {"on_failure": "zero"}])
def test_an_unknown_choice_is_named(choice: dict[str, Any]):
    with pytest.raises(InputError, match="choose one of"):
        Mixture({red: 1.0}, **choice)


# --- groups


def test_each_component_is_normalised_within_its_group_before_it_is_summed():
    mixture = Mixture({"small": (Says(1, 3, 5, 7), 1.0), "large": (Says(900, 100, 0, 500), 0.5)}, combine="group")
    scores, info = mixture(FOUR, PROMPTS)
    # Each group of two has deviations -1 and 1 in every component, whatever its scale.
    assert listed(scores) == [-1 + 0.5, 1 - 0.5, -1 - 0.5, 1 + 0.5]
    assert info["large/score"].tolist() == [900, 100, 0, 500]


def test_a_component_that_tells_no_images_apart_adds_nothing_to_the_group():
    scores, _ = Mixture({"flat": (Says(2, 2, 2, 2), 5.0), "other": (Says(0, 1, 1, 0), 1.0)}, combine="group")(
        FOUR, PROMPTS
    )
    assert listed(scores) == [-1, 1, 1, -1]


@pytest.mark.parametrize("options", [{"combine": "group"}, {"on_failure": "drop-component"}])
def test_an_image_alone_is_refused_where_groups_are_needed(options: Any):
    for call in (Mixture({Says(1, 2, 3): 1.0}, **options), functools.partial(score, Mixture({red: 1.0}, **options))):
        with pytest.raises(InputError, match=r"one image in this call, such as 'b'.*whole groups"):
            call([None] * 3, ["a", "a", "b"])


@pytest.mark.parametrize(
    ("schemes", "options", "expected"),
    [
        ([None, None], {}, None),
        (["reference", None], {}, "reference"),
        (["reference", "auto"], {}, "auto"),
        (["reference", "auto", "group"], {}, "group"),
        (["reference"], {"combine": "group"}, "group"),
        ([None], {"on_failure": "drop-component"}, "group"),
    ],
)
def test_a_mixture_has_the_scheme_of_its_neediest_part(schemes: list[Any], options: Any, expected: str | None):
    assert Mixture({Says(scheme=scheme): 1.0 for scheme in schemes}, **options).scheme == expected


def test_a_group_scheme_within_a_mixture_needs_company(FakeJudge: Any, shade: Any):
    mixture = Mixture({ListenerReward(FakeJudge(), scheme="group"): 1.0, red: 0.01})
    with pytest.raises(InputError, match="hand over whole groups"):
        score(mixture, [shade(10)], ["a"])


# --- failures


def test_an_image_that_a_component_gave_no_score_has_none():
    scores, info = Mixture({"a": (Says(1, NAN, 3, 4), 1.0), "b": (Says(10, 20, 30, 40), 1.0)})(FOUR, PROMPTS)
    assert listed(scores) == [11, None, 33, 44]
    assert info["failed"].tolist() == [0, 1, 0, 0] == info["a/missing"].tolist()
    assert info["b/missing"].tolist() == [0] * 4 == info["dropped"].tolist()


def test_the_rest_of_a_group_is_normalised_without_the_missing_image():
    prompts = ["a", "a", "a", "b", "b"]
    mixture = Mixture({"a": (Says(1, NAN, 3, 4, NAN), 1.0), "b": (Says(10, 99, 30, 40, 50), 1.0)}, combine="group")
    scores, info = mixture([None] * 5, prompts)
    # Of b's two images one is left, which has nothing to be compared with.
    assert listed(scores) == [-2, None, 2, None, None]
    assert info["failed"].tolist() == [0, 1, 0, 1, 1]


def test_a_component_is_dropped_for_all_images_of_a_group_and_its_weight_goes_to_nobody(
    caplog: pytest.LogCaptureFixture,
):
    parts = {"a": (Says(1, NAN, 3, 4), 1.0), "b": (Says(10, 20, 30, 40), 0.5)}
    mixture = Mixture(parts, on_failure="drop-component")
    mixture(FOUR, PROMPTS)
    scores, info = mixture(FOUR, PROMPTS)
    assert listed(scores) == [5, 10, 3 + 15, 4 + 20]
    assert info["dropped"].tolist() == [1, 1, 0, 0] and info["a/missing"].tolist() == [0, 1, 0, 0]
    assert info["failed"].tolist() == [0] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "component 'a' gave no score to 1 of 4 images; their prompts are scored without it. This is told once: info "
        "counts it from here on, in 'a/missing' and 'dropped'"
    ]
    scores, info = Mixture(parts, on_failure="drop-component", combine="group")(FOUR, PROMPTS)
    assert listed(scores) == [-0.5, 0.5, -1.5, 1.5] and info["dropped"].tolist() == [1, 1, 0, 0]


def test_an_image_that_nobody_could_score_drops_nothing():
    parts = {"a": (Says(1, NAN, 3, 4), 1.0), "b": (Says(10, NAN, 30, 40), 1.0)}
    scores, info = Mixture(parts, on_failure="drop-component")(FOUR, PROMPTS)
    assert listed(scores) == [11, None, 33, 44] and info["dropped"].tolist() == [0] * 4


def test_a_group_without_any_whole_component_has_no_scores():
    parts = {"a": (Says(1, NAN, 3, 4), 1.0), "b": (Says(NAN, 2, 30, 40), 1.0)}
    scores, info = Mixture(parts, on_failure="drop-component")(FOUR, PROMPTS)
    assert listed(scores) == [None, None, 33, 44] and info["failed"].tolist() == [1, 1, 0, 0]


def test_an_exception_goes_on_or_is_a_missing_score_by_the_policy(caplog: pytest.LogCaptureFixture):
    parts = {"a": (Says(raises=RuntimeError("no memory")), 1.0), "b": (Says(1, 2, 3, 4), 2.0)}
    with pytest.raises(RuntimeError, match="no memory"):
        Mixture(parts)(FOUR, PROMPTS)
    assert not caplog.records
    scores, info = Mixture(parts, on_failure="nan")(FOUR, PROMPTS)
    assert listed(scores) == [None] * 4 and info["a/missing"].tolist() == [1] * 4 == info["failed"].tolist()
    scores, info = Mixture(parts, on_failure="drop-component")(FOUR, PROMPTS)
    assert listed(scores) == [2, 4, 6, 8] and info["dropped"].tolist() == [1] * 4
    assert "component 'a' raised RuntimeError: no memory; these images have no score" in caplog.text


@pytest.mark.parametrize("policy", ["raise", "nan", "drop-component"])
@pytest.mark.parametrize("kind", [InputError, MissingExtraError, Unwanted])
def test_what_is_no_fault_of_the_component_goes_on_under_every_policy(policy: Any, kind: type[Exception]):
    with pytest.raises(kind, match="unreadable"):
        Mixture({Says(raises=kind("unreadable")): 1.0}, on_failure=policy)(FOUR, PROMPTS)


@pytest.mark.parametrize("policy", ["raise", "nan", "drop-component"])
@pytest.mark.parametrize(
    ("answer", "message"), [((1, 2), "'says': the reward gave shape"), ((1, 2, 3, math.inf), "inf")]
)
def test_a_component_that_answers_wrongly_is_an_error_under_every_policy(policy: Any, answer: Any, message: str):
    with pytest.raises(JudgeError, match=message):
        Mixture({Says(*answer): 1.0}, on_failure=policy)(FOUR, PROMPTS)


def test_a_broken_judge_within_a_mixture(FakeJudge: Any, shade: Any):
    judge = FakeJudge(breaks_on=lambda prompt, first, second: 10 in (first, second))
    images, prompts = [shade(10), shade(20), shade(30)], ["a"] * 3
    parts = {"listener": (ListenerReward(judge, on_failure="nan"), 1.0), "red": (red, 1.0)}
    scores, _ = Mixture(parts)(images, prompts)
    assert np.isnan(scores).tolist() == [True, False, False]
    scores, info = Mixture(parts, on_failure="drop-component")(images, prompts)
    assert scores.tolist() == [10, 20, 30] and info["listener/failed"].tolist() == [1, 0, 0]


# --- standard errors


def test_standard_errors_add_by_their_squares_where_every_component_has_one():
    parts = {"a": (Says(1, 2, NAN, 4, errors=[3.0] * 4), 1.0), "b": (Says(1, 2, 3, 4, errors=[2.0] * 4), -2.0)}
    assert listed(Mixture(parts)(FOUR, PROMPTS)[1]["standard_error"]) == [5, 5, None, 5]
    _, info = Mixture(parts, on_failure="drop-component")(FOUR, PROMPTS)
    assert listed(info["standard_error"]) == [5, 5, 4, 4]
    _, info = Mixture(parts | {"c": (Says(1, 2, 3, 4), 1.0)})(FOUR, PROMPTS)
    assert "standard_error" not in info and listed(info["b/standard_error"]) == [2] * 4


# --- what travels, and in which company


def test_it_pickles_by_its_configuration_and_scores_alike(FakeJudge: Any, shade: Any):
    mixture = Mixture({ListenerReward("tiny"): 1.0, red: 0.5, PromptLength(): 1.0}, on_failure="nan")
    mixture._told.add("red")
    copy = pickle.loads(pickle.dumps(mixture))
    assert repr(copy) == repr(mixture) and copy._told == set() and copy.rewards["red"] is red
    assert repr(copy.rewards["listener_reward"]) == repr(mixture.rewards["listener_reward"])
    small = pickle.loads(pickle.dumps(Mixture({red: 0.5, PromptLength(): 1.0})))
    assert small([shade(10)], ["abc"])[0].tolist() == [8]


def test_what_its_components_remember_is_its_state(FakeJudge: Any, shade: Any):
    def make() -> Mixture:
        return Mixture({"listener": (ListenerReward(FakeJudge(), scheme="reference"), 1.0), "net": (Net(), 1.0)})

    first, second = make(), make()
    first([shade(100)], ["a"])
    assert [*first.state_dict()] == ["listener"]
    second.load_state_dict(first.state_dict())
    expected = first([shade(200)], ["a"])[0]
    assert expected[0] > 0 and second([shade(200)], ["a"])[0].tolist() == expected.tolist()
    with pytest.raises(InputError, match="Mixture of listener"):
        second.load_state_dict({"other": {}})
    assert Mixture({red: 1.0}).state_dict() == {}


def test_no_gradient_passes_and_metadata_is_handed_on():
    weight = torch.ones(4, requires_grad=True)
    graphs = []

    def net(images: Any, prompts: Any, metadata: Any) -> Any:
        graphs.append((weight * 2).requires_grad)
        return (weight * 2).to(torch.bfloat16), {}

    other = Says(1, 2, 3, 4)
    scores, _ = Mixture({net: 1.0, other: 1.0})(FOUR, PROMPTS, [{"id": k} for k in range(4)])
    assert scores.tolist() == [3, 4, 5, 6] and graphs == [False]
    Mixture({other: 1.0})(FOUR, PROMPTS)
    assert other.seen == [[{"id": 0}, {"id": 1}, {"id": 2}, {"id": 3}], ({}, {}, {}, {})]


def test_many_threads_may_call_one_mixture(FakeJudge: Any, shade: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    mixture = Mixture({ListenerReward(FakeJudge(delay=0.002)): 1.0, red: 0.1})
    images = [shade(10 * k) for k in range(8)]
    expected, found = mixture(images, ["a"] * 8)[0].tolist(), []
    threads = [threading.Thread(target=lambda: found.append(mixture(images, ["a"] * 8)[0].tolist())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_a_mixture_is_imported_and_called_without_torch():
    source = """
import sys
from listener_reward import Mixture
def one(images, prompts, metadata):
    return [1.0] * len(prompts), {}
assert Mixture({one: 2.0})([None], ["a"])[0].tolist() == [2.0]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True)


# --- adapters and the server


def test_adapters_take_a_mixture_as_it_is_and_log_its_components(FakeJudge: Any, shade: Any):
    mixture = Mixture({"listener": (ListenerReward(FakeJudge(), scheme="reference"), 1.0), "red": (red, 0.1)})
    assert as_reward(mixture, {}, scheme="reference") is mixture
    with pytest.raises(InputError, match="no effect on a reward already made"):
        as_reward(mixture, {"scheme": "group"}, scheme="reference")
    found, _ = listener_multi_score(mixture)([shade(10), shade(20)], ["a", "a"], None)
    assert set(found) == {"failed", "listener/score", "red/score", "listener", "avg"}
    assert found["red/score"].tolist() == [10, 20] and found["avg"] is found["listener"]


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (lambda judge: ListenerReward(judge, on_failure="group-mean"), {}, "'group-mean'.*scatters a group over calls"),
        (lambda judge: red, {"on_failure": "drop-component"}, "'drop-component'.*scatters a group.*on_failure='nan'"),
    ],
)
def test_hosts_that_scatter_groups_refuse_what_needs_them_whole(part: Any, options: Any, message: str, FakeJudge: Any):
    mixture = Mixture({part(FakeJudge()): 1.0}, **options)
    assert as_reward(mixture, {}, scheme="group") is mixture
    with pytest.raises(InputError, match=message):
        as_reward(mixture, {}, scheme="reference")


def test_a_host_that_names_a_device_reaches_the_judge_within(monkeypatch: pytest.MonkeyPatch):
    reward = ListenerReward("tiny")
    as_reward(Mixture({reward: 1.0, red: 1.0}), {}, scheme="group", device="cuda:3")
    assert reward._device == "cuda:3"


def test_a_mixture_is_served_with_its_components_and_its_scheme(shade: Any):
    mixture = Mixture({"red": (red, 1.0), "length": (PromptLength(), 1.0)}, combine="group")
    with serving(mixture) as url:
        scores, info = RemoteReward(url, scheme="group")([shade(10), shade(20)], ["a", "a"])
        assert listed(scores) == [-1, 1] and info["red/score"].tolist() == [10, 20]
        with pytest.raises(InputError, match="answers by 'group'"):
            RemoteReward(url, scheme="reference")([shade(10)], ["a"])
        with pytest.raises(InputError, match="hand over whole groups"):
            RemoteReward(url)([shade(10)], ["a"])
        nested = Mixture({"far": (RemoteReward(url), 1.0)})([shade(10), shade(20)], ["a", "a"])[1]
        assert nested["far/red/score"].tolist() == [10, 20]


# --- advantages by components


def test_the_sum_of_normalised_components_by_hand():
    components = {"a": np.array([1.0, 3.0, NAN, 10.0, 30.0]), "b": np.array([5.0, 5.0, 9.0, NAN, 7.0])}
    groups, scored = np.array([0, 0, 0, 1, 1]), np.array([True, True, False, True, True])
    # The third sample takes no part. Group 1 has no b for its first sample, so b counts for none of the two.
    total, errors = normalised_sum(components, {"a": 1.0, "b": 2.0}, groups, scored)
    assert listed(total) == [-1, 1, None, -1, 1] and errors.tolist() == [0] * 5


def test_a_mixture_by_group_gives_the_advantages_of_the_components():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), 100 * rng.normal(size=12)
    prompts, groups = np.repeat(["p", "q", "r"], 4).tolist(), np.repeat([0, 1, 2], 4)
    scores, _ = Mixture({"a": (Says(*a), 1.0), "b": (Says(*b), 0.3)}, combine="group")([None] * 12, prompts)
    total, _ = normalised_sum({"a": a, "b": b}, {"a": 1.0, "b": 0.3}, groups, np.full(12, True))
    assert group_advantages(scores, groups) == pytest.approx(group_advantages(total, groups), abs=1e-5)
    assert group_advantages(total, groups).std() == pytest.approx(1, abs=1e-3)
