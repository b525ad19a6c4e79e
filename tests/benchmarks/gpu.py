"""The shared prefix on a GPU: shapes of Qwen2.5-VL with random weights, 504-pixel images, 256-token completions.

    python tests/benchmarks/gpu.py --out gpu.json

For each shape, G and attention, what `listener-reward bench listener` and `bench grpo` print. Then the largest batch of
one prompt's completions whose loss fits, forward and backward, each way: G is doubled until memory runs out. What does
not fit is "no room", and the other way's result is kept. All weights of 7B, their gradients and their optimizer do not
fit 80 GB: give `--lora`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from listener_reward.bench import run
from listener_reward.bench.shapes import Size, build_checkpoint


def largest_group(folder: Path, size: Size, way: str, most: int) -> int:
    """The largest G that fits, 0 if `size.group` itself does not; no more than `most` is tried."""
    fits, group = 0, size.group
    while group <= most:
        try:
            run._in_a_process("loss", folder / "model", replace(size, group=group), way, folder / "out.pt")
        except run.NoRoom:
            break
        fits, group = group, 2 * group
    return fits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=["qwen2.5-vl-3b", "qwen2.5-vl-7b"], help="Shapes, as of `bench`."
    )
    parser.add_argument("--group", nargs="*", type=int, default=[8, 16], help="Completions of a prompt.")
    parser.add_argument("--attention", nargs="*", default=["sdpa", "flex"], help="Of shared rows.")
    parser.add_argument("--pixels", type=int, default=504)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="Times each is run, after a warm-up.")
    parser.add_argument("--lora", action="store_true", help="Train adapters; without it every weight.")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="Compute activations again.")
    parser.add_argument("--most", type=int, default=512, help="Largest batch that is tried.")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="Where all the numbers go.")
    args = parser.parse_args()
    console = Console(stderr=True)
    found: list[dict] = []
    for model in args.models:
        size = Size(
            model=model,
            pixels=args.pixels,
            groups=1,
            tokens=args.tokens,
            dtype=args.dtype,
            repeats=args.repeats,
            lora=args.lora,
            gradient_checkpointing=args.gradient_checkpointing,
        )
        for group in args.group:
            for attention in args.attention:
                for name in ("listener", "grpo"):
                    results = run.run_bench(name, replace(size, group=group, attention=attention), console)
                    console.rule(f"{model}, G = {group}, {attention}")
                    run.report(results, console)
                    found.append(results)
                    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        with tempfile.TemporaryDirectory() as temporary:
            build_checkpoint(Path(temporary, "model"), size)
            start = replace(size, group=min(args.group), repeats=1)
            batches = {way: largest_group(Path(temporary), start, way, args.most) for way in ("shared", "plain")}
        console.print(f"{model}: largest batch {batches}")
        found.append({"model": model, "largest_batch": batches})
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
