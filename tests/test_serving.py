"""The server as such: who may ask, how much, how slowly and for how long, what is freed, and how it ends.

What hosts and `RemoteReward` get is in test_adapters_server.py and the hosts' own files.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib import request
from urllib.error import HTTPError

import numpy as np
import pytest
from adapter_hosts import PROMPTS, REDS, b64, broken, http, pixels, png, scripted, serving
from PIL import Image
from typer.testing import CliRunner

from listener_reward.batching import BatchingJudge
from listener_reward.cli import app
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.contract import as_reward
from listener_reward.integrations.serving.auth import check_exposure
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.serving.limits import Intake, Limits
from listener_reward.integrations.serving.uploads import upload
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward

KEY = "a-long-secret"
BODY = {"prompt": ["a", "a"], "image": [b64(png(11)), b64(png(200))]}


def ask(url: str, body: Any = None, *, raw: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers; names of headers have _ for -."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = request.Request(url, data, {"Content-Type": "application/json"} | named)
    try:
        with request.urlopen(asked, timeout=30) as reply:
            text, status, got = reply.read(), reply.status, reply.headers
    except HTTPError as refused:
        text, status, got = refused.read(), refused.code, refused.headers
    kind = got["Content-Type"]
    return status, json.loads(text) if "json" in kind else text.decode(), got


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(body: bytes, path: str = "/compute") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


class Slow:
    """A judge whose calls last until `go`."""

    def __init__(self, judge: Any):
        self.name, self.judge = "slow", judge
        self.began, self.go = threading.Event(), threading.Event()

    def compare_many(self, *args: Any, **options: Any) -> Any:
        self.began.set()
        assert self.go.wait(30)
        return self.judge.compare_many(*args, **options)


# --- who may ask


def test_without_the_key_nothing_is_answered_but_that_the_server_is_there(FakeJudge, monkeypatch):
    judge = FakeJudge()
    with serving(ListenerReward(judge), api_key=KEY) as url:
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
            for path in ("/compute", "/group/compute", "/score", "/v1/compare", "/v1/rank"):
                status, reply, headers = ask(url + path, BODY, **sent)
                assert status == 401 and "API key" in reply["detail"] and headers["WWW-Authenticate"] == "Bearer"
            assert ask(f"{url}/metrics", **sent)[0] == ask(f"{url}/nothing", **sent)[0] == 401
            assert ask(f"{url}/health", **sent)[:2] == (200, {"status": "ok"}) and ask(f"{url}/ready", **sent)[0] == 200
        assert judge.calls == []
        basic = base64.b64encode(f"any:{KEY}".encode()).decode()  # what clients make of http://any:KEY@host
        for right in (f"Bearer {KEY}", f"bearer  {KEY}", f"Basic {basic}"):
            assert ask(f"{url}/compute", BODY, Authorization=right)[0] == 200
            assert ask(f"{url}/health", Authorization=right)[1]["rewards"] == {"listener": ["score"]}
        monkeypatch.delenv("LISTENER_REWARD_API_KEY", raising=False)
        with pytest.raises(InputError, match="401 the API key is missing"):
            RemoteReward(url)(pixels(), PROMPTS)
        assert RemoteReward(url, api_key=KEY)(pixels(), PROMPTS)[0].shape == (4,)
        monkeypatch.setenv("LISTENER_REWARD_API_KEY", KEY)
        from_environment = as_reward(url, {}, scheme="group")
        assert from_environment(pixels(), PROMPTS, None)[0].shape == (4,)
        assert KEY.encode() not in pickle.dumps(from_environment)
        assert as_reward(url, {"api_key": KEY}, scheme="group")(pixels(), PROMPTS, None)[0].shape == (4,)


def test_a_key_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(InputError, match="give the key as api_key") as refused:
        RemoteReward(f"http://any:{KEY}@127.0.0.1:1")
    assert KEY not in str(refused.value)


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(InputError, match="api_key has characters"):
        RemoteReward("http://127.0.0.1:1", api_key="a\nb")


def test_the_key_follows_no_redirect(monkeypatch):
    monkeypatch.setattr("listener_reward.remote.time", SimpleNamespace(sleep=lambda seconds: None))
    with scripted((200, {}, {"rewards": [0.0] * 4})) as (elsewhere, thief):
        for status in (301, 302, 303, 307, 308):
            with (
                scripted((status, {"Location": f"{elsewhere}/compute"}, {})) as (url, _),
                pytest.raises(JudgeError, match=f"refused: {status}"),
            ):
                RemoteReward(url, api_key=KEY)(pixels(), PROMPTS)
        assert thief.paths == []


@pytest.mark.parametrize(
    ("host", "token", "insecure", "words"),
    [
        ("127.0.0.1", None, False, None),
        ("127.1.2.3", None, False, None),
        ("::1", None, False, None),
        ("localhost", None, False, None),
        ("0.0.0.0", None, False, "without an API key; set LISTENER_REWARD_API_KEY, or give --insecure"),
        ("::", None, False, "without an API key"),
        ("", None, False, "without an API key"),
        ("10.0.0.1", None, False, "without an API key"),
        ("0.0.0.0", KEY, False, None),
        ("0.0.0.0", None, True, None),
        ("127.0.0.1", "short", False, "8 or more printable"),
        ("127.0.0.1", "with a space", False, "8 or more printable"),
        ("127.0.0.1", "", False, "8 or more printable"),
    ],
)
def test_others_can_reach_no_server_without_a_key(host, token, insecure, words):
    if words is None:
        return check_exposure(host, token, insecure)
    with pytest.raises(InputError, match=words):
        check_exposure(host, token, insecure)


def test_serve_asks_for_a_key_before_it_loads_the_judge(monkeypatch):
    monkeypatch.delenv("LISTENER_REWARD_API_KEY", raising=False)
    monkeypatch.setattr("listener_reward.cli.serving.load_judge", lambda *_, **__: pytest.fail("it was loaded"))
    done = CliRunner().invoke(app, ["serve", "--judge", "tiny", "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "without an API key" in " ".join(done.stderr.split())


def test_a_web_page_cannot_ask(FakeJudge):
    """A form, a script of another origin, and a name that was pointed at this machine."""
    judge = FakeJudge()
    with serving(ListenerReward(judge), allow_hosts=["judge.example"]) as url:
        own = url.removeprefix("http://")
        for status, headers in (
            (403, {"Origin": "http://evil.example"}),
            (403, {"Origin": "null"}),
            (403, {"Origin": "http://127.0.0.1:1"}),
            (403, {"Sec_Fetch_Site": "cross-site"}),
            (403, {"Sec_Fetch_Site": "same-site"}),
            (415, {"Content_Type": "text/plain"}),
            (415, {"Content_Type": "application/x-www-form-urlencoded"}),
            (415, {"Content_Type": "multipart/form-data; boundary=x"}),
            (415, {"Content_Type": ""}),
            (421, {"Host": "evil.example"}),
            (421, {"Host": f"evil.example:{own.partition(':')[2]}"}),
            (421, {"Host": "127.0.0.1.evil.example"}),
            (421, {"Host": "judge.example.evil"}),
        ):
            for path in ("/compute", "/v1/compare"):
                got = ask(url + path, BODY, **headers)
                assert got[0] == status and got[1]["detail"], headers
            if status == 421:
                assert ask(f"{url}/health", **headers)[0] == 421
        assert judge.calls == []
        for headers in (
            {"Host": "localhost:1"},
            {"Host": "[::1]:8300"},
            {"Host": "JUDGE.example"},
            {"Host": "10.1.2.3"},
            {"Origin": f"http://{own}"},
            {"Sec_Fetch_Site": "none"},
            {"Content_Type": "application/json; charset=utf-8"},
        ):
            assert ask(f"{url}/compute", BODY, **headers)[0] == 200, headers
        got = ask(f"{url}/compute", BODY)[2]
        assert not any(name.lower().startswith("access-control") for name in got)
    with serving(ListenerReward(judge), allow_hosts=["*"]) as url:
        assert ask(f"{url}/compute", BODY, Host="any.example")[0] == 200


# --- how much


def test_each_limit_is_a_clear_refusal(FakeJudge):
    judge = FakeJudge()
    limits = Limits(body=100_000, images=4, pixels=5_000, prompt=100)
    large = io.BytesIO()
    Image.new("1", (100, 100)).save(large, "PNG")
    refused = [
        ({"prompt": ["a"] * 5, "image": [b64(png(1))] * 5}, 413, "5 pictures, more than 4.*--max-images"),
        ({"prompt": ["a"], "video": [[b64(png(1))] * 5]}, 413, "5 pictures"),
        ({"prompt": ["a"], "image": [b64(large.getvalue())]}, 413, "10,000 pixels, more than 5,000.*--request-pixels"),
        ({"prompt": ["a" * 101], "image": [b64(png(1))]}, 413, "101 characters, more than 100.*--max-prompt"),
        ({"prompt": ["a"], "image": ["A" * 100_000]}, 413, "more than 100,000 bytes"),
    ]
    with serving(ListenerReward(judge), limits=limits) as url:
        for body, status, words in refused:
            got, reply, _ = ask(f"{url}/compute", body)
            assert got == status and re.search(words, reply["detail"])
            if "image" in body:
                turns = [
                    {"history": [{"text": prompt, "image_b64": image}], "required_rewards": ["listener"]}
                    for prompt, image in zip(body["prompt"], body["image"], strict=True)
                ]
                assert ask(f"{url}/score", {"requests": turns})[0] == status
                rank = {"prompt": body["prompt"][0], "images": body["image"]}
                assert ask(f"{url}/v1/rank", rank)[0] == status
        assert judge.calls == []
        with pytest.raises(InputError, match="413 the request has 5 pictures"):
            RemoteReward(url)(pixels([9, 20, 30, 40, 50]), ["a"] * 5)
        assert ask(f"{url}/compute", BODY)[0] == 200


def test_a_body_of_many_small_values_is_refused_before_it_is_read(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        for raw in (b"[" + b"[]," * 2**20 + b"[]]", b'{"images": [' + b'"",' * 2**20 + b'""]}', b"[" * 2**21):
            for path in ("/compute", "/v1/rank"):
                status, reply, _ = ask(url + path, raw=raw)
                assert status == 413 and "more than 1,048,576 values" in reply["detail"]


def test_whatever_a_refusal_says_fits_into_a_status_line(FakeJudge):
    with serving(ListenerReward(FakeJudge())) as url:
        for text in ("\x01\x7f\r\nSet-Cookie: a", "\u2028\ud83d", "\U0001f600" * 400):
            item = {"history": [{"text": "a", "image_b64": b64(png(9))}], "required_rewards": [text]}
            status, reply, headers = ask(f"{url}/score", {"requests": [item]})
            assert status == 400 and "required_rewards" in reply["detail"] and "Set-Cookie" not in headers
            assert ask(f"{url}/score", {"requests": [], "protocol_version": text})[0] == 400


def chunked(parts: Iterator[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield b"%x\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


def test_a_body_past_the_limit_is_refused_while_it_comes(FakeJudge):
    with serving(ListenerReward(FakeJudge()), limits=Limits(body=100_000, body_seconds=1.0)) as url:
        with connect(url) as connection:
            connection.sendall(b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000000\r\n\r\n")
            assert b" 413 " in connection.recv(999)
            # The rest is read for a while, so that a client that only writes sees the answer; then it is cut off.
            start = time.monotonic()
            answer(connection)
            assert time.monotonic() - start < 10
        with connect(url) as connection:
            connection.sendall(b"POST /compute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            parts = [*chunked(iter([b"x" * 60_000] * 3))]
            connection.sendall(b"".join(parts[:2]))
            assert b" 413 " in connection.recv(999)
            connection.sendall(b"".join(parts[2:]) + b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            got = b""
            while b" 200 " not in got:  # the connection can be used again
                part = connection.recv(999)
                assert part
                got += part
        with connect(url) as connection:
            whole = json.dumps(BODY).encode()
            connection.sendall(b"POST /compute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"".join(chunked(iter([whole[:50], whole[50:]]))))
            assert b" 200 " in connection.recv(99)


def test_groups_that_keep_one_another_out_are_told_of_at_once(FakeJudge, caplog):
    """Two of a group of three, and room for two requests: the third, which both wait for, is refused."""
    reward = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 3)
    bodies = [{"prompt": ["a"], "image": [b64(png(red))]} for red in (11, 100, 200)]
    with serving(reward, limits=Limits(waiting=2)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, f"{url}/compute", bodies[0])
        until(lambda: reward.held == 1)
        second = pool.submit(ask, f"{url}/compute", bodies[1])
        until(lambda: reward.held == 2)
        for _ in range(2):
            status, reply, headers = ask(f"{url}/compute", bodies[2])
            assert status == 503 and headers["Retry-After"]
            assert "2 requests are under way, as many as this server takes; each of them waits for" in reply["detail"]
        assert caplog.text.count("raise --max-waiting") == 1
        for red in (100, 200):  # they are not given up: a client may hang up and make room, as here
            reward.submit(Image.new("RGB", (8, 8), (red, 0, 0)), "a")
        assert first.result(20)[0] == 200
    assert reward.held == 0 and second.result(20)[0] == 200


def test_more_requests_than_there_is_room_for_are_told_to_come_again(FakeJudge, monkeypatch):
    slow = Slow(FakeJudge())
    with serving(ListenerReward(slow), limits=Limits(waiting=2)) as url, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(ask, f"{url}/compute", BODY) for _ in range(2)]
        until(lambda: ask(f"{url}/ready")[0] == 503)
        status, reply, headers = ask(f"{url}/compute", BODY)
        assert status == 503 and "2 requests are under way" in reply["detail"]
        assert 1 <= int(headers["Retry-After"]) <= 60
        pauses: list[float] = []
        monkeypatch.setattr(
            "listener_reward.remote.time.sleep", lambda seconds: (pauses.append(seconds), slow.go.set())
        )
        until_free = RemoteReward(url)
        assert until_free(pixels(), PROMPTS)[0].shape == (4,) and pauses
        assert [one.result(30)[0] for one in held] == [200, 200]
        assert ask(f"{url}/ready")[:2] == (200, {"ready": True, "under_way": 0})


def test_the_bodies_under_way_are_bounded_together(FakeJudge):
    slow = Slow(FakeJudge())
    size = len(json.dumps(BODY))
    with serving(ListenerReward(slow), limits=Limits(held=2 * size + 10)) as url, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(ask, f"{url}/compute", BODY) for _ in range(2)]
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 2 and slow.began.is_set())
        time.sleep(0.1)
        status, reply, _ = ask(f"{url}/compute", BODY)
        assert status == 503 and "memory" in reply["detail"]
        slow.go.set()
        assert [one.result(30)[0] for one in held] == [200, 200] and ask(f"{url}/compute", BODY)[0] == 200


def test_pictures_are_decoded_when_there_is_room_for_their_pixels():
    intake = Intake(Limits(pixels=100, decoded=100))

    def sent(side: int) -> Any:
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        return upload(b64(file.getvalue()), "image")

    order: list[int] = []
    go = threading.Event()

    def works(side: int) -> None:
        with intake.room([sent(side)]):
            order.append(side)
            assert go.wait(20)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(works, 8)
        until(lambda: order == [8])
        second = pool.submit(works, 7)
        time.sleep(0.05)
        third = pool.submit(works, 2)  # would fit, and does not overtake
        time.sleep(0.05)
        assert order == [8]

        def gone() -> bool:
            raise InputError("gone")

        with pytest.raises(InputError, match="gone"), intake.room([sent(9)], gone):
            pass
        go.set()
        for one in (first, second, third):
            one.result(20)
    assert order == [8, 7, 2]
    with intake.room([sent(10)]):
        pass


def test_a_small_body_of_large_pictures_costs_no_memory():
    """200 one-bit PNGs of 2048 pixels are 0.64 MB, and were 6.8 GB before the first comparison."""
    script = """
