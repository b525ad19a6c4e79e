"""trl's DDPOTrainer and ddpo-pytorch: right advantages for good batches, and a stop at bad ones, in threads or not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import edits
import numpy as np
import pytest
import torch
from adapter_hosts import BAD_TENSORS, BETTER, ERRORS, PROMPTS, REFERENCE, broken, order, pixels, trl_host

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.ddpo_pytorch import listener_reward
from listener_reward.integrations.trl import ddpo_reward
from listener_reward.reward import ListenerReward

# ---------------------------------------------------------------------------------------------------------------------
# trl, whose host is in adapter_hosts.py


@pytest.mark.parametrize("make", [ddpo_reward, listener_reward])
def test_edits_whose_sources_the_prompt_function_gives(make):
    """Both hosts hand on what their prompt functions give beside the prompt."""
    reward_fn = make(edits.EditJudge(), edits=True)

    def scores(images, source):
        tensors = torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])
        return reward_fn(tensors, (edits.INSTRUCTION,) * len(images), ({"sources": [source]},) * len(images))[0]

    for source in (edits.DARK, edits.BRIGHT):
        scores([edits.HALF], source)  # what the others meet
    good, half, wrong, too_much = scores([edits.GOOD, edits.HALF, edits.WRONG, edits.BRIGHT_GOOD], edits.DARK)
    none, done = scores([edits.GOOD, edits.BRIGHT_GOOD], edits.BRIGHT)
    assert good > half > wrong and good > too_much and done > none
    with pytest.raises(InputError, match="has no source image"):
        reward_fn(pixels(), PROMPTS, ({},) * 4)


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


@pytest.mark.parametrize("name", sorted(BAD_TENSORS.keys() - {"prompts as one text"}))  # the host unzips them itself
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
