"""`listener-reward demo`: the whole method in a tiny world, on two cores, in a quarter of an hour.

From one base, with the same pairs, seed and steps, it trains a reasoner by accuracy-only GRPO and one by
listener-shaped GRPO, measures both beside the base and a supervised baseline on every split, ranks pictures from disk
with the better of the two, and writes `results.json` and `report.html`.
"""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from listener_reward import __version__
from listener_reward.datasets import load_pairs
from listener_reward.images import to_pil
from listener_reward.report import write_report
from listener_reward.shaping import WEIGHTS
from listener_reward.tiny.workers import Report, run_side_by_side
from listener_reward.trace import Masking

ACCURACY_ONLY, LISTENER_SHAPED = "accuracy-only GRPO", "listener-shaped GRPO"
ARMS = {ACCURACY_ONLY: (1.0, 1.0, 0.0), LISTENER_SHAPED: WEIGHTS}
"""Weights of format, accuracy and listener. Both arms can earn at most 2."""

SPLITS = ("id", "ood", "wrong")

VERSIONS = ("torch", "transformers", "trl")

CURVES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "listener": "listener_confidence",
    "contradiction": "contradiction_rate",
    "malformed": "malformed_rate",
}
"""The report's names of the learning curves, and the trainer's."""


@dataclass(frozen=True)
class Recipe:
    """How the demo trains."""

    steps: int = 160
    pairs: int = 1000
    groups: int = 12
    """Prompts in a step; each is answered by a group of `generations`."""
    generations: int = 8
    learning_rate: float = 1e-4
    sft_steps: int = 200
    test_pairs: int = 300
    """Test pairs of each split."""
    base: str = "tiny-base"
    listener: str = "tiny-listener"
    grounding: float = 2.0
    masking: Masking = "answer"
    share: bool = True
    """Whether a group shares its prompt. The results in docs/log.md were made as copies, which differ by rounding:
    after 160 steps that is another run of the same kind, and not the same numbers."""


