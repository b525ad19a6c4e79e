"""Sources and criteria over HTTP: read, counted, sent once, in groups and references, and never dropped in silence."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from adapter_hosts import b64, http, order, png, scripted, serving
from edits import BRIGHT, BRIGHT_GOOD, DARK, GOOD, HALF, INSTRUCTION, WRONG, EditJudge
from PIL import Image

from listener_reward import Prompt
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations import unirl
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.serving.computing import compute
from listener_reward.integrations.serving.limits import Intake, Limits, TooMuch
from listener_reward.media.images import png_of, to_picture
from listener_reward.pairs import as_prompt
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward
from listener_reward.verdict import Verdict

EDITS = [HALF, GOOD, WRONG]
RIGHT = [1, 0, 2]
"""Positions of `EDITS`, best first."""


def sent(image: Image.Image) -> str:
    return b64(png_of(image))


def body(images: Any = EDITS, sources: Any = (DARK,), **more: Any) -> dict[str, Any]:
    conditions = [[sent(source) for source in sources]] * len(images)
    return {
        "prompt": [INSTRUCTION] * len(images),
        "image": [sent(image) for image in images],
        "condition_images": conditions,
    } | more


def group() -> ListenerReward:
    return ListenerReward(EditJudge(), scheme="group")


# --- POST /compute


def test_an_edit_is_scored_with_its_source():
    reply = compute(group(), body())
    assert order(reply["rewards"]) == RIGHT and reply["sources"] == [1, 1, 1]
    numbered = compute(group(), body(condition_images=[[0]] * 3, pictures=[sent(DARK)]))
    assert numbered == reply
    assert "sources" not in compute(lambda images, prompts, metadata: (np.zeros(len(images)), {}), body(sources=()))


def test_one_instruction_on_two_sources_is_two_groups():
    images = [GOOD, BRIGHT_GOOD, GOOD, BRIGHT_GOOD]
    reply = compute(group(), body(images, condition_images=[[0], [0], [1], [1]], pictures=[sent(DARK), sent(BRIGHT)]))
    first, second, third, fourth = reply["rewards"]
    assert first > second and third < fourth and reply["info"]["comparisons"] == [1, 1, 1, 1]
    assert first + second == pytest.approx(0, abs=1e-5) == third + fourth


def test_the_reference_belongs_to_the_instruction_and_its_source():
    reward = ListenerReward(EditJudge(), scheme="reference")
    assert compute(reward, body([GOOD]))["rewards"] == [0]
    assert compute(reward, body([GOOD], (BRIGHT,)))["rewards"] == [0]
    assert (
        compute(reward, body([BRIGHT_GOOD]))["rewards"][0]
        < 0
        < compute(reward, body([BRIGHT_GOOD], (BRIGHT,)))["rewards"][0]
    )


def test_source_videos_are_storyboards_after_the_images():
    seen: list[Any] = []

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict]:
        assert prompts == [INSTRUCTION]  # texts, for whoever knows no others
        seen.extend(metadata)
        return np.zeros(len(images)), {}

    frames = [sent(DARK)] * 4
    reply = compute(reward, body([GOOD], condition_videos=[[frames, frames]]))
    assert reply["sources"] == [3]
    assert [source.size for source in seen[0]["sources"]] == [(8, 8), (44, 20), (44, 20)]


def test_a_picture_that_comes_often_is_counted_and_decoded_once(monkeypatch):
    decoded: list[str] = []
    monkeypatch.setattr(
        "listener_reward.integrations.serving.asked.to_picture",
        lambda image, field: decoded.append(field) or to_picture(image),
    )
    assert compute(group(), body(), intake=Intake(Limits(images=4)))["sources"] == [1, 1, 1]
    assert decoded == ["condition_images[0][0]"]
    with pytest.raises(TooMuch, match="the request has 4 pictures, more than 3"):
        compute(group(), body(), intake=Intake(Limits(images=3)))
    with pytest.raises(TooMuch, match="the request has 256 pixels, more than 255"):
        compute(group(), body(), intake=Intake(Limits(pixels=255)))
    with pytest.raises(TooMuch, match=r"prompts\[0\] has 17 source images, more than 16"):
        compute(group(), body(condition_images=[[0] * 17] * 3, pictures=[sent(DARK)]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"condition_images": [[]]}, "condition_images has 1 entries for 3 prompts"),
        ({"condition_images": "a"}, "condition_images is a str"),
        ({"condition_images": [{}] * 3}, r"condition_images[0] is a dict"),
        ({"condition_images": [["%%%"]] * 3}, r"condition_images[0][0] is not base64"),
        ({"condition_images": [[b64(b"no picture")]] * 3}, r"condition_images[0][0]"),
        ({"condition_images": [[b64(png(1)[:40])]] * 3}, r"condition_images[0][0]"),
        ({"condition_images": [[3]] * 3}, r"condition_images[0][0] is 3, and pictures has 0"),
        ({"condition_images": [[-1]] * 3, "pictures": [b64(png(1))]}, r"condition_images[0][0] is -1"),
        ({"condition_images": [[True]] * 3, "pictures": [b64(png(1))] * 2}, r"condition_images[0][0] is not base64"),
        ({"pictures": 3}, "pictures is a int"),
        ({"pictures": [None]}, r"pictures[0] is not base64"),
        ({"condition_videos": [[[3]]] * 3}, r"condition_videos[0][0][0] is not base64"),
        ({"criterion": "quality"}, "criterion is a str"),
        ({"criterion": [3] * 3}, r"criterion[0] is 3"),
        ({"prompt": [None] * 3}, "prompt"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_read_are_named(wrong, said):
    for reward in (group(), GroupCollector(group(), 3)):
        reply = compute(reward, body() | wrong)
        assert reply["rewards"] is None and reply["kind"] == "input" and said in reply["error"]


def test_whose_scheme_depends_on_the_company_counts_sources():
    auto = ListenerReward(EditJudge(), scheme="auto")
    apart = body([GOOD, GOOD], condition_images=[[sent(DARK)], [sent(BRIGHT)]])
    assert compute(auto, apart, scheme="reference")["rewards"] == [0, 0]
    with pytest.raises(InputError, match="wants scores by scheme 'group'"):
        compute(auto, apart, scheme="group")
    assert compute(auto, body(), scheme="group")["rewards"][1] > 0


# --- groups that arrive in pieces


def test_a_collector_waits_for_a_prompt_and_its_sources():
    judge = EditJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 2, timeout=20)
    requests = [(GOOD, DARK), (GOOD, BRIGHT), (BRIGHT_GOOD, DARK), (BRIGHT_GOOD, BRIGHT)]
    with serving(collector) as url, ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(http, f"{url}/compute", body([image], (source,))) for image, source in requests]
        dark, bright, too_much, done = (one.result(20)[1]["rewards"][0] for one in asked)
    assert dark > 0 > too_much and done > 0 > bright
    assert [len(prompt.sources) for prompt in judge.asked] == [1, 1]


def test_a_group_that_fills_holds_each_source_once_and_as_a_file():
    collector = GroupCollector(group(), 3, timeout=20)
    for image in (GOOD, HALF):
        collector.submit(png_of(image), Prompt(INSTRUCTION, DARK))
    ((key, waiting),) = collector._waiting.items()
    assert key == ("prompt", Prompt(INSTRUCTION, DARK).key)
    assert [prompt.sources for prompt in waiting.prompts.values()] == [(png_of(DARK),)]
    assert [member.picture for member in waiting.members] == [png_of(GOOD), png_of(HALF)]
    collector.stop()


def test_a_group_with_two_sources_is_none():
    collector = GroupCollector(group(), 2, timeout=20)
    futures = [collector.submit(GOOD, Prompt(INSTRUCTION, source), group="g") for source in (DARK, BRIGHT)]
    with pytest.raises(InputError, match=r"2 different prompts, 'make it redder', 'make it redder'; .* same source"):
        collector.wait(futures)


def test_a_collector_called_as_a_reward_reads_the_sources_of_the_metadata():
    collector = GroupCollector(group(), 3, timeout=20)
    scores, _ = collector(EDITS, [INSTRUCTION] * 3, [{"sources": DARK}] * 3)
    assert order(scores) == RIGHT


# --- RemoteReward


@pytest.mark.parametrize("how", ["sources", "metadata", "prompts"])
def test_a_remote_reward_sends_sources_and_scores_as_here(how: str):
    sources = [DARK, DARK, DARK, [BRIGHT], BRIGHT]
    images, prompts = [*EDITS, GOOD, BRIGHT_GOOD], [INSTRUCTION] * 5
    here, _ = group()(images, prompts, sources=sources)
    with serving(group()) as url:
        remote = RemoteReward(url)
        if how == "sources":
            there, _ = remote(images, prompts, sources=sources)
        elif how == "metadata":
            there, _ = score(as_reward(url, {}, scheme="group"), images, prompts, [{"sources": one} for one in sources])
        else:
            there, _ = remote(images, [Prompt(INSTRUCTION, one) for one in sources])
        assert there.tolist() == pytest.approx(here.tolist()) and order(there[:3]) == RIGHT
        with pytest.raises(InputError, match=r"sources\[0\]"):
            remote(images, prompts, sources=["nowhere.png"] * 5)
        with pytest.raises(InputError, match="got 0 sources"):
            remote(images, prompts)


def test_each_distinct_source_travels_once(monkeypatch):
    bodies: list[dict[str, Any]] = []

    def answer(self: RemoteReward, sent: bytes) -> dict[str, Any]:
        bodies.append(json.loads(sent))
        return {"rewards": [0, 0, 0], "sources": [1, 2, 0]}

    monkeypatch.setattr(RemoteReward, "_post", answer)
    RemoteReward("http://127.0.0.1:1")(EDITS, [INSTRUCTION] * 3, sources=[DARK, [BRIGHT, DARK.copy()], None])
    assert bodies[0]["pictures"] == [sent(DARK), sent(BRIGHT)]
    assert bodies[0]["condition_images"] == [[0], [1, 0], []] and "criterion" not in bodies[0]
    with pytest.raises(InputError, match="has not read the source images of the prompts; it needs a newer"):
        RemoteReward("http://127.0.0.1:1")(EDITS, [INSTRUCTION] * 3, sources=[DARK] * 3)


def test_a_server_that_reads_no_sources_is_found_out():
    answer = (200, {"Content-Type": "application/json"}, {"rewards": [0.0, 1.0, 2.0], "info": {}})
    with scripted(answer, answer, answer) as (url, _):
        with pytest.raises(InputError, match="has not read the source images"):
            RemoteReward(url)(EDITS, [INSTRUCTION] * 3, sources=[DARK] * 3)
        with pytest.raises(InputError, match="has not read the criteria"):
            RemoteReward(url)(EDITS, [Prompt("a", criterion="quality")] * 3)
        assert RemoteReward(url)(EDITS, ["a"] * 3)[0].tolist() == [0, 1, 2]


def test_a_criterion_goes_over_the_wire():
    class Two:
        name = "two questions"

        def compare_many(self, prompts: Any, firsts: Any, seconds: Any, *, think: Any = None) -> Any:
            said = [0.9 if as_prompt(prompt).criterion == "quality" else 0.1 for prompt in prompts]
            return [Verdict(p, 1 if p > 0.5 else 2, (), None, None, 0.0, 0, (p, p)) for p in said]

    with serving(ListenerReward(Two(), scheme="group")) as url:
        scores, _ = RemoteReward(url)([GOOD, HALF] * 2, [Prompt("a", criterion="quality")] * 2 + ["a"] * 2)
        assert scores[0] > scores[1] and scores[2] < scores[3]
        compared = {"prompt": "a", "first": sent(GOOD), "second": sent(HALF)}
        for criterion, p_first in (("quality", 0.9), (None, 0.1)):
            assert http(f"{url}/v1/compare", compared | {"criterion": criterion})[1]["p_first"] == p_first


# --- the judge itself


def test_the_judge_itself_is_asked_about_edits():
    asked = {"prompt": INSTRUCTION, "sources": [sent(DARK)]}
    with serving(group(), limits=Limits(images=4)) as url:
        status, verdict = http(f"{url}/v1/compare", asked | {"first": sent(GOOD), "second": sent(WRONG)})
        assert status == 200 and verdict["preferred"] == 1
        assert verdict["p_first"] == EditJudge().compare_many([Prompt(INSTRUCTION, DARK)], [GOOD], [WRONG])[0].p_first
        status, ranking = http(f"{url}/v1/rank", asked | {"images": [sent(image) for image in EDITS]})
        assert status == 200 and ranking["order"] == RIGHT
        for route, more in (
            ("compare", {"first": sent(GOOD), "second": sent(WRONG)}),
            ("rank", {"images": [sent(GOOD)] * 4}),
        ):
            for wrong, status in (
                ({"sources": ["%%%"]}, 400),
                ({"sources": sent(DARK)}, 422),
                ({"sources": [sent(DARK)] * 4}, 413),
            ):
                assert http(f"{url}/v1/{route}", asked | more | wrong)[0] == status


# --- UniRL


def turn(image: Image.Image, text: Any = INSTRUCTION) -> dict[str, Any]:
    return {"text": text, "image_b64": sent(image)}


def item(*history: Any, **more: Any) -> dict[str, Any]:
    return {"history": [*history], "required_rewards": ["listener"]} | more


def unirl_scores(reward: Any, items: list[dict[str, Any]], **options: Any) -> list[Any]:
    reply = unirl.answer(reward, {"requests": items}, **options)
    assert all(bool(result) != bool(error) for result, error in zip(reply["results"], reply["errors"], strict=True))
    return [
        error["listener"] if error else result["listener"]["score"]
        for result, error in zip(reply["results"], reply["errors"], strict=True)
    ]


def test_a_turn_before_the_last_is_a_source():
    assert order(unirl_scores(group(), [item(turn(DARK), turn(image)) for image in EDITS])) == RIGHT
    images = [GOOD, BRIGHT_GOOD]
    items = [item(turn(source), turn(image)) for source in (DARK, BRIGHT) for image in images]
    first, second, third, fourth = unirl_scores(group(), items)
    assert first > second and third < fourth
    collector = GroupCollector(group(), 2, timeout=20)
    again = unirl_scores(collector, [one | {"group_id": "dark" if k < 2 else "bright"} for k, one in enumerate(items)])
    assert again == pytest.approx([first, second, third, fourth])
    assert unirl_scores(collector, items) == pytest.approx(again)


def test_a_source_that_cannot_be_read_fails_its_item_alone():
    fine = [item(turn(DARK), turn(image)) for image in (GOOD, HALF)]
    for bad, said in (
        (item({"text": INSTRUCTION}, turn(GOOD)), r"requests[2].history[0] has neither image_b64"),
        (item({"text": INSTRUCTION, "image_b64": "%%%"}, turn(GOOD)), r"[2].history[0].image_b64 is not base64"),
        (item({"text": INSTRUCTION, "image_b64": b64(b"GIF")}, turn(GOOD)), "image_b64 is 3 bytes, in no format"),
        (item(turn(DARK, "draw a cat"), turn(GOOD)), r"requests[2].history[0] has another text than the last turn"),
        (item("a turn", turn(GOOD)), r"requests[2].history[0] is a str"),
    ):  # fmt: skip
        good, half, reason = unirl_scores(group(), [*fine, bad])
        assert good > half and said in reason
        collector = GroupCollector(group(), 3, timeout=20)
        good, half, reason = unirl_scores(collector, [one | {"group_id": "g"} for one in (*fine, bad)])
        assert good > half and said in reason
    assert order(unirl_scores(group(), [item(turn(DARK, None), turn(image)) for image in EDITS])) == RIGHT


def test_a_server_stops_where_no_source_came():
    reply = compute(group(), body(sources=()))
    assert reply["kind"] == "input" and "got 0 sources" in reply["error"]
    with pytest.raises((InputError, JudgeError)):
        RemoteReward("http://127.0.0.1:9", retries=0)(EDITS, [INSTRUCTION] * 3, sources=[DARK] * 3)


def test_a_prompt_with_sources_goes_to_another_process():
    prompt = Prompt(INSTRUCTION, [DARK, BRIGHT], "quality")
    assert pickle.loads(pickle.dumps(prompt)) == prompt
