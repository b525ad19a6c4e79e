"""What a verdict costs and what it is worth: accuracy against tokens generated, for every way to make one.

    python tests/benchmarks/verdicts.py --pairs 1500 --svg docs/verdicts.svg

The embedded judge thinks eight times in each order about every pair, once; each way of judging is then replayed on
those thoughts (`Judge.conclude`), so that the rows differ in nothing but the rule. All rows use the card's
calibration, which is for its own way of judging: hence the warning. Tokens are those of the completions, tags and end
included; reading an answer, the listener's too, costs a forward pass and no token. Differences are paired with the
row marked *, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from listener_reward import Judge
from listener_reward.conclude import Answer
from listener_reward.datasets import load_pairs
from listener_reward.evaluate.confidence import expected_calibration_error
from listener_reward.evaluate.run import side
from listener_reward.verdict import Verdict

THOUGHTS = 8
STOPS = (0.8, 0.9, 0.95, 0.99, 1.0)
Row = tuple[str, str, np.ndarray, np.ndarray, np.ndarray]
"""Family, name, and of each pair: whether it is right, thoughts, tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--split", default="id")
    parser.add_argument("--svg", type=Path, help="where the curve goes")
    args = parser.parse_args()
    judge = Judge.from_pretrained("tiny", batch_size=128, thoughts=THOUGHTS)
    pairs = load_pairs(f"tiny:{args.split}", limit=args.pairs)
    labels = np.array(pairs["p_first"])
    slow, fast = gather(judge, pairs, think=True), gather(judge, pairs, think=False)
    rng = np.random.default_rng(0)
    coins = rng.random(len(labels)) < 0.5
    costs = [[tokens(judge, answer) for answer in answers] for answers in slow]

    def replay(family: str, name: str, chosen: Sequence[Sequence[Answer]], think: bool = True, **card: Any) -> Row:
        usual = {"aggregate": "mean", "early_stop": None, "thoughts": THOUGHTS, "orders": "both"}
        judge.card = replace(judge.card, **{**usual, **card})
        mode, calibration = judge.card.mode(think), judge.card.calibration
        verdicts = [judge.conclude(answers, think=think) for answers in chosen]
        used = [len(judge._needed(answers, mode, calibration)) if think else 0 for answers in chosen]
        spent = [
            sum(cost[list(all_).index(one)] for one in judge._needed(some, mode, calibration)) if think else 0
            for all_, some, cost in zip(slow, chosen, costs, strict=True)
        ]
        return family, name, right(labels, verdicts), np.array(used), np.array(spent)

    def first(k: int) -> list[list[Answer]]:
        return [[answer for answer in answers if answer.number < k] for answers in slow]

    def one_order(views: Sequence[Sequence[Answer]]) -> list[list[Answer]]:
        return [[a for a in answers if a.flipped == coin] for answers, coin in zip(views, coins, strict=True)]

    rows = [
        replay("fast", "fast, one order", one_order(fast), think=False, orders="one"),
        replay("fast", "fast, both orders", fast, think=False),
        *(
            replay("one order", f"one order, {k} of mean", one_order(first(k)), thoughts=k, orders="one")
            for k in (1, 2, 4)
        ),
        *(replay("mean", f"mean of {k} in each order" + " *" * (k == 1), first(k), thoughts=k) for k in (1, 2, 4, 8)),
        *(
            replay("majority", f"majority of {k} in each order", first(k), thoughts=k, aggregate="majority")
            for k in (2, 4, 8)
        ),
        *(
            replay(who, f"{name} of {k} in each order", first(k), thoughts=k, aggregate=who)
            for who, name in (("listener", "listener's mean"), ("both", "both together"))
            for k in (1, 2, 4, 8)
        ),
        *(
            replay("both, early stop", f"both together, of 8, early stop {p:g}", slow, early_stop=p, aggregate="both")
            for p in STOPS
        ),
        *(replay("mean, early stop", f"mean of 8, early stop {p:g}", slow, early_stop=p) for p in STOPS),
        *(
            replay("majority, early stop", f"majority of 8, early stop {p:g}", slow, early_stop=p, aggregate="majority")
            for p in STOPS
        ),
    ]
    base = next(row for row in rows if row[1].endswith("*"))
    print(f"{len(labels)} pairs of tiny:{args.split}\n\n| verdict | accuracy (%) | against * | thoughts | tokens |")
    print("| --- " * 5 + "|")
    for _, name, correct, used, spent in rows:
        gap = 100 * (correct - base[2])
        half = 1.96 * gap.std() / len(gap) ** 0.5
        print(
            f"| {name} | {100 * correct.mean():.1f} | {gap.mean():+.1f} ± {half:.1f} | {used.mean():.1f} | "
            f"{spent.mean():.0f} |"
        )
    print("\nECE of the mean of k under the calibration that was fitted for k = 1:")
    for k in (1, 2, 4, 8):
        judge.card = replace(judge.card, aggregate="mean", early_stop=None, thoughts=k)
        p_first = np.array([judge.conclude(answers).p_first for answers in first(k)])
        print(f"  k = {k}: {expected_calibration_error(labels, p_first):.4f}")
    if args.svg:
        args.svg.write_text(drawn(rows))


