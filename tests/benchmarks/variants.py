"""The method's claim on the tiny world: both GRPO variants and the ablations, several seeds each, every split.

    python tests/benchmarks/variants.py --seeds 5 --out variants
    python tests/benchmarks/variants.py --seeds 3 --out variants --only ablations
    python tests/benchmarks/variants.py --out variants --table          # only print what is there

Every run is kept in `--out` as one JSON file, and a run that is there is not repeated, so the script may be stopped
and started again. Two runs go side by side, one core each. Seeds vary the order of the pairs and all sampling; base,
listener and pairs stay the same. Tables give the mean over seeds with its 95 % t-interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from listener_reward.recipes.variants import (
    ACCURACY_ONLY,
    LISTENER_SHAPED,
    SPLITS,
    VARIANTS,
    Recipe,
    evaluate_splits,
    train_sft_variant,
    train_variant,
)
from listener_reward.recipes.workers import Report, run_side_by_side

RECIPE = Recipe(share_prompt=False)  # as the tables of docs/log.md were made
MAIN = {name: (weights, RECIPE) for name, weights in VARIANTS.items()}
ABLATIONS = {
    "listener weight 1": ((1.0, 0.0, 1.0), RECIPE),
    "own base as listener": (VARIANTS[LISTENER_SHAPED], replace(RECIPE, listener="tiny-base")),
    "verdict masked": (VARIANTS[LISTENER_SHAPED], replace(RECIPE, masking="verdict")),
    "ungrounded listener": (VARIANTS[LISTENER_SHAPED], replace(RECIPE, grounding=0.0)),
    "SFT": (None, RECIPE),
}
METRICS = ("accuracy", "contradiction_rate", "malformed_rate", "ece")


def run_one(report: Report, name: str, seed: int, out: str) -> None:
    """Trains and measures one configuration with one seed, and keeps the result."""
    if Path(out).exists():  # another call of this script was faster
        return
    weights, recipe = {**MAIN, **ABLATIONS}[name]
    with tempfile.TemporaryDirectory() as folder:
        if weights is None:
            curves = None
            train_sft_variant(report, out=folder, seed=seed, recipe=recipe)
        else:
            curves = train_variant(report, weights=weights, out=folder, seed=seed, recipe=recipe)
        # Whoever listened in training, contradictions are always counted by the same, independent listener.
        splits = evaluate_splits(
            report, folder, SPLITS, recipe.test_pairs, listener=RECIPE.listener, think=weights is not None
        )
    settings = {"name": name, "seed": seed, "recipe": asdict(recipe), "weights": weights}
    Path(out).write_text(json.dumps({**settings, "splits": splits, "curves": curves}, indent=1))


def run_base(report: Report, out: str) -> None:
    splits = evaluate_splits(report, RECIPE.base, SPLITS, RECIPE.test_pairs, listener=RECIPE.listener)
    Path(out).write_text(json.dumps({"name": "base", "seed": 0, "recipe": asdict(RECIPE), "splits": splits}, indent=1))


def table(folder: Path) -> str:
    """Results as Markdown: one table a metric, and the variants' paired differences."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    names = list(dict.fromkeys(["base", *MAIN, *ABLATIONS]))
    lines: list[str] = []
    for metric in METRICS:
        lines += [f"\n{metric} (%)\n", f"| model | seeds | {' | '.join(SPLITS)} |", "| --- " * (2 + len(SPLITS)) + "|"]
        for name in names:
            mine = [run for run in runs if run["name"] == name]
            if mine:
                cells = [interval([run["splits"][split][metric] for run in mine]) for split in SPLITS]
                lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    by_seed = {(run["name"], run["seed"]): run["splits"] for run in runs}
    both = sorted({s for n, s in by_seed if n == ACCURACY_ONLY} & {s for n, s in by_seed if n == LISTENER_SHAPED})
    lines.append(f"\n{LISTENER_SHAPED} minus {ACCURACY_ONLY}, paired over {len(both)} seeds (points)\n")
    lines += ["| metric | " + " | ".join(SPLITS) + " |", "| --- " * (1 + len(SPLITS)) + "|"]
    for metric in METRICS:
        cells = []
        for split in SPLITS:
            shaped, plain = (
                [by_seed[variant, s][split][metric] for s in both] for variant in (LISTENER_SHAPED, ACCURACY_ONLY)
            )
            cells.append(interval([a - b for a, b in zip(shaped, plain, strict=True)]))
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(fractions: list[float | None]) -> str:
    """Mean and half-width of the 95 % t-interval, in per cent."""
    values = [100 * fraction for fraction in fractions if fraction is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("variants"))
    parser.add_argument("--only", choices=("main", "ablations"))
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        chosen = {**(MAIN if args.only != "ablations" else {}), **(ABLATIONS if args.only != "main" else {})}
        jobs: dict[str, Any] = {}
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in chosen:
                out = args.out / f"{name.replace(' ', '-')}-{seed}.json"
                if not out.exists():
                    jobs[f"{name} {seed}"] = (run_one, {"name": name, "seed": seed, "out": str(out)})
        if not (args.out / "base.json").exists():
            jobs["base"] = (run_base, {"out": str(args.out / "base.json")})
        run_side_by_side(jobs, at_once=args.at_once)
    print(table(args.out))


if __name__ == "__main__":
    main()
