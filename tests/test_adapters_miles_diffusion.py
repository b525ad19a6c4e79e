"""miles_diffusion: every layout of an output, groups that come in parts, and no reward for a bad one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import edits
import numpy as np
import pytest
import torch
from adapter_hosts import BETTER, ERRORS, REDS, REFERENCE, broken, generated, miles_host, order, serving

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.miles_diffusion import listener_rm
from listener_reward.reward import ListenerReward


@pytest.mark.parametrize(
    "layout, scale, frames",
    [("CTHW", 1, 1), ("CTHW", 255, 1), ("CHW", 1, 1), ("THWC", 1, 5), ("1THWC", 1, 5), ("CTHW", 1, 5), ("TCHW", 1, 5)],
)
def test_miles_diffusion_layouts(FakeJudge, layout, scale, frames):
    rm = listener_rm(FakeJudge(), reference=REFERENCE)
    rewards = miles_host(rm, [[generated(red, layout, scale, frames) for red in REDS]])
    assert order(rewards) == BETTER and all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize("group_size", [None, 3])
def test_miles_diffusion_edits(group_size):
    def edited(image, source, prompt=edits.INSTRUCTION):
        output = torch.tensor(np.asarray(image)).permute(2, 0, 1)[:, None]
        return SimpleNamespace(prompt=prompt, generated_output=output, reward=None, metadata={"sources": source})

    rm = listener_rm(edits.EditJudge(), scheme="group", group_size=group_size, edits=True)
    images = (edits.HALF, edits.GOOD, edits.WRONG)
    assert order(miles_host(rm, [[edited(image, edits.DARK) for image in images]])) == [1, 0, 2]
    both = [edited(image, edits.BRIGHT) for image in (edits.GOOD, edits.BRIGHT_GOOD, edits.HALF)]
    assert order(miles_host(rm, [both])) == [1, 0, 2]
    with pytest.raises(InputError, match="has no source image, and this reward is for edits"):
        miles_host(rm, [[edited(image, None) for image in images]])


def test_miles_diffusion_microgroups_wait_for_their_group(FakeJudge):
    judge = FakeJudge()
    rm = listener_rm(judge, group_size=4)
    rewards = miles_host(rm, [[generated(red)] for red in REDS[:2]] + [[generated(red) for red in REDS[2:]]])
    assert order(rewards) == BETTER and [len(call) for call in judge.calls] == [6]


def test_miles_diffusion_waits_without_the_threads_of_the_host(FakeJudge):
    rm = listener_rm(FakeJudge(), group_size=64, timeout=20)
    rewards = miles_host(rm, [[generated(red)] for red in range(10, 74)])
    assert rewards[63] > rewards[0]


def test_miles_diffusion_groups_of_one_prompt_are_told_apart_by_their_index(FakeJudge):
    judge = FakeJudge()
    samples = [generated(red) for red in (11, 12, 13, 14)]
    for index, one in enumerate(samples):
        one.group_index = index % 2
    miles_host(listener_rm(judge, group_size=2, timeout=5), [[one] for one in samples])
    assert sorted(sorted(pair[1:]) for call in judge.calls for pair in call) == [[11, 13], [12, 14]]


def test_miles_diffusion_takes_whole_groups_of_the_hosts_group_rm_and_no_parts(FakeJudge):
    rm = listener_rm(FakeJudge(), scheme="group")
    rewards = miles_host(rm, [[generated(red) for red in REDS]], n_samples_per_prompt=4)
    assert order(rewards) == BETTER and sum(rewards) == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="--group-rm"):
        miles_host(rm, [[generated(red) for red in REDS[:2]]], n_samples_per_prompt=4)


def test_miles_diffusion_by_url_takes_the_scheme_and_refuses_what_is_the_servers(FakeJudge):
    group = [[generated(red) for red in REDS]]
    with serving(ListenerReward(FakeJudge(), scheme="group")) as url:
        assert order(miles_host(listener_rm(url, scheme="group"), group, n_samples_per_prompt=4)) == BETTER
        assert order(miles_host(listener_rm(url, group_size=4), [[one] for one in group[0]])) == BETTER
        with pytest.raises(InputError, match="--group-rm"):
            miles_host(listener_rm(url, scheme="group"), [group[0][:2]], n_samples_per_prompt=4)
        with pytest.raises(InputError, match="answers by 'group'"):
            miles_host(listener_rm(url), group)
        for option in ("device", "reference", "on_failure", "thoughts", "grup_size"):
            with pytest.raises(InputError, match=f"{option}: no option for a URL, which takes scheme, timeout"):
                options: dict[str, Any] = {option: "x"}
                listener_rm(url, **options)


def test_miles_diffusion_image_that_cannot_be_read_keeps_no_neighbour_from_its_group(FakeJudge):
    bad = SimpleNamespace(prompt="a", generated_output=None, reward=None)
    collected = FakeJudge()
    with pytest.raises(InputError):
        miles_host(listener_rm(collected, group_size=3, timeout=20), [[bad, generated(3)], [generated(9)]])
    assert [sorted(pair[1:]) for call in collected.calls for pair in call] == [[3, 9]]


BAD_OUTPUTS: dict[str, Any] = {
    "not generated": None,
    "an array": np.zeros((3, 1, 4, 4)),
    "NaN pixels": torch.full((3, 1, 4, 4), float("nan")),
    "negative pixels": torch.full((3, 1, 4, 4), -1.0),
    "more than 255": torch.full((3, 1, 4, 4), 70000.0),
    "rank 2 latents": torch.linspace(-1, 2, 8)[None],
    "a batch": torch.zeros(2, 5, 4, 4, 3),
    "sixteen channels": torch.zeros(16, 5, 6, 6),
    "no pixels": torch.zeros(3, 1, 0, 0),
    "integers": torch.zeros(3, 1, 4, 4, dtype=torch.int64),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_miles_diffusion_stops_on_bad_output(FakeJudge, name):
    bad = SimpleNamespace(prompt="a", generated_output=BAD_OUTPUTS[name], reward=None)
    with pytest.raises(ERRORS):
        miles_host(listener_rm(FakeJudge()), [[generated(3), bad]])
    assert bad.reward is None


@pytest.mark.parametrize("prompt", ["", "  ", None, 5])
def test_miles_diffusion_stops_on_a_bad_prompt(FakeJudge, prompt):
    with pytest.raises(InputError):
        miles_host(listener_rm(FakeJudge()), [[generated(3), generated(4, prompt=prompt)]])


@pytest.mark.parametrize("group_size", [None, 4])
def test_miles_diffusion_stops_where_the_judge_breaks(FakeJudge, group_size):
    for policy in ("raise", "nan"):
        rm = listener_rm(broken(FakeJudge), group_size=group_size, on_failure=policy)
        with pytest.raises(JudgeError):
            miles_host(rm, [[generated(red) for red in REDS]])
