"""What the adapters' tests share: batches of four reds, bad ones, and the hosts that more than one file calls.

The hosts, here and in the tests, are written after their sources (the file is named at each) and reduced to what
touches a reward. What they would do with the answer is done too, so that an answer of a wrong type or shape fails as it
would there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any
from urllib import request
from urllib.error import HTTPError

import numpy as np
import torch
from PIL import Image

from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.serving.collector import GroupCollector
from listener_reward.integrations.serving.server import make_server

REDS = [200, 20, 90, 160]
PROMPTS = ("a", "a", "a", "a")
BETTER = [0, 3, 2, 1]  # positions of REDS, best first
ERRORS = (InputError, JudgeError)

REFERENCE = {"a": Image.new("RGB", (4, 4), (100, 0, 0))}


def pixels(reds=REDS, dtype=torch.float32) -> torch.Tensor:
    """What a pipeline's `output_type="pt"` gives: (B, 3, H, W) in [0, 1]."""
    images = torch.zeros(len(reds), 3, 4, 4)
    images[:, 0] = torch.tensor(reds)[:, None, None] / 255
    return images.to(dtype)


def order(scores) -> list[int]:
    return np.argsort(-np.asarray(torch.as_tensor(scores).float()), kind="stable").tolist()


def broken(FakeJudge, red=90, **options):
    """A judge that breaks on every pair with the image of this red in it."""
    return FakeJudge(breaks_on=lambda prompt, first, second: red in (first, second), **options)


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def with_pixel(value: float) -> torch.Tensor:
    images = pixels()
    images[1, 1, 2, 2] = value
    return images


BAD_TENSORS: dict[str, tuple[Any, Any]] = {
    "NaN pixel": (with_pixel(float("nan")), PROMPTS),
    "infinite pixel": (with_pixel(float("inf")), PROMPTS),
    "floats up to 255": (pixels() * 255, PROMPTS),
    "floats in [-1, 1]": (pixels() * 2 - 1, PROMPTS),
    "one image without its axis": (pixels()[0], PROMPTS[:1]),
    "five channels": (torch.zeros(4, 5, 6, 6), PROMPTS),
    "integers that are not bytes": ((pixels() * 255).long(), PROMPTS),
    "no images at all": (None, PROMPTS),
    "a prompt too few": (pixels(), PROMPTS[:3]),
    "a prompt too many": (pixels(), (*PROMPTS, "a")),
    "an empty prompt": (pixels(), ("a", "a", "  ", "a")),
    "a prompt that is None": (pixels(), ("a", None, "a", "a")),
    "prompts as one text": (pixels(), "aaaa"),
    "no pixels": (torch.zeros(4, 3, 0, 0), PROMPTS),
}
"""Batches that no tensor host may turn into scores. `None` stands for a pipeline that failed, `len` of which raises."""


# ---------------------------------------------------------------------------------------------------------------------
# trl 0.23.1, trl/trainer/ddpo_trainer.py: compute_rewards, step


def trl_host(reward_fn, pairs, is_async: bool):
    if not is_async:
        rewards = []
        for images, prompts, metadata in pairs:
            reward, reward_metadata = reward_fn(images, prompts, metadata)
            rewards.append((torch.as_tensor(reward, device="cpu"), reward_metadata))
    else:
        with ThreadPoolExecutor(2) as executor:
            rewards = executor.map(lambda x: reward_fn(*x), pairs)
            rewards = [
                (torch.as_tensor(reward.result(), device="cpu"), reward_metadata.result())
                for reward, reward_metadata in rewards
            ]
    rewards, metadata = zip(*rewards, strict=True)
    rewards = torch.cat(rewards).cpu().numpy()
    assert rewards.dtype.kind == "f" and type(rewards) is np.ndarray
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8), metadata


# ---------------------------------------------------------------------------------------------------------------------
# miles_diffusion, miles/rollout/rm_hub/__init__.py: batched_async_rm


