"""The server under load and under attack: what batching gives, how long a queue is waited in, what is left behind.

    python tests/benchmarks/serving.py burst              # 48 requests of one image against one request of 48
    python tests/benchmarks/serving.py load               # 32 clients, two images each, two minutes
    python tests/benchmarks/serving.py fuzz               # 1,000 requests made from the OpenAPI page by schemathesis
    python tests/benchmarks/serving.py slow               # 100 slow and 100 dying clients

`burst` and `load` serve the embedded judge in a process of its own, which shares the machine's cores with the clients;
`fuzz` (pip install schemathesis) and `slow` serve a judge that answers at once. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib import request

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from listener_reward.remote import RemoteReward

INSTANT = """
from listener_reward.integrations.serving.limits import Limits
from listener_reward.integrations.serving.server import make_server
from listener_reward.reward import ListenerReward
from listener_reward.batching import BatchingJudge
from listener_reward.verdict import Verdict

class Judge:
    name = "instant"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        given = []
        for first, second in zip(firsts, seconds):
            p = 0.5 if first == second else 0.9 if first.image.getpixel((0, 0)) > second.image.getpixel((0, 0)) else 0.1
            given.append(Verdict(p, None if p == 0.5 else 1 if p > 0.5 else 2, (), None, None, 0.0, 0))
        return given

