"""What replicas of a judge give on this machine, and what is lost when they are killed.

    python tests/benchmarks/replicas.py rate     # two replicas against one, in turns
    python tests/benchmarks/replicas.py kill     # a replica killed every 10 s for a minute, under load

Servers of the embedded judge, with Ray (pip install "listener-reward[serve,ray]"). Server, replicas and clients share
the machine's cores. Ratios are of one run. Linux alone: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parent))  # for whoever runs this file by another way than as a script

import numpy as np
from serving import served, tiny_images

from listener_reward.remote import RemoteReward


def command(replicas: int, *more: str) -> tuple[str, ...]:
    return "-m", "listener_reward.cli", "serve", "--judge", "tiny", "--port", "0", "--replicas", str(replicas), *more


def replicas_of(pid: int) -> list[int]:
    """Process ids of the replicas that the server `pid` started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"ServeReplica" in (entry / "cmdline").read_bytes() and pid in ancestors(int(entry.name)):
                found.append(int(entry.name))
    return found


def ancestors(pid: int) -> list[int]:
    above = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        above.append(pid)
    return above


class Load:
    """Clients that ask a server for what they know already."""

    def __init__(self, url: str, clients: int, images: int):
        self.images, self.prompts = tiny_images(clients * images)
        self.clients, self.each = clients, images
        self.reward = RemoteReward(url, scheme="reference", retries=0)
        self.reward(self.images, self.prompts)  # the first images of the prompts are their references from now on
        self.expected = self.reward(self.images, self.prompts)[0]
        self.errors: list[str] = []
        self.taken: list[float] = []

    def run(self, seconds: float) -> float:
        """Images a second."""
        end, asked = time.perf_counter() + seconds, []

        def client(number: int) -> None:
            own = slice(number * self.each, (number + 1) * self.each)
            while time.perf_counter() < end:
                start = time.perf_counter()
                try:
                    scores = self.reward(self.images[own], self.prompts[own])[0]
                    np.testing.assert_allclose(scores, self.expected[own], atol=1e-4)
                except Exception as error:
                    self.errors.append(str(error))
                self.taken.append(time.perf_counter() - start)
                asked.append(self.each)

        start = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as clients:
            list(clients.map(client, range(self.clients)))
        return sum(asked) / (time.perf_counter() - start)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Processors:
    """What the processes of this benchmark took of the machine's cores since the last look, and what all others did."""

    def __init__(self) -> None:
        self.own, self.all = self.now()

    def now(self) -> tuple[float, float]:
        own = 0.0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if os.getpid() in [int(entry.name), *ancestors(int(entry.name))]:
                    own += processor_seconds(int(entry.name))
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        return own, (user + nice + system) / os.sysconf("SC_CLK_TCK")

    def look(self) -> tuple[float, float]:
        """Seconds of this benchmark's and of others' processes."""
        own, whole = self.now()
        spent = own - self.own, (whole - self.all) - (own - self.own)
        self.own, self.all = own, whole
        return spent


def rate(seconds: float, thoughts: int, clients: int, span: float) -> dict[str, Any]:
    """In turns of `span` seconds. At the end of each, its last requests leave a replica idle while the other ends.

    Where others work on the machine, the second core is theirs: the quietest turns count.
    """
    # Several thoughts an order: the embedded judge is so small that carrying the pictures would be what is measured.
    more, turns = ("--thoughts", str(thoughts)), max(1, int(seconds / (2 * span)))
    measured: list[list[tuple[float, float, float]]] = [[], []]
    with served(*command(1, *more)) as (one, _), served(*command(2, *more)) as (two, _):
        loads = [Load(url, clients, 4) for url in (one, two)]
        processors = Processors()
        for _ in range(turns):
            for load, found in zip(loads, measured, strict=True):
                processors.look()
                start = time.perf_counter()
                images = load.run(span)
                own, others = (spent / (time.perf_counter() - start) for spent in processors.look())
                found.append((others, own, images))
    quiet = [sorted(found)[: max(1, turns // 4)] for found in measured]
    (foreign, cores, singles), (more_foreign, more_cores, doubles) = (
        np.mean(found, axis=0).tolist() for found in quiet
    )
    return {
        "turns of each": turns,
        "in the quietest quarter: images a second, one and two": (singles, doubles),
        "two of one": doubles / singles,
        "cores that others took meanwhile": (foreign, more_foreign),
        "cores that server, judges and clients took": (cores, more_cores),
        "two of one, in all turns": float(np.mean(measured[1], axis=0)[2] / np.mean(measured[0], axis=0)[2]),
        "cores that others took in all turns": [float(np.mean(found, axis=0)[0]) for found in measured],
        "errors": [error for load in loads for error in load.errors][:3],
    }


def kill(seconds: float) -> dict[str, Any]:
    over, killed = threading.Event(), []
    with served(*command(2)) as (url, pid):
        load = Load(url, 16, 2)

        def kills() -> None:
            while not over.wait(10):
                if running := replicas_of(pid):
                    killed.append(random.Random(len(killed)).choice(running))
                    os.kill(killed[-1], signal.SIGKILL)

        killer = threading.Thread(target=kills)
        killer.start()
        speed = load.run(seconds)
        over.set()
        killer.join()
    return {
        "replicas killed": len(killed),
        "requests": len(load.taken),
        "errors or other scores": len(load.errors),
        "first of them": load.errors[:3],
        "images a second": speed,
        "slowest request, seconds": max(load.taken),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "kill"))
    parser.add_argument("--seconds", type=float, default=60.0, help="How long the load lasts.")
    parser.add_argument("--thoughts", type=int, default=4, help="Of the judge about a pair in each order, for rate.")
    parser.add_argument("--clients", type=int, default=16, help="At once, of 4 images each, for rate.")
    parser.add_argument("--turn", type=float, default=10.0, help="Seconds of one turn, for rate.")
    args = parser.parse_args()
    found = kill(args.seconds) if args.what == "kill" else rate(args.seconds, args.thoughts, args.clients, args.turn)
    print(json.dumps(found, indent=1))
