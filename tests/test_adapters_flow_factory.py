"""Flow-Factory: groupwise and pointwise in its own process, and its client against the server."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import edits
import pytest
import torch
from adapter_hosts import (
    BETTER,
    ERRORS,
    REDS,
    REFERENCE,
    WatchedCollector,
    b64,
    broken,
    flow_factory_client,
    http,
    order,
    png,
    serving,
)
from PIL import Image

from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.serving.computing import compute
from listener_reward.media.images import png_of
from listener_reward.reward import ListenerReward

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
    batch = {name: [one.to("cpu") if hasattr(one, "to") else one for one in values] for name, values in batch.items()}
    output = model(**batch)
    return torch.as_tensor(output.rewards if hasattr(output, "rewards") else output, device="cpu", dtype=torch.float32)


def sample(red=None, prompt: Any = "a", **more):
    image = None if red is None else Image.new("RGB", (4, 4), (red, 0, 0))
    conditions = {"condition_images": None, "condition_videos": None, "audio": None}
    return {"prompt": prompt, "image": image, "video": None, "latents": MOVED, "metadata": "{}"} | conditions | more


class _Moved:
    """A field that no reward here asks for: the host moves what it hands over to the reward's device."""

    def to(self, device):
        raise AssertionError("moved for nothing")


MOVED = _Moved()


def config(judge, **more):
    """hparams/abc.py: keys that the host does not know are kept in `extra_kwargs` and read as attributes."""
    more = {"judge": judge} | more
    return SimpleNamespace(batch_size=4, dtype=torch.float32, extra_kwargs=more, **more)


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


@pytest.mark.parametrize("cls", ["ListenerPointwise", "ListenerGroupwise"])
def test_flow_factory_unknown_keys_are_refused(flow_factory, cls):
    with pytest.raises(InputError, match="edits is 'yes'; choose true"):
        getattr(flow_factory, cls)(config("tiny", edits="yes"), HERE)
    with pytest.raises(InputError, match="jugde: no key of this reward, which has judge, judge_options, video"):
        getattr(flow_factory, cls)(config("tiny", jugde="other"), HERE)


def edit(source: Any, image: Any, **more: Any) -> dict[str, Any]:
    """What is left of an `I2ISample` after `_convert_media_format`."""
    return sample(prompt=edits.INSTRUCTION, image=image, condition_images=[source]) | more


@pytest.mark.parametrize("cls", ["ListenerPointwise", "ListenerGroupwise"])
def test_flow_factory_edits(flow_factory, cls):
    model = getattr(flow_factory, cls)(config(edits.EditJudge(), edits=True), HERE)
    assert model.required_fields == ("prompt", "image", "condition_images")
    if cls == "ListenerPointwise":  # the first sample of each source is what the others meet
        flow_factory_host(model, [edit(source, edits.HALF) for source in (edits.DARK, edits.BRIGHT)])
    good, half, wrong = flow_factory_host(
        model, [edit(edits.DARK, image) for image in (edits.GOOD, edits.HALF, edits.WRONG)]
    ).tolist()
    assert good > half > wrong
    both = [edits.GOOD, edits.BRIGHT_GOOD]
    dark, dark_too_much = flow_factory_host(model, [edit(edits.DARK, image) for image in both]).tolist()
    bright_none, bright = flow_factory_host(model, [edit(edits.BRIGHT, image) for image in both]).tolist()
    assert dark > dark_too_much and bright > bright_none
    with pytest.raises(InputError, match=r"prompts\[0\], 'make it redder', has no source image"):
        flow_factory_host(model, [edit(edits.DARK, edits.GOOD, condition_images=None)] * 2)


def test_flow_factory_source_videos_are_storyboards_after_the_images(flow_factory):
    seen: list[Any] = []

    def reward(images, prompts, metadata):
        seen.extend(entry["sources"] for entry in metadata)
        return torch.zeros(len(images)), {}

    model = flow_factory.ListenerGroupwise(config(reward, video=True, edits="condition_videos"), HERE)
    assert model.required_fields == ("prompt", "video", "condition_videos")
    clip = [edits.DARK] * 8
    one = sample(video=clip, condition_images=[edits.DARK], condition_videos=[clip, clip])
    flow_factory_host(model, [one, sample(video=clip, condition_images=[edits.BRIGHT], condition_videos=[clip, clip])])
    assert [[source.size for source in sources] for sources in seen] == [[(8, 8), (44, 20), (44, 20)]] * 2
    with pytest.raises(InputError, match="has no source image"):
        flow_factory_host(model, [sample(video=clip)] * 2)


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
# Its RemoteRewardClient


