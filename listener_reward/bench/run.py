"""Runs the workloads of a benchmark one after the other, each in every way, and says how the ways compare."""

from __future__ import annotations

import multiprocessing
import signal
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

from listener_reward.errors import InputError, check_choice

if TYPE_CHECKING:
    from listener_reward.bench.shapes import Size

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "listener": ("listener",),
    "grpo": ("loss", "step"),
    "rank": ("rank",),
}
"""What each benchmark times."""

ALTERNATIVES = {"plain": "plain", "last_logit": "last logit"}
"""What a workload is compared with, by its name in the table; `workloads` says what each does."""


class NoRoom(RuntimeError):
    """A workload did not fit into memory."""


TITLES = {
    "listener": "Listener: the thoughts of a group, against a padded batch in plain transformers",
    "loss": "GRPO loss, forward and backward, against stock trl",
    "step": "GRPO step (rollout, listener, loss, update), against stock trl with the listener called naively",
    "rank": "Ranking images by every pair in both orders, against plain transformers",
}


def run_bench(name: str, size: Size, console: Console) -> dict[str, Any]:
    """Times `name` at `size`, both ways, and returns what `report` prints and `--json` gives.

    A workload that does not fit into memory is None there, and so is what would compare it.

    Raises:
        InputError: an unknown model or dtype, or a size that is not positive.
        MissingExtraError: `grpo`, and a part of trl that is timed or counted has changed.
        RuntimeError: a workload failed; its traceback is in the message.
    """
    _check(name, size)
    from listener_reward.bench.meter import matrix_rate
    from listener_reward.bench.shapes import build_checkpoint

    if name == "grpo":
        _check_trl()
    results: dict[str, Any] = {"benchmark": name, "size": asdict(size), "workloads": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with console.status("making a model with random weights"):
            build_checkpoint(folder / "model", size)
            results["matrix_rate_gflops"] = matrix_rate(size.dtype) / 1e9
        for workload in BENCHMARKS[name]:
            readings: dict[str, dict[str, Any] | None] = {}
            for way in ("shared", "plain", *(["last_logit"] if workload == "listener" else [])):
                with console.status(f"{workload}, {way}"):
                    try:
                        readings[way] = _in_a_process(workload, folder / "model", size, way, folder / f"{way}.pt")
                    except NoRoom:
                        readings[way] = None
            results["workloads"][workload] = _compare(readings, results["matrix_rate_gflops"] * 1e9, folder)
    return results


def report(results: dict[str, Any], console: Console) -> None:
    """Prints one table for each workload."""
    for workload, found in results["workloads"].items():
        table = Table(title=TITLES[workload], title_justify="left")
        others = {way: title for way, title in ALTERNATIVES.items() if way in found}
        for column in ("", "shared", *(name for title in others.values() for name in (title, f"{title} / shared"))):
            table.add_column(column, justify="right" if column else "left", no_wrap=not column)
        shared = found["shared"]
        for label, key, form in (
            ("seconds", "median_seconds", "{:.2f}"),
            ("processor seconds", "median_cpu_seconds", "{:.2f}"),
            ("language-model tokens", "tokens", "{:,.0f}"),
            ("vision patches", "patches", "{:,.0f}"),
            ("peak memory over the start, MB", "peak_mb", "{:,.0f}"),
            ("language-model tokens a second", "tokens_per_second", "{:,.0f}"),
            ("fraction of the machine's matrix rate", "share_of_matrix_rate", "{:.0%}"),
        ):
            is_rate = key in ("tokens_per_second", "share_of_matrix_rate")
            cells = [form.format(shared[key]) if shared else "no room"]
            for other in (found[way] for way in others):
                known = shared and other and not is_rate and shared[key]
                cells += [
                    form.format(other[key]) if other else "no room",
                    f"{other[key] / shared[key]:.2f}" if known else "",
                ]
            table.add_row(label, *cells)
        console.print(table)
        for way, title in others.items():
            suffix = _suffix(way)
            if found["limit" + suffix] is None:
                continue
            console.print(f"  {title}: limit by the count of operations: {found['limit' + suffix]:.2f} times")
            for quantity, difference in found["largest_difference" + suffix].items():
                console.print(f"  {title}: largest difference, {quantity}: {difference:.1e}")
    console.print(f"  the machine multiplies matrices at {results['matrix_rate_gflops']:,.0f} GFLOP/s")


def _suffix(way: str) -> str:
    """What the names of a comparison end in: nothing for "plain"."""
    return "" if way == "plain" else f"_{way}"


def _in_a_process(workload: str, folder: Path, size: Size, way: str, out: Path) -> dict[str, Any]:
    """The readings of `workload` done in one `way`; its results are in the file `out`.

    Raises:
        NoRoom: it did not fit into memory.
        RuntimeError: it failed otherwise.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    kind: str
    content: Any
    process = context.Process(target=_work, args=(sender, workload, folder, size, way, out))
    process.start()
    sender.close()
    try:
        kind, content = receiver.recv()
    except EOFError:
        process.join()
        kind = "no room" if process.exitcode == -signal.SIGKILL else "error"  # Linux kills what takes all memory
        content = f"the process ended with exit code {process.exitcode}"
    process.join()
    if kind != "done":
        raise (NoRoom if kind == "no room" else RuntimeError)(f"{workload} ({way}): {content}")
    return content


def _work(sender: Any, workload: str, folder: Path, size: Size, way: str, out: Path) -> None:
    import torch

    from listener_reward.bench.workloads import WORKLOADS

    try:
        with redirect_stdout(sys.stderr):  # trl prints its logs, and stdout is for the results
            reading, computed = WORKLOADS[workload](folder, size, way)
        torch.save(computed, out)
        sender.send(("done", asdict(reading)))
    except BaseException as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        sender.send(("no room" if full else "error", traceback.format_exc()))


def _compare(readings: dict[str, dict[str, Any] | None], matrix_rate: float, folder: Path) -> dict[str, Any]:
    for reading in filter(None, readings.values()):
        reading["median_seconds"] = statistics.median(reading["seconds"])
        reading["median_cpu_seconds"] = statistics.median(reading["cpu_seconds"])
        reading["tokens_per_second"] = reading["tokens"] / reading["median_seconds"]
        reading["share_of_matrix_rate"] = reading["weight_flops"] / reading["median_seconds"] / matrix_rate
    results: dict[str, Any] = dict(readings)
    shared = readings["shared"]
    for way, other in readings.items():
        if way == "shared":
            continue
        ratio = limit = differences = None
        if shared and other:
            ratio = other["median_seconds"] / shared["median_seconds"]
            # The ratio if the products with weight matrices were all that takes time, and took it at the same rate.
            limit = other["weight_flops"] / shared["weight_flops"]
            differences = _differences(folder / "shared.pt", folder / f"{way}.pt")
        suffix = _suffix(way)
        results |= {"ratio" + suffix: ratio, "limit" + suffix: limit, "largest_difference" + suffix: differences}
    return results


def _differences(ours: Path, theirs: Path) -> dict[str, float]:
    """How far apart the two files' numbers are."""
    import torch

    shared, plain = torch.load(ours), torch.load(theirs)
    assert shared.keys() == plain.keys()
    gradients = [key for key in plain if key.startswith("grad ")]
    differences = {key: (shared[key] - plain[key]).abs().max().item() for key in plain if key not in gradients}
    if gradients:
        # One number for all gradients: a weight with a tiny gradient has only rounding in it.
        whole = sum(plain[key].float().norm() ** 2 for key in gradients) ** 0.5
        apart = sum((shared[key].float() - plain[key].float()).norm() ** 2 for key in gradients) ** 0.5
        differences["gradient, relative"] = (apart / whole).item()
    return differences


def _check(name: str, size: Size) -> None:
    from listener_reward.bench.shapes import SHAPES_BY_NAME
    from listener_reward.prefix.attention import KERNELS

    for field, value, allowed in (
        ("benchmark", name, list(BENCHMARKS)),
        ("model", size.model, list(SHAPES_BY_NAME)),
        ("dtype", size.dtype, ["float32", "bfloat16", "float16"]),
        ("attention", size.attention, list(KERNELS)),
    ):
        check_choice(field, value, allowed)
    for field, least in (("pixels", 56), ("group", 2), ("groups", 1), ("tokens", 2), ("images", 2), ("repeats", 1)):
        if getattr(size, field) < least:
            raise InputError(f"{field} is {getattr(size, field)}; it must be at least {least}")


def _check_trl() -> None:
    """Raises MissingExtraError where trl has changed what a workload calls or counts, before the work begins."""
    from trl import GRPOTrainer

    from listener_reward.bench.meter import fused_head
    from listener_reward.train.guard import require

    require(GRPOTrainer, "_compute_loss", ["self", "model", "inputs"])
    fused_head()