import base64, io, json, resource, sys
from PIL import Image
from listener_reward.errors import InputError
from listener_reward.integrations.serving.computing import compute

file = io.BytesIO()
Image.new("1", (2048, 2048)).save(file, "PNG")
body = {"prompt": ["a"] * 200, "image": [base64.b64encode(file.getvalue()).decode()] * 200}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    compute(None, body)
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, megabytes = done.stdout.splitlines()
    assert "838,860,800 pixels, more than 268,435,456" in said and float(megabytes) < 50


# --- how slowly


def test_slow_clients_are_cut_off_and_the_others_are_answered(FakeJudge):
    limits = Limits(head_seconds=0.5, body_seconds=0.5, rate=2**20)
    head = b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with serving(ListenerReward(FakeJudge()), limits=limits) as url:
        clients = [connect(url) for _ in range(60)]
        starts = (b"", b"POST /comp", head, head + b"x" * 10)
        start = time.monotonic()
        for k, client in enumerate(clients):
            client.sendall(starts[k % 4])
        assert ask(f"{url}/compute", BODY)[0] == 200
        for k, client in enumerate(clients):
            got = answer(client)
            assert got == b"" if k % 4 == 0 else got.startswith(b"HTTP/1.1 408 "), k
            client.close()
        assert time.monotonic() - start < 8
        with connect(url) as drip:  # a byte now and then does not help
            drip.sendall(head)
            with pytest.raises(OSError):
                for _ in range(100):
                    drip.sendall(b"x")
                    time.sleep(0.05)
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 0)
        assert ask(f"{url}/compute", BODY)[0] == 200


