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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from listener_reward import Judge
from listener_reward.conclude import Judgement
from listener_reward.datasets import load_pairs
from listener_reward.evaluate.confidence import expected_calibration_error
from listener_reward.evaluate.plotting import BLUE, GREEN, GREY, ORANGE, save_svg, styled
from listener_reward.evaluate.run import side
from listener_reward.verdict import Verdict

THOUGHTS = 8
STOPS = (0.8, 0.9, 0.95, 0.99, 1.0)
RULES = ("mean", "majority", "listener", "both")
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
    costs = [[tokens(judge, judgement) for judgement in judgements] for judgements in slow]

    def replay(family: str, name: str, chosen: Sequence[Sequence[Judgement]], think: bool = True, **card: Any) -> Row:
        usual = {"aggregate": "mean", "early_stop": None, "thoughts": THOUGHTS, "orders": "both"}
        judge.card = replace(judge.card, **{**usual, **card})
        mode, calibration = judge.card.mode(think), judge.card.calibration
        verdicts = [judge.conclude(judgements, think=think) for judgements in chosen]
        used = [len(judge._needed(judgements, mode, calibration)) if think else 0 for judgements in chosen]
        spent = [
            sum(cost[list(all_).index(one)] for one in judge._needed(some, mode, calibration)) if think else 0
            for all_, some, cost in zip(slow, chosen, costs, strict=True)
        ]
        return family, name, right(labels, verdicts), np.array(used), np.array(spent)

    def first(k: int) -> list[list[Judgement]]:
        return [[judgement for judgement in judgements if judgement.number < k] for judgements in slow]

    def one_order(views: Sequence[Sequence[Judgement]]) -> list[list[Judgement]]:
        return [[a for a in judgements if a.flipped == coin] for judgements, coin in zip(views, coins, strict=True)]

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
        p_first = np.array([judge.conclude(judgements).p_first for judgements in first(k)])
        print(f"  k = {k}: {expected_calibration_error(labels, p_first):.4f}")
    if args.svg:
        save_svg(drawn(rows), args.svg)


def gather(judge: Judge, pairs: Any, think: bool) -> list[list[Judgement]]:
    found: list[list[Judgement]] = []
    for start in track(range(0, len(pairs), 64), "thinking" if think else "fast"):
        rows = pairs[start : start + 64]
        firsts, seconds = map(list, zip(*rows["images"], strict=True))
        found += judge.judgements(rows["prompt"], firsts, seconds, think=think)
    return found


def tokens(judge: Judge, judgement: Judgement) -> int:
    """How many tokens the completion behind `answer` had."""
    if not judgement.trace.well_formed:
        return judge.card.max_new_tokens
    form = judge.card.format
    text = f"{form.answer_slot(judgement.trace.thought)}{judgement.trace.answer}{form.answer[1]}"
    return len(judge.reasoner.tokenizer(text)["input_ids"]) + 1  # pyright: ignore[reportAttributeAccessIssue]


def right(labels: np.ndarray, verdicts: Sequence[Verdict]) -> np.ndarray:
    """1 where the verdict sides with the majority, (n,) float64; the tiny world's fifteen voters never tie."""
    return np.array([verdict.preferred == y for verdict, y in zip(verdicts, side(labels), strict=True)], dtype=float)


@styled
def drawn(rows: Sequence[Row]) -> Figure:
    """Accuracy against tokens, a panel for each rule; below each, on its own scale, the verdicts without thoughts."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for family, _, correct, _, spent in rows:
        lines.setdefault(family, []).append((float(spent.mean()), 100 * float(correct.mean())))
    figure = Figure(figsize=(8, 3.6))
    grid = figure.subplots(2, len(RULES), sharex=True, sharey="row", height_ratios=[4, 1])
    for rule, above, below in zip(RULES, *grid, strict=True):
        own = [("both orders", rule, BLUE), ("early stop", f"{rule}, early stop", ORANGE)]
        own += [("one order", "one order", GREEN)] * (rule == "mean")
        for number, (name, family, color) in enumerate(one for one in own if one[1] in lines):
            above.plot(*zip(*sorted(lines[family]), strict=True), "o-", color=color, label=name)
            above.text(0.12, 0.95 - 0.1 * number, name, color=color, va="top", transform=above.transAxes)
        below.plot(*zip(*lines["fast"], strict=True), "o", color=GREY, label="no thoughts")
        below.text(0.12, 0.5, "no thoughts", color=GREY, va="center", transform=below.transAxes)
        above.set_title(rule)
        above.spines.bottom.set_visible(False)
        above.tick_params(bottom=False)
    thoughtful = [accuracy for family in lines.keys() - {"fast"} for _, accuracy in lines[family]]
    fast = [accuracy for _, accuracy in lines["fast"]]
    for axes, accuracies, step in ((grid[0, 0], thoughtful, 1), (grid[1, 0], fast, 5)):
        # Whole steps: where all is nearly the same, it must not look as if it was not.
        low, high = step * np.floor(min(accuracies) / step), step * np.ceil(max(accuracies) / step)
        axes.set(ylim=(low - step / 10, high + step / 10), yticks=np.arange(low, high + step, step))
    figure.suptitle("accuracy, %", x=0.01, ha="left", fontsize="medium")
    figure.supxlabel("tokens generated for each pair", fontsize="medium")
    return figure


if __name__ == "__main__":
    main()
