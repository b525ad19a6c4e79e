"""How far the embedded judge's confidence is from the fraction of people who agree, before and after its calibration.

    python tests/benchmarks/calibration.py --pairs 3000 --svg docs/reliability.svg

The pairs are those of `listener-reward eval --data tiny:SPLIT`; the calibration was fitted on others. "Floor" is what
the voters themselves would measure: the mean ECE of the true probabilities against labels drawn from them, which is not
zero because every pair has fifteen voters and every bin a finite number of pairs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from rich.progress import track

from listener_reward import Judge
from listener_reward.calibration.maps import Calibration
from listener_reward.datasets import load_pairs
from listener_reward.evaluate.confidence import brier_score, expected_calibration_error, negative_log_likelihood
from listener_reward.evaluate.plotting import reliability_figure, save_svg
from listener_reward.tiny.world import p_prefers_first, split_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--splits", nargs="+", default=["id", "ood", "wrong"])
    parser.add_argument("--svg", type=Path, help="where the reliability diagram of the first split goes")
    parser.add_argument("--no-think", action="store_true")
    args = parser.parse_args()
    judge = Judge.from_pretrained("tiny", batch_size=128, think=not args.no_think)
    print("| split | who | ECE before | after | floor | Brier before | after | NLL before | after | mirrored |")
    print("| --- " * 10 + "|")
    for split in args.splits:
        pairs, verdicts, mirrored = load_pairs(f"tiny:{split}", limit=args.pairs), [], []
        for start in track(range(0, args.pairs, 128), split):
            rows = pairs[start : start + 128]
            firsts, seconds = map(list, zip(*rows["images"], strict=True))
            judgements = judge.judgements(rows["prompt"], firsts, seconds)
            verdicts += [[judge.conclude(some, calibration=c) for c in (Calibration(), None)] for some in judgements]
            if start < 512:
                swapped = judge.compare_many(rows["prompt"], seconds, firsts)
                mirrored += [
                    other.p_first == 1 - one.p_first for (_, one), other in zip(verdicts[start:], swapped, strict=True)
                ]
        labels = np.array(pairs["p_first"])
        truth = [p_prefers_first(one.prompt, one.first, one.second) for one in split_pairs(split, args.pairs)]
        floor = _floor(np.array(truth))
        for who in ("p_first", "listener_p_first"):
            before, after = (np.array([getattr(one[k], who) for one in verdicts]) for k in (0, 1))
            cells = [
                f"{metric(labels, p):.4f}"
                for metric in (expected_calibration_error, brier_score, negative_log_likelihood)
                for p in (before, after)
            ]
            cells.insert(2, f"{floor:.4f}")
            name = "verdict" if who == "p_first" else "listener"
            print(f"| {split} | {name} | {' | '.join(cells)} | {sum(mirrored)} of {len(mirrored)} |", flush=True)
            if args.svg and who == "p_first" and split == args.splits[0]:
                save_svg(reliability_figure({"before": (labels, before), "after": (labels, after)}), args.svg)


def _floor(truth: np.ndarray, voters: int = 15, draws: int = 20) -> float:
    rng = np.random.default_rng(0)
    return (
        math.fsum(expected_calibration_error(rng.binomial(voters, truth) / voters, truth) for _ in range(draws)) / draws
    )


if __name__ == "__main__":
    main()
