"""Ranks 64 pictures of 1024 x 1024 by all 2,016 pairs, and prints what that took at its peak beyond pictures and model.

    python tests/memory_of_ranking.py [--think]

Run by `test_memory.py`, in a process of its own: a peak of memory never comes down again.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from listener_reward.judge import Judge
from listener_reward.media.images import to_picture

IMAGES, SIDE = 64, 1024


def peak() -> int:
    """Bytes of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    judge = Judge.from_pretrained("tiny", device="cpu", think="--think" in sys.argv)
    rng = np.random.default_rng(0)
    pictures = [to_picture(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(IMAGES)]
    judge.compare("two red circles", *(rng.integers(0, 256, (96, 96, 3), np.uint8) for _ in range(2)))  # warm
    before, started = peak(), time.perf_counter()
    ranking = judge.rank("two red circles", pictures)
    seconds = time.perf_counter() - started
    decoded = sum(picture.nbytes for picture in pictures)
    print(json.dumps({"comparisons": ranking.comparisons, "bytes": peak() - before, "decoded": decoded, "s": seconds}))


if __name__ == "__main__":
    main()
