"""Each adapter inside a copy of its host's calling pattern: right scores for good input, the host's own error for bad.

The hosts below are written after their sources (the file is named at each) and reduced to what touches a reward. What
they would do with the answer is done here too, so that an answer of a wrong type or shape fails as it would there.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib import request
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from PIL import Image

from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.integrations import unirl
from listener_reward.integrations.collector import GroupCollector
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.dance_grpo import ListenerScorer
from listener_reward.integrations.ddpo_pytorch import listener_reward
from listener_reward.integrations.flow_grpo import listener_multi_score, listener_score
from listener_reward.integrations.miles_diffusion import listener_rm
from listener_reward.integrations.pref_grpo import ListenerDispatcher
from listener_reward.integrations.remote import RemoteReward
from listener_reward.integrations.server import compute, make_server
from listener_reward.integrations.trl import ddpo_reward
from listener_reward.integrations.verl_omni import compute_score
from listener_reward.reward import ListenerReward

REDS = [200, 20, 90, 160]
PROMPTS = ("a", "a", "a", "a")
BETTER = [0, 3, 2, 1]  # positions of REDS, best first
ERRORS = (InputError, JudgeError)

REFERENCE = {"a": Image.new("RGB", (4, 4), (100, 0, 0))}


def pixels(reds=REDS, dtype=torch.float32) -> torch.Tensor:
    """What a pipeline's `output_type="pt"` gives: (B, 3, H, W) in [0, 1]."""
    images = torch.zeros(len(reds), 3, 4, 4)
    images[:, 0] = torch.tensor(reds)[:, None, None] / 255
    return images.to(dtype)


def order(scores) -> list[int]:
    return np.argsort(-np.asarray(torch.as_tensor(scores).float()), kind="stable").tolist()


def broken(FakeJudge, red=90, **options):
    """A judge that breaks on every pair with the image of this red in it."""
    return FakeJudge(breaks_on=lambda prompt, first, second: red in (first, second), **options)


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def with_pixel(value: float) -> torch.Tensor:
    images = pixels()
    images[1, 1, 2, 2] = value
    return images


BAD_TENSORS: dict[str, tuple[Any, Any]] = {
    "NaN pixel": (with_pixel(float("nan")), PROMPTS),
    "infinite pixel": (with_pixel(float("inf")), PROMPTS),
    "floats up to 255": (pixels() * 255, PROMPTS),
    "floats in [-1, 1]": (pixels() * 2 - 1, PROMPTS),
    "one image without its axis": (pixels()[0], PROMPTS[:1]),
    "five channels": (torch.zeros(4, 5, 6, 6), PROMPTS),
    "integers that are not bytes": ((pixels() * 255).long(), PROMPTS),
    "no images at all": (None, PROMPTS),
    "a prompt too few": (pixels(), PROMPTS[:3]),
    "a prompt too many": (pixels(), (*PROMPTS, "a")),
    "an empty prompt": (pixels(), ("a", "a", "  ", "a")),
    "a prompt that is None": (pixels(), ("a", None, "a", "a")),
    "prompts as one text": (pixels(), "aaaa"),
    "no pixels": (torch.zeros(4, 3, 0, 0), PROMPTS),
}
"""Batches that no tensor host may turn into scores. `None` stands for a pipeline that failed, `len` of which raises."""


# ---------------------------------------------------------------------------------------------------------------------
# trl 0.23.1, trl/trainer/ddpo_trainer.py: compute_rewards, step


def trl_host(reward_fn, pairs, is_async: bool):
    if not is_async:
        rewards = []
        for images, prompts, metadata in pairs:
            reward, reward_metadata = reward_fn(images, prompts, metadata)
            rewards.append((torch.as_tensor(reward, device="cpu"), reward_metadata))
    else:
        with ThreadPoolExecutor(2) as executor:
            rewards = executor.map(lambda x: reward_fn(*x), pairs)
            rewards = [
                (torch.as_tensor(reward.result(), device="cpu"), reward_metadata.result())
                for reward, reward_metadata in rewards
            ]
    rewards, metadata = zip(*rewards, strict=True)
    rewards = torch.cat(rewards).cpu().numpy()
    assert rewards.dtype.kind == "f" and type(rewards) is np.ndarray
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8), metadata


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trl_ddpo(FakeJudge, is_async, dtype):
    prompts = tuple(np.random.default_rng(0).choice(["a"], 4))  # np.str_, as in trl's example
    reward_fn = ddpo_reward(FakeJudge(), reference=REFERENCE)
    pairs = [[pixels(dtype=dtype), prompts, ({},) * 4], [pixels([10, 240], dtype), prompts[:2], ({},) * 2]]
    advantages, metadata = trl_host(reward_fn, pairs, is_async)
    assert order(advantages) == [5, 0, 3, 2, 1, 4]
    assert metadata[1]["comparisons"].tolist() == [1, 1]


def test_trl_ddpo_async_breaks_plain_functions(FakeJudge):
    with pytest.raises(AttributeError, match="result"):
        trl_host(ListenerReward(FakeJudge()), [[pixels(), PROMPTS, ({},) * 4]], True)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_trl_ddpo_stops_on_bad_input(FakeJudge, name, is_async):
    images, prompts = BAD_TENSORS[name]
    with pytest.raises((*ERRORS, TypeError)):
        trl_host(ddpo_reward(FakeJudge()), [[images, prompts, ({},) * 4]], is_async)


# ---------------------------------------------------------------------------------------------------------------------
# ddpo-pytorch, scripts/train.py


def ddpo_pytorch_host(reward_fn, batches):
    with ThreadPoolExecutor(max_workers=2) as executor:
        samples = []
        for images, pairs in batches:
            prompts, prompt_metadata = zip(*pairs, strict=True)
            rewards = executor.submit(reward_fn, images, prompts, prompt_metadata)
            time.sleep(0)
            samples.append(rewards)
        gathered = []
        for sample in samples:
            rewards, _ = sample.result()
            gathered.append(torch.as_tensor(rewards, device="cpu"))
    return torch.cat(gathered).numpy()


