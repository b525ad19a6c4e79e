"""`plan`: what a run needs of its GPUs, before any is rented."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from listener_reward.cli.options import AsJson, Debug, JudgeName
from listener_reward.cli.printing import print_json, table_of
from listener_reward.cli.terminal import errors_in_one_line, plain, working
from listener_reward.errors import InputError
from listener_reward.models.options import as_bytes, check_options

if TYPE_CHECKING:
    from listener_reward.plan.plans import Phase, Plan


_JUDGED = frozenset({"judge", "listener", "no_think", "thoughts", "like", "batch_size", "quantization", "max_pixels"})
PLANNED = {
    "train": frozenset({"config", "launch", "gpus"}),
    "eval": _JUDGED | {"card", "data"},
    "serve": _JUDGED | {"card", "data"},
}
"""What can be planned, and the options that not all plans look at."""


def plan(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="`train`, `eval` or `serve`.")] = "train",
    config: Annotated[
        str | None, typer.Option("--config", help="train: the YAML file of `listener-reward train`.")
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option("--launch", help="train: a name of `launch-config`, or a file.", show_default="one GPU, or DDP"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=1, help="train: GPUs.", show_default="the launch's own")
    ] = None,
    judge: JudgeName = None,
    listener: Annotated[
        str | None,
        typer.Option("--listener", help="eval, serve: as for these commands.", show_default="the judge's own"),
    ] = None,
    no_think: Annotated[bool, typer.Option("--no-think", help="eval, serve: no thoughts.")] = False,
    thoughts: Annotated[
        int | None,
        typer.Option(
            "--thoughts",
            metavar="K",
            min=1,
            help="eval, serve: thoughts an order.",
            show_default="the judge's own",
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="eval, serve: a checkpoint of the shapes that a judge will have.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="eval, serve: completions at a time.")] = 32,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help='eval, serve: "4bit" or "8bit" weights.', show_default="16 bit")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", metavar="FILE", help="eval, serve: a card in place of the judge's.", show_default=False),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option("--max-pixels", min=1, help="eval, serve: larger images are reduced to it.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="eval: the pairs, see `eval`.")] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", metavar="WxH", help="All images are of this size; no data is read.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="With --image-size, of a prompt.")] = 40,
    pairs: Annotated[int | None, typer.Option("--pairs", min=1, help="With --image-size, how many there are.")] = None,
    thought_tokens: Annotated[
        int | None,
        typer.Option("--thought-tokens", min=1, help="Of a thought on average; for time.", show_default="the limit"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of a GPU, such as 24GB: says whether it fits, and what to change.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="3090, 4090, l40s, a100-40, a100-80, h100 or h200: memory and rates.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", min=0.01, help="Dense products in bfloat16, TFLOP/s, for time.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", min=0.001, help="Of the GPU's memory, TB/s, which bounds decoding.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option("--utilisation", min=0.01, max=1, help="Fraction of both rates that is reached.")
    ] = 0.35,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Plan a run before a GPU is rented: tokens, memory by part, operations, hours, and what to change.

    Nothing is downloaded but a checkpoint's configuration and tokenizer, and no weight is loaded: the passes of the run
    are done on tensors without data.

    `listener-reward plan --config train.yaml --launch fsdp2 --gpus 8 --gpu h100`

    `listener-reward plan eval --judge runs/first --data pairs.jsonl --memory 24GB`

    For `train`, any field of the training configuration can be given after `--`, and wins.
    """
    with errors_in_one_line(debug):
        fields = list(ctx.args)
        if what.startswith("--"):  # the first field after `--`, where WHAT is left out
            what, fields = "train", [what, *fields]
        if what not in PLANNED:
            raise InputError(f"what is {what!r}; choose train, eval or serve")
        _check_meant(ctx, what, fields)
        check_options({"quantization": quantization})
        if what == "train":
            import listener_reward.train  # noqa: F401  says which extra is missing before any work is done
        from listener_reward.plan.plans import KNOWN_GPUS

        if gpu is not None and gpu not in KNOWN_GPUS:
            raise InputError(f"gpu is {gpu!r}; choose one of {', '.join(KNOWN_GPUS)}, or give --memory and --tflops")
        chosen = None if gpu is None else KNOWN_GPUS[gpu]
        room = as_bytes(memory, "memory") if memory is not None else chosen.memory if chosen else None
        rate = tflops * 1e12 if tflops is not None else chosen.rate if chosen else None
        moved = bandwidth * 1e12 if bandwidth is not None else chosen.bandwidth if chosen else None
        size = None if image_size is None else _size(image_size)
        with working("planning"):
            if what == "train":
                from listener_reward.plan.launches import Launch
                from listener_reward.plan.training import Assumptions, plan_training

                if config is None and not fields:
                    raise InputError("--config is not given; name the training configuration: plan --config train.yaml")
                argv = [*(["--config", config] if config else []), *fields]
                assumed = Assumptions(size, prompt_tokens, pairs, thought_tokens)
                made = plan_training(argv, launch=Launch.of(launch, gpus), assumptions=assumed)
            else:
                made = _judging(
                    what,
                    judge,
                    card,
                    like=like,
                    data=data,
                    size=size,
                    prompt_tokens=prompt_tokens,
                    pairs=pairs,
                    max_pixels=max_pixels,
                    options={
                        "listener": listener,
                        "think": not no_think,
                        "thoughts": thoughts,
                        "thought": thought_tokens,
                        "batch_size": batch_size,
                        "bits": 16 if quantization is None else int(quantization[0]),
                    },
                )
        reached = None if rate is None else rate * utilisation
        passed = None if moved is None else moved * utilisation
        if as_json:
            print_json(made.to_dict(memory=room, rate=reached, bandwidth=passed))
        else:
            print_plan(made, memory=room, rate=reached, bandwidth=passed)


