"""The server and RemoteReward: the reward itself over HTTP, its errors, and the command that serves it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from adapter_hosts import (
    PROMPTS,
    REDS,
    REFERENCE,
    HandClock,
    WatchedCollector,
    b64,
    broken,
    flow_factory_client,
    http,
    pixels,
    png,
    scripted,
    serving,
    trl_host,
)
from typer.testing import CliRunner

from listener_reward import remote as client
from listener_reward.batching import BatchingJudge
from listener_reward.cli import app
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.serving import server
from listener_reward.integrations.serving.collector import ClientGone, GroupCollector
from listener_reward.integrations.serving.server import make_server
from listener_reward.integrations.trl import ddpo_reward
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward


def test_remote_reward_is_the_reward_itself(FakeJudge):
    reward = ListenerReward(FakeJudge(listener_slope=2.0), reference=REFERENCE, scheme="reference", on_failure="nan")
    with serving(reward) as url:
        here, there = reward(pixels(), PROMPTS), as_reward(url, {}, scheme="reference")(pixels(), PROMPTS, None)
        assert there[0] == pytest.approx(here[0]) and there[0].dtype == np.float32
        assert there[1].keys() == here[1].keys()
        assert all(there[1][key] == pytest.approx(here[1][key], nan_ok=True) for key in here[1])
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


@pytest.fixture
def pauses(monkeypatch):
    seconds: list[float] = []
    monkeypatch.setattr(client.time, "sleep", seconds.append)
    return seconds


FINE = (200, {}, {"rewards": [1.0, 2.0, 3.0, 4.0], "info": {}})


def test_remote_reward_asks_again_what_a_server_may_answer_the_next_time(pauses):
    busy = (503, {"Retry-After": "7"}, {"detail": "busy"})
    later = (503, {"Retry-After": "Sat, 28 Nov 2026 12:00:00 GMT"}, {})  # a date: left to the client's own pauses
    with scripted(None, (502, {}, {}), busy, later, (504, {}, {}), (429, {"Retry-After": "9999"}, {}), FINE) as (
        url,
        _,
    ):
        assert RemoteReward(url)(pixels(), PROMPTS)[0].tolist() == [1, 2, 3, 4]
    assert pauses == [1, 2, 7, 8, 16, 60]


def test_remote_reward_asks_again_as_often_as_it_was_told(pauses):
    with scripted(*[(503, {}, {"detail": "busy"})] * 3) as (url, handler):
        with pytest.raises(JudgeError, match="refused: 503 busy"):
            RemoteReward(url, retries=2)(pixels(), PROMPTS)
        assert handler.script == [] and pauses == [1, 2]
    with pytest.raises(JudgeError, match=r"did not answer in 3 attempts \(.*refused.*serve"):
        RemoteReward(url, retries=2)(pixels(), PROMPTS)
    assert pauses == [1, 2, 1, 2]


@pytest.mark.parametrize("status, kind", [(400, InputError), (404, JudgeError), (409, InputError), (500, JudgeError)])
def test_remote_reward_asks_nothing_twice_that_would_fail_again(pauses, status, kind):
    with (
        scripted((status, {}, {"detail": "no\nand no"})) as (url, _),
        pytest.raises(kind, match=f"refused: {status} no"),
    ):
        RemoteReward(url)(pixels(), PROMPTS)
    assert pauses == []


def test_remote_reward_asks_this_machine_directly_whatever_the_proxy(FakeJudge, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(ListenerReward(FakeJudge())) as url:
        for name in ("127.0.0.1", "localhost"):
            scores, _ = RemoteReward(url.replace("127.0.0.1", name), retries=0)(pixels(), PROMPTS)
            assert scores[0] == scores.max()
    with pytest.raises(JudgeError, match=r"did not answer through the proxy 127.0.0.1 \(") as raised:
        RemoteReward("http://judge.example:8300", retries=0)(pixels(), PROMPTS)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "prompts",
    [[None, None, "a", "a"], ["a", 3, "a", "a"], ["a", "", "a", "a"], ["a"] * 3, "aaaa", None, 5, iter("aaaa")],
)
def test_remote_reward_sends_nothing_before_its_checks(prompts):
    with scripted() as (url, handler), pytest.raises(InputError, match="prompts"):
        RemoteReward(url)(pixels(), prompts)
    assert handler.paths == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"url": "127.0.0.1:8300"}, "url is"),
        ({"url": "http://"}, "url is"),
        ({"scheme": "groups"}, "scheme is 'groups'"),
        ({"timeout": 0}, "timeout is 0"),
        ({"retries": -1}, "retries -1"),
    ],
)
def test_remote_reward_options_that_make_no_sense(options, words):
    with pytest.raises(InputError, match=words):
        RemoteReward(**({"url": "http://127.0.0.1:8300"} | options))


@pytest.mark.parametrize("has", ["reference", "group", "auto"])
@pytest.mark.parametrize("wanted", ["reference", "group", "auto", None])
@pytest.mark.parametrize("prompts", [("a", "a", "a", "a"), ("a", "b", "c", "d"), ("a", "a", "b", "c")])
def test_a_server_answers_by_the_scheme_that_was_asked_for_or_not_at_all(FakeJudge, has, wanted, prompts):
    """Whatever it answers is what a reward of the wanted scheme gives."""
    with serving(ListenerReward(FakeJudge(), scheme=has)) as url:
        assert http(f"{url}/health")[1]["scheme"] == has
        try:
            scores, _ = RemoteReward(url, scheme=wanted)(pixels(), prompts)
        except InputError as error:
            lone = has == "group" and len(set(prompts)) > 1
            assert lone or (wanted != has and "409 the client wants scores by scheme" in str(error))
            return
    expected = score(ListenerReward(FakeJudge(), scheme=wanted or has), pixels(), prompts)[0]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_a_callable_that_does_not_say_its_scheme_is_asked_for_none():
    def reward(images, prompts, metadata):
        return np.zeros(len(images)), {}

    with serving(reward) as url:
        assert RemoteReward(url)(pixels(), PROMPTS)[0].tolist() == [0] * 4
        with pytest.raises(InputError, match="answers by None"):
            RemoteReward(url, scheme="group")(pixels(), PROMPTS)


def posted(url: str, body: dict) -> socket.socket:
    """A connection on which a request was sent and not answered."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"POST /compute HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_collector_forgets_the_images_of_a_client_that_has_gone(FakeJudge, caplog):
    """A run that died in the middle of a group, and was started again: its new images meet one another alone."""
    judge = FakeJudge()
    collector = WatchedCollector(ListenerReward(judge, scheme="group"), 4, timeout=60)
    with serving(collector) as url:
        half = {"prompt": ["a", "a"], "image": [b64(png(red)) for red in (1, 2)]}
        with posted(url, half):
            collector.places(2)
        while not all(member.gone for group in collector._waiting.values() for member in group.members):
            time.sleep(0.05)
        scores, _ = RemoteReward(url, scheme="group")(pixels(), PROMPTS)
    assert scores[0] == scores.max() and sorted({red for call in judge.calls for _, *pair in call for red in pair}) == [
        20, 90, 160, 200,
    ]  # fmt: skip
    assert "Traceback" not in caplog.text and not any(record.levelname == "ERROR" for record in caplog.records)