def miles_host(rm, microgroups, **args):
    async def generate_and_rm_microgroup(samples):
        await asyncio.to_thread(time.sleep, 0.001)  # the host's own ray.get, in the loop's few threads
        rewards = await rm(SimpleNamespace(custom_rm_path="my_rewards.rm", **args), samples)
        for one, reward in zip(samples, rewards, strict=True):
            one.reward = reward

    async def rollout():
        await asyncio.gather(*(generate_and_rm_microgroup(samples) for samples in microgroups))

    asyncio.run(rollout())
    return [one.reward for samples in microgroups for one in samples]


def generated(
    red: int, layout: str = "CTHW", scale: float = 1.0, frames: int = 1, prompt: Any = "a"
) -> SimpleNamespace:
    video = pixels([red]).expand(frames, -1, -1, -1) * scale  # TCHW
    output = {
        "CTHW": video.transpose(0, 1),
        "TCHW": video,
        "THWC": video.permute(0, 2, 3, 1),
        "1THWC": video.permute(0, 2, 3, 1)[None],
        "CHW": video[0],
    }[layout]
    return SimpleNamespace(prompt=prompt, generated_output=output, reward=None, metadata={})


# ---------------------------------------------------------------------------------------------------------------------
# A collector without a clock


class HandClock:
    """The time of a collector, which goes on by hand: `GroupCollector(..., clock=hand.now, timer=hand.timer)`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._due: list[tuple[float, Callable[[], object]]] = []

    def now(self) -> float:
        return self.seconds

    def timer(self, seconds: float, function: Callable[..., object], arguments: Sequence[Any]) -> Any:
        entry = (self.seconds + seconds, lambda: function(*arguments))
        return SimpleNamespace(start=lambda: self._due.append(entry), cancel=lambda: self._due.remove(entry))

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        due = [entry for entry in self._due if entry[0] <= self.seconds]
        self._due = [entry for entry in self._due if entry not in due]
        for _, call in due:
            call()


class WatchedCollector(GroupCollector):
    """Keeps the futures that it gave out, one for each submission, and tells when there are so many."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.futures: list[Future] = []
        self._came = threading.Condition()

    def submit(self, *args: Any, **options: Any) -> Future:
        future = super().submit(*args, **options)
        with self._came:
            self.futures.append(future)
            self._came.notify_all()
        return future

    def places(self, submissions: int) -> int:
        """How many places of groups so many submissions took, once they came."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.futures) >= submissions, 60)
            return len({id(future) for future in self.futures})


# ---------------------------------------------------------------------------------------------------------------------
# The server, and Flow-Factory's RemoteRewardClient


@contextmanager
def serving(reward, **options):
    server = make_server(reward, port=0, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def http(
    url: str, body: Any = None, raw: bytes | None = None, raises: bool = False, timeout: float = 30
) -> tuple[int, dict]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    try:
        with request.urlopen(
            request.Request(url, data, {"Content-Type": "application/json"}), timeout=timeout
        ) as reply:
            return reply.status, json.load(reply)
    except HTTPError as refused:
        if raises:
            raise
        return refused.code, json.load(refused)


def flow_factory_client(url: str, prompt, image=None, video=None, condition_images=None) -> list[float]:
    payload = {"prompt": prompt, "image": image, "video": video, "condition_images": condition_images, "kwargs": None}
    try:
        _, data = http(f"{url}/compute", payload, raises=True)
    except HTTPError as refused:  # requests' raise_for_status shows the status line, and not the body
        error = f"{refused.code} Client Error: {refused.reason} for url: {url}/compute"
        raise RuntimeError(f"Failed to connect to {url}: {error}") from refused
    if data.get("error"):
        raise RuntimeError(f"Server error: {data['error']}")
    return torch.tensor(data["rewards"], dtype=torch.float32).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# A server that answers as it is told


class Scripted(BaseHTTPRequestHandler):
    """Answers each request by the next entry of `script`: a status with headers and body, or None to hang up."""

    script: list[tuple[int, dict[str, str], Any] | None]
    paths: list[str]
    headers_seen: list[dict[str, str]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.paths.append(self.path)
        self.headers_seen.append(dict(self.headers))
        answer = self.script.pop(0)
        if answer is None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            return self.connection.close()
        status, headers, body = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def scripted(*script: tuple[int, dict[str, str], Any] | None) -> Iterator[tuple[str, Any]]:
    handler = type("Handler", (Scripted,), {"script": [*script], "paths": [], "headers_seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
