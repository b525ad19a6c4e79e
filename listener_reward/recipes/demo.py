"""`listener-reward demo`: the whole method in a tiny world, on two cores, in a quarter of an hour.

From one base, with the same pairs, seed and steps, it trains a reasoner by accuracy-only GRPO and one by
listener-shaped GRPO, evaluates both beside the base, a supervised and a Bradley-Terry baseline on every split, ranks
pictures from disk with the better of the two, and writes `results.json` and `report.html`.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from listener_reward.datasets import load_pairs
from listener_reward.files import write_text
from listener_reward.media.images import to_pil
from listener_reward.recipes.study.carry_out import judge_folder
from listener_reward.recipes.study.conduct import conduct
from listener_reward.recipes.study.configuration import Arm, Splits
from listener_reward.recipes.study.plans import Question, Study
from listener_reward.recipes.study.runs import versions
from listener_reward.recipes.variants import ACCURACY_ONLY, SPLITS, VARIANTS, Recipe
from listener_reward.recipes.workers import Report, run_side_by_side
from listener_reward.report import write_report

CAPTIONS = {
    "id": {"title": "In distribution", "meaning": "New pairs of the same kind as in training."},
    "ood": {
        "title": "Out of distribution",
        "meaning": "Prompts and a drawing style that training never showed; the frame says nothing about quality.",
    },
    "wrong": {
        "title": "Wrong-way",
        "meaning": "In training a framed picture was usually the better one; here it is usually the worse one, so a "
        "judge that learnt to look for the frame falls below 50 %.",
    },
}
"""What the page calls each split of the tiny world, and says of it."""


def demo_plan(recipe: Recipe, seed: int) -> Question:
    """What the demo runs: every way to train, from one base, with the same pairs, seed and steps."""
    return Question(
        question="Does the listener make a better judge?",
        arms={
            "base": Arm(method="none", recipe=recipe),
            "SFT": Arm(method="sft", recipe=recipe),
            # Its rate is the best of those tried: see docs/log.md.
            "Bradley-Terry": Arm(method="bradley-terry", recipe=replace(recipe, learning_rate=3e-4)),
            **{name: Arm(weights=weights, recipe=recipe) for name, weights in VARIANTS.items()},
        },
        measurements={
            "splits": Splits(SPLITS, recipe.test_pairs, listener=recipe.listener, diagnostics=True),
        },
        seeds=(seed,),
        against=ACCURACY_ONLY,
    )


def run_demo(out: str | Path, steps: int | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Runs the demo, writes `results.json` and `report.html` into `out`, and returns the results.

    Runs that are in `out` already are not made again.
    """
    recipe = Recipe()
    if quick:
        recipe = replace(recipe, steps=3, sft_steps=3, pairs=60, groups=4, generations=4, test_pairs=20)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    out = Path(out)
    console = Console(stderr=True)
    question = demo_plan(recipe, seed)
    study = Study("listener-reward demo", datetime.date.today().isoformat(), (question,))
    console.print(
        f"[bold]1/3[/] Training {recipe.steps} steps of GRPO twice, and two baselines; judging "
        f"{recipe.test_pairs} pairs of each split with every model, in both orders"
    )
    found = conduct(study, out, console=console)
    records = {run.arm_name: found[run.key] for run in study.runs()}
    table = [{**records[name]["results"][split], "model": name, "split": split} for split in SPLITS for name in records]

    console.print("[bold]2/3[/] Ranking pictures from disk, and picking pairs to look at")
    winner = max(VARIANTS, key=lambda name: sum(records[name]["results"][split]["accuracy"] for split in SPLITS))
    models = {name: str(judge_folder(out, question.arms[name], seed)) for name in VARIANTS}
    examples = run_side_by_side(
        {"pictures": (look, {"models": models, "winner": winner, "out": str(out)})}, console=console
    )["pictures"]

    console.print("[bold]3/3[/] Writing the report")
    results = {
        "title": "listener-reward demo",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "listener-reward demo" + (" --quick" if quick else "") + f" --steps {recipe.steps} --seed {seed}",
        "versions": {name: version for name, version in versions().items() if name != "diffusers"},
        "settings": {
            **asdict(recipe),
            "seed": seed,
            "arms": {name: list(weights) for name, weights in VARIANTS.items()},
        },
        "curves": {name: records[name]["training"]["curves"] for name in VARIANTS},
        "splits": CAPTIONS,
        "table": table,
        **examples,
    }
    write_text(out / "results.json", json.dumps(results, indent=1))
    page = write_report(out / "report.html", results)
    console.print(f"Done: open [bold]{page}[/] in a browser; the numbers are in {out / 'results.json'}")
    return results


def look(report: Report, models: Mapping[str, str], winner: str, out: str, each: int = 2) -> dict[str, Any]:
    """A dozen judged pairs, `each` of every variant and split, and the winner's ranking of picture files."""
    from listener_reward.judge import Judge

    judges = {name: Judge.from_pretrained(folder, listener="tiny-listener") for name, folder in models.items()}
    pairs = []
    for split in SPLITS:
        rows = load_pairs(f"tiny:{split}", limit=each).to_list()
        for name, judge in judges.items():
            for row in rows:
                first, second = (to_pil(image) for image in row["images"])
                pairs.append(
                    {
                        "prompt": row["prompt"],
                        "split": split,
                        "p_first": row["p_first"],
                        "first_png": _png(first),
                        "second_png": _png(second),
                        "model": name,
                        "verdict": judge.compare(row["prompt"], first, second).to_dict(),
                    }
                )
                report(len(pairs), each * len(SPLITS) * len(judges), split)
    prompt, files = draw_files(Path(out, "pictures"))
    ranking = judges[winner].rank(prompt, files)
    images = [_png(to_pil(file)) for file in files]
    return {"pairs": pairs, "ranking": {"judge": winner, "prompt": prompt, "images": images, **ranking.to_dict()}}


def draw_files(folder: Path, seed: int = 0) -> tuple[str, list[Path]]:
    """Six pictures of "two red circles" on disk, from right and clean to wrong and glitched, and their prompt."""
    from listener_reward.tiny.drawing import draw
    from listener_reward.tiny.world import Scene

    scenes = [
        Scene("blue", "square", 3, "glitched"),
        Scene("red", "circle", 2),
        Scene("red", "circle", 1),
        Scene("green", "circle", 2),
        Scene("red", "circle", 2, "glitched"),
        Scene("yellow", "star", 1, "faded"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    files = [folder / f"{index}.png" for index in range(len(scenes))]
    for file, scene in zip(files, scenes, strict=True):
        draw(scene, rng).save(file)
    return "two red circles", files


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
