"""DDPO of the tiny diffusion model: does the judge's reward raise a utility that it never sees?

    python tests/benchmarks/ddpo.py --out ddpo-runs            # nine runs, one after another
    python tests/benchmarks/ddpo.py --out ddpo-runs --rewards judge --seeds 0    # one of them
    python tests/benchmarks/ddpo.py --out ddpo-runs --docs docs                  # the table, the curve and the grid

Three rewards, three seeds each. "judge" is `ListenerReward("tiny")` and nothing else. "truth", the ceiling, is the
true utility (`tiny.read`). "random", the floor, is a `ListenerReward` whose judge has random weights. What counts is
the true utility of pictures for prompts that training never had: all counts of the colour and shape combinations that
`world.held_out` names, from fixed seeds, by the pipeline's own scheduler. Runs that are there are not run again, and
an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from tqdm import tqdm

from listener_reward import ListenerReward
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.integrations.ddpo.log import checkpoints, grid, read_metrics
from listener_reward.media.images import to_pil_batch
from listener_reward.tiny.diffusion import CALL, load_pipeline
from listener_reward.tiny.models import QUESTION, build_model, build_processor
from listener_reward.tiny.read import asked, read
from listener_reward.tiny.world import COLORS, COUNTS, SHAPES, held_out, plural

REWARDS = ("judge", "truth", "random")
SETTINGS: dict[str, Any] = {
    "epochs": 40,
    "num_inference_steps": 6,
    "call": {"guidance_scale": CALL["guidance_scale"]},
    "prompts_per_epoch": 8,
    "images_per_prompt": 8,
    "batch_size": 32,
    "updates_per_epoch": 2,
    "clip_range": 2e-3,
    "learning_rate": 3e-3,
    "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "kl": 0.03,
    "sample_every": 0,
    "save_every": 10,
    "keep_checkpoints": 100,
}
SEEDS_A_PROMPT = 24


def prompts(held: bool) -> list[str]:
    """The prompts of training, or those held out from it, in one wording."""
    return [
        f"{count} {color} {plural(shape, COUNTS.index(count) + 1)}"
        for color in COLORS
        for shape in SHAPES
        for count in COUNTS
        if held_out(color, shape) == held
    ]


def utilities(images: Any, texts: Sequence[str], metadata: Any = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The true utility of each image, by the contract of a reward."""
    found = [read(image).utility(asked(text)) for image, text in zip(to_pil_batch(images), texts, strict=True)]
    return np.array(found, dtype=np.float32), {}


def random_judge(folder: Path, seed: int) -> ListenerReward:
    """A judge of the embedded one's architecture with random weights; it has learnt no thoughts, so it has none."""
    torch.manual_seed(seed)
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION)).save(folder)
    return ListenerReward(folder, think=False)


def run(name: str, seed: int, folder: Path, **changes: Any) -> None:
    """One training run and the true utility along it, into `folder`."""
    if (folder / "result.json").exists():
        return
    settings = SETTINGS | {"seed": seed, "output_dir": str(folder)} | changes
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that runs can go side by side
    reward = {
        "judge": lambda: ListenerReward("tiny", batch_size=64),
        "truth": lambda: utilities,
        "random": lambda: random_judge(folder / "random", seed),
    }[name]()
    clock = time.perf_counter()
    trainer = DDPOTrainer(load_pipeline(), reward, prompts(held=False), DDPOConfig(**settings), second_reward=utilities)
    trainer.train(resume=True)
    seconds = time.perf_counter() - clock
    curve = {0: evaluate(load_pipeline())}
    for epoch, checkpoint in tqdm(checkpoints(folder / "checkpoints").items(), "evaluating"):
        pipeline = load_pipeline()
        pipeline.load_lora_weights(checkpoint)
        curve[epoch] = evaluate(pipeline)
    result = {"reward": name, "seed": seed, "seconds": seconds, "settings": settings, "utility": curve}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def evaluate(pipeline: Any) -> list[float]:
    """The true utility of pictures of the held-out prompts, of each prompt in turn from each seed."""
    found = []
    for text in prompts(held=True):
        found += utilities(pictures(pipeline, text, SEEDS_A_PROMPT), [text] * SEEDS_A_PROMPT)[0].tolist()
    return found


def pictures(pipeline: Any, text: str, n: int) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(k) for k in range(n)]
    return pipeline([text] * n, generator=generators, **CALL).images