def test_connections_beyond_the_limit_are_closed(FakeJudge):
    with serving(ListenerReward(FakeJudge()), limits=Limits(connections=3)) as url:
        clients = [connect(url) for _ in range(3)]
        for client in clients:  # each is known to the server once it has answered
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in client.recv(999)
        with connect(url) as one_more:
            got = answer(one_more)
            assert got.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in got
        for client in clients:
            client.close()
        until(lambda: ask(f"{url}/ready")[0] == 200)


def test_who_does_not_read_the_answer_is_cut_off(FakeJudge, shade):
    class Talkative(FakeJudge):
        def compare_many(self, *args: Any, **options: Any) -> Any:
            from dataclasses import replace

            given = super().compare_many(*args, **options)
            return [replace(v, thoughts=(replace(v.thoughts[0], text="x" * 30_000_000),)) for v in given]

    body = json.dumps({"prompt": "a", "first": b64(png(1)), "second": b64(png(2))}).encode()
    with serving(ListenerReward(Talkative()), limits=Limits(body_seconds=0.5)) as url, connect(url) as client:
        client.sendall(post(body, "/v1/compare"))
        time.sleep(2)
        assert len(answer(client)) < 30_000_000


# --- for how long


def test_the_deadline_of_a_client_is_kept(FakeJudge):
    judge = FakeJudge()
    slow = Slow(judge)
    with serving(ListenerReward(slow, scheme="group")) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, f"{url}/compute", BODY)
        assert slow.began.wait(20)
        patient = pool.submit(ask, f"{url}/compute", BODY, X_Request_Timeout="600")
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 2)
        late = pool.submit(ask, f"{url}/compute", BODY, X_Request_Timeout="0.5")
        until(lambda: late.done() or ask(f"{url}/ready")[1]["under_way"] == 3)
        time.sleep(0.6)
        slow.go.set()
        assert first.result(20)[0] == patient.result(20)[0] == 200
        status, reply, _ = late.result(20)
        assert status == 504 and "X-Request-Timeout is over" in reply["detail"]
        assert sum(map(len, judge.calls)) == 2, "the late one was not begun"
        for bad in ("0", "-1", "nan", "soon", "1e"):
            assert ask(f"{url}/compute", BODY, X_Request_Timeout=bad)[0] == 400
        assert ask(f"{url}/compute", BODY, X_Request_Timeout="inf")[0] == 200