def test_collector_takes_a_client_back_that_comes_again(FakeJudge, shade):
    judge, hand = FakeJudge(), HandClock()
    reward = ListenerReward(judge, scheme="group")
    collector = GroupCollector(reward, 2, timeout=10, clock=hand.now, timer=hand.timer)
    first = collector.submit(shade(10), "a", name="one")
    collector.leave([first])
    second = collector.submit(shade(200), "a", name="two")
    assert not second.done()
    assert collector.submit(shade(10), "a", name="one") is first
    assert second.result(5)[0] > 0 > first.result(5)[0]
    # A group of which everyone has gone is forgotten in silence, and its time is not counted for those who come next.
    collector.leave([collector.submit(shade(10), "b", name="three")])
    hand.advance(9)
    late = collector.submit(shade(20), "b")
    hand.advance(9)
    assert not late.done()
    hand.advance(2)
    with pytest.raises(JudgeError, match=r"1 of 2 images.*waits for itself"):
        late.result(0)


def test_a_client_that_asks_again_before_it_is_seen_to_be_gone_keeps_its_place(FakeJudge, shade):
    """Flow-Factory's does: it sends the same again the moment that its patience ends."""
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2)
    first = collector.submit(shade(10), "a", name="one")
    assert collector.submit(shade(10), "a", name="one") is first
    collector.leave([first])  # the first request is over only now
    second = collector.submit(shade(200), "a", name="two")
    assert second.result(5)[0] > 0 > first.result(5)[0]
    # Both hung up: nobody waits any more.
    third = collector.submit(shade(10), "b", name="three")
    collector.submit(shade(10), "b", name="three")
    collector.leave([third])
    collector.leave([third])
    assert collector.waiting == 0


