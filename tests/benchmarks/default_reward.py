"""The rule that decides the default recipe, as docs/evidence.md has it: the gain against the listener's confidence.

    python tests/benchmarks/default_reward.py

From the finished runs of `examples/study.yaml` in `docs/studies/tiny`: for each setting of the training votes the gain
minus listener-shaped GRPO, paired by seed, in the mean of the three splits; then the same in the mean of all settings
in which no vote is turned round, which is one number for each seed. Intervals are Student's 95 %. Last, of each way to
train by GRPO, how many runs have unlearnt to think (fewer than 40 tokens for a pair, where the untrained base has 45)
and the worst.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from listener_reward.recipes.study.plans import Question, compared_with, read_study
from listener_reward.recipes.study.results import METRICS, cell, columns_of, compared, rows_of
from listener_reward.recipes.study.runs import finished

ROOT = Path(__file__).parents[2]
PLAN, RUNS = ROOT / "examples/study.yaml", ROOT / "docs/studies/tiny"
GAIN, PAPER, ACCURACY = "gain", "listener-shaped GRPO", "accuracy-only GRPO"
FEW_TOKENS = 40


def failures(questions: Sequence[Question], records: Mapping[str, Any], arm: str) -> str:
    """How many of an arm's runs in these questions think in few tokens, and the least accuracy of any."""
    keys = {run.key for one in questions for runs in rows_of(one).values() for run in runs if run.arm_name == arm}
    few = sum(columns_of(records[key], "tokens")["mean"] < FEW_TOKENS for key in keys)
    worst = min(columns_of(records[key], "accuracy")["mean"] for key in keys)
    return f"  {arm:24}{few} of {len(keys)}  worst {100 * worst:.1f} %"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    records = finished(RUNS)
    questions = [question for question in compared_with(read_study(PLAN), PAPER).questions if question.vary is not None]
    for metric in ("accuracy", "contradiction_rate"):
        shown = METRICS[metric]
        print(f"{shown.title}, mean of the three splits, {GAIN} minus {PAPER} ({shown.difference})")
        as_drawn = {}  # by run, because the world's own setting is asked in both questions and counts once
        for question in questions:
            rows = rows_of(question)
            for row, gaps in compared(question, records, metric):
                if rows[row][0].arm_name != GAIN:
                    continue
                print(f"  {row:40}{len(gaps['mean'])} seeds  {cell(gaps['mean'], shown, sign=True)}")
                if question.vary != "flipped":
                    as_drawn[rows[row][0].key] = gaps["mean"]
        pooled = np.mean([*as_drawn.values()], axis=0).tolist()
        name = f"mean of the {len(as_drawn)} settings as drawn"
        print(f"  {name:40}{len(pooled)} seeds  {cell(pooled, shown, sign=True)}")
    print(f"runs with fewer than {FEW_TOKENS} tokens for a pair, and the worst accuracy, mean of the three splits")
    print(*(failures(questions, records, arm) for arm in (ACCURACY, PAPER, GAIN)), sep="\n")
