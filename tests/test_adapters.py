"""What holds for every adapter, what they share, and trl's own trainer; the hosts have a file each beside this one."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_hosts import PROMPTS, HandClock, generated, miles_host, pixels
from edits import BRIGHT, DARK

from listener_reward import Prompt, integrations
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.ddpo_pytorch import listener_reward
from listener_reward.integrations.flow_grpo import listener_multi_score, listener_score
from listener_reward.integrations.miles_diffusion import listener_rm
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.trl import ddpo_reward
from listener_reward.reward import ListenerReward


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


@pytest.mark.parametrize("scheme", ["reference", "auto"])
def test_the_mean_of_part_of_a_group_is_refused(FakeJudge, scheme):
    policy = {"scheme": scheme, "on_failure": "group-mean"}
    for make in (listener_score, listener_multi_score, ddpo_reward, listener_reward, listener_rm):
        with pytest.raises(InputError, match="group-mean"):
            make(FakeJudge(), **policy)
    with pytest.raises(InputError, match="group-mean"):
        listener_multi_score(ListenerReward(FakeJudge(), **policy))


def test_a_group_on_which_the_judge_broke_altogether_is_an_error_under_every_policy(FakeJudge):
    for policy in ("raise", "nan", "group-mean"):
        judge = FakeJudge(breaks_on=lambda *_: True)
        with pytest.raises(JudgeError):
            score(ListenerReward(judge, on_failure=policy), pixels(), PROMPTS)


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def test_collector_scores_the_rest_of_a_group_of_which_one_cannot_be_read(FakeJudge, shade):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 3, timeout=5)
    futures = [collector.submit(image, "a") for image in (shade(10), "no/such/file.png", shade(200))]
    with pytest.raises(InputError):
        futures[1].result(5)
    assert futures[2].result(5)[0] > 0 > futures[0].result(5)[0]


def test_collector_that_does_not_fill_fails_whole_and_takes_the_next_group(FakeJudge, shade):
    hand = HandClock()
    reward = ListenerReward(FakeJudge(), scheme="group")
    collector = GroupCollector(reward, 2, timeout=10, clock=hand.now, timer=hand.timer)
    alone = collector.submit(shade(10), "a")
    hand.advance(9.9)
    assert not alone.done()
    hand.advance(0.2)
    with pytest.raises(JudgeError, match="1 of 2"):
        alone.result(0)
    futures = [collector.submit(shade(red), "a") for red in (10, 200)]
    assert futures[1].result(5)[0] > 0


def test_collector_tells_groups_of_one_prompt_apart_by_name(FakeJudge, shade):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 2)
    futures = [collector.submit(shade(red), "a", group=group) for red, group in zip((1, 2, 3, 4), "xyxy", strict=True)]
    assert all(future.result(5) for future in futures)
    assert [[pair[1:] for pair in call] for call in judge.calls] == [[(1, 3)], [(2, 4)]]


def test_collector_forgets_names_after_a_while(FakeJudge, shade):
    judge, hand = FakeJudge(), HandClock()
    reward = ListenerReward(judge, scheme="group")
    collector = GroupCollector(reward, 2, timeout=10, clock=hand.now, timer=hand.timer)
    for _ in range(2):
        futures = [collector.submit(shade(red), "a", name=str(red)) for red in (10, 200)]
        assert futures[1].result(5)[0] > 0
        both = [collector.submit(shade(red), "b") for red in (10, 200)]
        both[1].result(5)  # groups are scored one after the other: the first one is over
        hand.advance(9.9)
        assert collector.submit(shade(10), "a", name="10") is futures[0]
        hand.advance(0.2)
    assert [call[0][0] for call in judge.calls] == ["a", "b", "a", "b"]


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


@pytest.mark.parametrize("how", ["sources", "metadata", "prompts"])
def test_any_reward_reads_sources_in_the_metadata_and_texts_in_the_prompts(how):
    calls = []

    def reward(images, prompts, metadata):
        calls.append((prompts, metadata))
        return [0.0] * len(images), {}

    images, texts, sources = [DARK] * 3, ["a", "a", "b"], [[DARK, BRIGHT], [DARK, BRIGHT], None]
    if how == "sources":
        score(reward, images, texts, [{"key": 1}, {}, None], sources=sources)
    elif how == "metadata":
        score(reward, images, texts, [{"key": 1, "sources": sources[0]}, {"sources": sources[1]}, {"sources": None}])
    else:
        asked = [Prompt(text, source or ()) for text, source in zip(texts, sources, strict=True)]
        score(reward, images, asked, [{"key": 1}, {}, {}])
    ((prompts, metadata),) = calls
    assert prompts == texts and metadata[0]["key"] == 1
    assert [source.tobytes() for source in metadata[0]["sources"]] == [DARK.tobytes(), BRIGHT.tobytes()]
    assert metadata[0]["sources"] is metadata[1]["sources"] and not metadata[2].get("sources")
    score(reward, images, [Prompt("a", DARK, "quality"), "a", "b"])
    assert calls[1][0] == [Prompt("a", criterion="quality"), "a", "b"]


def test_sources_that_do_not_fit_the_metadata_are_named():
    def reward(images, prompts, metadata):
        pytest.fail("it was asked")

    with pytest.raises(InputError, match="metadata has sources too"):
        score(reward, [DARK] * 2, ["a"] * 2, [{"sources": DARK}] * 2, sources=[DARK] * 2)
    with pytest.raises(InputError, match="metadata has a str; with source images each entry has to be a dict"):
        score(reward, [DARK] * 2, ["a"] * 2, ["{}", "{}"], sources=[DARK] * 2)
    with pytest.raises(InputError, match="sources has 1 entries for 2 images"):
        score(reward, [DARK] * 2, ["a"] * 2, sources=[DARK])
    with pytest.raises(InputError, match=r"prompts\[1\], 'b', has no source image, and this reward is for edits"):
        score(reward, [DARK] * 2, ["a", "b"], sources=[DARK, None], edits=True)


def test_what_is_no_reward_is_named():
    for options in ({}, {"scheme": "group"}):
        with pytest.raises(InputError, match="reward"):
            as_reward(5, options, scheme="auto")
    with pytest.raises(InputError, match="scheme"):
        as_reward(lambda *_: None, {"scheme": "group"}, scheme="auto")


def unpickling(source: str) -> list[str]:
    """What in a module's source can run what it reads."""
    found, tensors_only = [], set()
    for node in ast.walk(ast.parse(source)):  # a call comes before the name that it calls
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            if any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords):
                tensors_only.add(node.func)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found += [] if name == "torch.load" and node in tensors_only else [name]
    modules = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = [name for name in found if name not in ("json.load", "json.loads")]
    return [name for name in found if name.split(".")[0] in modules or name.endswith((".load", ".loads"))]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "from dill import loads",
        "from torch import load",
        "import cloudpickle",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "torch.jit.load(file, weights_only=True)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(source):
    assert unpickling(source)


def test_reading_json_and_tensors_alone_is_no_unpickling():
    assert unpickling("json.loads(text); torch.load(file, map_location='cpu', weights_only=True); self._load()") == []


INTEGRATIONS = Path(integrations.__file__).parent


@pytest.mark.parametrize("name", sorted(str(path.relative_to(INTEGRATIONS)) for path in INTEGRATIONS.rglob("*.py")))
def test_what_comes_over_the_wire_cannot_run(name):
    """Every file, and not those alone that read from a socket now: the next one would not be on a list."""
    assert unpickling((INTEGRATIONS / name).read_text(encoding="utf-8")) == []


@pytest.mark.skipif("TRL_DDPO_PYTHON" not in os.environ, reason="TRL_DDPO_PYTHON names no interpreter with trl<=0.23.1")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_real_ddpo_trainer_takes_three_steps(mode, tmp_path):
    script = Path(__file__).with_name("trl_ddpo_trainer.py")
    done = subprocess.run([os.environ["TRL_DDPO_PYTHON"], script, mode], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"three steps, {mode}" in done.stdout