def test_collector_says_what_may_be_wrong_where_a_client_waits(FakeJudge, shade, caplog, monkeypatch):
    monkeypatch.setattr("listener_reward.integrations.serving.collector.PATIENCE", 0.5)
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2)
    ticks = iter([False, False, True])
    with pytest.raises(ClientGone):
        collector.wait([collector.submit(shade(10), "a")], lambda: next(ticks))
    assert "waits for itself: let it send a whole group" in caplog.text


@pytest.mark.parametrize("clients", [1, 2])
def test_a_client_that_waits_for_itself_is_told_at_once(FakeJudge, monkeypatch, clients):
    """Each sends half a group and would send the rest once it is answered."""
    monkeypatch.setattr("listener_reward.integrations.serving.collector.STUCK", 1)
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 4, clients=clients)
    with serving(collector) as url, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(http, f"{url}/compute", halved(f"prompt {k}")) for k in range(clients)]
        for k, (_, reply) in enumerate(one.result(10) for one in asked):
            assert reply["kind"] == "input" and f"2 of 4 images of prompt 'prompt {k}' came" in reply["error"]
            assert f"came, and all {clients} requests that clients send at once wait (" in reply["error"]
            assert "waits for itself: let it send a whole group" in reply["error"]
        assert collector.waiting == 0
        whole = {"prompt": ["a"] * 4, "image": [b64(png(red)) for red in REDS]}
        assert http(f"{url}/compute", whole)[0] == 200
    # Called in a process, which has no client that hangs up, it is the same.
    with pytest.raises(InputError, match="waits for itself"), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda prompt: collector([png(1)], [prompt]), ["x", "y"][:clients]))


def test_clients_that_fill_one_anothers_groups_are_not_taken_for_waiting_ones(FakeJudge, monkeypatch):
    """One waits, its client hangs up and asks again: for a second it is there twice, and the other one still comes."""
    monkeypatch.setattr("listener_reward.integrations.serving.collector.STUCK", 2)
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 4, clients=2)
    with serving(collector) as url, ThreadPoolExecutor(2) as pool:
        with pytest.raises(OSError, match="timed out"):
            http(f"{url}/compute", halved("a"), timeout=1)
        again = pool.submit(http, f"{url}/compute", halved("a"))
        time.sleep(4)
        assert not again.done(), "one of two waits, and the other may come"
        assert http(f"{url}/compute", halved("a", start=2))[0] == 200 == again.result(10)[0]