def test_nothing_is_begun_for_a_client_that_has_gone(FakeJudge):
    judge = FakeJudge()
    slow = Slow(judge)
    data = json.dumps(BODY).encode()
    with serving(ListenerReward(slow, scheme="group")) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, f"{url}/compute", BODY)
        assert slow.began.wait(20)
        clients = [connect(url) for _ in range(20)]
        for client in clients:
            client.sendall(
                b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 21)
        for client in clients:
            client.close()
        time.sleep(0.2)
        slow.go.set()
        assert first.result(20)[0] == 200
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 0)
        assert sum(map(len, judge.calls)) == 1


def test_a_remote_reward_says_how_long_it_waits(FakeJudge):
    with scripted((200, {}, {"rewards": [0.0] * 4})) as (url, handler):
        RemoteReward(url, timeout=42, api_key=KEY)(pixels(), PROMPTS)
    assert handler.headers_seen[0]["X-Request-Timeout"] == "42"
    assert handler.headers_seen[0]["Authorization"] == f"Bearer {KEY}"


# --- what it answers


def test_the_judge_itself_can_be_asked(FakeJudge):
    judge = FakeJudge(listener_slope=2.0)
    with serving(ListenerReward(judge, scheme="group")) as url:
        body = {"prompt": "a", "first": b64(png(200)), "second": b64(png(20))}
        status, verdict, _ = ask(f"{url}/v1/compare", body)
        expected = FakeJudge(listener_slope=2.0).compare("a", Image.new("RGB", (4, 4), (200, 0, 0)), png(20))
        assert status == 200 and verdict == json.loads(json.dumps(expected.to_dict()))
        assert ask(f"{url}/v1/compare", body | {"think": False})[0] == 200 and judge.think == [None, False]
        status, ranking, _ = ask(f"{url}/v1/rank", {"prompt": "a", "images": [b64(png(red)) for red in REDS]})
        assert status == 200 and ranking["order"] == [0, 3, 2, 1] and ranking["comparisons"] == 6
        assert ask(f"{url}/v1/rank", {"prompt": "a", "images": [b64(png(1))] * 3, "budget": 2})[0] == 200
        for bad, words in (
            ({}, "prompt: Field required"),
            (body | {"more": 1}, "more: Extra inputs"),
            (body | {"first": 3}, "first: Input should be a valid string"),
            (body | {"think": "yes"}, "think: Input should be a valid boolean"),
            ([], "body: Input should be"),
        ):
            status, reply, _ = ask(f"{url}/v1/compare", bad)
            assert status == 422 and words in reply["detail"]
        assert ask(f"{url}/v1/rank", {"prompt": "a", "images": []})[0] == 422
        assert ask(f"{url}/v1/rank", {"prompt": "a", "images": [b64(png(1))] * 2, "budget": 0})[0] == 422
        for bad in ("%%%", "/etc/passwd", "http://127.0.0.1/a.png", b64(b"no picture"), b64(png(1)[:40])):
            assert ask(f"{url}/v1/compare", body | {"first": bad})[0] == 400
    with serving(ListenerReward(broken(FakeJudge))) as url:
        status, reply, _ = ask(f"{url}/v1/compare", {"prompt": "a", "first": b64(png(90)), "second": b64(png(1))})
        assert status == 500 and "the judge broke" in reply["detail"]
    with serving(lambda images, prompts, metadata: (np.zeros(len(images)), {})) as url:
        assert ask(f"{url}/v1/rank", {"prompt": "a", "images": [b64(png(1))]})[0] == 501


