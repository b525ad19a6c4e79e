"""Bulk scoring of 100,000 pairs, killed three times on the way: every row once, in how much memory.

    python tests/benchmarks/scoring.py

The judge is arithmetic on pixels, so that the numbers are those of reading, keeping and going on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from listener_reward.media.storyboards import as_picture
from listener_reward.scoring import read_verdicts, score_pairs
from listener_reward.verdict import Verdict


class Brightness:
    """Prefers the brighter image."""

    name = "brightness"

    def compare_many(
        self, prompts: Sequence[str], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        first, second = ([float(np.asarray(as_picture(one)).mean()) for one in side] for side in (firsts, seconds))
        margins = [a - b for a, b in zip(first, second, strict=True)]
        ps = [1 / (1 + np.exp(-margin / 50)) for margin in margins]
        return [Verdict(p, 1 if p > 0.5 else 2 if p < 0.5 else None, (), None, None, 0.0, 0) for p in ps]


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python tests/benchmarks/scoring.py [--pairs N] [--kills N]", description=__doc__
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # what the killed process is told
    options = parser.parse_args()
    if options.work:
        score_pairs(Brightness(), str(options.work / "pairs.jsonl"), options.work / "out.parquet", progress=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.pairs, options.kills), indent=2))


def measure(work: Path, pairs: int, kills: int) -> dict[str, Any]:
    draw = random.Random(0)
    for level in range(256):
        Image.new("RGB", (64, 64), (level, level, level)).save(work / f"{level}.png")
    with open(work / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(pairs):
            first, second = draw.randrange(256), draw.randrange(256)
            row = {"id": f"p{i}", "prompt": f"a grey wall, number {i}"}
            file.write(json.dumps(row | {"image_first": f"{first}.png", "image_second": f"{second}.png"}) + "\n")
    command = [sys.executable, __file__, "--work", str(work)]
    peaks, lasted, begun = [], [], time.perf_counter()
    parts = work / "out.parquet.parts"
    for kill in range(kills + 1):
        started, before = time.perf_counter(), len(list(parts.glob("*-*.parquet")))
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if kill < kills:
            while len(list(parts.glob("*-*.parquet"))) < before + max(1, pairs // 1024 // (kills + 1)):
                assert child.poll() is None
                time.sleep(0.05)
            time.sleep(draw.random())
            child.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == (signal.SIGKILL if kill < kills else 0), status
        peaks.append(usage.ru_maxrss / 1024)
        lasted.append(round(time.perf_counter() - started, 1))
    rows = [row["index"] for row in read_verdicts(work / "out.parquet", ["index"])]
    return {
        "pairs": pairs,
        "rows": len(rows),
        "every pair once, in order": rows == list(range(pairs)),
        "killed": kills,
        "peak MB of each process": [round(peak) for peak in peaks],
        "seconds of each process": lasted,
        "pairs a second": round(pairs / (time.perf_counter() - begun)),
        "file MB": round((work / "out.parquet").stat().st_size / 2**20, 1),
    }


if __name__ == "__main__":
    main()