def _check_meant(ctx: typer.Context, what: str, fields: Sequence[str]) -> None:
    """Refuses options that are given and that the plan of `what` does not look at."""
    others = set().union(*PLANNED.values()) - PLANNED[what]
    given = [name for name in ctx.params if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")]
    if found := [f"--{name.replace('_', '-')}" for name in given if name in others]:
        of = "; for train, the YAML file or fields after `--` say it" if what == "train" else ""
        raise InputError(f"{', '.join(found)}: no option of `plan {what}`{of}; leave it out")
    if what != "train" and fields:
        raise InputError(f"{' '.join(fields)}: fields after `--` are those of `plan train`; leave them out")


def _judging(
    what: str,
    judge: str | None,
    card: Path | None,
    *,
    like: str | None,
    data: str | None,
    size: tuple[int, int] | None,
    prompt_tokens: int,
    pairs: int | None,
    max_pixels: int | None,
    options: dict[str, Any],
) -> Plan:
    from listener_reward.plan.checkpoints import Checkpoint
    from listener_reward.plan.judging import plan_judging
    from listener_reward.plan.tokens import assumed, of_data
    from listener_reward.reward import PAPER_CHECKPOINT

    checkpoint = Checkpoint.of(judge or PAPER_CHECKPOINT, like=like, card=card, max_pixels=max_pixels)
    chat_format = checkpoint.card.format
    if size is None and data is None and what == "serve":
        size = (1024, 1024)
    if size is not None:
        found = assumed(checkpoint, chat_format, size, prompt_tokens, pairs or 0, "assumed")
    elif data is not None:
        found = of_data(checkpoint, chat_format, data, pairs, 0)
    else:
        raise InputError("--data is not given; name the pairs to judge, or give --image-size WIDTHxHEIGHT")
    return plan_judging(what, checkpoint, found, **options)


def print_plan(plan: Plan, *, memory: float | None, rate: float | None, bandwidth: float | None) -> None:
    console = Console(highlight=False)
    console.print(tokens_table(plan))
    console.print(memory_table(plan))
    counted = f"{plan.flops / 1e12:,.0f} TFLOP a {plan.unit} on each of {plan.gpus} GPU{'s' * (plan.gpus > 1)}"
    if rate is not None:
        counted += f": {plan.seconds(rate, bandwidth):,.1f} s at {rate / 1e12:,.0f} TFLOP/s"
        counted += f" and {bandwidth / 1e12:.2f} TB/s" if bandwidth else ", without decoding's reading of the weights"
        if plan.units:
            counted += f", {plan.hours(rate, bandwidth):,.1f} hours for {plan.units:,.0f} {plan.unit}s"
    console.print(counted, soft_wrap=True)
    for note in plan.notes:
        console.print(Text.assemble(("note: ", "yellow"), plain(note)), soft_wrap=True)
    if memory is None:
        return
    peak = plan.peak
    sizes = f"{peak.total / 1e9:.1f} of {memory / 1e9:.1f} GB"
    if peak.total <= memory:
        console.print(Text.assemble(("It fits", "bold green"), f": {sizes}, in {peak.name}"))
        return
    console.print(Text.assemble(("It does not fit", "bold red"), f": {sizes}, in {peak.name}. What to change:"))
    for line in plan.advice(memory):
        console.print(f"  {line}", soft_wrap=True)


def tokens_table(plan: Plan) -> Table:
    """How a pair's tokens come about, and the longest pair's."""
    longest = plan.pairs.longest
    table = table_of("tokens of a pair", "longest")
    table.add_row("question and chat template", f"{longest.question:,}")
    table.add_row("prompt", f"{longest.prompt:,}")
    for place, (grid, tokens, size) in enumerate(zip(longest.grids, longest.images, longest.sizes, strict=True), 1):
        seen = f"image {place}: {size[0]} x {size[1]} pixels, {math.prod(grid):,} patches"
        table.add_row(seen, f"{tokens:,}")
    table.add_row("thought and answer, at most", f"{plan.thought:,}")
    table.add_section()
    table.add_row("together", f"{longest.total + plan.thought:,}")
    table.add_row(
        f"mean of {len(plan.pairs.seen):,} pairs ({plain(plan.pairs.source)})", f"{plan.pairs.mean + plan.thought:,.0f}"
    )
    return table


def memory_table(plan: Plan) -> Table:
    """Gigabytes of each part on one GPU, a column for each phase."""
    parts = list(dict.fromkeys(part for phase in plan.phases for part, size in phase.parts.items() if size))
    table = table_of("GB on each GPU", *(phase.name for phase in plan.phases))
    for part in parts:
        table.add_row(part, *(_gigabytes(phase, part) for phase in plan.phases))
    table.add_section()
    table.add_row("together", *(f"{phase.total / 1e9:.1f}" for phase in plan.phases))
    return table


def _gigabytes(phase: Phase, part: str) -> str:
    size = phase.parts.get(part, 0)
    return f"{size / 1e9:.1f}" if size else ""


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None or not int(match[1]) * int(match[2]):
        raise InputError(f"image-size is {text!r}; give width and height in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])
