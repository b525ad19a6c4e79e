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

from matplotlib.figure import Figure
from rich.console import Console

from listener_reward.bench import run
from listener_reward.bench.shapes import Size, build_checkpoint
from listener_reward.evaluate.plotting import BLUE, ORANGE, label_ends, save_svg, styled

SIZES = (2, 4, 8, 16, 32)
KEPT = ("median_seconds", "tokens", "patches", "peak_mb", "weight_flops")
COLORS = {"listener": BLUE, "loss": ORANGE}


def measure(workloads: list[str], repeats: int, largest_loss: int) -> list[dict]:
    run.BENCHMARKS["loss"] = ("loss",)
    rows: list[dict] = []
    for workload in workloads:
        for group in SIZES:
            size = Size(group=group, repeats=repeats)
            if workload == "loss" and group > largest_loss:
                row = shared_alone(workload, size, rows[-1])
            else:
                found = run.run_bench(workload, size, Console(stderr=True))["workloads"][workload]
                row = {"what": workload, "group": group, "ratio": found["ratio"], "limit": found["limit"]}
                row |= {"ratio_last_logit": found.get("ratio_last_logit")}
                row |= {way: found[way] and {key: found[way][key] for key in KEPT} for way in ("shared", "plain")}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def shared_alone(workload: str, size: Size, smaller: dict) -> dict:
    """A row without copies, which would not fit; their operations are those of a `smaller` row's, times the sizes."""
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder, "model"), size)
        shared = run._in_a_process(workload, Path(folder, "model"), size, "shared", Path(folder, "shared.pt"))
    shared["median_seconds"] = statistics.median(shared["seconds"])
    flops = smaller["plain"]["weight_flops"] * size.group / smaller["group"]
    row = {"what": workload, "group": size.group, "ratio": None, "limit": flops / shared["weight_flops"], "plain": None}
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


@styled
def plot(rows: list[dict]) -> Figure:
    """Ratio against G, measured and the limit by counting."""
    figure = Figure(figsize=(7, 3.8))
    axes, ends = figure.subplots(), []
    for what, color in COLORS.items():
        for key, name, dashes in (("ratio", what, "-"), ("limit", f"{what}, limit", (0, (4, 3)))):
            points = [(row["group"], row[key]) for row in rows if row["what"] == what and row[key]]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linestyle=dashes, label=name)
                ends.append((name, *points[-1], color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, map(str, SIZES))
    axes.set(xlabel="G, completions of a prompt", title="times faster than copies", ylim=(0, None))
    axes.locator_params(axis="y", integer=True)
    label_ends(axes, ends)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/prefix-cost.svg"), help="Where to draw the plot.")
    parser.add_argument("--repeats", type=int, default=1, help="Times each is run; the median counts.")
    parser.add_argument("--largest-loss", type=int, default=16, help="Largest G of which the copies' loss is run.")
    parser.add_argument("--only", nargs="*", choices=list(COLORS), help="Run these alone.")
    args = parser.parse_args()
    found = measure(args.only or list(COLORS), args.repeats, args.largest_loss)
    print(table(found))
    save_svg(plot(found), args.out)
