"""Runs the arms of a benchmark one after the other and says how they compare."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from listener_reward.errors import InputError

if TYPE_CHECKING:
    from listener_reward.bench.shapes import Size

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "listener": ("listener",),
    "grpo": ("loss", "step"),
    "rank": ("rank",),
}
"""What each benchmark times."""

TITLES = {
    "listener": "Listener: the thoughts of a group, against a padded batch in plain transformers",
    "loss": "GRPO loss, forward and backward, against stock trl",
    "step": "GRPO step (rollout, listener, loss, update), against stock trl with the listener called naively",
    "rank": "Ranking images by every pair in both orders, against plain transformers",
}


def run_bench(name: str, size: Size, console: Console) -> dict[str, Any]:
    """Times `name` at `size`, both ways, and returns what `report` prints and `--json` gives.

    Raises:
        InputError: an unknown model or dtype, or a size that is not positive.
        RuntimeError: an arm failed; its traceback is in the message.
    """
    _check(name, size)
    from listener_reward.bench.meter import matrix_rate
    from listener_reward.bench.shapes import build_checkpoint

    results: dict[str, Any] = {"benchmark": name, "size": asdict(size), "arms": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with console.status("making a model with random weights"):
            build_checkpoint(folder / "model", size)
            results["matrix_rate_gflops"] = matrix_rate(size.dtype) / 1e9
        for arm in BENCHMARKS[name]:
            readings = {}
            for way in ("shared", "plain"):
                with console.status(f"{arm}, {way}"):
                    readings[way] = _in_a_process(arm, folder / "model", size, way == "shared", folder / f"{way}.pt")
            results["arms"][arm] = _compare(readings, results["matrix_rate_gflops"] * 1e9, folder)
    return results


def report(results: dict[str, Any], console: Console) -> None:
    """One table for each arm."""
    for arm, found in results["arms"].items():
        table = Table(title=TITLES[arm], title_justify="left")
        for column in ("", "shared", "plain", "plain / shared"):
            table.add_column(column, justify="left" if not column else "right")
        shared, plain = found["shared"], found["plain"]
        for label, key, form in (
            ("seconds", "median_seconds", "{:.2f}"),
            ("processor seconds", "median_cpu_seconds", "{:.2f}"),
            ("language-model tokens", "tokens", "{:,.0f}"),
            ("vision patches", "patches", "{:,.0f}"),
            ("peak memory over the start, MB", "peak_mb", "{:,.0f}"),
            ("language-model tokens a second", "tokens_per_second", "{:,.0f}"),
            ("share of the machine's matrix rate", "share_of_matrix_rate", "{:.0%}"),
        ):
            is_rate = key in ("tokens_per_second", "share_of_matrix_rate")
            ratio = "" if is_rate or not shared[key] else f"{plain[key] / shared[key]:.2f}"
            table.add_row(label, form.format(shared[key]), form.format(plain[key]), ratio)
        console.print(table)
        console.print(f"  limit by the count of operations: {found['limit']:.2f} times")
        for quantity, difference in found["largest_difference"].items():
            console.print(f"  largest difference, {quantity}: {difference:.1e}")
    console.print(f"  the machine multiplies matrices at {results['matrix_rate_gflops']:,.0f} GFLOP/s")


def _in_a_process(arm: str, folder: Path, size: Size, shared: bool, out: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    kind: str
    content: Any
    process = context.Process(target=_work, args=(sender, arm, folder, size, shared, out))
    process.start()
    sender.close()
    try:
        kind, content = receiver.recv()
    except EOFError:
        process.join()
        kind, content = "error", f"the process ended with exit code {process.exitcode} (killed for memory?)"
    process.join()
    if kind == "error":
        raise RuntimeError(f"{arm} ({'shared' if shared else 'plain'}): {content}")
    return content


def _work(sender: Any, arm: str, folder: Path, size: Size, shared: bool, out: Path) -> None:
    import torch

    from listener_reward.bench.arms import ARMS
    from listener_reward.prefix import use_kernel

    try:
        use_kernel(size.attention)
        with redirect_stdout(sys.stderr):  # trl prints its logs, and stdout is for the results
            reading, computed = ARMS[arm](folder, size, shared)
        torch.save(computed, out)
        sender.send(("done", asdict(reading)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))


def _compare(readings: dict[str, dict[str, Any]], matrix_rate: float, folder: Path) -> dict[str, Any]:
    import torch

    for reading in readings.values():
        reading["median_seconds"] = statistics.median(reading["seconds"])
        reading["median_cpu_seconds"] = statistics.median(reading["cpu_seconds"])
        reading["tokens_per_second"] = reading["tokens"] / reading["median_seconds"]
        reading["share_of_matrix_rate"] = reading["weight_flops"] / reading["median_seconds"] / matrix_rate
    shared, plain = (torch.load(folder / f"{way}.pt") for way in ("shared", "plain"))
    assert shared.keys() == plain.keys()
    gradients = [key for key in plain if key.startswith("grad ")]
    differences = {key: (shared[key] - plain[key]).abs().max().item() for key in plain if key not in gradients}
    if gradients:
        # A weight whose gradient is nothing beside the others' has only rounding in it.
        whole = sum(plain[key].float().norm() ** 2 for key in gradients) ** 0.5
        apart = sum((shared[key].float() - plain[key].float()).norm() ** 2 for key in gradients) ** 0.5
        differences["gradient, relative"] = (apart / whole).item()
    ratio = readings["plain"]["median_seconds"] / readings["shared"]["median_seconds"]
    # The ratio if the products with weight matrices were all that takes time, and took it at the same rate.
    limit = readings["plain"]["weight_flops"] / readings["shared"]["weight_flops"]
    return {**readings, "ratio": ratio, "limit": limit, "largest_difference": differences}


def _check(name: str, size: Size) -> None:
    from listener_reward.bench.shapes import SHAPES_BY_NAME
    from listener_reward.prefix import KERNELS

    for field, value, allowed in (
        ("benchmark", name, list(BENCHMARKS)),
        ("model", size.model, list(SHAPES_BY_NAME)),
        ("dtype", size.dtype, ["float32", "bfloat16", "float16"]),
        ("attention", size.attention, list(KERNELS)),
    ):
        if value not in allowed:
            raise InputError(f"{field} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
    for field, least in (("pixels", 56), ("group", 2), ("groups", 1), ("tokens", 2), ("images", 2), ("repeats", 1)):
        if getattr(size, field) < least:
            raise InputError(f"{field} is {getattr(size, field)}; it must be at least {least}")
