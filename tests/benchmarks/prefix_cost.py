"""Cost of a group against its size: the listener and the loss with a shared prefix, and as copies.

    python tests/benchmarks/prefix_cost.py --out docs/prefix-cost.svg

Prints the Markdown table of docs/performance.md and draws its plot. The copies' loss needs about 0.7 GB of memory for
every completion; sizes of which it does not fit are left out by `--largest-loss`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from listener_reward.bench import run
from listener_reward.bench.shapes import Size

SIZES = (2, 4, 8, 16, 32)
COLORS = {"listener": "#2a6fbb", "loss": "#c2572b"}


def measure(arms: list[str], repeats: int, largest_loss: int) -> list[dict]:
    run.BENCHMARKS["loss"] = ("loss",)
    rows = []
    for arm in arms:
        for group in SIZES:
            if arm == "loss" and group > largest_loss:
                continue
            found = run.run_bench(arm, Size(group=group, repeats=repeats), Console(stderr=True))["arms"][arm]
            row = {"what": arm, "group": group, "ratio": found["ratio"], "limit": found["limit"]}
            for way in ("shared", "plain"):
                row[way] = {key: found[way][key] for key in ("median_seconds", "tokens", "patches", "peak_mb")}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| | G | shared, s | copies, s | ratio | limit | of the limit | shared, MB | copies, MB |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        shared, plain = row["shared"], row["plain"]
        lines.append(
            f"| {row['what']} | {row['group']} | {shared['median_seconds']:.2f} | {plain['median_seconds']:.2f} "
            f"| {row['ratio']:.2f} | {row['limit']:.2f} | {row['ratio'] / row['limit']:.0%} "
            f"| {shared['peak_mb']:,.0f} | {plain['peak_mb']:,.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict]) -> str:
    """Ratio against G, measured and the limit by counting, as an SVG that reads on light and on dark."""
    left, top, width, height, most = 50, 20, 480, 280, max(row["limit"] for row in rows) * 1.1

    def at(group: int, ratio: float) -> tuple[float, float]:
        return left + width * SIZES.index(group) / (len(SIZES) - 1), top + height * (1 - ratio / most)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 140} {top + height + 50}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="#fff"/><path d="M{left} {top}V{top + height}H{left + width}" '
        'fill="none" stroke="#666"/>',
    ]
    step = 2 if most < 20 else 5
    for tick in range(0, int(most) + 1, step):
        x, y = at(2, tick)
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{tick}</text>')
        parts.append(f'<path d="M{left} {y}h{width}" stroke="#eee"/>')
    for group in SIZES:
        x, y = at(group, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{group}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">G, completions of a prompt</text>'
    )
    parts.append(f'<text x="8" y="{top - 6}">times faster than copies</text>')
    for what, color in COLORS.items():
        for key, dash in (("ratio", ""), ("limit", ' stroke-dasharray="5 4"')):
            points = [at(row["group"], row[key]) for row in rows if row["what"] == what]
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
            x, y = points[-1]
            label = what if key == "ratio" else f"{what}, limit"
            parts.append(f'<text x="{x + 8}" y="{y + 4}" fill="{color}">{label}</text>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/prefix-cost.svg"), help="Where to draw the plot.")
    parser.add_argument("--repeats", type=int, default=1, help="Times each is run; the median counts.")
    parser.add_argument("--largest-loss", type=int, default=16, help="Largest G of which the copies' loss is run.")
    parser.add_argument("--only", nargs="*", choices=list(COLORS), help="Run these alone.")
    args = parser.parse_args()
    found = measure(args.only or list(COLORS), args.repeats, args.largest_loss)
    print(table(found))
    args.out.write_text(plot(found) + "\n", encoding="utf-8")
