"""DDPO of the tiny editor: does the judge's reward raise the true utility of edits, which it never sees?

    python tests/benchmarks/ddpo_editor.py --out editor-runs                                   # all runs
    python tests/benchmarks/ddpo_editor.py --out editor-runs --rewards judge --seeds 3         # one of them
    python tests/benchmarks/ddpo_editor.py --out editor-runs --docs docs/img                   # the table and the grid

Four rewards. "judge" is `ListenerReward("tiny")` and nothing else, which sees each edit's source. "truth", the ceiling,
is the true utility of an edit, read from pixels (`tiny.read`). "blind" is the same judge without the sources, and
"random", the floor, one with random weights that sees them. What counts is the true utility of held-out edits from
fixed seeds, by the pipeline's own scheduler: goals of held-out colours and shapes, and pairs of changes that training
never asks for together, each of a source of its own. Runs that are there are not run again, and an interrupted one
goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from listener_reward import ListenerReward
from listener_reward.evaluate.plotting import styled
from listener_reward.integrations.ddpo.log import read_metrics
from listener_reward.media.images import to_pil_batch
from listener_reward.tiny.editing import draw_work, load_editor, make_edits, sample_work
from listener_reward.tiny.edits import PARTS, TinyEdit
from listener_reward.tiny.read import read_framed

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.ddpo import SETTINGS, carry_out, random_judge, table, trained
from benchmarks.pictures import save

REWARDS = ("judge", "truth", "blind", "random")
TRAINED, MEASURED, SHOWN = 400, 300, 8


def edits(held: bool, n: int) -> list[TinyEdit]:
    """Edits to train on, or held-out ones, always the same."""
    return [sample_work(random.Random(f"ddpo/{held}/{k}"), 0.0, held) for k in range(n)]


def true_utilities(images: Any, prompts: Any, metadata: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The true utility of each result, in [0, 8.2], by the contract of a reward: `metadata` has the edits."""
    return np.array(
        [_utility(image, about["edit"]) for image, about in zip(to_pil_batch(images), metadata, strict=True)]
    ), {}


def _utility(picture: Image.Image, edit: TinyEdit) -> float:
    return read_framed(picture).edit_utility(edit.goal, edit.asked)


def build_reward(name: str, folder: Path, seed: int) -> Any:
    if name == "truth":
        return true_utilities
    if name == "random":
        return random_judge(folder / "random", seed)
    judge = ListenerReward("tiny", batch_size=64)
    return judge if name == "judge" else lambda images, prompts, metadata: judge(images, prompts)


def run(name: str, seed: int, folder: Path, **changes: Any) -> None:
    """One training run and the true utility of held-out edits along it, into `folder`."""
    settings = SETTINGS | {"seed": seed, "output_dir": str(folder)} | changes
    reward = partial(build_reward, name, folder, seed)
    carry_out(name, folder, settings, load_editor, reward, prompts, true_utilities, evaluate)


def prompts() -> list[dict[str, Any]]:
    """Those of training, with their sources."""
    asked = edits(held=False, n=TRAINED)
    return [{"prompt": edit.wording, "image": draw_work(edit)[0], "edit": edit} for edit in asked]


def evaluate(editor: Any) -> list[float]:
    """The true utility of what the editor makes of each held-out edit."""
    asked = edits(held=True, n=MEASURED)
    return [_utility(picture, edit) for edit, picture in zip(asked, make_edits(editor, asked), strict=True)]


# ------------------------------------------------------------------------------------------------------------ results


def bounds() -> str:
    """What the true utilities of held-out edits should lie between."""
    asked = edits(held=True, n=MEASURED)
    source, goal = (np.mean([edit.utility(getattr(edit, name)) for edit in asked]) for name in ("source", "goal"))
    return f"true utility of the sources as they are {source:.2f}, of the goals {goal:.2f}"


def by_part(results: list[dict[str, Any]]) -> str:
    """The rise of the judge's runs in the held-out edits that ask for each change."""
    asked = edits(held=True, n=MEASURED)
    runs = [list(result["utility"].values()) for result in results if result["reward"] == "judge"]
    lines = ["| asked for | edits | before | after |", "| --- | --- | --- | --- |"]
    for part in PARTS if runs else ():
        chosen = [k for k, edit in enumerate(asked) if part in edit.asked]
        before, after = (np.mean([np.array(run[k])[chosen] for run in runs]) for k in (0, -1))
        lines.append(f"| {part} | {len(chosen)} | {before:.2f} | {after:.2f} |")
    return "\n".join(lines)


@styled
def before_and_after(folder: Path) -> Figure:
    """The first held-out edits, two in a row: the source, two results of the base, and two of the trained editor.

    Base and trained editor have the same two seeds.
    """
    asked = edits(held=True, n=SHOWN)
    sources = [draw_work(edit)[0] for edit in asked]
    editors = load_editor(), trained(load_editor, folder)
    results = [make_edits(editor, asked, seed) for editor in editors for seed in (0, 1)]
    names = ("source", "before", "before", "after", "after")
    figure = Figure(figsize=(10.4, 0.3 + 1.35 * len(asked) / 2))
    for place, part in enumerate(figure.subfigures(-(-len(asked) // 2), 2, squeeze=False).flat):
        part.suptitle(asked[place].wording, fontsize=10, weight="bold")
        for axes, name, pictures in zip(part.subplots(1, len(names)), names, [sources, *results], strict=True):
            axes.imshow(pictures[place], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_xlabel(name, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--rewards", nargs="+", default=REWARDS, choices=REWARDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--docs", type=Path, help="writes the grid of the judge's first run there")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of DDPOConfig")
    args = parser.parse_args()

    changes = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in args.set)}
    if args.docs is None:
        for seed in args.seeds:
            for name in args.rewards:
                run(name, seed, args.out / f"{name}-{seed}", **changes)
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/result.json"))]
    print(table(results, REWARDS), by_part(results), bounds(), sep="\n\n")
    for result in results:
        name, seed, curve = (result[key] for key in ("reward", "seed", "utility"))
        last = read_metrics(args.out / f"{name}-{seed}" / "metrics.jsonl")[-1]
        along = ", ".join(f"{np.mean(values):.3f}" for values in curve.values())
        print(f"{name} {seed}: {along}; diversity {last['diversity']:.3f}")
    if args.docs is not None:
        save(before_and_after(args.out / f"judge-{args.seeds[0]}"), args.docs / "ddpo-editor.png")


if __name__ == "__main__":
    main()
