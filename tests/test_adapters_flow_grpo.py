"""flow_grpo, DiffusionNFT and AWM: weighed with other rewards, on one scale in all batches, and a stop at bad ones."""

from __future__ import annotations

import inspect
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import edits
import numpy as np
import pytest
import torch
from adapter_hosts import BAD_TENSORS, BETTER, ERRORS, PROMPTS, REDS, REFERENCE, broken, order, pixels

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.flow_grpo import listener_multi_score, listener_score
from listener_reward.reward import ListenerReward

# ---------------------------------------------------------------------------------------------------------------------
# flow_grpo, DiffusionNFT and AWM, flow_grpo/rewards.py: multi_score; scripts/train_sd3.py, train_nft_sd3.py


def flow_grpo_multi_score(device, score_dict, score_functions):
    score_fns = {}
    for name in score_dict:
        takes_device = "device" in score_functions[name].__code__.co_varnames
        score_fns[name] = score_functions[name](device) if takes_device else score_functions[name]()

    def _fn(images, prompts, metadata, ref_images=None, only_strict=True):
        total_scores, score_details = [], {}
        for name, weight in score_dict.items():
            if name == "listener" and ref_images is not None:  # the lines that the adapter's docstring adds
                scores, _ = score_fns[name](images, prompts, metadata, ref_images)
            else:
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
        for images, prompts, metadata, *ref_images in batches:  # train_flux_kontext.py hands over the last
            keywords = {} if nft else {"only_strict": True}
            samples.append(executor.submit(reward_fn, images, prompts, metadata, *ref_images, **keywords))
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
    reward_fn = listener_multi_score(FakeJudge())  # the images that open a prompt are compared with nothing
    rewards = flow_grpo_host(reward_fn, [(pixels(), list(PROMPTS), [{}] * 4), (pixels([5]), ["b"], [{}])])
    assert {"avg", "listener", "standard_error"} <= rewards.keys()
    assert all(value.shape == (5,) for value in rewards.values())
    logged = {f"reward_{key}": value.mean().item() for key, value in rewards.items()}  # train_sd3.py
    evaluated = {key: np.mean(value[value != -10]).item() for key, value in map(_as_array, rewards.items())}
    assert np.isfinite([*logged.values(), *evaluated.values()]).all()
    assert rewards["comparisons"].tolist() == [0, 1, 1, 1, 0]


def _as_array(item):
    return item[0], item[1].numpy()


def edit_batch(images, sources):
    """As train_flux_kontext.py has them: tensors, and PIL images whose files the metadata name."""
    tensors = torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])
    metadata = [{"prompt": edits.INSTRUCTION, "image": "generated_images/image_9.jpg"} for _ in images]
    return tensors, [edits.INSTRUCTION] * len(images), metadata, list(sources)


@pytest.mark.parametrize("whole", [False, True])
def test_flow_grpo_edits(whole):
    judge = edits.EditJudge()
    if whole:
        reward_fn = listener_multi_score(judge, edits=True)
    else:
        factories = {"jpeg": jpeg_compressibility, "listener": listener_score(judge, edits=True)}
        reward_fn = flow_grpo_multi_score(torch.device("cpu"), {"jpeg": 1.0, "listener": 2.0}, factories)
    first = edit_batch([edits.HALF, edits.HALF], [edits.DARK, edits.BRIGHT])  # what the others meet
    flow_grpo_host(reward_fn, [first])
    images = [edits.GOOD, edits.HALF, edits.WRONG, edits.GOOD, edits.BRIGHT_GOOD, edits.GOOD, edits.BRIGHT_GOOD]
    sources = [edits.DARK] * 5 + [edits.BRIGHT] * 2
    good, half, wrong, dark, dark_too_much, bright_none, bright = flow_grpo_host(
        reward_fn, [edit_batch(images, sources)]
    )["avg"].tolist()
    assert good > half > wrong and dark > dark_too_much and bright > bright_none and good == dark


@pytest.mark.parametrize("make", [lambda judge, **more: listener_score(judge, **more)("cpu"), listener_multi_score])
def test_flow_grpo_edit_without_its_source_stops(make):
    images, prompts, metadata, _ = edit_batch([edits.GOOD, edits.HALF], [edits.DARK] * 2)
    with pytest.raises(
        InputError, match=r"names a source image, 'generated_images/image_9.jpg', and ref_images did not"
    ):
        make(edits.EditJudge())(images, prompts, metadata)
    with pytest.raises(InputError, match=r"prompts\[0\], 'make it redder', has no source image"):
        make(edits.EditJudge(), edits=True)(images, prompts, [{}] * 2)
    assert make(edits.EditJudge())(images, prompts, metadata, torch.stack([images[0] * 0] * 2))


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


def test_flow_grpo_hands_its_device_on(monkeypatch):
    reward = ListenerReward("tiny", scheme="reference")
    factory = listener_score(reward)
    loads = []
    fake = SimpleNamespace(Judge=SimpleNamespace(from_pretrained=lambda name, **options: loads.append(options)))
    monkeypatch.setitem(sys.modules, "listener_reward.judge", fake)
    factory(torch.device("cuda", 3))
    reward._load()
    assert loads == [{"device": "cuda:3"}]
