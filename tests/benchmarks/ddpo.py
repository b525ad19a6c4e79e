"""DDPO of the tiny diffusion model: does the judge's reward raise a utility that it never sees?

    python tests/benchmarks/ddpo.py --out ddpo-runs            # nine runs, one after another
    python tests/benchmarks/ddpo.py --out ddpo-runs --rewards judge --seeds 0    # one of them
    python tests/benchmarks/ddpo.py --out ddpo-runs --docs docs                  # the table, the curve and the grid
    python tests/benchmarks/ddpo.py --out ddpo-noise --rewards judge --set advantage_noise=true --against ddpo-runs

Three rewards, three seeds each. "judge" is `ListenerReward("tiny")` and nothing else. "truth", the ceiling, is the
true utility (`tiny.read`). "random", the floor, is a `ListenerReward` whose judge has random weights. What counts is
the true utility of pictures for prompts that training never had: all counts of the colour and shape combinations that
`world.held_out` names, from fixed seeds, by the pipeline's own scheduler. Runs that are there are not run again, and
an interrupted one goes on.

Two more by name: "reference" and "anchors" are the judge by those schemes, with all else equal, advantages within
groups too. Each run draws its anchors itself, 4 out of 8 samples of the untrained model for each training prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from tqdm import tqdm

from listener_reward import Judge, ListenerReward
from listener_reward.anchor_sets import fill_folder
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import JudgeError
from listener_reward.evaluate.plotting import BLUE, GREEN, GREY, ORANGE, label_ends, save_svg, styled
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.integrations.ddpo.log import checkpoints, grid, read_metrics
from listener_reward.recipes import generators
from listener_reward.recipes.generators import pictures, prompts, utilities
from listener_reward.tiny.diffusion import load_pipeline
from listener_reward.tiny.models import EDIT_QUESTION, QUESTION, build_model, build_processor

REWARDS = ("judge", "truth", "random")
SCHEMES = ("reference", "anchors")
"""The judge's own is "group"."""
COLORS = {"judge": BLUE, "judge, noise-aware": ORANGE, "truth": GREEN, "random": GREY}
"""Of the lines in the figure; `label` names runs."""
SETTINGS: dict[str, Any] = generators.SETTINGS | {"epochs": 40, "save_every": 10}
SEEDS_A_PROMPT = 24


def random_judge(folder: Path, seed: int) -> ListenerReward:
    """A judge of the embedded one's architecture with random weights; it has learnt no thoughts, so it has none."""
    torch.manual_seed(seed)
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION, edit_question=EDIT_QUESTION)).save(folder)
    return ListenerReward(folder, think=False)


def by_anchors(folder: Path, seed: int) -> ListenerReward:
    """The judge by anchors in `folder`, which are drawn from the untrained model unless they are there."""
    judge, base = Judge.from_pretrained("tiny", batch_size=64), load_pipeline()

    def samples(text: str) -> list[Image.Image]:
        return pictures(base, text, 8, 1000 * (seed + 1))  # others than those of `evaluate` and of other runs

    for _, made in tqdm(fill_folder(folder, prompts(held=False), samples, judge, 4), "drawing anchors"):
        if isinstance(made, JudgeError):
            raise made
    return ListenerReward(judge, scheme="anchors", anchors=folder)


def run(name: str, seed: int, folder: Path, **changes: Any) -> None:
    """One training run and the true utility along it, into `folder`."""
    make = {
        "judge": lambda: ListenerReward("tiny", batch_size=64),
        "reference": lambda: ListenerReward("tiny", scheme="reference", batch_size=64),
        "anchors": lambda: by_anchors(folder / "anchors", seed),
        "truth": lambda: utilities,
        "random": lambda: random_judge(folder / "random", seed),
    }[name]
    settings = SETTINGS | {"seed": seed, "output_dir": str(folder)} | changes
    carry_out(name, folder, settings, load_pipeline, make, lambda: prompts(held=False), utilities, evaluate)


def carry_out(
    name: str,
    folder: Path,
    settings: dict[str, Any],
    load: Callable[[], Any],
    reward: Callable[[], Any],
    asked: Callable[[], Sequence[Any]],
    truth: Any,
    measure: Callable[[Any], list[float]],
) -> None:
    """A run of `settings` by a reward on what is asked, `truth` beside it, and what is measured of it along the way.

    Nothing is made of a run that is there, and an interrupted one goes on.
    """
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that runs can go side by side
    prompts = asked()
    clock = time.perf_counter()
    trainer = DDPOTrainer(load(), reward(), prompts, DDPOConfig(**settings), second_reward=truth)
    trainer.train(resume=True)
    seconds = time.perf_counter() - clock
    curve = {0: measure(load())}
    for epoch, checkpoint in tqdm(checkpoints(folder / "checkpoints").items(), "evaluating"):
        curve[epoch] = measure(trained(load, checkpoint))
    seed = settings["seed"]
    result = {"reward": name, "seed": seed, "seconds": seconds, "settings": settings, "utility": curve}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def trained(load: Callable[[], Any], folder: Path) -> Any:
    """A pipeline with the LoRA of a checkpoint or of a finished run."""
    pipeline = load()
    pipeline.load_lora_weights(str(folder))
    return pipeline