def test_ddpo_pytorch(FakeJudge):
    reward_fn = listener_reward(FakeJudge(delay=0.002), reference=REFERENCE)
    metadata = [{}, {"questions": ["?"], "answers": ["!"]}, {}, {}]
    nhwc = (pixels().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    batches = [(images, list(zip(PROMPTS, metadata, strict=True))) for images in (pixels(), nhwc) * 4]
    rewards = ddpo_pytorch_host(reward_fn, batches).reshape(8, 4)
    assert np.allclose(rewards, rewards[0], atol=1e-6) and order(rewards[0]) == BETTER


@pytest.mark.parametrize("name", ["trl", "ddpo-pytorch", "flow_grpo", "miles"])
def test_hosts_that_scatter_a_group_get_scores_of_one_scale(FakeJudge, name):
    """Two calls with two images each, of which the second call's are the better ones: by a mean of their own they would
    not be. All meet the first image seen."""
    judge, calls = FakeJudge(slope=3.0), ([20, 40], [180, 200])
    if name == "miles":
        rm = listener_rm(judge)
        scores = [miles_host(rm, [[generated(red) for red in reds]]) for reds in calls]
    else:
        made = {"trl": ddpo_reward, "ddpo-pytorch": listener_reward, "flow_grpo": listener_score}[name](judge)
        reward_fn = made("cpu") if name == "flow_grpo" else made
        scores = [np.asarray(reward_fn(pixels(reds), ("a", "a"), ({}, {}))[0]).tolist() for reds in calls]
    expected = [[3 * (red - 20) / 255 for red in reds] for reds in calls]
    assert scores[0] == pytest.approx(expected[0], abs=1e-4) and scores[1] == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.parametrize("name", BAD_TENSORS.keys() - {"prompts as one text"})  # the host unzips them itself
def test_ddpo_pytorch_stops_on_bad_input(FakeJudge, name):
    images, prompts = BAD_TENSORS[name]
    with pytest.raises((*ERRORS, TypeError)):
        ddpo_pytorch_host(listener_reward(FakeJudge()), [(images, [(prompt, {}) for prompt in prompts])] * 2)


@pytest.mark.parametrize("options", [{}, {"answers_nan": True}])
@pytest.mark.parametrize("policy", ["raise", "nan"])
def test_ddpo_hosts_stop_where_the_judge_breaks_in_the_middle(FakeJudge, policy, options):
    judge = broken(FakeJudge, **options)
    fine, bad = (pixels([11, 12]), PROMPTS[:2]), (pixels(), PROMPTS)
    for is_async in (False, True):
        with pytest.raises(JudgeError):
            reward_fn = ddpo_reward(judge, reference=REFERENCE, on_failure=policy)
            trl_host(reward_fn, [[images, prompts, ({},) * len(prompts)] for images, prompts in (fine, bad)], is_async)
    with pytest.raises(JudgeError):
        reward_fn = listener_reward(judge, reference=REFERENCE, on_failure=policy)
        ddpo_pytorch_host(reward_fn, [(images, [(one, {}) for one in prompts]) for images, prompts in (fine, bad)])


# ---------------------------------------------------------------------------------------------------------------------
# flow_grpo and DiffusionNFT, flow_grpo/rewards.py: multi_score; scripts/train_sd3.py, train_nft_sd3.py


def flow_grpo_multi_score(device, score_dict, score_functions):
    score_fns = {}
    for name in score_dict:
        takes_device = "device" in score_functions[name].__code__.co_varnames
        score_fns[name] = score_functions[name](device) if takes_device else score_functions[name]()

    def _fn(images, prompts, metadata, ref_images=None, only_strict=True):
        total_scores, score_details = [], {}
        for name, weight in score_dict.items():
            scores, _ = score_fns[name](images, prompts, metadata)
            score_details[name] = scores
            weighted = [weight * one for one in scores]
            total_scores = (
                weighted if not total_scores else [a + b for a, b in zip(total_scores, weighted, strict=True)]
            )
        score_details["avg"] = total_scores
        return score_details, {}

    return _fn


def flow_grpo_host(reward_fn, batches, nft: bool = False):
    samples = []
    with ThreadPoolExecutor(max_workers=8) as executor:
        for images, prompts, metadata in batches:
            keywords = {} if nft else {"only_strict": True}
            samples.append(executor.submit(reward_fn, images, prompts, metadata, **keywords))
            time.sleep(0)
        details = []
        for sample in samples:
            rewards, _ = sample.result()
            details.append({key: torch.as_tensor(value, device="cpu").float() for key, value in rewards.items()})
    return {key: torch.cat([one[key] for one in details], dim=0) for key in details[0]}


def jpeg_compressibility():
    return lambda images, prompts, metadata: (np.zeros(len(images)), {})


@pytest.mark.parametrize("nft", [False, True])
def test_flow_grpo_weighs_it_with_other_rewards_from_eight_threads(FakeJudge, nft):
    factories = {"jpeg": jpeg_compressibility, "listener": listener_score(FakeJudge(delay=0.002), reference=REFERENCE)}
    reward_fn = flow_grpo_multi_score(torch.device("cpu"), {"jpeg": 0.5, "listener": 2.0}, factories)
    rewards = flow_grpo_host(reward_fn, [(pixels(), list(PROMPTS), [{}] * 4)] * 16, nft)
    assert rewards["avg"].shape == (64,) and torch.allclose(rewards["avg"], 2 * rewards["listener"])
    assert order(rewards["avg"][:4]) == BETTER


def test_flow_grpo_factory_is_the_plain_function_that_the_host_looks_into(FakeJudge):
    factory = listener_score(FakeJudge())
    assert inspect.isfunction(factory) and "device" in factory.__code__.co_varnames


def test_flow_grpo_whole_dict_is_numeric_and_has_the_same_keys_in_every_batch(FakeJudge):
    reward_fn = listener_multi_score(FakeJudge())  # no listener: NaN where it would speak
    rewards = flow_grpo_host(reward_fn, [(pixels(), list(PROMPTS), [{}] * 4), (pixels([5]), ["b"], [{}])])
    assert {"avg", "listener", "standard_error"} <= rewards.keys()
    assert all(value.shape == (5,) for value in rewards.values())
    assert torch.isfinite(rewards["avg"]).all() and torch.isnan(rewards["listener_p_first"]).all()


def test_flow_grpo_videos_are_judged_as_storyboards(FakeJudge):
    videos = pixels()[:, None].expand(-1, 5, -1, -1, -1)  # (B, F, C, H, W), scripts/train_wan2_1.py
    factory = listener_score(FakeJudge(), scheme="group")
    scores, _ = factory("cpu")(videos, list(PROMPTS), [{}] * 4)
    assert order(scores) == BETTER


def test_flow_grpo_scores_of_different_batches_and_ranks_are_on_one_scale(FakeJudge):
    reward_fn = listener_multi_score(FakeJudge(slope=3.0), reference=REFERENCE)
    alone = [flow_grpo_host(reward_fn, [(pixels([red]), ["a"], [{}])])["avg"].item() for red in REDS]
    together = flow_grpo_host(reward_fn, [(pixels(), list(PROMPTS), [{}] * 4)])["avg"]
    assert alone == pytest.approx(together.tolist())
    assert alone == pytest.approx([3 * (red - 100) / 255 for red in REDS], abs=1e-4)


@pytest.mark.parametrize("make", [lambda judge: listener_score(judge)("cpu"), listener_multi_score])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_flow_grpo_stops_on_bad_input(FakeJudge, name, make):
    images, prompts = BAD_TENSORS[name]
    reward_fn = make(FakeJudge())
    with ThreadPoolExecutor(8) as executor, pytest.raises((*ERRORS, TypeError)):
        executor.submit(reward_fn, images, prompts, [{}] * 4).result()


def test_flow_grpo_needs_no_metadata(FakeJudge):
    scores, _ = listener_score(FakeJudge())("cpu")(pixels(), list(PROMPTS), None)
    assert order(scores) == [0, 3, 2, 1]


@pytest.mark.parametrize("options", [{}, {"answers_nan": True}])
@pytest.mark.parametrize("policy", ["raise", "nan"])
def test_flow_grpo_stops_where_the_judge_breaks_in_the_middle(FakeJudge, policy, options):
    reward_fn = listener_multi_score(broken(FakeJudge, **options), scheme="group", on_failure=policy)
    with pytest.raises(JudgeError):
        flow_grpo_host(reward_fn, [(pixels([11, 12]), ["b", "b"], [{}] * 2), (pixels(), list(PROMPTS), [{}] * 4)])


def test_flow_grpo_masks_a_broken_sample_by_its_group_mean(FakeJudge):
    """The host leaves out samples without an advantage, which is what a sample at its group's mean has."""
    reward_fn = listener_multi_score(broken(FakeJudge), scheme="group", on_failure="group-mean")
    rewards = flow_grpo_host(reward_fn, [(pixels(), list(PROMPTS), [{}] * 4)])
    others = rewards["avg"][[0, 1, 3]]
    assert rewards["failed"].tolist() == [0, 0, 1, 0] and rewards["avg"][2].item() == pytest.approx(
        others.mean().item(), abs=1e-6
    )
    assert rewards["avg"][0] > rewards["avg"][3] > rewards["avg"][1]


def test_flow_grpo_broken_sample_has_no_advantage_in_a_group_scattered_over_calls(FakeJudge):
    """A group of eight over two calls, whose images differ much in quality: the host normalises over both."""
    reward_fn = listener_multi_score(broken(FakeJudge), scheme="group", on_failure="group-mean")
    batches = [
        (pixels([10, 20, 30, 40]), list(PROMPTS), [{}] * 4),
        (pixels([250, 90, 240, 200]), list(PROMPTS), [{}] * 4),
    ]
    rewards = flow_grpo_host(reward_fn, batches)
    advantages = (rewards["avg"] - rewards["avg"].mean()) / rewards["avg"].std()
    assert rewards["failed"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0] and abs(advantages[5].item()) < 1e-5


@pytest.mark.parametrize("scheme", ["reference", "auto"])
def test_the_mean_of_part_of_a_group_is_refused(FakeJudge, scheme):
    policy = {"scheme": scheme, "on_failure": "group-mean"}
    for make in (listener_score, listener_multi_score, ddpo_reward, listener_reward, listener_rm):
        with pytest.raises(InputError, match="group-mean"):
            make(FakeJudge(), **policy)
    with pytest.raises(InputError, match="group-mean"):
        listener_multi_score(ListenerReward(FakeJudge(), **policy))


def test_flow_grpo_hands_its_device_on(monkeypatch):
    reward = ListenerReward("tiny", scheme="reference")
    factory = listener_score(reward)
    loads = []
    fake = SimpleNamespace(Judge=SimpleNamespace(from_pretrained=lambda name, **options: loads.append(options)))
    monkeypatch.setitem(sys.modules, "listener_reward.judge", fake)
    factory(torch.device("cuda", 3))
    reward._get_judge()
    assert loads == [{"device": "cuda:3"}]


def test_a_group_on_which_the_judge_broke_altogether_is_an_error_under_every_policy(FakeJudge):
    for policy in ("raise", "nan", "group-mean"):
        judge = FakeJudge(breaks_on=lambda *_: True)
        with pytest.raises(JudgeError):
            score(ListenerReward(judge, on_failure=policy), pixels(), PROMPTS)


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
    items = dispatcher.build_reward_inputs()
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


# ---------------------------------------------------------------------------------------------------------------------
# DanceGRPO, fastvideo/train_grpo_flux.py: sample_reference_model, train_one_step; train_grpo_hunyuan.py


def dance_grpo_advantages(rewards: torch.Tensor, generations=4):
    rewards = rewards.to(torch.float32)
    advantages = torch.zeros_like(rewards)
    for start in range(0, len(rewards), generations):
        group = rewards[start : start + generations]
        advantages[start : start + generations] = (group - group.mean()) / (group.std() + 1e-8)
    return advantages


def dance_grpo_host(scorer, images, captions):
    """With the two lines changed that the adapter's docstring names."""
    for image, caption in zip(images, captions, strict=True):
        decoded_image, batch_caption = [image], [caption]
        with torch.no_grad():
            scorer.add(decoded_image[0], batch_caption[0])
    return dance_grpo_advantages(scorer.collect("cpu"))


def test_dance_grpo_group(FakeJudge, shade):
    judge = FakeJudge()
    scorer = ListenerScorer(judge)
    for _ in range(2):
        advantages = dance_grpo_host(scorer, [shade(red) for red in (*REDS, *reversed(REDS))], ["a"] * 4 + ["b"] * 4)
        assert order(advantages[:4]) == BETTER and torch.allclose(advantages[:4], advantages[4:].flip(0), atol=1e-5)
    assert [len(call) for call in judge.calls] == [12, 12]  # every pair of both groups, in one call of the judge


def test_dance_grpo_one_by_one(FakeJudge, shade):
    scorer = ListenerScorer(FakeJudge())
    all_rewards = []
    for red in REDS:
        with torch.no_grad():
            all_rewards.append(scorer(shade(red), "a"))
    assert {reward.shape for reward in all_rewards} == {(1,)}
    assert order(dance_grpo_advantages(torch.cat(all_rewards, dim=0))) == BETTER


def test_dance_grpo_videos(FakeJudge, shade, tmp_path):
    scorer, rewards = ListenerScorer(FakeJudge()), []
    for index, red in enumerate(REDS):
        path = tmp_path / f"{index}.gif"
        shade(red).save(path, save_all=True, append_images=[shade(red + 5)] * 3, duration=100)
        reward = scorer.reward([str(path)], ["a"], use_norm=True)
        rewards.append(torch.tensor(reward[0]["VQ"]).unsqueeze(0))
    assert order(dance_grpo_advantages(torch.cat(rewards, dim=0))) == BETTER


BAD_CALLS: dict[str, tuple[Any, Any]] = {
    "no image": (None, "a"),
    "missing file": ("no/such/file.png", "a"),
    "truncated bytes": (png(3)[:40], "a"),
    "an image list": ([Image.new("RGB", (4, 4))], "a"),
    "NaN pixels": (np.full((4, 4, 3), np.nan, np.float32), "a"),
    "wrong range": (np.full((4, 4, 3), 200.0), "a"),
    "latents": (torch.randn(16, 64), "a"),
    "empty image": (Image.new("RGB", (0, 4)), "a"),
    "empty caption": (Image.new("RGB", (4, 4)), ""),
    "no caption": (Image.new("RGB", (4, 4)), None),
    "captions of the batch": (Image.new("RGB", (4, 4)), ["a"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_dance_grpo_stops_on_bad_input(FakeJudge, shade, name):
    image, caption = BAD_CALLS[name]
    scorer = ListenerScorer(FakeJudge())
    for call in (scorer, scorer.add):
        with pytest.raises(ERRORS):
            call(image, caption)
    with pytest.raises(InputError, match="nothing was added"):
        scorer.collect()


BAD_PATHS: dict[str, tuple[Any, Any]] = {
    "missing file": (["no/such.mp4"], ["a"]),
    "URL": (["https://example.org/a.mp4"], ["a"]),
    "no path": ([None], ["a"]),
    "header only": ([b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"], ["a"]),
    "text": ([b"a clip of a fox"], ["a"]),
    "NaN frames": ([np.full((2, 4, 4, 3), np.nan, np.float32)], ["a"]),
    "no frames": ([[]], ["a"]),
    "a prompt too few": (["a.mp4", "b.mp4"], ["a"]),
    "empty prompt": (["a.mp4"], [""]),
    "prompt as one text": (["a.mp4"], "a"),
}


@pytest.mark.parametrize("name", BAD_PATHS)
def test_dance_grpo_gives_no_video_score_on_bad_input(FakeJudge, name):
    """The host's `except` makes -1 of it, which it masks nowhere: the docs say to take the call out of its `try`."""
    with pytest.raises(ERRORS):
        ListenerScorer(FakeJudge()).reward(*BAD_PATHS[name])


def test_dance_grpo_starts_afresh_after_a_judge_that_broke(FakeJudge, shade):
    scorer = ListenerScorer(broken(FakeJudge))
    with pytest.raises(JudgeError):
        dance_grpo_host(scorer, [shade(red) for red in REDS], ["a"] * 4)
    assert len(dance_grpo_host(scorer, [shade(red) for red in (1, 2, 3, 4)], ["a"] * 4)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Flow-Factory, src/flow_factory/rewards/abc.py, reward_processor.py, my_reward_remote.py


@pytest.fixture
def flow_factory(monkeypatch):
    """The adapter, imported over a stand-in for the host's module."""

    class RewardModelOutput(SimpleNamespace):
        pass

    class BaseRewardModel:
        required_fields = ()
        use_tensor_inputs = False

        def __init__(self, config, accelerator):
            self.accelerator, self.config = accelerator, config
            self.device = accelerator.device

    class PointwiseRewardModel(BaseRewardModel):
        required_fields = ("image", "prompt")

    class GroupwiseRewardModel(BaseRewardModel):
        required_fields = ("image", "prompt")

    abc = ModuleType("flow_factory.rewards.abc")
    for cls in (RewardModelOutput, PointwiseRewardModel, GroupwiseRewardModel):
        setattr(abc, cls.__name__, cls)
    for name, module in {
        "flow_factory": ModuleType("flow_factory"),
        "flow_factory.rewards": ModuleType("flow_factory.rewards"),
        "flow_factory.rewards.abc": abc,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "listener_reward.integrations.flow_factory", raising=False)
    yield importlib.import_module("listener_reward.integrations.flow_factory")
    sys.modules.pop("listener_reward.integrations.flow_factory")


def flow_factory_host(model, samples: list[dict]):
    """One batch or one group, as RewardProcessor computes it: fields by the call's signature, the call by keyword."""
    parameters = inspect.signature(model.__call__).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    fields = [name for name in samples[0] if takes_all or name in parameters]
    batch = {
        name: [sample[name] for sample in samples]
        for name in fields
        if all(sample[name] is not None for sample in samples)
    }
    output = model(**batch)
    return torch.as_tensor(output.rewards if hasattr(output, "rewards") else output, device="cpu", dtype=torch.float32)


def sample(red=None, prompt: Any = "a", **more):
    image = None if red is None else Image.new("RGB", (4, 4), (red, 0, 0))
    return {"prompt": prompt, "image": image, "video": None, "latents": torch.zeros(1), "metadata": "{}"} | more


def config(judge, **more):
    return SimpleNamespace(judge=judge, batch_size=4, dtype=torch.float32, **more)


HERE = SimpleNamespace(device=torch.device("cpu"))


def test_flow_factory_groupwise(FakeJudge, flow_factory):
    model = flow_factory.ListenerGroupwise(config(FakeJudge()), HERE)
    assert isinstance(model, sys.modules["flow_factory.rewards.abc"].GroupwiseRewardModel)
    rewards = flow_factory_host(model, [sample(red) for red in REDS])
    assert order(rewards) == BETTER and rewards.sum().item() == pytest.approx(0, abs=1e-5)


def test_flow_factory_hands_its_device_on(flow_factory):
    there = SimpleNamespace(device=torch.device("cuda", 2))
    for cls in (flow_factory.ListenerGroupwise, flow_factory.ListenerPointwise):
        assert cls(config("tiny"), there).reward._device == "cuda:2"


def test_flow_factory_groupwise_stops_at_a_group_of_one(FakeJudge, flow_factory):
    with pytest.raises(InputError, match="one image"):
        flow_factory_host(flow_factory.ListenerGroupwise(config(FakeJudge()), HERE), [sample(3)])


def test_flow_factory_pointwise_scores_a_sample_alike_in_every_batch(FakeJudge, flow_factory):
    model = flow_factory.ListenerPointwise(config(FakeJudge(), judge_options={"reference": REFERENCE}), HERE)
    together = flow_factory_host(model, [sample(red) for red in REDS])
    alone = [flow_factory_host(model, [sample(red)]).item() for red in REDS]
    assert together.tolist() == pytest.approx(alone, abs=1e-6) and order(together) == BETTER


def test_flow_factory_videos(FakeJudge, flow_factory):
    model = flow_factory.ListenerGroupwise(config(FakeJudge(), video=True), HERE)
    assert set(model.required_fields) == {"prompt", "video"}
    videos = [[Image.new("RGB", (4, 4), (red, 0, 0))] * 5 for red in REDS]
    assert order(flow_factory_host(model, [sample(video=video) for video in videos])) == BETTER


BAD_SAMPLES: dict[str, Any] = {
    "no image": sample(),
    "image and video": sample(3, video=[Image.new("RGB", (4, 4))]),
    "empty prompt": sample(3, ""),
    "blank prompt": sample(3, "\n"),
    "no prompt": sample(3, None),
    "prompt of another type": sample(3, 5),
    "NaN pixels": sample(image=torch.full((3, 4, 4), float("nan"))),
    "wrong range": sample(image=torch.full((3, 4, 4), 255.0)),
    "wrong shape": sample(image=torch.zeros(7, 7, 7)),
    "a path that is not there": sample(image="no/such/file.png"),
    "integers": sample(image=torch.zeros(3, 4, 4, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
@pytest.mark.parametrize("cls", ["ListenerPointwise", "ListenerGroupwise"])
def test_flow_factory_stops_on_bad_input(FakeJudge, flow_factory, name, cls):
    model = getattr(flow_factory, cls)(config(FakeJudge()), HERE)
    batch = [BAD_SAMPLES[name]] * 2 if name in ("no image", "image and video") else [sample(1), BAD_SAMPLES[name]]
    with pytest.raises((*ERRORS, TypeError)):
        flow_factory_host(model, batch)


def test_flow_factory_stops_where_the_judge_breaks(FakeJudge, flow_factory):
    for cls in (flow_factory.ListenerPointwise, flow_factory.ListenerGroupwise):
        for options in ({}, {"on_failure": "nan"}):
            model = cls(config(broken(FakeJudge), judge_options=options), HERE)
            with pytest.raises(JudgeError):
                flow_factory_host(model, [sample(red) for red in REDS])


def test_flow_factory_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    monkeypatch.delitem(sys.modules, "listener_reward.integrations.flow_factory", raising=False)
    with pytest.raises(MissingExtraError, match="pip install"):
        importlib.import_module("listener_reward.integrations.flow_factory")


# ---------------------------------------------------------------------------------------------------------------------
# verl-omni, verl_omni/reward_loop/reward_manager/visual.py: run_single; multi.py for the entry's other keys


async def verl_omni_host(visuals, extra_infos, ground_truths, **entry):
    """All samples of a batch at once, each by keyword; a sync function would go to an executor."""
    signature = inspect.signature(compute_score)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())

    async def run_single(visual, extra_info, ground_truth):
        keywords = {
            "data_source": "pickscore",
            "solution_image": visual,
            "ground_truth": ground_truth,
            "extra_info": {**extra_info, "num_turns": None, "rollout_reward_scores": {}}
            if isinstance(extra_info, dict)
            else extra_info,
            "reward_router_address": None,
            **entry,
        }
        keywords = {key: value for key, value in keywords.items() if takes_all or key in signature.parameters}
        if inspect.iscoroutinefunction(compute_score):
            result = await compute_score(**keywords)
        else:
            result = await asyncio.get_running_loop().run_in_executor(None, lambda: compute_score(**keywords))
        score = float(result["score"])
        return {"reward_score": score, "reward_extra_info": {k: v for k, v in result.items() if k != "score"}}

    return await asyncio.gather(*map(run_single, visuals, extra_infos, ground_truths))


def bytes_chw(red: int, frames: int | None = None) -> torch.Tensor:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[0] = red
    return image if frames is None else image.expand(frames, -1, -1, -1)


def verl(visuals, infos=None, truths=None, **entry):
    infos = [{"prompt": "a"}] * len(visuals) if infos is None else infos
    return asyncio.run(verl_omni_host(visuals, infos, truths or [None] * len(visuals), **entry))


def test_verl_omni_reference(FakeJudge):
    judge = FakeJudge()
    verl([bytes_chw(100)], judge=judge)  # the first image of the prompt is kept
    results = verl([bytes_chw(red) for red in REDS], judge=judge)
    scores = [result["reward_score"] for result in results]
    assert order(scores) == BETTER and all(type(value) is float for value in scores)
    assert all(type(value) is float for result in results for value in result["reward_extra_info"].values())
    assert len({frozenset(result["reward_extra_info"]) for result in results}) == 1


def test_verl_omni_group_waits_for_its_members_without_blocking_the_loop(FakeJudge):
    judge = FakeJudge()
    infos = [{"prompt": "a"}, {"raw_prompt": [{"role": "user", "content": "b"}]}] * 4
    results = verl([bytes_chw(red) for red in REDS for _ in range(2)], infos, judge=judge, group_size=4)
    scores = [result["reward_score"] for result in results]
    assert order(scores[::2]) == order(scores[1::2]) == BETTER
    assert sorted(len(call) for call in judge.calls) == [6, 6]


def test_verl_omni_prompt_may_be_the_ground_truth_and_the_sample_a_video(FakeJudge):
    judge = FakeJudge()
    visuals = [bytes_chw(red, frames=5) for red in REDS]
    results = verl(visuals, [{}] * 4, ["a"] * 4, judge=judge, group_size=4)
    assert order([result["reward_score"] for result in results]) == BETTER


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
PARTS = [{"type": "image"}, {"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    "raw_prompt",
    [
        np.array(CHAT, dtype=object),
        [{"role": "user", "content": PARTS}],
        np.array([{"role": "user", "content": np.array(PARTS, dtype=object)}], dtype=object),
    ],
    ids=["array", "parts", "array of parts"],
)
def test_verl_omni_reads_every_form_of_a_chat(FakeJudge, raw_prompt):
    judge = FakeJudge()
    verl([bytes_chw(3), bytes_chw(9)], [{"raw_prompt": raw_prompt}] * 2, judge=judge, group_size=2)
    assert [pair[0] for call in judge.calls for pair in call] == ["a"]


def test_verl_omni_samples_that_meet_in_a_server_do_not_wait_for_threads(FakeJudge):
    """More samples at once than the loop's executor has threads, each of which waits for the others."""
    with serving(GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 40, timeout=20)) as url:
        results = verl([bytes_chw(red) for red in range(10, 50)], judge=url)
    assert results[39]["reward_score"] > results[0]["reward_score"]


BAD_VISUALS: dict[str, dict[str, Any]] = {
    "no image": {"visual": None},
    "NaN pixels": {"visual": torch.full((3, 4, 4), float("nan"))},
    "floats up to 255": {"visual": torch.full((3, 4, 4), 255.0)},
    "latents": {"visual": torch.randn(16, 8, 8)},
    "rank 5": {"visual": torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)},
    "no frames": {"visual": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)},
    "integers": {"visual": torch.zeros(3, 4, 4, dtype=torch.int64)},
    "no metadata": {"info": None},
    "no prompt": {"info": {}},
    "empty prompt": {"info": {"prompt": ""}},
    "chat without a user": {"info": {"raw_prompt": [{"role": "system", "content": "s"}]}},
    "prompt of another type": {"info": {"prompt": 5}},
}


@pytest.mark.parametrize("name", BAD_VISUALS)
@pytest.mark.parametrize("group_size", [0, 2])
def test_verl_omni_stops_on_bad_input(FakeJudge, name, group_size):
    bad = {"visual": bytes_chw(3), "info": {"prompt": "a"}} | BAD_VISUALS[name]
    with pytest.raises(ERRORS):
        verl([bad["visual"]], [bad["info"]], judge=FakeJudge(), group_size=group_size, timeout=0.05)


@pytest.mark.parametrize("group_size", [0, 4])
def test_verl_omni_stops_where_the_judge_breaks(FakeJudge, group_size):
    for options in ({}, {"answers_nan": True}):
        judge = broken(FakeJudge, **options)
        if not group_size:
            verl([bytes_chw(100)], judge=judge)
        with pytest.raises(JudgeError):
            verl([bytes_chw(red) for red in REDS], judge=judge, group_size=group_size)


# ---------------------------------------------------------------------------------------------------------------------
# miles_diffusion, miles/rollout/rm_hub/__init__.py: batched_async_rm


def miles_host(rm, microgroups, **args):
    async def generate_and_rm_microgroup(samples):
        await asyncio.to_thread(time.sleep, 0.001)  # the host's own ray.get, in the loop's few threads
        rewards = await rm(SimpleNamespace(custom_rm_path="my_rewards.rm", **args), samples)
        for one, reward in zip(samples, rewards, strict=True):
            one.reward = reward

    async def rollout():
        await asyncio.gather(*(generate_and_rm_microgroup(samples) for samples in microgroups))

    asyncio.run(rollout())
    return [one.reward for samples in microgroups for one in samples]


def generated(
    red: int, layout: str = "CTHW", scale: float = 1.0, frames: int = 1, prompt: Any = "a"
) -> SimpleNamespace:
    video = pixels([red]).expand(frames, -1, -1, -1) * scale  # TCHW
    output = {
        "CTHW": video.transpose(0, 1),
        "TCHW": video,
        "THWC": video.permute(0, 2, 3, 1),
        "1THWC": video.permute(0, 2, 3, 1)[None],
        "CHW": video[0],
    }[layout]
    return SimpleNamespace(prompt=prompt, generated_output=output, reward=None, metadata={})


@pytest.mark.parametrize(
    "layout, scale, frames",
    [("CTHW", 1, 1), ("CTHW", 255, 1), ("CHW", 1, 1), ("THWC", 1, 5), ("1THWC", 1, 5), ("CTHW", 1, 5), ("TCHW", 1, 5)],
)
def test_miles_diffusion_layouts(FakeJudge, layout, scale, frames):
    rm = listener_rm(FakeJudge(), reference=REFERENCE)
    rewards = miles_host(rm, [[generated(red, layout, scale, frames) for red in REDS]])
    assert order(rewards) == BETTER and all(type(reward) is float for reward in rewards)


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


# ---------------------------------------------------------------------------------------------------------------------
# The server: UniRL's RemoteRewardBackend (unirl/reward/remote.py), Flow-Factory's RemoteRewardClient, RemoteReward


@contextmanager
def serving(reward, **options):
    server = make_server(reward, port=0, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def http(url: str, body: Any = None, raw: bytes | None = None) -> tuple[int, dict]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    try:
        with request.urlopen(request.Request(url, data, {"Content-Type": "application/json"}), timeout=30) as reply:
            return reply.status, json.load(reply)
    except HTTPError as refused:
        return refused.code, json.load(refused)


def unirl_request(red=None, text: Any = "a", **turn) -> dict:
    media = {} if red is None else {"image_b64": b64(png(red))}
    return {"history": [{"text": text, **media, **turn}], "required_rewards": ["listener"], "metadata": None}


def unirl_host(url: str, requests: list[dict]) -> tuple[list[float | None], list[str | None]]:
    """Rewards and errors of a batch; None for a sample that failed, of which the host is told the reason."""
    status, health = http(f"{url}/health")
    assert status == 200 and "listener" in health["rewards"]
    identities = [
        {"request_id": str(i), "sample_id": None, "group_id": "g", "source_rank": 0} for i in range(len(requests))
    ]
    wire = [one | identity for one, identity in zip(requests, identities, strict=True)]
    status, raw = http(f"{url}/score", {"protocol_version": "1", "requests": wire})
    if 400 <= status < 500:
        raise RuntimeError(raw["detail"])
    assert status == 200 and raw["protocol_version"] == "1"
    for expected, actual in zip(identities, raw["identities"], strict=True):
        assert all(actual[key] == value for key, value in expected.items())
    rewards, errors = [], []
    for result, error in zip(raw["results"], raw["errors"], strict=True):
        if "listener" in result:
            values = list(result["listener"].values())
            assert all(isinstance(value, float) and np.isfinite(value) for value in values)
            rewards.append(values[0])
            errors.append(None)
        else:
            rewards.append(None)
            errors.append(error["listener"])
    return rewards, errors


def test_unirl(FakeJudge):
    with serving(ListenerReward(FakeJudge(), scheme="reference", reference=REFERENCE, on_failure="nan")) as url:
        rewards, errors = unirl_host(url, [unirl_request(red) for red in REDS])
        condition = unirl_request(9)["history"][0]
        edit = unirl_request(REDS[0]) | {"history": [condition, *unirl_request(REDS[0])["history"]]}
        assert unirl_host(url, [edit])[0] == pytest.approx(rewards[:1])
    assert order(rewards) == BETTER and errors == [None] * 4


def test_unirl_video(FakeJudge, shade, tmp_path):
    requests = []
    for red in REDS:
        shade(red).save(tmp_path / "a.gif", save_all=True, append_images=[shade(red + 5)] * 3, duration=100)
        requests.append(unirl_request(video_b64=b64((tmp_path / "a.gif").read_bytes())))
    with serving(ListenerReward(FakeJudge(), reference=REFERENCE)) as url:
        assert order(unirl_host(url, requests)[0]) == BETTER


BAD_REQUESTS: dict[str, dict] = {
    "no media": unirl_request(),
    "not base64": unirl_request(image_b64="%%%"),
    "base64 of nothing": unirl_request(image_b64=""),
    "base64 of text": unirl_request(image_b64=b64(b"a fox")),
    "truncated image": unirl_request(image_b64=b64(png(4)[:50])),
    "image of another type": unirl_request(image_b64=7),
    "a file of the server": unirl_request(video_path="/etc/passwd"),
    "memory of another process": unirl_request(image_ipc="handle"),
    "empty prompt": unirl_request(4, ""),
    "no prompt": unirl_request(4, None),
    "no history": unirl_request() | {"history": []},
    "history of another type": unirl_request() | {"history": "a"},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_unirl_fails_a_bad_sample_and_no_other(FakeJudge, name):
    requests = [unirl_request(200), BAD_REQUESTS[name], unirl_request(20)]
    reply = unirl.answer(ListenerReward(FakeJudge()), {"requests": requests})
    assert reply["results"][1] == {} and reply["errors"][1]["listener"]
    first, last = (reply["results"][k]["listener"]["score"] for k in (0, 2))
    assert first > 0 > last and reply["errors"][0] == reply["errors"][2] == {}


def test_unirl_fails_the_samples_that_the_judge_broke_on(FakeJudge):
    requests = [unirl_request(red) for red in REDS]
    with serving(ListenerReward(broken(FakeJudge), scheme="group", on_failure="nan")) as url:
        rewards, errors = unirl_host(url, requests)
    assert rewards[2] is None and "broke" in str(errors[2])
    assert rewards[0] > rewards[3] > rewards[1]  # type: ignore[operator]
    reply = unirl.answer(ListenerReward(broken(FakeJudge), scheme="group"), {"requests": requests})
    assert reply["results"] == [{}] * 4 and all(error["listener"] for error in reply["errors"])


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"requests": 5},
        {"requests": ["a"]},
        {"requests": [unirl_request(3) | {"required_rewards": ["clip"]}]},
        {"requests": [unirl_request(3) | {"required_rewards": []}]},
        {"requests": [unirl_request(3)], "protocol_version": "2"},
    ],
)
def test_unirl_refuses_a_malformed_request(FakeJudge, body):
    with serving(ListenerReward(FakeJudge())) as url:
        status, reply = http(f"{url}/score", body)
    assert status == 400 and reply["detail"]


def test_unirl_ranks_meet_in_a_collector(FakeJudge):
    """Four processes with one image each of the same prompt: together they are a group."""
    with serving(GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 4)) as url, ThreadPoolExecutor(4) as ranks:
        rewards = list(ranks.map(lambda red: unirl_host(url, [unirl_request(red)])[0][0], REDS))
    assert order(rewards) == BETTER and sum(rewards) == pytest.approx(0, abs=1e-5)  # type: ignore[arg-type]


def test_unirl_unreadable_sample_takes_its_place_in_the_collector(FakeJudge):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 4, timeout=20)
    bad = {"no prompt": unirl_request(4, None), "truncated": BAD_REQUESTS["truncated image"]}
    for number, one in enumerate(bad.values()):
        requests = [unirl_request(200), one, unirl_request(20), unirl_request(90)]
        reply = unirl.answer(collector, {"requests": [each | {"group_id": f"g{number}"} for each in requests]})
        assert [bool(error) for error in reply["errors"]] == [False, True, False, False]
        assert reply["results"][0]["listener"]["score"] > 0 > reply["results"][2]["listener"]["score"]


def test_unirl_groups_are_told_apart_by_their_id(FakeJudge):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 2, timeout=20)
    requests = [unirl_request(red) | {"group_id": group} for red, group in zip((1, 2, 3, 4), "xyxy", strict=True)]
    unirl.answer(collector, {"requests": requests})
    assert [[pair[1:] for pair in call] for call in judge.calls] == [[(1, 3)], [(2, 4)]]
    mixed = [unirl_request(red, text) | {"group_id": "z"} for red, text in ((1, "a"), (2, "b"))]
    reply = unirl.answer(collector, {"requests": mixed})
    assert reply["results"] == [{}, {}] and "2 different prompts" in reply["errors"][0]["listener"]


def test_unirl_request_that_is_repeated_counts_once(FakeJudge):
    """The client's timeout is shorter than the wait for the group: it sends the same keys again, in the middle of the
    wait and after the answer was lost."""
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 4, timeout=20)
    halves = [
        {"requests": [unirl_request(red) | {"group_id": "g", "idempotency_key": str(red)} for red in reds]}
        for reds in (REDS[:2], REDS[2:])
    ]
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(unirl.answer, collector, halves[0]) for _ in range(2)]
        time.sleep(0.1)
        assert not any(one.done() for one in waiting) and judge.calls == []
        last = unirl.answer(collector, halves[1])
        first, again = (one.result(5) for one in waiting)
    assert first == again == unirl.answer(collector, halves[0])
    scores = [result["listener"]["score"] for result in first["results"] + last["results"]]
    assert order(scores) == BETTER and len(judge.calls) == 1


def test_unirl_version_can_be_pinned(FakeJudge):
    with serving(GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2)) as url:
        version = http(f"{url}/health")[1]["scorer_version"]
        reply = http(f"{url}/score", {"requests": [unirl_request(11), unirl_request(12)]})[1]
    assert version.endswith(" fake") and {one["scorer_version"] for one in reply["identities"]} == {version}


