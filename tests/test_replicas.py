"""A judge in several processes: how pairs are shared out, and what becomes of them when a process dies."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib import request

import numpy as np
import pytest
import yaml
from adapter_hosts import serving
from edits import DARK, GOOD, HALF, INSTRUCTION, WRONG, EditJudge
from PIL import Image
from typer.testing import CliRunner

from listener_reward.batching import BatchingJudge
from listener_reward.cli import app
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.serving.replicas import (
    APPLICATION,
    DEPLOYMENT,
    ReplicatedJudge,
    Scale,
    application,
    attach,
    start,
)
from listener_reward.media.images import to_picture
from listener_reward.media.storyboards import as_picture
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward
from listener_reward.verdict import Verdict


class Redness:
    """p_first is sigmoid((red_first - red_second) / 50)."""

    name = "redness"

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        time.sleep(self.seconds)
        if "break" in prompts:
            raise JudgeError("it broke")
        if "fault" in prompts:
            raise ZeroDivisionError("a fault of the judge's author")
        verdicts = []
        for first, second in zip(firsts, seconds, strict=True):
            reds = [float(np.asarray(as_picture(side, field="image"))[0, 0, 0]) for side in (first, second)]
            p = float(1 / (1 + np.exp((reds[1] - reds[0]) / 50)))
            verdicts.append(Verdict(p, 1 if p > 0.5 else 2 if p < 0.5 else None, (), None, None, 0.0, 0))
        return verdicts


def refusing() -> Any:
    raise InputError("the checkpoint is not there")


def red(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, 0, 0))


def pairs(count: int) -> tuple[list[str], list[Image.Image], list[Image.Image]]:
    return ["a"] * count, [red(5 * k) for k in range(count)], [red(100)] * count


@pytest.fixture
def ray() -> Any:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    return import_module("ray")


# --- how many


@pytest.mark.parametrize(("text", "least", "most"), [("4", 4, 4), ("1-8", 1, 8), (" 2-2 ", 2, 2)])
def test_a_number_of_replicas_or_its_bounds_are_read(text: str, least: int, most: int):
    assert Scale.read(text, 0.5) == Scale(least, most, 0.5)


@pytest.mark.parametrize("text", ["0", "0-4", "8-1", "-1", "two", "", "1-", "1-2-3", "9" * 9])
def test_other_numbers_of_replicas_are_refused(text: str):
    with pytest.raises(InputError, match="replicas are"):
        Scale.read(text)
    with pytest.raises(InputError, match="0 GPUs or more"):
        Scale(gpus=-1.0)


@pytest.mark.parametrize("options", [["--gpus-per-replica", "1"], ["--ray-address", "auto"]])
def test_options_of_replicas_without_replicas_are_refused(options: list[str]):
    done = CliRunner().invoke(app, ["serve", "--judge", "tiny", *options])
    assert done.exit_code == 2 and "give their number by --replicas" in " ".join(done.stderr.split())


def test_a_judge_for_judges_that_run_already_is_refused():
    done = CliRunner().invoke(app, ["serve", "--judge", "tiny", "--deployed", "judges"])
    assert done.exit_code == 2 and "judge has no effect" in " ".join(done.stderr.split())


# --- what is sent, to replicas in this process


class Handle:
    """Ray Serve's handle, whose replicas die by the numbers of the questions in `dies`."""

    def __init__(self, ray: Any, dies: Sequence[int] = ()):
        self.died, self.dies = ray.exceptions.ActorDiedError, dies
        self.judge: Any = Redness()
        self.asked: list[int] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self.answer, method))

    def answer(self, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "describe":
            said = {"name": "redness", "identity": "redness", "think": None, "ranks": False}
            return SimpleNamespace(result=lambda timeout_s: said)
        number = len(self.asked)
        self.asked.append(len(arguments[0]))

        def result(timeout_s: float) -> Any:
            if number in self.dies:
                raise self.died()
            return getattr(self.judge, method)(*arguments, **options)

        return SimpleNamespace(result=result)


def test_pairs_are_shared_out_among_the_replicas_and_come_back_in_order(ray: Any):
    handle = Handle(ray)
    judge = ReplicatedJudge(handle, most=3)
    assert judge.compare_many(*pairs(8)) == Redness().compare_many(*pairs(8)) and sorted(handle.asked) == [2, 3, 3]
    assert judge.compare_many(*pairs(2)) == Redness().compare_many(*pairs(2)) and handle.asked[3:] == [1, 1]
    assert judge.compare_many([], [], []) == [] and judge.name == "redness"
    assert judge.rank("a", [red(9), red(200), red(70)]).order == [1, 2, 0]


def test_replicas_get_the_sources_of_a_prompt(ray: Any):
    handle = Handle(ray)
    handle.judge = EditJudge()
    with serving(ListenerReward(ReplicatedJudge(handle, most=2), scheme="group")) as url:
        scores, _ = RemoteReward(url)([HALF, GOOD, WRONG], [INSTRUCTION] * 3, sources=[DARK] * 3)
    assert scores.argsort().tolist() == [2, 0, 1]
    assert [prompt.sources for prompt in pickle.loads(pickle.dumps(handle.judge.asked))] == [(to_picture(DARK),)] * 3


def test_pairs_of_a_dead_replica_go_to_another_one(ray: Any):
    handle = Handle(ray, dies=(0, 2))
    judge = ReplicatedJudge(handle, most=2)
    assert judge.compare_many(*pairs(6)) == Redness().compare_many(*pairs(6))
    assert handle.asked == [3, 3, 3, 3] and judge.resent == 2


def test_a_judge_whose_replicas_all_die_is_broken(ray: Any):
    handle = Handle(ray, dies=range(99))
    judge = ReplicatedJudge(handle, most=1, tries=3)
    with pytest.raises(JudgeError, match="3 replicas of the judge died one after another"):
        judge.compare_many(*pairs(4))
    assert handle.asked == [4, 4, 4]


# --- Ray itself


@pytest.fixture(scope="module")
def replicated() -> Iterator[ReplicatedJudge]:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    cloudpickle: Any = import_module("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import the tests
    with start(partial(Redness, 0.03), Scale(2, 2)) as judge:
        yield judge


def test_replicas_that_are_killed_lose_no_request(replicated: ReplicatedJudge, ray: Any):
    """Both at once and in the middle of their work, until pairs had to be sent again."""
    reward = ListenerReward(BatchingJudge(replicated, limit=16, at_once=2), scheme="group")
    images, over, answered = [red(5 * k) for k in range(16)], threading.Event(), []

    def ask(client: RemoteReward, number: int) -> None:
        while not over.is_set():
            answered.append((number, client(images[2 * number : 2 * number + 2], ["a"] * 2)[0]))

    def go_on(answers: int) -> None:
        end, before = time.monotonic() + 60, len(answered)
        while len(answered) < before + answers:
            assert time.monotonic() < end
            time.sleep(0.01)

    with serving(reward) as url, ThreadPoolExecutor(8) as threads:
        client = RemoteReward(url, retries=0, timeout=60)
        expected = [client(images[2 * k : 2 * k + 2], ["a"] * 2)[0] for k in range(8)]
        asking = [threads.submit(ask, client, number) for number in range(8)]
        try:
            for _ in range(5):
                go_on(16)
                for one in ray.util.list_named_actors(all_namespaces=True):
                    if "REPLICA" in one["name"] and "Judge" in one["name"]:
                        ray.kill(ray.get_actor(**one))
                go_on(16)
                if replicated.resent:
                    break
        finally:
            over.set()
        for one in asking:
            one.result()
        with request.urlopen(f"{url}/metrics", timeout=30) as page:
            counted = next(
                line for line in page.read().decode().splitlines() if line.startswith("listener_reward_resent ")
            )
    assert float(counted.split()[1]) == replicated.resent >= 1
    for number, scores in answered:
        np.testing.assert_allclose(scores, expected[number])


def test_the_processes_of_ray_are_told_to_look_at_replicas_less_often(replicated: ReplicatedJudge, ray: Any):
    def told() -> str | None:
        return os.environ.get("RAY_SERVE_CONTROL_LOOP_INTERVAL_S")

    assert ray.get(ray.remote(told).remote()) == "0.5"


def test_what_the_judge_says_of_a_pair_is_said_as_without_replicas(replicated: ReplicatedJudge):
    with pytest.raises(JudgeError, match=r"^it broke$"):
        replicated.compare_many(["break"], [red(1)], [red(2)])
    with pytest.raises(JudgeError, match=r"a replica of the judge failed: .*a fault of the judge's author"):
        replicated.compare_many(["fault"], [red(1)], [red(2)])
    with pytest.raises(InputError, match="image"):
        replicated.compare_many(["a"], ["not a file"], [red(2)])
    assert replicated.compare_many(*pairs(9)) == Redness().compare_many(*pairs(9))


def test_a_judge_that_cannot_be_had_is_named_at_the_start(replicated: ReplicatedJudge):
    with pytest.raises(InputError, match=r"^the checkpoint is not there$"):
        start(refusing, Scale(), name="refusing")
    with pytest.raises(InputError, match="no judge 'refusing'; start it with `serve deploy`"):
        attach("refusing")
    with pytest.raises(InputError, match="has judges 'listener-reward' already; ask them by --deployed"):
        start(Redness, Scale())


def test_the_example_of_serve_deploy_is_one(replicated: ReplicatedJudge):
    schema: Any = import_module("ray.serve.schema")
    given = yaml.safe_load((Path(__file__).parents[1] / "examples" / "serve_deploy.yaml").read_text())
    [deployed] = schema.ServeDeploySchema.model_validate(given).applications
    module, _, builder = deployed.import_path.partition(":")
    assert getattr(import_module(module), builder) is application
    assert deployed.name == APPLICATION and [one.name for one in deployed.deployments] == [DEPLOYMENT]


def test_a_server_asks_judges_that_were_deployed(replicated: ReplicatedJudge):
    serve: Any = import_module("ray.serve")
    serve.run(application({"judge": "no-such-folder/at-all"}), name="deployed", route_prefix=None)
    try:
        with pytest.raises(InputError, match="no-such-folder"):
            attach("deployed")
    finally:
        serve.delete("deployed")
    with attach("listener-reward") as judge:
        assert judge.name == "redness" and judge.most == 2
        assert judge.compare_many(*pairs(3)) == Redness().compare_many(*pairs(3))
    assert replicated.compare_many(*pairs(3)) == Redness().compare_many(*pairs(3))