# ------------------------------------------------------------------------------------------------------------ results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean over runs and half its 95 % interval, by Student's t."""
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(spread)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| reward | runs | true utility before | after | rise, 95 % | minutes a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in REWARDS:
        runs = [result for result in results if result["reward"] == name]
        if not runs:
            continue
        before, after = ([np.mean(list(r["utility"].values())[k]) for r in runs] for k in (0, -1))
        rise, half = interval([b - a for a, b in zip(before, after, strict=True)])
        spread = f" ± {half:.2f}" if len(runs) > 1 else ""
        minutes = np.mean([r["seconds"] for r in runs]) / 60
        lines.append(
            f"| {name} | {len(runs)} | {np.mean(before):.2f} | {np.mean(after):.2f} | {rise:+.2f}{spread} "
            f"| {minutes:.0f} |"
        )
    return "\n".join(lines)


def curve(results: list[dict[str, Any]]) -> str:
    """Held-out true utility against epochs as SVG: each run thin, the mean of a reward's runs thick."""
    left, top, width, height = 46, 24, 460, 260
    epochs = max(int(epoch) for result in results for epoch in result["utility"])
    values = [np.mean(found) for result in results for found in result["utility"].values()]
    low, high = min(values) - 0.1, max(values) + 0.1

    def path(points: dict[str, float], style: str) -> str:
        places = [
            (left + width * int(epoch) / epochs, top + height * (high - value) / (high - low))
            for epoch, value in points.items()
        ]
        return f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" fill="none" {style}/>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {top + height + 46}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>',
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="14">true utility on held-out prompts (at most 6.7)</text>',
        f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">epochs</text>',
    ]
    for tick in np.arange(np.ceil(low * 2) / 2, high, 0.5):
        y = top + height * (high - tick) / (high - low)
        lines.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        lines.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#eee"/>')
    for tick in range(0, epochs + 1, max(1, epochs // 4)):
        x = left + width * tick / epochs
        lines.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{tick}</text>')
    ends = []
    for name, color in zip(REWARDS, ("#2a6fbb", "#3e8c4b", "#888"), strict=True):
        runs = [
            {epoch: float(np.mean(found)) for epoch, found in result["utility"].items()}
            for result in results
            if result["reward"] == name
        ]
        if runs:
            mean = {epoch: float(np.mean([points[epoch] for points in runs])) for epoch in runs[0]}
            lines += [path(points, f'stroke="{color}" stroke-opacity="0.35"') for points in runs]
            lines.append(path(mean, f'stroke="{color}" stroke-width="2.5"'))
            ends.append((top + height * (high - list(mean.values())[-1]) / (high - low) + 4, name, color))
    lowest = 0.0
    for y, name, color in sorted(ends):
        lowest = max(y, lowest + 13)  # names of lines that end together stand below one another
        lines.append(f'<text x="{left + width + 8}" y="{lowest:.1f}" fill="{color}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def before_and_after(folder: Path) -> Image.Image:
    """Two rows for each of three held-out prompts: the base's pictures, and the trained model's from the same seeds."""
    base, trained = load_pipeline(), load_pipeline()
    trained.load_lora_weights(folder)
    shown = [p for text in prompts(held=True)[::4] for model in (base, trained) for p in pictures(model, text, 8)]
    return grid(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--rewards", nargs="+", default=REWARDS, choices=REWARDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5], help="0 to 2 chose the number of epochs")
    parser.add_argument("--docs", type=Path, help="writes the curve and the grid of the judge's first run there")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of DDPOConfig")
    args = parser.parse_args()

    changes = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in args.set)}
    if args.docs is None:
        for seed in args.seeds:
            for name in args.rewards:
                run(name, seed, args.out / f"{name}-{seed}", **changes)
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/result.json"))]
    print(table(results))
    for result in results:
        last = read_metrics(args.out / f"{result['reward']}-{result['seed']}" / "metrics.jsonl")[-1]
        ends = [float(np.mean(list(result["utility"].values())[k])) for k in (0, -1)]
        print(f"{result['reward']} {result['seed']}: {ends[0]:.3f} to {ends[1]:.3f}, diversity {last['diversity']:.3f}")
    if args.docs is not None:
        (args.docs / "ddpo-curve.svg").write_text(curve(results), encoding="utf-8")
        before_and_after(args.out / f"judge-{args.seeds[0]}").save(args.docs / "ddpo-grid.png")


if __name__ == "__main__":
    main()
