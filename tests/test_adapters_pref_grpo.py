"""Pref-GRPO: groups of files, alone and beside the host's own rewards, and a ValueError for bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edits
import pytest
import torch
from adapter_hosts import BETTER, REDS, broken, order, png, serving

from listener_reward.errors import JudgeError
from listener_reward.integrations.pref_grpo import ListenerDispatcher
from listener_reward.reward import ListenerReward

# ---------------------------------------------------------------------------------------------------------------------
# Pref-GRPO, fastvideo/train_flux.py: sample_reference_model, train_one_step; rewards/dispatcher.py


def pref_grpo_host(dispatcher, images, captions, weights, folder: Path):
    reward_inputs = dispatcher.build_reward_inputs()
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        path = folder / f"flux_0_{index}.png"
        image.save(path)
        for name in reward_inputs:
            reward_inputs[name].append({"path": str(path), "prompt": caption})
    return pref_grpo_advantages(dispatcher, reward_inputs, weights)


def pref_grpo_advantages(dispatcher, reward_inputs, weights, generations=4):
    tensors, dim_reward = dispatcher.compute_rewards(reward_inputs)
    advantages = torch.zeros_like(next(iter(tensors.values())))
    for name, weight in weights.items():
        rewards = tensors[name].to(torch.float32)
        for start in range(0, len(rewards), generations):
            group = rewards[start : start + generations]
            advantages[start : start + generations] += weight * (group - group.mean()) / (group.std() + 1e-8)
    assert all(len(values) == len(advantages) for values in dim_reward.values())
    return advantages


def test_pref_grpo_edits(tmp_path):
    """train_flux1_kontext_edit.py: sample_reference_model, with the branch that the adapter's docstring widens."""
    dispatcher = ListenerDispatcher(edits.EditJudge(), edits=True)
    reward_inputs = dispatcher.build_reward_inputs()
    samples = [(edits.DARK, image) for image in (edits.HALF, edits.GOOD, edits.WRONG, edits.BRIGHT_GOOD)]
    samples += [(edits.BRIGHT, image) for image in (edits.GOOD, edits.BRIGHT_GOOD)]
    paths = tmp_path, tmp_path
    for index, (source, image) in enumerate(samples):
        paths = tmp_path / f"source_{index}.png", tmp_path / f"flux1_kontext_0_{index}.png"
        source.save(paths[0])
        image.save(paths[1])
        item = {"source_path": str(paths[0]), "edited_path": str(paths[1]), "instruction": edits.INSTRUCTION}
        reward_inputs["listener"].append(item)
    half, good, wrong, too_much, none, done = dispatcher.compute_rewards(reward_inputs)[0]["listener"].tolist()
    assert good > half > wrong and good > too_much and done > none
    lost = {"listener": [{"path": str(paths[1]), "prompt": edits.INSTRUCTION}] * 2}  # the host's other branch
    with pytest.raises(ValueError, match="has no source image, and this reward is for edits"):
        dispatcher.compute_rewards(lost)


class HostDispatcher:
    """The host's own, with the one reward `length`: of the prompt."""

    def build_reward_inputs(self):
        return {"length": []}

    def compute_rewards(self, reward_inputs):
        assert reward_inputs.keys() == {"length"}
        lengths = torch.tensor([float(len(item["prompt"])) for item in reward_inputs["length"]])
        return {"length": lengths}, {"length_score": lengths.numpy()}


def test_pref_grpo(FakeJudge, shade, tmp_path):
    dispatcher = ListenerDispatcher(FakeJudge())
    images = [shade(red) for red in (*REDS, *reversed(REDS))]
    advantages = pref_grpo_host(dispatcher, images, ["a"] * 4 + ["b"] * 4, {"listener": 1.0}, tmp_path)
    assert order(advantages[:4]) == BETTER and torch.allclose(advantages[:4], advantages[4:].flip(0), atol=1e-5)


@pytest.mark.parametrize("captions", [["a"], ["a", "a", "b"]])
def test_pref_grpo_stops_where_an_image_has_nothing_to_compare_with(FakeJudge, shade, tmp_path, captions):
    images = [shade(10 * k) for k in range(len(captions))]
    with pytest.raises(ValueError, match="one image"):
        pref_grpo_host(ListenerDispatcher(FakeJudge()), images, captions, {"listener": 1.0}, tmp_path)


