"""How few comparisons order a group: Kendall's tau to the full round robin of the same judge, against the budget.

    python tests/benchmarks/ranking.py                              # simulated judges, seconds
    python tests/benchmarks/ranking.py --tiny rounds --prompts 24   # also the embedded judge; its comparisons are kept

A simulated judge answers sigmoid(s_i - s_j + e_ij), the true scores with a standard deviation of 2 and e_ij a fixed
error of the pair, so a judge with errors is inconsistent, as real ones are. The embedded judge compares pictures of the
tiny world: one prompt, candidates as a generator would make them. "random" draws pairs, "Swiss" lets neighbours in the
standing meet, every image once a round; both are fitted by the same model and never repeat a pair, so only the choice
of pairs differs. Every group is ranked from `STARTS` orders of its images, because the first pairs depend on it.
"Itself again" is the tau between two full round robins of the embedded judge that differ in the seed of its thoughts:
how much of an order is the judge's and not the dice's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy.special import expit
from scipy.stats import kendalltau

from listener_reward.ranking import estimate_votes, fit_bradley_terry, next_round, rank_images, round_size

Outcomes = list[tuple[int, int, float]]
Schedule = Callable[[int, Outcomes, int, np.random.Generator], list[tuple[int, int]]]

SHARES = {16: (16, 24, 30, 40, 60), 64: (96, 128, 161, 242, 504)}
STARTS = {16: 3, 64: 1}
MODES = {"thinking": {}, "8 thoughts": {"thoughts": 8}, "fast": {"think": False}, "fast uncalibrated": {"think": False}}
"""Of "fast" the answers before the verdict's curve are kept, on which `Judge.rank` fits its scores; "fast uncalibrated"
is without Platt's scaling of each answer too."""


