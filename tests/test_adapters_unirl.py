"""UniRL: requests to the server, ranks that meet in a collector, and a reason for each sample that failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import edits
import numpy as np
import pytest
from adapter_hosts import BETTER, REDS, REFERENCE, WatchedCollector, b64, broken, http, order, png, serving

from listener_reward.integrations import unirl
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.media.images import png_of
from listener_reward.reward import ListenerReward

# ---------------------------------------------------------------------------------------------------------------------
# UniRL, unirl/reward/remote.py: RemoteRewardBackend


def unirl_request(red=None, text: Any = "a", **turn) -> dict:
    media = {} if red is None else {"image_b64": b64(png(red))}
    return {"history": [{"text": text, **media, **turn}], "required_rewards": ["listener"], "metadata": None}


def unirl_host(url: str, requests: list[dict]) -> tuple[list[Any], list[str | None]]:
    """Rewards (float) and errors of a batch; None for a sample that failed, of which the host is told the reason."""
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
    assert order(rewards) == BETTER and errors == [None] * 4


def test_unirl_edit():
    """_build_score_payload: the source, then the result, both with the instruction."""

    def edit(source, image) -> dict:
        media = [{"image_b64": b64(png_of(one))} for one in (source, image)]
        return unirl_request() | {"history": [{"text": edits.INSTRUCTION} | one for one in media]}

    with serving(ListenerReward(edits.EditJudge(), scheme="group")) as url:
        rewards, errors = unirl_host(url, [edit(edits.DARK, one) for one in (edits.HALF, edits.GOOD, edits.WRONG)])
        assert order(rewards) == [1, 0, 2] and errors == [None] * 3
        both = [edit(source, one) for source in (edits.DARK, edits.BRIGHT) for one in (edits.GOOD, edits.BRIGHT_GOOD)]
        dark, dark_too_much, bright_none, bright = unirl_host(url, both)[0]
        assert dark > dark_too_much and bright > bright_none


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
    assert rewards[0] > rewards[3] > rewards[1]
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
    assert order(rewards) == BETTER and sum(rewards) == pytest.approx(0, abs=1e-5)


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
    collector = WatchedCollector(ListenerReward(judge, scheme="group"), 4, timeout=60)
    halves = [
        {"requests": [unirl_request(red) | {"group_id": "g", "idempotency_key": str(red)} for red in reds]}
        for reds in (REDS[:2], REDS[2:])
    ]
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(unirl.answer, collector, halves[0]) for _ in range(2)]
        assert collector.places(4) == 2
        assert not any(one.done() for one in waiting) and judge.calls == []
        last = unirl.answer(collector, halves[1])
        first, again = (one.result(5) for one in waiting)
    assert first == again == unirl.answer(collector, halves[0])
    scores = [result["listener"]["score"] for result in first["results"] + last["results"]]
    assert order(scores) == BETTER and len(judge.calls) == 1


def test_unirl_asks_for_its_scheme_by_its_base_url(FakeJudge):
    requests = [unirl_request(red) for red in REDS]
    with serving(ListenerReward(FakeJudge(), reference=REFERENCE, scheme="reference")) as url:
        assert order(unirl_host(f"{url}/reference", requests)[0]) == BETTER
        with pytest.raises(RuntimeError, match=r"wants scores by scheme 'group'.* answers by 'reference'"):
            http(f"{url}/group/health")
            unirl_host(f"{url}/group", requests)
    with serving(GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 4)) as url:
        assert order(unirl_host(f"{url}/group", requests)[0]) == BETTER
        with pytest.raises(RuntimeError, match=r"wants scores by scheme 'reference'"):
            unirl_host(f"{url}/reference", requests)


def test_unirl_version_can_be_pinned(FakeJudge):
    with serving(GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2)) as url:
        version = http(f"{url}/health")[1]["scorer_version"]
        reply = http(f"{url}/score", {"requests": [unirl_request(11), unirl_request(12)]})[1]
    assert version.endswith(" fake") and {one["scorer_version"] for one in reply["identities"]} == {version}