def test_numbers_that_json_has_not_are_refused_and_others_come_back(FakeJudge):
    item = {"history": [{"text": "a", "image_b64": b64(png(9))}], "required_rewards": ["listener"]}
    with serving(ListenerReward(FakeJudge(), scheme="reference")) as url:
        for bad in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000):
            raw = json.dumps({"requests": [item | {"request_id": "@"}]}).encode().replace(b'"@"', bad)
            assert ask(f"{url}/score", raw=raw)[0] == 400, bad
        for fine in (1.5, 10**30, "\ud83d", None, [1, {"a": 2}], "x" * 9999):
            status, reply, _ = ask(f"{url}/score", {"requests": [item | {"request_id": fine}]})
            assert status == 200 and reply["identities"][0]["request_id"] == fine
        deep = json.dumps({"requests": [item | {"request_id": "@"}]}).encode().replace(b'"@"', b"[" * 900 + b"]" * 900)
        assert ask(f"{url}/score", raw=deep)[0] in (200, 400)
        half = {"prompt": ["a \ud83d"], "image": [b64(png(1))]}
        assert ask(f"{url}/compute", half)[1]["kind"] == "input"


def test_metrics_say_what_was_done(FakeJudge):
    judge = BatchingJudge(FakeJudge(listener_slope=-4.0, malformed=True))
    with serving(ListenerReward(judge, scheme="group")) as url:
        assert ask(f"{url}/compute", BODY)[0] == 200
        assert ask(f"{url}/reference/compute", BODY)[0] == 409 and ask(f"{url}/nothing")[0] == 404
        status, page, headers = ask(f"{url}/metrics")
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name, value in {
        'requests_total{route="/compute",status="200"}': 1,
        'requests_total{route="/compute",status="409"}': 1,
        'requests_total{route="other",status="404"}': 1,
        "comparisons_total": 1,
        "listened_total": 1,
        "contradictions_total": 1,
        "thoughts_total": 2,
        "malformed_thoughts_total": 1,
        "failures_total": 0,
        "batch_pairs_count": 1,
        "batch_pairs_sum": 1,
        "batch_seconds_count": 1,
        "label_mass_count": 0,
        "queue_pairs": 0,
        "requests_under_way": 0,
        'request_seconds_count{route="/compute"}': 2,
    }.items():
        assert float(lines[f"listener_reward_{name}"]) == value, name
    with serving(GroupCollector(ListenerReward(BatchingJudge(broken(FakeJudge)), scheme="group"), 3)) as url:
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(ask, f"{url}/compute", BODY)
            until(lambda: "listener_reward_group_images 2.0" in ask(f"{url}/metrics")[1])
            assert "broke" in ask(f"{url}/compute", {"prompt": ["a"], "image": [b64(png(90))]})[1]["error"]
            assert waits.result(20)[1]["kind"] == "judge"
        assert "listener_reward_failures_total 1.0" in ask(f"{url}/metrics")[1]