def ours(n: int, outcomes: Outcomes, size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    return next_round(n, outcomes, size)


def random_pairs(n: int, outcomes: Outcomes, size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    met = {outcome[:2] for outcome in outcomes}
    left = [pair for pair in combinations(range(n), 2) if pair not in met]
    return [left[k] for k in rng.permutation(len(left))[:size]]


def swiss(n: int, outcomes: Outcomes, size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Each image meets the next below it in the standing that it has not met."""
    scores, _ = fit_bradley_terry(n, outcomes, votes=estimate_votes(n, outcomes))
    met, waiting = {outcome[:2] for outcome in outcomes}, np.argsort(-scores, kind="stable").tolist()
    pairs = []
    while waiting and len(pairs) < size:
        i = waiting.pop(0)
        opponents = [j for j in waiting if (min(i, j), max(i, j)) not in met]
        if opponents:
            waiting.remove(opponents[0])
            pairs.append((min(i, opponents[0]), max(i, opponents[0])))
    return pairs


def taus(p: np.ndarray, schedule: Schedule, budgets: tuple[int, ...], seed: int) -> list[float]:
    """Kendall's tau to the round robin of `p` (n, n) after each of `budgets` comparisons."""
    n, rng, outcomes, found = len(p), np.random.default_rng(seed), [], []
    full = full_scores(p)
    for budget in budgets:
        while len(outcomes) < budget:
            size = n // 2 if schedule is swiss else round_size(n, len(outcomes))
            size = min(size, budget - len(outcomes))
            pairs = schedule(n, outcomes, size, rng) or random_pairs(n, outcomes, size, rng)
            outcomes += [(i, j, float(p[i, j])) for i, j in pairs]
        scores, _ = fit_bradley_terry(n, outcomes, votes=estimate_votes(n, outcomes))
        found.append(tau(scores, full))
    return found


def over_starts(p: np.ndarray, schedule: Schedule, budgets: tuple[int, ...], seed: int) -> np.ndarray:
    """The mean of `taus` over `STARTS` orders in which the images are given."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(p)) for _ in range(STARTS[len(p)])]
    return np.mean([taus(p[np.ix_(order, order)], schedule, budgets, seed) for order in orders], axis=0)


def tau(scores: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    return float(np.asarray(kendalltau(scores, others))[0])


def full_scores(p: np.ndarray) -> list[float]:
    return rank_images(lambda pairs: [p[i, j] for i, j in pairs], len(p)).scores


def simulated(n: int, error: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores, errors = rng.normal(0, 2, n), np.triu(rng.normal(0, error, (n, n)), 1)
    return expit(scores[:, None] - scores + errors - errors.T)


def of_the_tiny_judge(n: int, prompts: int, mode: str, folder: Path, seed: int = 0) -> np.ndarray:
    """Round robins (prompts, n, n) of the embedded judge, kept in `folder`."""
    from listener_reward import Judge
    from listener_reward.calibration.maps import Calibration, Curve
    from listener_reward.tiny.drawing import draw
    from listener_reward.tiny.world import sample_candidate, sample_prompt, wording

    judge = None
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in track(range(prompts), f"{mode}, {n} images"):
        kept = folder / f"{mode.replace(' ', '-')}-{n}-{number}{f'-seed-{seed}' * bool(seed)}.npy"
        if not kept.exists():
            judge = judge or Judge.from_pretrained("tiny", batch_size=128, listener="none", seed=seed, **MODES[mode])
            if mode == "fast uncalibrated":
                judge.card = replace(judge.card, fast_calibration=Calibration())
            elif mode == "fast":
                judge.card = replace(
                    judge.card, fast_calibration=replace(judge.card.fast_calibration, reasoner_curve=Curve())
                )
            rng = random.Random(f"rank/{n}/{number}")
            prompt = sample_prompt(rng, held=False)
            words = wording(prompt, rng)
            pictures = [draw(sample_candidate(prompt, rng, rng.choice((0.35, 0.35, 1.0))), rng) for _ in range(n)]
            p, pairs = np.full((n, n), 0.5), list(combinations(range(n), 2))
            for start in range(0, len(pairs), 240):
                some = pairs[start : start + 240]
                firsts, seconds = [pictures[i] for i, _ in some], [pictures[j] for _, j in some]
                for (i, j), verdict in zip(some, judge.compare_many([words] * len(some), firsts, seconds), strict=True):
                    p[i, j], p[j, i] = verdict.p_first, 1 - verdict.p_first
            np.save(kept, p)
        found.append(np.load(kept))
    return np.array(found)


def table(n: int, judges: dict[str, np.ndarray]) -> None:
    budgets = SHARES[n]
    every = n * (n - 1) // 2
    print(f"\n{n} images; mean (median) of Kendall's tau to all {every} comparisons\n")
    print(f"| judge | votes | pairs by | {' | '.join(f'{b} ({b / every:.0%})' for b in budgets)} |")
    print("| --- " * (3 + len(budgets)) + "|")
    for name, games in judges.items():
        votes = np.mean([estimate_votes(n, [(i, j, p[i, j]) for i, j in combinations(range(n), 2)]) for p in games])
        for schedule in (ours, swiss, random_pairs):
            found = np.array([over_starts(p, schedule, budgets, seed) for seed, p in enumerate(games)])
            cells = [f"{column.mean():.3f} ({np.median(column):.3f})" for column in found.T]
            label = {ours: "ours", swiss: "Swiss", random_pairs: "random"}[schedule]
            print(f"| {name}, {len(games)} groups | {votes:.0f} | {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64], choices=list(SHARES))
    parser.add_argument("--groups", type=int, default=24, help="simulated groups for each judge; a third of 64 images")
    parser.add_argument(
        "--tiny", type=Path, help="folder for the embedded judge's comparisons; left out, no such judge"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--prompts", type=int, default=24, help="groups of 16 of the embedded judge; of 64 an eighth")
    parser.add_argument("--again", type=int, default=0, help="groups that the embedded judge orders with two seeds")
    args = parser.parse_args()
    for n in args.sizes:
        groups, prompts = (args.groups, args.prompts) if n == 16 else (args.groups // 3, args.prompts // 8)
        judges = {
            f"simulated, error {error:g}": np.array([simulated(n, error, seed) for seed in range(groups)])
            for error in (0.0, 0.25, 0.5, 1.0)
        }
        if args.tiny:
            judges |= {f"tiny, {mode}": of_the_tiny_judge(n, prompts, mode, args.tiny) for mode in args.modes}
        table(n, judges)
        if args.again and args.tiny:
            for mode in args.modes:
                one, other = (of_the_tiny_judge(n, args.again, mode, args.tiny, seed) for seed in (0, 1))
                found = [tau(full_scores(p), full_scores(q)) for p, q in zip(one, other, strict=True)]
                print(
                    f"\nItself again: tiny, {mode}, {args.again} groups: {np.mean(found):.3f} ({np.median(found):.3f})"
                )


if __name__ == "__main__":
    main()