def halved(prompt, start=0):
    return {"prompt": [prompt] * 2, "image": [b64(png(red)) for red in REDS[start : start + 2]]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_collector_of_a_forked_process_begins_anew(FakeJudge, shade):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 2)
    collector.submit(shade(10), "a")
    collector([shade(10), shade(200)], ["b", "b"])  # its thread is not copied
    with collector._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # which ends a child that hangs
            scores, _ = collector([shade(10), shade(200)], ["a", "a"])
            os._exit(int(scores[1] > 0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_requests_that_come_while_the_judge_is_busy_are_judged_together(FakeJudge, shade):
    judge = FakeJudge(slope=3.0, delay=0.05)
    reds = range(10, 106, 2)  # 48 requests of one image, as verl-omni sends them
    batching = ListenerReward(BatchingJudge(judge, limit=20), reference={"a": shade(0)}, scheme="reference")
    with ThreadPoolExecutor(48) as clients:
        scores = [*clients.map(lambda red: batching([shade(red)], ["a"])[0].item(), reds)]
    assert scores == pytest.approx([3 * red / 255 for red in reds], abs=1e-4)
    assert sum(map(len, judge.calls)) == 48 and max(map(len, judge.calls)) <= 20 and len(judge.calls) < 24


def test_a_request_that_fails_fails_no_other_that_is_judged_with_it(FakeJudge, shade):
    judge = broken(FakeJudge, slope=3.0, delay=0.05)
    batching = ListenerReward(judge, reference={"a": shade(0)}, scheme="reference")
    with ThreadPoolExecutor(8) as clients:
        calls = [([shade(red)], [prompt]) for red, prompt in ((1, "a"), (90, "a"), (51, "b"), (85, "a"), (170, "a"))]
        done = [clients.submit(batching, *call) for call in calls]
        assert [done[k].result()[0].item() for k in (0, 3, 4)] == pytest.approx([3 / 255, 1, 2], abs=1e-4)
        with pytest.raises(JudgeError):
            done[1].result()
        with pytest.raises(InputError, match="no image for prompt 'b'"):
            done[2].result()


def test_remote_reward_without_a_server_says_how_to_start_one():
    with pytest.raises(JudgeError, match="listener-reward serve"):
        RemoteReward("http://127.0.0.1:9", timeout=2, retries=0)(pixels(), PROMPTS)


def test_server_survives_what_is_no_request(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        assert http(f"{url}/compute", raw=b"\x80\x04cos\nsystem\n.")[0] == 400
        assert http(f"{url}/compute", raw=b"[" * 100_000)[0] == 400
        for length, status in (("9" * 5000, 413), ("0" * 5000 + "2", 400), ("-1", 411), ("\u0664", 411), ("2 2", 411)):
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"POST /compute HTTP/1.1\r\nContent-Length: {length}\r\n\r\nxx".encode())
                assert connection.recv(99).split()[1] == str(status).encode(), length[:9]
        assert http(f"{url}/nothing")[0] == 404 and http(f"{url}/nothing", {})[0] == 404
        assert flow_factory_client(url, [], []) == []
        assert http(f"{url}/health")[0] == 200


def test_server_on_a_port_that_is_taken_says_so(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url, pytest.raises(InputError, match="port"):
        make_server(ListenerReward(FakeJudge()), port=int(url.rpartition(":")[2]))


def test_server_on_an_address_that_is_no_name_says_so(FakeJudge):
    with pytest.raises(InputError, match="choose another host"):
        make_server(ListenerReward(FakeJudge()), host="no.such.name.invalid", port=0)


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_server_on_ipv6(FakeJudge):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with serving(ListenerReward(FakeJudge()), host="::1") as url:
        port = url.rpartition(":")[2]
        assert RemoteReward(f"http://[::1]:{port}", retries=0)(pixels(), PROMPTS)[0].shape == (4,)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--reference", "no.json"], "no.json cannot be read"),
        (["--criteria", "alignment"], "give 'alignment=1,quality=0.5'"),
        (["--on-failure", "zero"], "on_failure is 'zero'"),
        (["--on-failure", "group-mean"], "on_failure is 'group-mean'"),
        (["--scheme", "group", "--state", "a.db"], "state is given"),
        (["--group-size", "4", "--state", "a.db"], "state is given"),
        (["--group-clients", "4"], "give --group-size as well"),
    ],
)
def test_serve_refuses_what_would_have_no_effect(options, words, monkeypatch, FakeJudge, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("listener_reward.cli.serving.load_judge", lambda *_, **__: FakeJudge())
    done = CliRunner().invoke(app, ["serve", "--judge", "tiny", "--port", "0", *options])
    assert done.exit_code == 2 and words in " ".join(done.stderr.split())


def test_serve_hands_its_options_on(monkeypatch, FakeJudge, shade, tmp_path):
    monkeypatch.setattr("listener_reward.cli.serving.load_judge", lambda *_, **__: FakeJudge(slope=3.0))
    made = []
    monkeypatch.setattr(server, "make_server", lambda reward, **_: made.append(reward) or FakeServer())
    shade(100).save(tmp_path / "a.png")
    (tmp_path / "references.json").write_text('{"a": "a.png"}')
    for options in (
        ["--reference", str(tmp_path / "references.json"), "--on-failure", "raise"],
        ["--state", str(tmp_path / "state.db"), "--criteria", "alignment=1,quality=0.5"],
        [],
        ["--group-size", "3", "--group-timeout", "42", "--group-clients", "6"],
    ):
        done = CliRunner().invoke(app, ["serve", "--judge", "tiny", *options])
        assert done.exit_code == 0, done.output
    assert [type(reward) for reward in made] == [ListenerReward] * 3 + [GroupCollector]
    given, kept, temporary = made[:3]
    assert all(isinstance(reward.judge, BatchingJudge) for reward in (given, kept, temporary, made[3].reward))
    collects = made[3]
    assert given([shade(185)], ["a"])[0].tolist() == pytest.approx([1.0], abs=1e-4) and given.on_failure == "raise"
    assert [reward.criteria for reward in made[:3]] == [{}, {"alignment": 1.0, "quality": 0.5}, {}]
    assert (kept._kept.path, temporary._kept.path) == (str(tmp_path / "state.db"), "")
    assert temporary([shade(100), shade(185)], ["a", "a"])[0].tolist() == pytest.approx([0, 1.0], abs=1e-4)
    assert (collects.group_size, collects.timeout, collects.clients, collects.reward.scheme) == (3, 42, 6, "group")


class FakeServer:
    server_address = ("127.0.0.1", 8300)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def serve_forever(self):
        pass


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
    assert process.returncode == 0, "SIGTERM is how a server ends"
    assert scores[0] == 0 and np.isfinite(scores).all() and info["comparisons"].tolist() == [0, 1, 1, 1]
