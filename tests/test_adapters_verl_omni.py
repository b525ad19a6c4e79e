"""verl-omni: samples that come one at a time, every form of a prompt, and no score for a bad one."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import edits
import numpy as np
import pytest
import torch
from adapter_hosts import BETTER, ERRORS, REDS, broken, order, serving

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.verl_omni import compute_score
from listener_reward.reward import ListenerReward

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
        result: Any
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


def test_verl_omni_logs_no_nan(FakeJudge):
    """Of the first sample of a prompt nothing is known that needs a comparison; the host takes means of all samples."""
    results = verl([bytes_chw(red) for red in REDS], judge=FakeJudge(listener_slope=2.0))
    for key in results[0]["reward_extra_info"]:
        assert np.isfinite(np.mean([result["reward_extra_info"][key] for result in results])), key
    assert sorted(results[0]["reward_extra_info"]) == ["comparisons", "failed", "standard_error"]


def verl_edit(images, sources, **entry) -> list[float]:
    """Data as the host's examples/flowgrpo_trainer/qwen_image_edit/prepare_data.py writes them, with a source."""
    visuals = [torch.tensor(np.asarray(image)).permute(2, 0, 1) for image in images]
    infos = [{"split": "train", "index": 0, "instruction": edits.INSTRUCTION} | source for source in sources]
    results = verl(visuals, infos, [edits.INSTRUCTION] * len(images), data_source="image_edit", **entry)
    return [result["reward_score"] for result in results]


@pytest.mark.parametrize("how", ["sources", "list", "Parquet's list", "source_folder"])
def test_verl_omni_edits(how, tmp_path):
    judge = edits.EditJudge()
    for name, source in (("dark.png", edits.DARK), ("bright.png", edits.BRIGHT)):
        source.save(tmp_path / name)
    entry: dict[str, Any] = {"judge": judge, "edits": True}

    def of(name: str) -> dict[str, Any]:
        data = {"bytes": (tmp_path / name).read_bytes(), "path": None}
        return {
            "sources": {"sources": str(tmp_path / name)},
            "list": {"sources": [data]},
            "Parquet's list": {"sources": np.array([data], dtype=object)},
            "source_folder": {"image": name},
        }[how]

    if how == "source_folder":
        entry["source_folder"] = str(tmp_path)
    verl_edit([edits.HALF] * 2, [of("dark.png"), of("bright.png")], **entry)  # what the others meet
    images = [edits.GOOD, edits.HALF, edits.WRONG, edits.BRIGHT_GOOD]
    good, half, wrong, too_much = verl_edit(images, [of("dark.png")] * 4, **entry)
    none, done = verl_edit([edits.GOOD, edits.BRIGHT_GOOD], [of("bright.png")] * 2, **entry)
    assert good > half > wrong and good > too_much and done > none


def test_verl_omni_edits_in_a_group():
    images = [edits.HALF, edits.GOOD, edits.WRONG]
    rewards = verl_edit(images, [{"sources": [edits.DARK]}] * 3, judge=edits.EditJudge(), group_size=3)
    assert order(rewards) == [1, 0, 2] and sum(rewards) == pytest.approx(0, abs=1e-5)


def test_verl_omni_edit_without_its_source_stops():
    with pytest.raises(
        InputError, match=r"names a source image, 'a.png', which the host does not hand over; give source"
    ):
        verl_edit([edits.GOOD], [{"image": "a.png"}], judge=edits.EditJudge())
    with pytest.raises(InputError, match="has no source image, and this reward is for edits"):
        verl_edit([edits.GOOD], [{}], judge=edits.EditJudge(), edits=True)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"grup_size": 3}, "grup_size: no option of a ListenerReward, which has scheme, reference,"),
        ({"think_": False}, "think_: no option"),
        ({"reference": "/no/such.json"}, "/no/such.json cannot be read"),
        ({"judge": "http://127.0.0.1:9", "reference": "a.json"}, "reference: no option for a URL, which takes scheme"),
        (
            {"judge": "http://127.0.0.1:9", "grup_size": 3},
            "grup_size: no option for a URL.*may have judge, scheme, group_size",
        ),
    ],
)
def test_verl_omni_key_that_has_no_effect_is_refused(entry, words):
    with pytest.raises(InputError, match=words):
        verl([bytes_chw(3)], **({"judge": "tiny"} | entry))


def test_verl_omni_reference_is_a_file_of_its_own(FakeJudge, shade, tmp_path, monkeypatch):
    shade(100).save(tmp_path / "a.png")
    (tmp_path / "references.json").write_text('{"a": "a.png"}')
    monkeypatch.setattr(ListenerReward, "_get_judge", lambda self: FakeJudge(slope=3.0))
    results = verl([bytes_chw(red) for red in REDS], judge="tiny", reference=str(tmp_path / "references.json"))
    expected = [3 * (red - 100) / 255 for red in REDS]
    assert [result["reward_score"] for result in results] == pytest.approx(expected, abs=1e-4)


def test_verl_omni_text_to_be_drawn_is_no_prompt(FakeJudge):
    """examples/flowgrpo_trainer/data_process/qwenimage_ocr.py, whose ground truth is what stands in quotation marks;
    qwenimage_ocr_http_service.py, of the same data_source, has the whole prompt there, and sd3_ocr.py in raw_prompt."""
    call = {"solution_image": bytes_chw(3), "data_source": "flow_grpo/ocr", "judge": FakeJudge()}
    with pytest.raises(InputError, match="'STOP', the text to be drawn"):
        asyncio.run(compute_score(ground_truth="STOP", extra_info={"split": "train", "index": 0}, **call))
    for truth, info in (('a sign says "STOP"', {}), ("STOP", {"raw_prompt": "a sign says STOP"})):
        assert asyncio.run(compute_score(ground_truth=truth, extra_info=info, **call))["score"] == 0


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
        results = verl([bytes_chw(red) for red in range(10, 50)], judge=url, scheme="group")
        with pytest.raises(InputError, match=r"wants scores by scheme 'reference'.*answers by 'group'"):
            verl([bytes_chw(3)], judge=url)
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
        verl([bad["visual"]], [bad["info"]], judge=FakeJudge(), group_size=group_size, timeout=20)


@pytest.mark.parametrize("group_size", [0, 4])
def test_verl_omni_stops_where_the_judge_breaks(FakeJudge, group_size):
    for options in ({}, {"answers_nan": True}):
        judge = broken(FakeJudge, **options)
        if not group_size:
            verl([bytes_chw(100)], judge=judge)
        with pytest.raises(JudgeError):
            verl([bytes_chw(red) for red in REDS], judge=judge, group_size=group_size)