def hangs_up(url: str, body: dict) -> None:
    """A client that sends a request and loses patience."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /compute HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        time.sleep(0.2)


def test_flow_factory_request_that_is_sent_again_counts_once_and_an_equal_one_twice(FakeJudge):
    judge = FakeJudge()
    body = {"prompt": ["a"], "image": [b64(png(7))], "video": None, "condition_images": None, "kwargs": None}
    with serving(GroupCollector(ListenerReward(judge, scheme="group"), 3, timeout=20)) as url:
        hangs_up(url, body)
        with ThreadPoolExecutor(3) as clients:
            # One sends again, another process has the very same image; the group is full with the third.
            equal = [clients.submit(http, f"{url}/compute", body) for _ in range(2)]
            time.sleep(0.2)
            assert judge.calls == [], "the first client's image was counted twice"
            third = clients.submit(http, f"{url}/compute", body | {"image": [b64(png(200))]})
            rewards = [one.result(10)[1]["rewards"][0] for one in (*equal, third)]
    assert rewards[0] == rewards[1] < rewards[2] and len(judge.calls) == 1


def test_flow_factory_remote_bad_image_keeps_no_neighbour_from_its_group(FakeJudge):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 3, timeout=20)
    assert compute(collector, {"prompt": ["a", "a"], "image": ["%%%", b64(png(3))]})["kind"] == "input"
    assert compute(collector, {"prompt": ["a"], "image": [b64(png(9))]})["rewards"][0] > 0
    assert judge.calls == [[("a", 3, 9)]]


def flow_factory_client(url: str, prompt, image=None, video=None) -> list[float]:
    payload = {"prompt": prompt, "image": image, "video": video, "condition_images": None, "kwargs": None}
    status, data = http(f"{url}/compute", payload)
    if status >= 400:
        raise RuntimeError(f"Failed to connect to {url}")
    if data.get("error"):
        raise RuntimeError(f"Server error: {data['error']}")
    return torch.tensor(data["rewards"], dtype=torch.float32).tolist()


def test_flow_factory_remote(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        assert http(f"{url}/health")[0] == 200
        images = [b64(png(red)) for red in REDS]
        assert order(flow_factory_client(url, ["a"] * 4, images)) == BETTER
        assert order(flow_factory_client(url, ["a"] * 4, video=[[image] * 3 for image in images])) == BETTER


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": ["a"]},
        {"prompt": ["a", ""]},
        {"prompt": ["a", None]},
        {"prompt": "aa"},
        {"prompt": None},
        {"image": [b64(png(11)), "%%%"]},
        {"image": [b64(png(11)), b64(png(11)[:40])]},
        {"image": [b64(png(11)), None]},
        {"image": b64(png(11))},
        {"image": None},
        {"video": [[b64(png(11))]] * 2},
        {"image": [b64(png(11)), []]},
    ],
)
def test_flow_factory_remote_stops_on_bad_input(FakeJudge, bad):
    body = {"prompt": ["a", "a"], "image": [b64(png(11)), b64(png(12))], "video": None} | bad
    reply = compute(ListenerReward(FakeJudge()), body)
    assert reply["rewards"] is None and reply["kind"] == "input" and reply["error"]
    with serving(ListenerReward(FakeJudge())) as url, pytest.raises(RuntimeError, match="Server error"):
        flow_factory_client(url, body["prompt"], body["image"], body["video"])


def test_flow_factory_remote_stops_where_the_judge_breaks(FakeJudge):
    for policy in ("raise", "nan"):
        reward = ListenerReward(broken(FakeJudge), scheme="group", on_failure=policy)
        with serving(reward) as url, pytest.raises(RuntimeError, match="broke"):
            flow_factory_client(url, ["a"] * 4, [b64(png(red)) for red in REDS])


def test_remote_reward_is_the_reward_itself(FakeJudge):
    reward = ListenerReward(FakeJudge(listener_slope=2.0), reference=REFERENCE, scheme="reference", on_failure="nan")
    with serving(reward) as url:
        here, there = reward(pixels(), PROMPTS), as_reward(url, {}, scheme="auto")(pixels(), PROMPTS, None)
        assert there[0] == pytest.approx(here[0]) and there[0].dtype == np.float32
        assert there[1].keys() == here[1].keys()
        assert all(there[1][key] == pytest.approx(here[1][key]) for key in here[1])
        with pytest.raises(InputError, match="empty"):
            RemoteReward(url)(pixels([9]), [""])


def test_remote_reward_gives_nan_for_what_the_judge_broke_on_and_raises_where_it_raised(FakeJudge):
    with serving(ListenerReward(broken(FakeJudge), scheme="group", on_failure="nan")) as url:
        scores, info = RemoteReward(url)(pixels(), PROMPTS)
        assert np.isnan(scores).tolist() == [False, False, True, False] and info["failed"].tolist() == [0, 0, 1, 0]
        with pytest.raises(JudgeError, match="broke on them"):
            trl_host(ddpo_reward(url), [[pixels(), PROMPTS, ({},) * 4]], False)
    with serving(ListenerReward(broken(FakeJudge), scheme="group")) as url, pytest.raises(JudgeError, match="broke"):
        RemoteReward(url)(pixels(), PROMPTS)


def test_remote_reward_without_a_server_says_how_to_start_one():
    with pytest.raises(JudgeError, match="listener-reward serve"):
        RemoteReward("http://127.0.0.1:9", timeout=2)(pixels(), PROMPTS)


def test_server_survives_what_is_no_request(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        assert http(f"{url}/compute", raw=b"\x80\x04cos\nsystem\n.")[0] == 400
        assert http(f"{url}/compute", raw=b"[" * 100_000)[0] == 400
        assert http(f"{url}/nothing")[0] == 404 and http(f"{url}/nothing", {})[0] == 404
        assert flow_factory_client(url, [], []) == []
        assert http(f"{url}/health")[0] == 200


def test_server_on_a_port_that_is_taken_says_so(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url, pytest.raises(InputError, match="port"):
        make_server(ListenerReward(FakeJudge()), port=int(url.rpartition(":")[2]))


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def test_collector_scores_the_rest_of_a_group_of_which_one_cannot_be_read(FakeJudge, shade):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 3, timeout=5)
    futures = [collector.submit(image, "a") for image in (shade(10), "no/such/file.png", shade(200))]
    with pytest.raises(InputError):
        futures[1].result(5)
    assert futures[2].result(5)[0] > 0 > futures[0].result(5)[0]


def test_collector_that_does_not_fill_fails_whole_and_takes_the_next_group(FakeJudge, shade):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2, timeout=0.05)
    with pytest.raises(JudgeError, match="1 of 2"):
        collector.submit(shade(10), "a").result(5)
    futures = [collector.submit(shade(red), "a") for red in (10, 200)]
    assert futures[1].result(5)[0] > 0


def test_collector_tells_groups_of_one_prompt_apart_by_name(FakeJudge, shade):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 2)
    futures = [collector.submit(shade(red), "a", group=group) for red, group in zip((1, 2, 3, 4), "xyxy", strict=True)]
    assert all(future.result(5) for future in futures)
    assert [[pair[1:] for pair in call] for call in judge.calls] == [[(1, 3)], [(2, 4)]]


def test_collector_forgets_names_after_a_while(FakeJudge, shade):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 2, timeout=0.3)
    for _ in range(2):
        futures = [collector.submit(shade(red), "a", name=str(red)) for red in (10, 200)]
        assert futures[1].result(5)[0] > 0
        assert collector.submit(shade(10), "a", name="10") is futures[0]
        time.sleep(0.4)
    assert len(judge.calls) == 2


def test_collector_goes_on_where_a_host_gives_up_on_one_image(FakeJudge, shade):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2, timeout=5)

    async def host():
        task = asyncio.ensure_future(asyncio.wrap_future(collector.submit(shade(10), "a")))
        await asyncio.sleep(0)
        task.cancel()
        return await asyncio.wrap_future(collector.submit(shade(200), "a"))

    assert asyncio.run(host())[0] > 0


@pytest.mark.parametrize("answer", [None, "x", [1.0], [[1.0]] * 4, [1.0, None, 2.0, 3.0], [1, 2, 3, float("inf")]])
def test_another_reward_that_does_not_give_one_score_each_is_an_error(answer):
    with pytest.raises(JudgeError):
        score(lambda images, prompts, metadata: (answer, {}), pixels(), PROMPTS)


def test_metadata_that_is_missing_becomes_empty_dicts():
    seen = []

    def reward(images, prompts, metadata):
        seen.append(metadata)
        return torch.zeros(len(images)), {"words": ["a"] * 4, "one": np.ones(1), "fine": torch.ones(4)}

    assert score(reward, pixels(), PROMPTS)[1].keys() == {"fine"}
    assert seen == [({}, {}, {}, {})]


@pytest.mark.parametrize("metadata", [[], [{}] * 3, ({},) * 5])
def test_metadata_that_was_shifted_on_the_way_is_an_error_in_every_host_that_has_some(FakeJudge, metadata):
    calls = [ddpo_reward(FakeJudge()), listener_reward(FakeJudge()), listener_score(FakeJudge())("cpu")]
    for call in (*calls, listener_multi_score(FakeJudge())):
        with pytest.raises(InputError, match=f"metadata has {len(metadata)}"):
            call(pixels(), PROMPTS, metadata)


def test_what_is_no_reward_is_named():
    for options in ({}, {"scheme": "group"}):
        with pytest.raises(InputError, match="reward"):
            as_reward(5, options, scheme="auto")
    with pytest.raises(InputError, match="scheme"):
        as_reward(lambda *_: None, {"scheme": "group"}, scheme="auto")


def unpickling(source: str) -> list[str]:
    """What in a module's source can run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""]
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "loads"):
            found += [f"{ast.unparse(node.value)}.{node.attr}"]
    modules = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    safe = {"json.load", "json.loads"}
    return [name for name in found if name.split(".")[0] in modules or (".load" in name and name not in safe)]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "from dill import loads",
        "import cloudpickle",
        "torch.load(file)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(source):
    assert unpickling(source)


