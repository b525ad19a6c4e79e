"""The method's claim on the tiny world: both GRPO variants and the ablations, several seeds each, every split.

    python tests/benchmarks/variants.py --seeds 5 --out variants
    python tests/benchmarks/variants.py --seeds 3 --out variants --only ablations
    python tests/benchmarks/variants.py --out variants --table          # only print what is there

This is a study as `listener-reward study` runs it: every run is kept in `--out` as one JSON file, and a run that is
there is not repeated, so the script may be stopped and started again. Two runs go side by side, one core each. Seeds
vary the order of the pairs and all sampling; base, listener and pairs stay the same. Tables give the mean over seeds
with its 95 % t-interval.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from listener_reward.recipes.study.conduct import conduct
from listener_reward.recipes.study.configuration import Arm, Splits
from listener_reward.recipes.study.plans import Question, Study
from listener_reward.recipes.study.results import tables
from listener_reward.recipes.study.runs import finished
from listener_reward.recipes.variants import ACCURACY_ONLY, LISTENER_SHAPED, SPLITS, VARIANTS, Recipe

RECIPE = Recipe(share_prompt=False)  # as the tables of docs/log.md were made
MAIN = {
    "base": Arm(method="none", recipe=RECIPE),
    **{name: Arm(weights=weights, recipe=RECIPE) for name, weights in VARIANTS.items()},
}
SHAPED = VARIANTS[LISTENER_SHAPED]
ABLATIONS = {
    "listener weight 1": Arm(weights=(1.0, 0.0, 1.0), recipe=RECIPE),
    "own base as listener": Arm(weights=SHAPED, recipe=replace(RECIPE, listener="tiny-base")),
    "verdict masked": Arm(weights=SHAPED, recipe=replace(RECIPE, masking="verdict")),
    "ungrounded listener": Arm(weights=SHAPED, recipe=replace(RECIPE, grounding=0.0)),
    "SFT": Arm(method="sft", recipe=RECIPE),
    "Bradley-Terry": Arm(method="bradley-terry", recipe=RECIPE),
}
# Whoever listened in training, contradictions are always counted by the same, independent listener.
MEASURED = {"splits": Splits(SPLITS, RECIPE.test_pairs, listener=RECIPE.listener)}


def plan(seeds: range) -> Study:
    """Both questions from these seeds."""
    questions = (
        Question("Does the listener make a better judge?", MAIN, MEASURED, tuple(seeds), against=ACCURACY_ONLY),
        Question("What does each part of it do?", ABLATIONS, MEASURED, tuple(seeds)),
    )
    return Study("The method's claim on the tiny world", "2026-11-23", questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("variants"))
    parser.add_argument("--only", choices=("main", "ablations"))
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    args = parser.parse_args()
    study = plan(range(args.first_seed, args.first_seed + args.seeds))
    if not args.table:
        only = {None: (), "main": (*MAIN,), "ablations": (*ABLATIONS,)}[args.only]
        conduct(study, args.out, only=only, at_once=args.at_once)
    print(tables(study, finished(args.out)))


if __name__ == "__main__":
    main()