def test_the_types_are_in_the_openapi_page_with_examples_that_work(FakeJudge):
    with serving(ListenerReward(FakeJudge(), scheme="group"), api_key=KEY) as url:
        key = {"Authorization": f"Bearer {KEY}"}
        status, page, _ = ask(f"{url}/openapi.json", **key)
        assert status == 200 and "HTTPBearer" in page["components"]["securitySchemes"]
        posts = {path: one["post"] for path, one in page["paths"].items() if "post" in one}
        assert posts.keys() == {"/compute", "/score", "/v1/compare", "/v1/rank"}
        for path, post in posts.items():
            schema = post["requestBody"]["content"]["application/json"]["schema"]
            status, reply, _ = ask(url + path, schema["examples"][0], **key)
            assert status == 200 and set(reply) <= set(
                page["components"]["schemas"][post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]["properties"]
            )  # fmt: skip
            assert {"400", "401", "413", "503", "504"} <= post["responses"].keys()


def test_the_page_for_people_has_every_route_and_fetches_nothing(FakeJudge):
    with serving(ListenerReward(FakeJudge()), api_key=KEY) as url:
        status, page, headers = ask(f"{url}/docs")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    for route in ("POST /compute", "POST /score", "POST /v1/compare", "POST /v1/rank", "GET /health", "GET /metrics"):
        assert f"<code>{route}</code>" in page
    assert "array of string" in page and "boolean or null" in page and "two red circles" in page
    assert not re.search(r"<script|<link|src=|https?://", page)


# --- what is freed