@pytest.mark.parametrize("name", ["server", "remote", "unirl", "flow_factory", "collector", "contract", "video"])
def test_what_comes_over_the_wire_cannot_run(name):
    path = Path(inspect.getfile(score)).with_name(f"{name}.py")
    assert unpickling(path.read_text(encoding="utf-8")) == []


def test_serve_command(random_judge):
    command = [sys.executable, "-m", "listener_reward.cli", "serve", "--judge", str(random_judge), "--no-think"]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "serving on" in line)
            url = line.split()[-1]
            assert http(f"{url}/health")[1]["rewards"] == {"listener": ["score"]}
            scores, info = RemoteReward(url)(pixels(), PROMPTS)
        finally:
            process.terminate()
    assert scores[0] == 0 and np.isfinite(scores).all() and info["comparisons"].tolist() == [0, 1, 1, 1]


@pytest.mark.skipif("TRL_DDPO_PYTHON" not in os.environ, reason="TRL_DDPO_PYTHON names no interpreter with trl<=0.23.1")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_real_ddpo_trainer_takes_three_steps(mode, tmp_path):
    script = Path(__file__).with_name("trl_ddpo_trainer.py")
    done = subprocess.run([os.environ["TRL_DDPO_PYTHON"], script, mode], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"three steps, {mode}" in done.stdout
