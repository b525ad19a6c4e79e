"""The server and RemoteReward: the reward itself over HTTP, its errors, and the command that serves it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from adapter_hosts import PROMPTS, REFERENCE, broken, flow_factory_client, http, pixels, serving, trl_host

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.contract import as_reward
from listener_reward.integrations.serving.app import make_server
from listener_reward.integrations.serving.client import RemoteReward
from listener_reward.integrations.trl import ddpo_reward
from listener_reward.reward import ListenerReward


def test_remote_reward_is_the_reward_itself(FakeJudge):
    reward = ListenerReward(FakeJudge(listener_slope=2.0), reference=REFERENCE, scheme="reference", on_failure="nan")
    with serving(reward) as url:
        here, there = reward(pixels(), PROMPTS), as_reward(url, {}, scheme="reference")(pixels(), PROMPTS, None)
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
            trl_host(ddpo_reward(url, scheme="group"), [[pixels(), PROMPTS, ({},) * 4]], False)
    with serving(ListenerReward(broken(FakeJudge), scheme="group")) as url, pytest.raises(JudgeError, match="broke"):
        RemoteReward(url)(pixels(), PROMPTS)


def test_remote_reward_without_a_server_says_how_to_start_one():
    with pytest.raises(JudgeError, match="listener-reward serve"):
        RemoteReward("http://127.0.0.1:9", timeout=2, retries=0)(pixels(), PROMPTS)


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