def gather(judge: Judge, pairs: Any, think: bool) -> list[list[Answer]]:
    found: list[list[Answer]] = []
    for start in track(range(0, len(pairs), 64), "thinking" if think else "fast"):
        rows = pairs[start : start + 64]
        firsts, seconds = map(list, zip(*rows["images"], strict=True))
        found += judge.answers(rows["prompt"], firsts, seconds, think=think)
    return found


def tokens(judge: Judge, answer: Answer) -> int:
    """How many tokens the completion behind `answer` had."""
    if not answer.trace.well_formed:
        return judge.card.max_new_tokens
    form = judge.card.format
    text = f"{form.answer_slot(answer.trace.thought)}{answer.trace.answer}{form.answer[1]}"
    return len(judge.reasoner.tokenizer(text)["input_ids"]) + 1  # pyright: ignore[reportAttributeAccessIssue]


def right(labels: np.ndarray, verdicts: Sequence[Verdict]) -> np.ndarray:
    """1 where the verdict sides with the majority, (n,) float64; the tiny world's fifteen voters never tie."""
    return np.array([verdict.preferred == y for verdict, y in zip(verdicts, side(labels), strict=True)], dtype=float)


def drawn(rows: Sequence[Row], width: int = 560, height: int = 360) -> str:
    """Accuracy against tokens as SVG, one line for each family; the fewer are wrong the higher, on a log scale."""
    colors = {"fast": "#888", "one order": "#5b8c3e", "mean": "#2b6ca3", "majority": "#8a5ba8"}
    colors |= {"listener": "#3aa6a0", "both": "#d1669e", "both, early stop": "#222"}
    colors |= {"mean, early stop": "#b5533c", "majority, early stop": "#c99a2e"}
    most = max(row[4].mean() for row in rows)

    def wrong(accuracy: float) -> float:
        return max(1 - accuracy, 1e-3)

    accuracies = [row[2].mean() for row in rows]
    most_wrong = wrong(min(accuracies))
    least_wrong = min(wrong(max(accuracies)), 0.99 * most_wrong)

    def rise(accuracy: float) -> float:
        rising = math.log(most_wrong / wrong(accuracy)) / math.log(most_wrong / least_wrong)
        return height - 60 - rising * (height - 100)

    def place(row: Row) -> tuple[float, float]:
        return 50 + row[4].mean() / most * (width - 80), rise(row[2].mean())

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M50 20V{height - 45}H{width - 25}" fill="none" stroke="#888"/>',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">tokens generated for each pair</text>',
        '<text x="50" y="14">accuracy, %</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = 50 + share * (width - 80)
        lines.append(f'<text x="{x:.0f}" y="{height - 29}" text-anchor="middle">{share * most:.0f}</text>')
    for percent in (50, 60, 70, 80, 90, 92, 94, 95, 96, 97, 98, 99):
        if least_wrong * 0.9 < wrong(percent / 100) < most_wrong * 1.1:
            lines.append(f'<text x="44" y="{rise(percent / 100) + 4:.0f}" text-anchor="end">{percent}</text>')
    for number, (family, color) in enumerate(colors.items()):
        points = [(place(row), row[1]) for row in rows if row[0] == family]
        path = "L".join(f"{x:.1f} {y:.1f}" for (x, y), _ in sorted(points))
        lines.append(f'<path d="M{path}" fill="none" stroke="{color}"/>')
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{name}</title></circle>'
            for (x, y), name in points
        ]
        lines.append(f'<text x="{width - 190}" y="{height / 2 - 40 + 16 * number:.0f}" fill="{color}">{family}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