def test_the_pictures_of_a_failed_request_are_freed_at_once(FakeJudge, monkeypatch):
    """Without a garbage collection: an exception that its own traceback holds kept 4.3 GB."""
    alive: list[weakref.ref[Any]] = []
    from listener_reward.media import images

    decoded = images._decoded

    def watched(*args: Any) -> Any:
        image = decoded(*args)
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(images, "_decoded", watched)
    bad = [b64(png(1)), b64(png(2)), b64(png(3)[:60])]
    score = [
        {"history": [{"text": "a", "image_b64": one}], "required_rewards": ["listener"], "group_id": "g"} for one in bad
    ]
    fine = BODY | {"image": [b64(png(90)), b64(png(1))]}
    requests = [
        ("/compute", {"prompt": ["a"] * 3, "image": bad}),
        ("/score", {"requests": score}),
        ("/v1/rank", {"prompt": "a", "images": bad}),
        ("/v1/compare", {"prompt": "a", "first": b64(png(90)), "second": b64(png(2))}),
        ("/compute", fine),
        ("/group/compute", fine),
    ]
    with serving(ListenerReward(broken(FakeJudge), scheme="group")) as url:
        gc.collect()
        gc.disable()
        try:
            for path, body in requests:
                ask(url + path, body)
                until(lambda: not any(ref() is not None for ref in alive), 2)
        finally:
            gc.enable()
    assert len(alive) > 8


def test_a_group_that_fills_holds_files_and_not_pixels(FakeJudge):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 3)
    with serving(collector) as url, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, f"{url}/compute", BODY)
        until(lambda: collector.waiting == 2)
        (group,) = collector._waiting.values()
        assert [type(member.picture) for member in group.members] == [bytes, bytes]
        assert ask(f"{url}/compute", {"prompt": ["a"], "image": [b64(png(90))]})[0] == 200
        assert waits.result(20)[1]["rewards"][1] > 0


# --- mutated bodies, dying clients


def mutated(random: random.Random, body: Any) -> Any:
    """`body` with one of its values replaced, one left out, or one put where it does not belong."""
    junk = [
        None, True, 0, -1, 1e300, 10**400, "", "a", "\x00", "\ud800", "%%%", "../../etc/passwd", "http://x/y.png", [],
        [[]], {}, {"a": 1}, [None], "A" * 5000, b64(b"GIF89a" + b"\xff" * 99), b64(b"RIFF\x00\x00\x00\x00AVI LIST"),
        b64(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 99), b64(b"%!PS-Adobe-3.0 EPSF-3.0\n"), b64(png(1)[:-9]),
    ]  # fmt: skip
    if isinstance(body, dict) and body and random.random() < 0.9:
        key = random.choice([*body])
        kind = random.random()
        if kind < 0.15:
            return {name: value for name, value in body.items() if name != key}
        if kind < 0.25:
            return body | {random.choice(["x", "image", "video", "prompt", "images", key + " "]): random.choice(junk)}
        return body | {key: mutated(random, body[key])}
    if isinstance(body, list) and body and random.random() < 0.8:
        k = random.randrange(len(body))
        return random.choice([[*body[:k], mutated(random, body[k]), *body[k + 1 :]], body + body[:1], body[:-1]])
    return random.choice(junk)


def threads() -> int:
    return len([thread for thread in threading.enumerate() if not thread.name.startswith("listener-reward-request")])


@pytest.mark.parametrize("collects", [False, True])
def test_three_hundred_mutated_bodies_and_dying_clients_leave_nothing_behind(FakeJudge, collects):
    chance = random.Random(0)
    turn = {"text": "a", "image_b64": b64(png(5))}
    item = {"history": [turn, turn], "required_rewards": ["listener"], "metadata": None, "group_id": "g"}
    bodies = {
        "/compute": BODY | {"video": None, "condition_images": [[0], [b64(png(3))]], "pictures": [b64(png(3))]},
        "/score": {"protocol_version": "1", "requests": [item, item]},
        "/v1/compare": {"prompt": "a", "first": b64(png(1)), "second": b64(png(2)), "think": None, "sources": []},
        "/v1/rank": {"prompt": "a", "images": [b64(png(1)), b64(png(2))], "budget": None, "criterion": None},
    }
    reward = ListenerReward(FakeJudge(), scheme="group", on_failure="nan")
    served: Any = GroupCollector(reward, 2, timeout=0.2) if collects else reward
    with serving(served, limits=Limits(body_seconds=2.0, head_seconds=2.0)) as url:
        ask(f"{url}/compute", BODY)
        before, files = threads(), len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        with ThreadPoolExecutor(8) as pool:
            jobs = []
            for number in range(300):
                path = chance.choice([*bodies])
                raw = json.dumps(mutated(chance, bodies[path])).encode()
                if number % 5 == 0:
                    place = chance.randrange(len(raw))
                    raw = raw[:place] + chance.randbytes(chance.randrange(4)) + raw[place + chance.randrange(9) :]
                jobs.append((raw, pool.submit(ask, url + path, raw=raw)))
            for raw, job in jobs:
                status, reply, _ = job.result(60)
                assert status < 500, (raw[:300], reply)
                assert "detail" in reply if status >= 400 else isinstance(reply, dict)
        sent = post(json.dumps(BODY).encode())
        for number in range(100):
            with connect(url) as client:
                client.sendall(sent[: chance.randrange(1, len(sent) + 1)])
                if number % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset
        until(lambda: ask(f"{url}/ready")[1]["under_way"] == 0)
        status, reply, _ = ask(f"{url}/compute", BODY)
        assert status == 200 and reply["rewards"][1] > 0 > reply["rewards"][0]
        if files:
            until(lambda: len(os.listdir("/proc/self/fd")) <= files + 8)
        until(lambda: threads() <= before + 1)
    until(lambda: not any("listener-reward-request" in thread.name for thread in threading.enumerate()))