def evaluate(pipeline: Any) -> list[float]:
    """The true utility of pictures of the held-out prompts, of each prompt in turn from each seed."""
    found = []
    for text in prompts(held=True):
        found += utilities(pictures(pipeline, text, SEEDS_A_PROMPT), [text] * SEEDS_A_PROMPT)[0].tolist()
    return found


# ------------------------------------------------------------------------------------------------------------ results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean over runs and half its 95 % interval, by Student's t."""
    half_width = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half_width)


def label(result: dict[str, Any]) -> str:
    """What tables and figures call a run."""
    noisy = result.get("settings", {}).get("advantage_noise")
    return result["reward"] + (", noise-aware" if noisy else "")


def rises(results: list[dict[str, Any]], name: str) -> dict[int, float]:
    """By how much the true utility rose in each run of a reward, by seed."""
    found = {}
    for result in results:
        if result["reward"] == name:
            means = [float(np.mean(values)) for values in result["utility"].values()]
            found[result["seed"]] = means[-1] - means[0]
    return found


def paired(rises: dict[int, float], others: dict[int, float]) -> str:
    """How much further some runs came than others, by the seeds that both have."""
    seeds = sorted(rises.keys() & others.keys())
    if not seeds:
        return "no seed in common"
    mean, half = interval([rises[seed] - others[seed] for seed in seeds])
    return f"{mean:+.2f} ± {half:.2f} by seeds {', '.join(map(str, seeds))}"


def table(results: list[dict[str, Any]], order: Sequence[str] = (*COLORS, *SCHEMES)) -> str:
    lines = [
        "| reward | runs | true utility before | after | rise, 95 % | minutes a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = {label(result) for result in results}
    known = [name for name in order if name in names]
    for name in (*known, *sorted(names.difference(known))):
        runs = [result for result in results if label(result) == name]
        before, after = ([np.mean(list(r["utility"].values())[k]) for r in runs] for k in (0, -1))
        rise, half = interval([b - a for a, b in zip(before, after, strict=True)])
        half_width = f" ± {half:.2f}" if len(runs) > 1 else ""
        minutes = np.mean([r["seconds"] for r in runs]) / 60
        lines.append(
            f"| {name} | {len(runs)} | {np.mean(before):.2f} | {np.mean(after):.2f} | {rise:+.2f}{half_width} "
            f"| {minutes:.0f} |"
        )
    return "\n".join(lines)


@styled
def curve(results: list[dict[str, Any]]) -> Figure:
    """Held-out true utility against epochs: each run thin, the mean of a reward's runs thick."""
    figure = Figure(figsize=(7, 3.8))
    axes, ends, epochs = figure.subplots(), [], []
    for name, color in COLORS.items():
        runs = [result["utility"] for result in results if label(result) == name]
        if not runs:
            continue
        epochs = [int(epoch) for epoch in runs[0]]
        utility = np.array([[np.mean(run[epoch]) for epoch in runs[0]] for run in runs])
        axes.plot(epochs, utility.T, color=color, linewidth=0.8, alpha=0.4)
        axes.plot(epochs, utility.mean(0), color=color, linewidth=2.5, label=name)
        ends.append((name, epochs[-1], utility.mean(0)[-1], color))
    axes.set(xlabel="epochs", xticks=epochs, title="true utility on held-out prompts (at most 6.7)")
    axes.margins(x=0.01)
    label_ends(axes, ends)
    return figure


def before_and_after(folder: Path) -> Image.Image:
    """Two rows for each of three held-out prompts: the base's pictures, and the trained model's from the same seeds."""
    models = load_pipeline(), trained(load_pipeline, folder)
    samples = [p for text in prompts(held=True)[::4] for model in models for p in pictures(model, text, 8)]
    return grid(samples)


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of all runs in a folder that have ended."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/result.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--rewards", nargs="+", default=REWARDS, choices=(*REWARDS, *SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5], help="0 to 2 chose the number of epochs")
    parser.add_argument("--docs", type=Path, help="writes the curve and the grid of the judge's first run there")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of DDPOConfig")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="other runs, in tables and figures beside these")
    args = parser.parse_args()

    changes = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in args.set)}
    if args.docs is None:
        for seed in args.seeds:
            for name in args.rewards:
                run(name, seed, args.out / f"{name}-{seed}", **changes)
    results = read(args.out)
    others = [] if args.against is None else read(args.against)
    print(table(results + others))
    for result in results:
        rows = read_metrics(args.out / f"{result['reward']}-{result['seed']}" / "metrics.jsonl")[-10:]
        diversity, kl = (np.mean([row[name] for row in rows]) for name in ("diversity", "kl"))
        ends = [float(np.mean(list(result["utility"].values())[k])) for k in (0, -1)]
        print(
            f"{result['reward']} {result['seed']}: {ends[0]:.3f} to {ends[1]:.3f}; "
            f"last ten epochs: diversity {diversity:.3f}, KL {kl:.4f}"
        )
    for name in SCHEMES:
        if found := rises(results, name):
            print(f"{name} less judge: {paired(found, rises(results, 'judge'))}")
    if others:
        for name in dict.fromkeys(result["reward"] for result in results):
            print(f"{name} less that of {args.against}: {paired(rises(results, name), rises(others, name))}")
    if args.docs is not None:
        save_svg(curve(results + others), args.docs / "ddpo-curve.svg")
        before_and_after(args.out / f"judge-{args.seeds[0]}").save(args.docs / "ddpo-grid.png")


if __name__ == "__main__":
    main()