def train_arm(
    report: Report, weights: Sequence[float], out: str, seed: int, recipe: Recipe, pairs: Any = None
) -> dict[str, list[Any]]:
    """Trains one GRPO arm, writes its judge into `out`, and returns its learning curves.

    `pairs` are those of the recipe unless others are given.
    """
    from transformers import TrainerCallback

    from listener_reward.train.config import AS_COPIES, ListenerGRPOConfig
    from listener_reward.train.trainer import ListenerGRPOTrainer

    args = ListenerGRPOConfig(
        output_dir=out,
        listener=recipe.listener,
        listener_batch_size=128,
        listener_grounding=recipe.grounding,
        masking=recipe.masking,
        log_completions=False,
        reward_weights=list(weights),
        per_device_train_batch_size=recipe.groups * recipe.generations,
        num_generations=recipe.generations,
        max_completion_length=40,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **({} if recipe.share else AS_COPIES),  # pyright: ignore[reportArgumentType]
    )
    curves: dict[str, list[Any]] = {name: [] for name in ("step", *CURVES)}

    class Curves(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs and "reward" in logs:
                curves["step"].append(state.global_step)
                for name, key in CURVES.items():
                    curves[name].append(logs.get(key))
                reward = logs["reward"]  # None where the listener failed on the whole batch
                report(state.global_step, recipe.steps, "no reward" if reward is None else f"reward {reward:.2f}")

    pairs = load_pairs("tiny:train", limit=recipe.pairs) if pairs is None else pairs
    trainer = ListenerGRPOTrainer(recipe.base, args, pairs, callbacks=[Curves()])
    trainer.train()
    trainer.save_judge(out)
    return curves


def train_sft_arm(report: Report, out: str, seed: int, recipe: Recipe) -> None:
    """Trains the supervised baseline on the same pairs; `out` then holds its judge."""
    from transformers import TrainerCallback
    from trl import SFTConfig

    from listener_reward.train.sft import train_sft

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                report(state.global_step, recipe.sft_steps, f"loss {logs['loss']:.2f}")

    args = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=32,
        max_steps=recipe.sft_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    train_sft(recipe.base, load_pairs("tiny:train", limit=recipe.pairs), args, callbacks=[Steps()])


def measure(
    report: Report, model: str, splits: Sequence[str], pairs: int, listener: str | None = None, think: bool = True
) -> dict[str, dict[str, Any]]:
    """Evaluates one judge on splits of the tiny world; `Evaluation.to_dict()` and its diagnostics by split."""
    from listener_reward.diagnostics import diagnose
    from listener_reward.evaluate import evaluate
    from listener_reward.judge import Judge

    judge = Judge.from_pretrained(model, listener=listener, batch_size=128, think=think)
    table = {}
    for done, split in enumerate(splits):
        report(done, len(splits), split)
        evaluation = evaluate(judge, load_pairs(f"tiny:{split}", limit=pairs), progress=False)
        table[split] = evaluation.to_dict() | {"diagnostics": diagnose(evaluation)}
    report(len(splits), len(splits), "")
    return table


def run_demo(out: str | Path, steps: int | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Runs the demo, writes `results.json` and `report.html` into `out`, and returns the results."""
    recipe = Recipe()
    if quick:
        recipe = replace(recipe, steps=3, sft_steps=3, pairs=60, groups=4, generations=4, test_pairs=20)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    versions = {"listener-reward": __version__, **{name: importlib.metadata.version(name) for name in VERSIONS}}
    console = Console(stderr=True)
    console.print(f"[bold]1/4[/] Training {recipe.steps} steps of GRPO twice, and the supervised baseline")
    folders = {name: str(out / name.replace(" ", "-")) for name in (*ARMS, "SFT")}
    jobs: dict[str, Any] = {
        name: (train_arm, {"weights": weights, "out": folders[name], "seed": seed, "recipe": recipe})
        for name, weights in ARMS.items()
    }
    jobs["SFT"] = (train_sft_arm, {"out": folders["SFT"], "seed": seed, "recipe": recipe})
    trained = run_side_by_side(jobs, console=console)

    console.print(f"[bold]2/4[/] Judging {recipe.test_pairs} pairs of each split with every model, in both orders")
    models = {"base": recipe.base, "SFT": folders["SFT"], **{arm: folders[arm] for arm in ARMS}}
    measured = run_side_by_side(
        {
            name: (
                measure,
                {
                    "model": model,
                    "splits": SPLITS,
                    "pairs": recipe.test_pairs,
                    "listener": recipe.listener,
                    "think": name != "SFT",  # it was taught to answer without a thought
                },
            )
            for name, model in models.items()
        },
        console=console,
    )
    table = [{**measured[name][split], "model": name, "split": split} for split in SPLITS for name in models]

    console.print("[bold]3/4[/] Ranking pictures from disk, and picking pairs to look at")
    winner = max(ARMS, key=lambda arm: sum(measured[arm][split]["accuracy"] for split in SPLITS))
    models = {arm: folders[arm] for arm in ARMS}
    shown = run_side_by_side(
        {"pictures": (look, {"models": models, "winner": winner, "out": str(out)})}, console=console
    )["pictures"]

    console.print("[bold]4/4[/] Writing the report")
    results = {
        "title": "listener-reward demo",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "listener-reward demo" + (" --quick" if quick else "") + f" --steps {recipe.steps} --seed {seed}",
        "versions": versions,
        "settings": {**asdict(recipe), "seed": seed, "arms": {name: list(weights) for name, weights in ARMS.items()}},
        "curves": {arm: trained[arm] for arm in ARMS},
        "table": table,
        **shown,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    page = write_report(out / "report.html", results)
    console.print(f"Done: open [bold]{page}[/] in a browser; the numbers are in {out / 'results.json'}")
    return results


def look(report: Report, models: Mapping[str, str], winner: str, out: str, each: int = 2) -> dict[str, Any]:
    """A dozen judged pairs, `each` of every arm and split, and the winner's ranking of picture files."""
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
    from listener_reward.tiny.draw import draw
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
