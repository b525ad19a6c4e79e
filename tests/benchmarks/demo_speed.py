"""The tiny demo's training time, with a group's prompt shared and as copies.

    OMP_NUM_THREADS=1 python tests/benchmarks/demo_speed.py --steps 20

One thread, as the demo's own workers have, each variant after the other, the same data and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

from listener_reward.recipes.variants import LISTENER_SHAPED, VARIANTS, Recipe, train_variant

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="GRPO steps of the demo's recipe; it has 160.")
    args = parser.parse_args()
    taken = {}
    curves = {}
    for name, share_prompt in (("warm", True), ("shared", True), ("copies", False)):
        steps = 2 if name == "warm" else args.steps
        recipe = replace(Recipe(), steps=steps, share_prompt=share_prompt)
        with tempfile.TemporaryDirectory() as folder:
            wall, processor = time.perf_counter(), time.process_time()
            curves[name] = train_variant(
                lambda *_: None, weights=VARIANTS[LISTENER_SHAPED], out=folder, seed=0, recipe=recipe
            )
            taken[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    ratio = {key: taken["copies"][key] / taken["shared"][key] for key in taken["copies"]}
    first = {name: curve["reward"][0] for name, curve in curves.items()}
    print(
        json.dumps(
            {"steps": args.steps, **taken, "copies / shared": ratio, "reward of the first step": first}, indent=1
        )
    )
