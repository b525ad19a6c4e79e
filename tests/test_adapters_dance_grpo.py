"""DanceGRPO: images in groups or one by one, videos, and no score for a bad call."""

from __future__ import annotations

from typing import Any

import edits
import numpy as np
import pytest
import torch
from adapter_hosts import BETTER, ERRORS, REDS, broken, order, png, serving
from PIL import Image

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.dance_grpo import ListenerScorer
from listener_reward.reward import ListenerReward

# ---------------------------------------------------------------------------------------------------------------------
# DanceGRPO, fastvideo/train_grpo_flux.py: sample_reference_model, train_one_step; train_grpo_hunyuan.py


def dance_grpo_advantages(rewards: torch.Tensor, generations=4):
    rewards = rewards.to(torch.float32)
    advantages = torch.zeros_like(rewards)
    for start in range(0, len(rewards), generations):
        group = rewards[start : start + generations]
        advantages[start : start + generations] = (group - group.mean()) / (group.std() + 1e-8)
    return advantages


def dance_grpo_main(reward, device=0):
    """`main` of train_grpo_flux.py with none of its own rewards, and the line that the adapter's docstring adds."""
    preprocess_val = None
    reward_model, processor = ListenerScorer(reward, device="cpu"), None
    return lambda images, captions: dance_grpo_host(reward_model, images, captions, processor, preprocess_val)


def dance_grpo_host(reward_model, images, captions, tokenizer=None, preprocess_val=None):
    """`sample_reference_model`, with the two lines changed that the adapter's docstring names."""
    for image, caption in zip(images, captions, strict=True):
        decoded_image, batch_caption = [image], [caption]
        with torch.no_grad():
            reward_model.add(decoded_image[0], batch_caption[0])
    all_rewards = reward_model.collect()
    return dance_grpo_advantages(all_rewards)


def test_dance_grpo_group(FakeJudge, shade):
    judge = FakeJudge()
    scorer = ListenerScorer(judge)
    for _ in range(2):
        advantages = dance_grpo_host(scorer, [shade(red) for red in (*REDS, *reversed(REDS))], ["a"] * 4 + ["b"] * 4)
        assert order(advantages[:4]) == BETTER and torch.allclose(advantages[:4], advantages[4:].flip(0), atol=1e-5)
    assert [len(call) for call in judge.calls] == [12, 12]  # every pair of both groups, in one call of the judge


def test_dance_grpo_edits():
    scorer = ListenerScorer(edits.EditJudge(), edits=True)
    for source, images in (
        (edits.DARK, (edits.GOOD, edits.HALF, edits.WRONG)),
        (edits.DARK, (edits.GOOD, edits.BRIGHT_GOOD)),
        (edits.BRIGHT, (edits.BRIGHT_GOOD, edits.GOOD)),
    ):
        for image in images:
            scorer.add(image, edits.INSTRUCTION, sources=source)
    good, half, wrong, _, too_much, done, none = scorer.collect().tolist()
    assert good > half > wrong and done > none and good > too_much
    scorer(edits.HALF, edits.INSTRUCTION, sources=edits.BRIGHT)  # what the next one meets
    assert scorer(edits.BRIGHT_GOOD, edits.INSTRUCTION, sources=edits.BRIGHT).item() > 0
    for call in (scorer.add, scorer):
        with pytest.raises(InputError, match="has no source image"):
            call(edits.GOOD, edits.INSTRUCTION)


def test_dance_grpo_edit_files(tmp_path):
    scorer = ListenerScorer(edits.EditJudge())
    paths = [str(tmp_path / f"{k}.png") for k in range(3)]
    for path, image in zip(paths, (edits.HALF, edits.GOOD, edits.WRONG), strict=True):
        image.save(path)
    rewards = scorer.reward(paths, [edits.INSTRUCTION] * 3, sources=[edits.DARK] * 3)
    assert order(rewards) == [1, 0, 2]


def test_dance_grpo_without_a_reward_of_its_own(FakeJudge, shade):
    step = dance_grpo_main(FakeJudge())
    assert order(step([shade(red) for red in REDS], ["a"] * 4)) == BETTER


def test_dance_grpo_scripts_of_hpsv3_need_no_change_in_their_loop(FakeJudge, shade, tmp_path):
    """train_grpo_flux_lora.py, _qwenimage.py, _sd.py: `if hps_score.ndim == 2`, then `torch.cat`."""
    reward_model, all_rewards = ListenerScorer(FakeJudge()), []
    for index, red in enumerate(REDS):
        shade(red).save(tmp_path / f"flux_0_{index}.png")
        hps_score: Any = reward_model.reward([str(tmp_path / f"flux_0_{index}.png")], ["a"])
        if hps_score.ndim == 2:
            hps_score = hps_score[:, 0]
        all_rewards.append(hps_score)
    assert order(dance_grpo_advantages(torch.cat(all_rewards, dim=0))) == BETTER


def test_dance_grpo_scores_are_where_the_host_gathers_them(FakeJudge, shade, tmp_path):
    scorer = ListenerScorer(FakeJudge(), device="meta")  # stands in for a GPU
    shade(3).save(tmp_path / "a.png")
    for red in REDS:
        scorer.add(shade(red), "a")
    given: Any = (scorer.collect(), scorer(shade(3), "a"), scorer.reward([str(tmp_path / "a.png")], ["a"]))
    assert [one.device.type for one in given] == ["meta"] * 3
    assert ListenerScorer(FakeJudge(), device=1).device == torch.device("cuda:1")


def test_dance_grpo_groups_by_a_server_are_groups(FakeJudge, shade):
    """By its default, `serve` compares with a reference: a score of another kind, which looks alike."""
    images = [shade(red) for red in REDS]
    with serving(ListenerReward(FakeJudge(), scheme="auto")) as url:
        scorer = ListenerScorer(url)
        assert order(dance_grpo_host(scorer, images, ["a"] * 4)) == BETTER
        assert scorer(images[0], "b").tolist() == [0]
    with serving(ListenerReward(FakeJudge(), scheme="reference")) as url:
        scorer = ListenerScorer(url)
        with pytest.raises(InputError, match=r"wants scores by scheme 'auto'.* answers by 'reference'"):
            dance_grpo_host(scorer, images, ["a"] * 4)


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
        reward: Any = scorer.reward([str(path)], ["a"], use_norm=True)
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