def test_pref_grpo_beside_the_hosts_own_rewards(FakeJudge, shade, tmp_path):
    dispatcher = ListenerDispatcher(FakeJudge(), host=HostDispatcher())
    weights = {"listener": 1.0, "length": 0.1}
    advantages = pref_grpo_host(dispatcher, [shade(red) for red in REDS], ["a"] * 4, weights, tmp_path)
    assert order(advantages) == BETTER


def test_pref_grpo_by_a_server_compares_groups_or_nothing(FakeJudge, shade, tmp_path):
    call = ([shade(red) for red in REDS], ["a"] * 4, {"listener": 1.0}, tmp_path)
    for scheme in ("group", "auto"):
        with serving(ListenerReward(FakeJudge(), scheme=scheme)) as url:
            assert order(pref_grpo_host(ListenerDispatcher(url), *call)) == BETTER
            with pytest.raises(ValueError, match=r"one image|wants scores by scheme 'group'"):
                pref_grpo_host(ListenerDispatcher(url), [shade(3)], ["a"], {"listener": 1.0}, tmp_path)
    refusal = pytest.raises(ValueError, match=r"wants scores by scheme 'group'.* answers by 'reference'")
    with serving(ListenerReward(FakeJudge(), scheme="reference")) as url, refusal:
        pref_grpo_host(ListenerDispatcher(url), *call)


def test_pref_grpo_logs_what_a_reward_gives_and_no_nan(shade, tmp_path):
    def reward(images, prompts, metadata):
        return [float(k) for k in range(len(images))], {}

    items = {"listener": [{"path": str(tmp_path / "a.png"), "prompt": "a"}] * 2}
    shade(3).save(tmp_path / "a.png")
    tensors, logged = ListenerDispatcher(reward).compute_rewards(items)
    assert tensors["listener"].tolist() == [0, 1] and logged.keys() == {"listener_score"}


def test_pref_grpo_videos(FakeJudge, shade, tmp_path):
    dispatcher = ListenerDispatcher(FakeJudge(), modality="video")
    items = dispatcher.build_reward_inputs()
    for index, red in enumerate(REDS):
        path = tmp_path / f"{index}.gif"
        shade(red).save(path, save_all=True, append_images=[shade(red + 5)] * 3, duration=100)
        items["listener"].append({"path": str(path), "prompt": "a"})
    assert order(pref_grpo_advantages(dispatcher, items, {"listener": 1.0})) == BETTER


BAD_ITEMS: dict[str, Any] = {
    "missing file": {"path": "no/such/file.png"},
    "empty file": lambda folder: _written(folder, b""),
    "truncated file": lambda folder: _written(folder, png(9)[:50]),
    "text": lambda folder: _written(folder, b"a picture of a fox"),
    "folder": lambda folder: {"path": str(folder)},
    "URL": {"path": "https://example.org/a.png"},
    "no path": {"path": None},
    "path of another type": {"path": 7},
    "empty prompt": {"prompt": ""},
    "no prompt": {"prompt": None},
    "prompt of another type": {"prompt": ["a"]},
    "not a video": None,
}


def _written(folder: Path, data: bytes) -> dict[str, str]:
    (folder / "bad.png").write_bytes(data)
    return {"path": str(folder / "bad.png")}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_pref_grpo_stops_on_bad_input(FakeJudge, shade, tmp_path, name):
    bad = BAD_ITEMS[name]
    dispatcher = ListenerDispatcher(FakeJudge(), modality="video" if bad is None else "image")
    items: Any = dispatcher.build_reward_inputs()
    for index in range(4):
        shade(index).save(tmp_path / f"{index}.jpg")
        items["listener"].append({"path": str(tmp_path / f"{index}.jpg"), "prompt": "a"})
    items["listener"][2] |= (bad(tmp_path) if callable(bad) else bad) or {"path": 7}
    with pytest.raises(ValueError):  # the host's own rewards raise ValueError, which InputError is
        pref_grpo_advantages(dispatcher, items, {"listener": 1.0})


def test_pref_grpo_stops_without_inputs_and_on_a_broken_judge(FakeJudge, shade, tmp_path):
    for empty in ({}, {"listener": []}):
        with pytest.raises(ValueError):
            ListenerDispatcher(FakeJudge()).compute_rewards(empty)
    with pytest.raises(ValueError, match="host="):
        ListenerDispatcher(FakeJudge()).compute_rewards({"clip": [{}], "listener": [{}]})
    for policy in ("raise", "nan"):
        with pytest.raises(JudgeError):
            dispatcher = ListenerDispatcher(broken(FakeJudge), on_failure=policy)
            pref_grpo_host(dispatcher, [shade(red) for red in REDS], ["a"] * 4, {"listener": 1.0}, tmp_path)