limits = Limits(head_seconds=2.0, body_seconds=2.0)
with make_server(ListenerReward(BatchingJudge(Judge()), scheme="group"), port=0, limits=limits) as server:
    print(f"serving on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def served(*command: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server, which must end with 0."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if "serving on" in line:
                break
        assert "serving on" in said[-1], "".join(said)
        log = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
        log.start()
        try:
            yield said[-1].split()[-1], process.pid
        finally:
            process.terminate()
            if code := process.wait(90):
                print(f"the server ended with {code}:", *said[-20:], sep="\n")


def judge_of_images() -> tuple[str, ...]:
    return "-m", "listener_reward.cli", "serve", "--judge", "tiny", "--port", "0"


def tiny_images(count: int) -> tuple[list[Image.Image], list[str]]:
    from listener_reward.datasets import load_pairs

    rows: Any = load_pairs("tiny:id", limit=(count + 1) // 2)
    images = [image for row in rows for image in row["images"]]
    return images[:count], [row["prompt"] for row in rows for _ in row["images"]][:count]


def burst(seconds: float) -> dict[str, Any]:
    images, prompts = tiny_images(48)
    with served(*judge_of_images()) as (url, _), ThreadPoolExecutor(48) as clients:
        reward = RemoteReward(url, scheme="reference")
        reward(images, prompts)  # the first images of the prompts are their references from now on
        together, alone = [], []
        for _ in range(5):
            start = time.perf_counter()
            whole = reward(images, prompts)[0]
            together.append(time.perf_counter() - start)
            start = time.perf_counter()
            each = [*clients.map(lambda k: reward([images[k]], [prompts[k]])[0].item(), range(48))]
            alone.append(time.perf_counter() - start)
            np.testing.assert_allclose(each, whole, atol=1e-4)
    return {
        "one request of 48, seconds": together,
        "48 requests of one, seconds": alone,
        "rate of the 48 requests, of the one": float(np.median(together) / np.median(alone)),
    }


def load(seconds: float) -> dict[str, Any]:
    images, prompts = tiny_images(64)
    taken: list[float] = []
    errors: list[str] = []
    with served(*judge_of_images()) as (url, pid), ThreadPoolExecutor(32) as clients:
        reward = RemoteReward(url, scheme="reference", retries=0)
        reward(images, prompts)
        expected = reward(images, prompts)[0]
        before, end = resident(pid), time.perf_counter() + seconds

        def client(number: int) -> None:
            own = slice(2 * number, 2 * number + 2)
            while time.perf_counter() < end:
                start = time.perf_counter()
                try:
                    scores = reward(images[own], prompts[own])[0]
                    np.testing.assert_allclose(scores, expected[own], atol=1e-4)
                except Exception as error:
                    errors.append(str(error))
                taken.append(time.perf_counter() - start)

        start = time.perf_counter()
        list(clients.map(client, range(32)))
        whole = time.perf_counter() - start
        after = resident(pid)
    explained = 32 * whole / len(taken)  # Little's law: so long a queue of 32 takes at the rate that was reached
    p95 = float(np.quantile(taken, 0.95))
    return {
        "requests": len(taken),
        "errors": len(errors),
        "first errors": errors[:3],
        "images a second": 2 * len(taken) / whole,
        "p50, seconds": float(np.median(taken)),
        "p95, seconds": p95,
        "explained by the queue, seconds": explained,
        "p95 / explained": p95 / explained,
        "resident memory before and after, MB": (before, after),
    }


def fuzz(seconds: float) -> dict[str, Any]:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with served("-c", INSTANT) as (url, pid), tempfile.TemporaryDirectory() as folder:
        check_alive(url)
        before = state(pid)
        command = f"run {url}/openapi.json --phases examples,coverage,fuzzing --max-examples 250 --checks {checks}"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *command.split(), "--continue-on-failure", "--no-color"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": folder},
        )
        check_alive(url)
        time.sleep(3)
        counts = re.findall(r"[\d,]+ (?:generated|test cases?)[^\n]*", done.stdout)
        asked = sum(int(float(line.rpartition(" ")[2])) for line in metrics(url) if "requests_total{" in line)
        broken = [line for line in metrics(url) if "requests_total{" in line and 'status="5' in line]
        return {
            "requests": asked,
            "schemathesis": counts,
            "exit code": done.returncode,
            "answers of 5xx": broken,
            "said": "" if done.returncode == 0 else done.stdout[-6000:],
            "threads, files and MB before": before,
            "threads, files and MB after": state(pid),
        }


def slow(seconds: float) -> dict[str, Any]:
    chance = random.Random(0)
    body = json.dumps(body_of(10, 200)).encode()
    whole = b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with served("-c", INSTANT) as (url, pid):
        check_alive(url)
        before = state(pid)
        host, port = url.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port))) for _ in range(100)]
        start, cut = time.perf_counter(), 0
        places = [0] * 100
        while any(client.fileno() >= 0 for client in clients) and time.perf_counter() - start < 60:
            for k, client in enumerate(clients):
                if client.fileno() < 0:
                    continue
                try:
                    client.send(whole[places[k] : places[k] + 1])  # a byte now and then
                    places[k] += 1
                except OSError:
                    client.close()
                    cut += 1
            time.sleep(0.2)
        lasted = time.perf_counter() - start
        check_alive(url)
        for number in range(100):
            with socket.create_connection((host, int(port))) as dying:
                dying.sendall(whole[: chance.randrange(1, len(whole))])
                if number % 2:
                    dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        check_alive(url)
        time.sleep(3)
        return {
            "slow clients cut off": cut,
            "seconds": lasted,
            "threads, files and MB before": before,
            "threads, files and MB after": state(pid),
        }


def body_of(*reds: int) -> dict[str, Any]:
    import base64

    pictures = []
    for red in reds:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
        pictures.append(base64.b64encode(file.getvalue()).decode())
    return {"prompt": ["a"] * len(reds), "image": pictures}


def check_alive(url: str) -> None:
    """The server still orders two pictures as it should."""
    scores = RemoteReward(url, retries=0)([Image.new("RGB", (4, 4), (red, 0, 0)) for red in (10, 200)], ["a", "a"])[0]
    assert scores[1] > 0 > scores[0]


def metrics(url: str) -> list[str]:
    with request.urlopen(f"{url}/metrics", timeout=30) as reply:
        return reply.read().decode().splitlines()


def resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def state(pid: int) -> tuple[int, int, float]:
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")), resident(pid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("burst", "load", "fuzz", "slow"))
    parser.add_argument("--seconds", type=float, default=120.0, help="How long the load lasts.")
    args = parser.parse_args()
    print(json.dumps({"burst": burst, "load": load, "fuzz": fuzz, "slow": slow}[args.what](args.seconds), indent=1))
