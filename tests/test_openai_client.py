"""The client of OpenAI-compatible servers: bounded in time, in requests under way, and in what it encodes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from listener_reward.addresses import is_here
from listener_reward.errors import InputError, JudgeError, UnreachableError
from listener_reward.media.images import to_picture
from listener_reward.models import openai_client
from listener_reward.models.openai_client import OpenAIClient


def quick(address: str, **options: Any) -> OpenAIClient:
    return OpenAIClient(address, **{"api_key": "", "pause": 0.001, "tries": 3} | options)


@contextmanager
def dripping(every: float) -> Iterator[str]:
    """A server that sends a byte of its answer every so many seconds."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        while True:
            try:
                asked, _ = listening.accept()
                asked.recv(65536)
                asked.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while asked.send(b" "):
                    time.sleep(every)
            except OSError:
                if listening.fileno() < 0:
                    return

    threading.Thread(target=drip, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    listening.close()


def test_a_try_ends_at_its_time_though_bytes_keep_coming():
    with dripping(0.02) as address:
        begun = time.monotonic()
        with pytest.raises(JudgeError, match="in 2 tries; the last time, ReadTimeout: timed out"):
            quick(address, tries=2, timeout=0.15).post("/chat/completions", {})
        assert 0.3 <= time.monotonic() - begun < 2


def test_a_server_that_takes_no_connection_is_told_from_one_that_fails():
    with pytest.raises(UnreachableError, match="no response in 3 tries; the last time, ConnectError"):
        quick("http://127.0.0.1:9/v1").post("/chat/completions", {})
    with dripping(0.02) as address, pytest.raises(JudgeError) as failed:
        quick(address, tries=2, timeout=0.1).post("/chat/completions", {})
    assert not isinstance(failed.value, UnreachableError)


def test_the_deadline_ends_the_tries():
    begun = time.monotonic()
    with pytest.raises(JudgeError, match="in 1 tries"):
        quick("http://127.0.0.1:9/v1", tries=100, pause=10.0, deadline=1.0).get("/models")
    assert time.monotonic() - begun < 1


@contextmanager
def counting(most: list[int]) -> Iterator[str]:
    """A server that notes in `most` how many requests were under way at a time."""
    now, lock = [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.02)
            with lock:
                now[0] -= 1
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_requests_under_way_are_bounded_over_all_who_ask():
    most = [0]
    with counting(most) as address:
        client = quick(address, workers=3)
        callers = [
            threading.Thread(target=client.map, args=(lambda _: client.post("/x", {}), range(6))) for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert most == [3]


def test_a_picture_is_encoded_once_and_old_ones_make_room(monkeypatch):
    encoded = []
    stock = openai_client._data_url

    def spy(image: Any) -> str:
        encoded.append(image)
        return stock(image)

    monkeypatch.setattr(openai_client, "_data_url", spy)
    client = quick("http://127.0.0.1:9/v1")
    pictures = [to_picture(Image.new("RGB", (8, 8), shade)) for shade in ("red", "green", "blue")]
    assert len({client.picture_url(picture) for picture in (*pictures, *pictures)}) == 3
    assert len(encoded) == 3
    monkeypatch.setattr(openai_client, "_KEPT_PICTURES", 1)
    for picture in pictures:
        client.picture_url(picture)
    client.picture_url(to_picture(Image.new("RGB", (8, 8), "white")))
    assert len(client._pictures) == 1


def test_this_machine_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    most = [0]
    with counting(most) as address:
        assert quick(address).post("/x", {}) == {}
    assert [is_here(url) for url in ("http://[::1]:1/v1", "http://localhost", "http://h")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("options", "words"), [({"workers": 0}, "workers"), ({"timeout": 0}, "timeout")])
def test_numbers_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        quick("http://127.0.0.1:9/v1", **options)
