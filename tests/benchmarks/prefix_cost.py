"""Cost of a group against its size: the listener and the loss with a shared prefix, and as copies.

    python tests/benchmarks/prefix_cost.py --out docs/prefix-cost.svg

Prints the Markdown table of docs/performance.md and draws its plot. The copies' loss needs about 0.7 GB of memory for
every completion; sizes above `--largest-loss` are run with a shared prefix only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from listener_reward.bench import run
from listener_reward.bench.shapes import Size, build_checkpoint

SIZES = (2, 4, 8, 16, 32)
KEPT = ("median_seconds", "tokens", "patches", "peak_mb", "weight_flops")
COLORS = {"listener": "#2a6fbb", "loss": "#c2572b"}


def measure(arms: list[str], repeats: int, largest_loss: int) -> list[dict]:
    run.BENCHMARKS["loss"] = ("loss",)
    rows: list[dict] = []
    for arm in arms:
        for group in SIZES:
            size = Size(group=group, repeats=repeats)
            if arm == "loss" and group > largest_loss:
                row = shared_alone(arm, size, rows[-1])
            else:
                found = run.run_bench(arm, size, Console(stderr=True))["arms"][arm]
                row = {"what": arm, "group": group, "ratio": found["ratio"], "limit": found["limit"]}
                row |= {"ratio_last_logit": found.get("ratio_last_logit")}
                row |= {way: found[way] and {key: found[way][key] for key in KEPT} for way in ("shared", "plain")}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def shared_alone(arm: str, size: Size, smaller: dict) -> dict:
    """A row without copies, which would not fit; their operations are those of a `smaller` row's, times the sizes."""
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder, "model"), size)
        shared = run._in_a_process(arm, Path(folder, "model"), size, "shared", Path(folder, "shared.pt"))
    shared["median_seconds"] = statistics.median(shared["seconds"])
    flops = smaller["plain"]["weight_flops"] * size.group / smaller["group"]
    row = {"what": arm, "group": size.group, "ratio": None, "limit": flops / shared["weight_flops"], "plain": None}
    return row | {"shared": {key: shared[key] for key in KEPT}}


def table(rows: list[dict]) -> str:
    lines = [
        "| | G | shared, s | copies, s | ratio | limit | of the limit | shared, MB | copies, MB |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        shared, plain = row["shared"], row["plain"]
        copies, memory = (f"{plain['median_seconds']:.2f}", f"{plain['peak_mb']:,.0f}") if plain else ("no room", "")
        ratio, share = (f"{row['ratio']:.2f}", f"{row['ratio'] / row['limit']:.0%}") if plain else ("", "")
        lines.append(
            f"| {row['what']} | {row['group']} | {shared['median_seconds']:.2f} | {copies} | {ratio} "
            f"| {row['limit']:.2f} | {share} | {shared['peak_mb']:,.0f} | {memory} |"
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
            points = [at(row["group"], row[key]) for row in rows if row["what"] == what and row[key]]
            if not points:
                continue
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