def hangs_up(url: str, body: dict, patience: Callable[[], object]) -> None:
    """A client that sends a request and hangs up when its `patience` returns."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /compute HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        patience()


def test_flow_factory_request_that_is_sent_again_counts_once_and_an_equal_one_twice(FakeJudge):
    judge = FakeJudge()
    body = {"prompt": ["a"], "image": [b64(png(7))], "video": None, "condition_images": None, "kwargs": None}
    collector = WatchedCollector(ListenerReward(judge, scheme="group"), 3, timeout=60)
    with serving(collector) as url:
        hangs_up(url, body, lambda: collector.places(1))
        with ThreadPoolExecutor(3) as clients:
            # One sends again, another process has the very same image; the group is full with the third.
            equal = [clients.submit(http, f"{url}/compute", body) for _ in range(2)]
            assert collector.places(3) == 2, "the first client's image was counted twice"
            assert judge.calls == []
            third = clients.submit(http, f"{url}/compute", body | {"image": [b64(png(200))]})
            rewards = [one.result(10)[1]["rewards"][0] for one in (*equal, third)]
    assert rewards[0] == rewards[1] < rewards[2] and len(judge.calls) == 1


def test_flow_factory_remote_bad_image_keeps_no_neighbour_from_its_group(FakeJudge):
    judge = FakeJudge()
    collector = GroupCollector(ListenerReward(judge, scheme="group"), 3, timeout=20)
    assert compute(collector, {"prompt": ["a", "a"], "image": ["%%%", b64(png(3))]})["kind"] == "input"
    assert compute(collector, {"prompt": ["a"], "image": [b64(png(9))]})["rewards"][0] > 0
    assert judge.calls == [[("a", 3, 9)]]


def test_flow_factory_remote(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        assert http(f"{url}/health")[0] == 200
        images = [b64(png(red)) for red in REDS]
        assert order(flow_factory_client(url, ["a"] * 4, images)) == BETTER
        assert order(flow_factory_client(url, ["a"] * 4, video=[[image] * 3 for image in images])) == BETTER


def test_flow_factory_remote_asks_for_its_scheme_by_its_url(FakeJudge):
    images = [b64(png(red)) for red in REDS]
    with serving(ListenerReward(FakeJudge(), scheme="group")) as url:
        assert http(f"{url}/group/health")[0] == 200
        assert order(flow_factory_client(f"{url}/group", ["a"] * 4, images)) == BETTER
        with pytest.raises(RuntimeError, match=r"409 Client Error: the client wants scores by scheme 'reference'"):
            flow_factory_client(f"{url}/reference", ["a"] * 4, images)


def test_flow_factory_remote_edits():
    """_build_payload: a list of base64 for each image, whatever it has in common with the others'."""
    images = [b64(png_of(one)) for one in (edits.HALF, edits.GOOD, edits.WRONG)]
    dark, bright = ([b64(png_of(source))] for source in (edits.DARK, edits.BRIGHT))
    with serving(ListenerReward(edits.EditJudge(), scheme="group")) as url:
        assert order(flow_factory_client(url, [edits.INSTRUCTION] * 3, images, condition_images=[dark] * 3)) == [
            1,
            0,
            2,
        ]
        both = [b64(png_of(one)) for one in (edits.GOOD, edits.BRIGHT_GOOD)] * 2
        first, second, third, fourth = flow_factory_client(
            url, [edits.INSTRUCTION] * 4, both, condition_images=[dark, dark, bright, bright]
        )
        assert first > second and third < fourth
        with pytest.raises(RuntimeError, match=r"Server error: condition_images has 1 entries for 3 prompts"):
            flow_factory_client(url, [edits.INSTRUCTION] * 3, images, condition_images=[dark])


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
