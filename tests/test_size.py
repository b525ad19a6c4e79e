"""10,000 pairs through the command line, in bounded memory. `benchmarks/evaluation.py` measures how long it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PAIRS = 10_000
SIDE = 64
"""All pictures decoded would take 20,000 x 12 KiB, 234 MiB."""

CODE = """
import json, resource, sys
import numpy as np
from listener_reward import cli
from listener_reward.evaluate import batches
from listener_reward.cli import journals
from listener_reward.media.images import to_pil
from listener_reward.verdict import Verdict

class Redder:
    name = "redder"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        reds = [[to_pil(image).getpixel((0, 0))[0] for image in images] for images in (firsts, seconds)]
        return [Verdict(0.5 + (a - b) / 512, 1 if a > b else 2, (), None, None, 0.0, 0) for a, b in zip(*reds)]

journals.load_rater = lambda *arguments, **options: Redder()
batches.BUDGET = 2**23  # what it keeps decoded on purpose
peaks = []
for data in sys.argv[1:]:
    cli.app(["eval", "--data", data, "--judge", "redder", "--scores", data + ".scores.jsonl", "--json"],
            standalone_mode=False)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
print(json.dumps(peaks), file=sys.stderr)
"""


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """Few pairs and many, the redder first: a file of its own for each picture, all links to eight."""
    for red in range(8):
        Image.new("RGB", (SIDE, SIDE), (30 * red, 0, 0)).save(tmp_path / f"red-{red}.png")
    files = []
    for n in (200, PAIRS):
        files.append(tmp_path / f"{n}.jsonl")
        rows, scores = [], []
        for k in range(n):
            sides = {"image_first": (k % 7) + 1, "image_second": k % 7}
            for side, red in sides.items():
                os.link(tmp_path / f"red-{red}.png", tmp_path / f"{n}-{k}-{side}.png")
            names = {side: f"{n}-{k}-{side}.png" for side in sides}
            rows.append({"prompt": f"p{k // 4}", "p_first": 1.0 if k % 10 else 0.0, "id": str(k), **names})
            scores.append({"id": str(k), "margin": 1.0 if k % 2 else -1.0})
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(f"{files[-1]}.scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return files


def test_ten_thousand_pairs_through_eval_in_bounded_memory(data: list[Path]) -> None:
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, data)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    decoder, text, records = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        record, end = decoder.raw_decode(text)
        records.append({one["judge"]: one for one in record["judges"]})
        text = text[end:].strip()
    assert [record["redder"]["n"] for record in records] == [200, PAIRS]
    assert records[1]["redder"]["accuracy"] == 0.9, "a tenth of the labels is the other way round"
    # Of the tenth with the label 0, all even, a file that says so on even pairs is right; of the others on odd ones.
    assert records[1][f"{PAIRS}.jsonl.scores.jsonl"]["accuracy"] == 0.6
    small, large = json.loads(done.stderr.strip().splitlines()[-1])
    assert large - small < 150, "MiB more for 50 times as many pairs: rows and labels, and no pictures"