# --- how it ends


SERVER = """
import time
from listener_reward.integrations.serving.server import make_server
from listener_reward.reward import ListenerReward
from listener_reward.verdict import Verdict

class Judge:
    name = "slow"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        time.sleep(0.5)
        return [Verdict(0.5, None, (), None, None, 0.0, 0) for _ in prompts]

with make_server(ListenerReward(Judge(), scheme="group"), port=0) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_when_what_is_under_way_is_answered(number):
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(4) as pool:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            under_way = [pool.submit(ask, f"{url}/compute", BODY | {"prompt": [name] * 2}) for name in "abcd"]
            until(lambda: ask(f"{url}/ready")[1]["under_way"] == 4)
            process.send_signal(number)
            until(lambda: ask(f"{url}/ready")[0] == 503)
            status, reply, headers = ask(f"{url}/compute", BODY)
            assert status == 503 and "about to end" in reply["detail"] and headers["Retry-After"]
            assert [one.result(60)[1]["rewards"] for one in under_way] == [[0.0, 0.0]] * 4
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_groups_that_will_not_be_full_are_told_to_ask_again_when_the_server_ends(FakeJudge):
    collector = GroupCollector(ListenerReward(FakeJudge(), scheme="group"), 3)
    with ThreadPoolExecutor(1) as pool:
        with serving(collector) as url:
            waits = pool.submit(ask, f"{url}/compute", BODY)
            until(lambda: collector.waiting == 2)
        status, reply, headers = waits.result(20)
    assert status == 503 and "not full" in reply["detail"] and headers["Retry-After"] == "5"


def test_what_waits_longer_than_the_server_takes_to_end_is_told_to_ask_again(FakeJudge):
    slow = Slow(FakeJudge())
    with ThreadPoolExecutor(3) as pool:
        with serving(ListenerReward(slow, scheme="group"), limits=Limits(drain_seconds=0.2)) as url:
            begun = pool.submit(ask, f"{url}/compute", BODY)
            assert slow.began.wait(20)
            waits = pool.submit(ask, f"{url}/compute", BODY)
            until(lambda: ask(f"{url}/ready")[1]["under_way"] == 2)
            threading.Timer(0.6, slow.go.set).start()
        assert begun.result(20)[0] == 200 and waits.result(20)[0] == 503


def test_serve_hands_its_limits_on(monkeypatch, FakeJudge):
    monkeypatch.setattr("listener_reward.cli.serving.load_judge", lambda *_, **__: FakeJudge())
    made: list[dict[str, Any]] = []

    class Server:
        server_address = ("127.0.0.1", 8300)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def serve_forever(self) -> None: ...

    def make_server(reward: Any, **options: Any) -> Any:
        made.append(options | {"reward": reward})
        return Server()

    monkeypatch.setattr("listener_reward.integrations.serving.server.make_server", make_server)
    options = (
        "--max-body 2 --max-images 3 --request-pixels 4 --max-prompt 5 --max-waiting 6 --drain 7 --max-batch 8 --wait 9"
    )
    hosts = "--allow-host a.example --allow-host b.example --host 0.0.0.0 --insecure"
    done = CliRunner().invoke(app, ["serve", "--judge", "tiny", *options.split(), *hosts.split()])
    assert done.exit_code == 0, done.output
    monkeypatch.setenv("LISTENER_REWARD_API_KEY", KEY)
    assert CliRunner().invoke(app, ["serve", "--judge", "tiny", "--host", "0.0.0.0"]).exit_code == 0
    given, secure = made
    assert given["limits"] == Limits(
        body=2 * 2**20, images=3, pixels=4, prompt=5, waiting=6, connections=262, drain_seconds=7
    )
    assert (given["reward"].judge.limit, given["reward"].judge.wait) == (8, 0.009)
    assert (given["host"], given["insecure"], given["allow_hosts"]) == ("0.0.0.0", True, ["a.example", "b.example"])
    assert (given["api_key"], secure["api_key"], secure["insecure"]) == (None, KEY, False)


def test_the_health_page_of_hosts_stays_as_it_is(FakeJudge):
    with serving(ListenerReward(FakeJudge(), scheme="group")) as url:
        status, health = http(f"{url}/auto/health")
    assert status == 200 and health.keys() == {"status", "rewards", "scorer_version", "scheme"}
