"""10,000 pairs through `evaluate` with a fake judge: seconds, and how far memory rises above loading the pairs.

    python tests/benchmarks/evaluation.py --pixels 64
    python tests/benchmarks/evaluation.py --pixels 512 --images 9
    python tests/benchmarks/evaluation.py --pixels 512 --html page.html

The pairs are of any two of 500 pictures, the worst case for what `eval` keeps decoded, or with `--images N` all pairs
of the N pictures of a prompt, one prompt after another, as HPDv2 has them. The judge wants every picture as pixels and
prefers the redder one. The pictures are smooth gradients with noise, stored as JPEG, which decode about as fast as
photographs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from listener_reward.datasets import load_pairs
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.diagnostics import diagnose
from listener_reward.evaluate.gallery import Gallery
from listener_reward.media.images import to_pil
from listener_reward.report import write_report
from listener_reward.verdict import Verdict

PICTURES, PROMPTS = 500, 2500


class Redder:
    name = "redder"

    def compare_many(self, prompts, firsts, seconds, *, think=None):
        return [self.compare(first, second) for first, second in zip(firsts, seconds, strict=True)]

    def compare(self, first, second) -> Verdict:
        one, two = (float(np.asarray(to_pil(image))[..., 0].mean()) for image in (first, second))
        gap = min(max((one - two) / 100, -0.5), 0.5)
        return Verdict(0.5 + gap, 1 if gap > 0 else 2 if gap < 0 else None, (), None, None, 0.0, 0)


def make(folder: Path, pairs: int, pixels: int, images: int | None = None) -> Path:
    rng, draw = np.random.default_rng(0), random.Random(0)
    ramp = np.linspace(0, 1, pixels)[:, None, None]
    for number in range(PICTURES):
        ends = rng.integers(0, 200, (2, 1, 1, 3))
        picture = ends[0] + (ends[1] - ends[0]) * ramp + rng.integers(0, 20, (pixels, pixels, 3))
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.jpg", quality=85)
    with (folder / "pairs.jsonl").open("w") as file:
        inside = list(combinations(range(images), 2)) if images else []
        for number in range(pairs):
            if images:
                prompt, place = divmod(number, len(inside))
                first, second = ((prompt * images + one) % PICTURES for one in inside[place])
            else:
                prompt, (first, second) = number % PROMPTS, draw.sample(range(PICTURES), 2)
            row = {"prompt": f"prompt {prompt}", "p_first": draw.random()}
            file.write(json.dumps(row | {"image_first": f"{first}.jpg", "image_second": f"{second}.jpg"}) + "\n")
    return folder / "pairs.jsonl"


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--images", type=int, help="pictures of a prompt, all pairs of which are judged")
    parser.add_argument("--html", type=Path, help="also gather the worst mistakes, and write the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make(Path(folder), options.pairs, options.pixels, options.images)
        started = time.perf_counter()
        pairs = load_pairs(str(data))
        loaded, before = time.perf_counter(), peak()
        gallery = Gallery("redder")
        watch = gallery.add if options.html else None
        record = evaluate(Redder(), pairs, progress=False, watch=watch)
        if options.html:
            row = record.to_dict() | {"model": "redder", "split": record.data, "diagnostics": diagnose(record)}
            write_report(options.html, {"title": "redder", "table": [row], "pairs": gallery.pairs})
        seconds, after = time.perf_counter() - loaded, peak()
    print(
        f"{record.n} pairs of {options.pixels} px: loading {loaded - started:.1f} s, evaluation {seconds:.1f} s, "
        f"peak memory {before:.0f} MiB after loading and {after:.0f} MiB after evaluation"
        + (f", page {options.html.stat().st_size / 2**20:.2f} MiB" if options.html else "")
    )


if __name__ == "__main__":
    main()
