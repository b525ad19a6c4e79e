"""`listener-reward plan` against measured peaks of memory on a CPU: listener, GRPO steps, a judge with eight thoughts.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan.py              # some minutes; prints the table of docs/plan.md
    HF_HUB_OFFLINE=1 python tests/benchmarks/plan.py --recipes     # the table of examples/recipes

The model has 60 M random weights. What is measured is the most bytes that torch's allocator had given out at once, by
torch's profiler: what `torch.cuda.max_memory_allocated` says on a GPU. Weights count. A process's resident memory is
more, by what its allocator keeps and by the profiler's own records. Each row runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from listener_reward.bench.shapes import Size, build_checkpoint, group_chats, pictures, words
from listener_reward.bench.trainers import make_trainer
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.cli import app
from listener_reward.judge import Judge
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.plan.checkpoints import Checkpoint
from listener_reward.plan.judging import plan_judging
from listener_reward.plan.passes import Architecture
from listener_reward.plan.reading import Asked, listening
from listener_reward.plan.tokens import assumed
from listener_reward.plan.training import Assumptions, plan_training

THOUGHTS = 8


@dataclass
class Peak:
    """The most bytes that torch's allocator had given out at once inside `allocated`."""

    bytes: int = 0


@contextmanager
def allocated() -> Iterator[Peak]:
    """Records every allocation of this process's CPU tensors. What was there before is not counted."""
    from torch.profiler import ProfilerActivity, profile

    peak = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        yield peak
    assert found.profiler is not None and found.profiler.kineto_results is not None
    every: Any = found.profiler.kineto_results.events()
    events = [event for event in every if event.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak.bytes = max(peak.bytes, live)


def measure_listener(folder: Path, size: Size) -> tuple[int, int]:
    """The bytes of weights, and the peak beside them, of a group's thoughts that are read."""
    vlm = TransformersVLM.from_pretrained(folder, dtype=size.dtype, batch_size=size.group)
    chats, _ = group_chats(size, vlm.reserved)
    rng = random.Random(size.seed)
    prefixes = [ChatFormat().answer_slot(words(size.tokens, rng)) for _ in chats]
    with allocated() as peak:
        vlm.label_logprobs(chats, prefixes, ("1", "2"))
    return _weights(vlm.model), peak.bytes


def measure_judge(folder: Path, size: Size) -> tuple[int, int]:
    """Of a judge that thinks eight times in each order about two pairs; each thought is as long as it may be."""
    vlm = TransformersVLM.from_pretrained(folder, dtype=size.dtype)
    rng = random.Random(size.seed)
    draw = vlm.generate

    def drawn(chats: Any, **options: Any) -> list[str]:
        draw(chats, **options)  # random weights write nothing that can be read
        slot = ChatFormat()
        return [f"{slot.answer_slot(words(size.tokens, rng))}1{slot.answer[1]}" for _ in chats]

    vlm.generate = drawn
    judge = Judge(vlm, None, replace(Card.load(folder), thoughts=THOUGHTS, max_new_tokens=size.tokens))
    images = pictures(4, size)
    with allocated() as peak:
        judge.compare_many([words(size.prompt_words, rng) for _ in range(2)], images[:2], images[2:])
    return _weights(vlm.model), peak.bytes


def measure_step(folder: Path, size: Size) -> tuple[int, int]:
    """Of GRPO steps from their second on, when the optimizer has its moments."""
    trainer, listener = make_trainer(folder, size, True)
    weights = _weights(trainer.accelerator.unwrap_model(trainer.model)) + _weights(listener.vlm.model)
    with allocated() as peak:
        trainer.train()
    return weights, peak.bytes


def plan_listener(folder: Path, size: Size) -> int:
    """The bytes that `plan` expects where `measure_listener` measures."""
    checkpoint = Checkpoint.of(str(folder))
    pair = _pairs(checkpoint, size).longest
    model = Architecture(checkpoint.config, torch.float32)
    parts, _ = listening(model, Asked(pair, 1, size.group, size.tokens, 16384, size.group, size.group))
    return model.weight_bytes + sum(parts.values())


def plan_judge(folder: Path, size: Size) -> int:
    checkpoint = Checkpoint.of(str(folder))
    pairs = _pairs(checkpoint, size)
    options: dict[str, Any] = {"listener": "none", "thoughts": THOUGHTS, "max_new_tokens": size.tokens}
    return plan_judging("eval", checkpoint, pairs, on_cpu=True, **options).peak.total


def plan_step(folder: Path, size: Size) -> int:
    given = {
        "model_name_or_path": folder,
        "listener": folder,
        "output_dir": folder / "planned",
        "data": "none",
        "dtype": size.dtype,
        "use_peft": size.lora,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": size.group,
        "num_generations": size.group,
        "gradient_accumulation_steps": size.groups,
        "max_completion_length": size.tokens,
        "gradient_checkpointing": size.gradient_checkpointing,
        "max_steps": 2,
        "token_budget": 2**20,
        "report_to": "none",
    }
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    side = size.pixels, size.pixels
    return plan_training(argv, assumptions=Assumptions(side, size.prompt_words, 8), on_cpu=True).peak.total


def _pairs(checkpoint: Checkpoint, size: Size) -> Any:
    side = size.pixels, size.pixels
    return assumed(checkpoint, checkpoint.card.format, side, size.prompt_words, 2, "random")


def _weights(model: Any) -> int:
    return sum(weight.nbytes for weight in model.parameters())


LISTENER, JUDGE, STEP = (measure_listener, plan_listener), (measure_judge, plan_judge), (measure_step, plan_step)
SIZE = Size(group=4, groups=2, tokens=32, pixels=280, repeats=2)
"""Of a GRPO step: three steps of it take a minute of one core."""

CASES: dict[str, tuple[tuple[Callable[..., Any], Callable[..., Any]], Size]] = {
    "listener, 8 thoughts of a pair": (LISTENER, Size()),
    "judge, 8 thoughts in each order of 2 pairs": (JUDGE, Size(tokens=48)),
    "GRPO step, every weight": (STEP, SIZE),
    "GRPO step, every weight, layers computed again": (STEP, replace(SIZE, gradient_checkpointing=True)),
    "GRPO step, every weight, one micro-batch": (STEP, replace(SIZE, groups=1)),
    "GRPO step, LoRA": (STEP, replace(SIZE, lora=True)),
    "GRPO step, LoRA, layers computed again": (STEP, replace(SIZE, lora=True, gradient_checkpointing=True)),
}


def compare(name: str, folder: Path) -> tuple[int, int, int]:
    """Bytes of weights, the measured peak with them, and the planned one."""
    (measure, plan), size = CASES[name]
    build_checkpoint(folder, size)
    weights, over = measure(folder, size)
    return weights, weights + over, plan(folder, size)


RECIPES = sorted(Path(__file__).parents[2].joinpath("examples/recipes").glob("*.yaml"))


@cache
def planned(recipe: Path) -> dict[str, Any]:
    """What the command in a recipe's own header says, as JSON."""
    words = re.search(r"^# plan: listener-reward (plan .*)$", recipe.read_text(encoding="utf-8"), re.M)
    assert words is not None, f"{recipe.name} does not say how it is planned"
    argv = [str(recipe) if word == recipe.name else word for word in shlex.split(words[1])]
    done = CliRunner().invoke(app, [*argv, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def expected(found: dict[str, Any]) -> str:
    """What a recipe's header says of its memory."""
    many = f"each of {found['gpus']} GPUs" if found["gpus"] > 1 else "one GPU"
    return f"{found['peak_bytes'] / 1e9:.1f} GB on {many}, in {found['peak_phase']}"


def recipes_table() -> str:
    """A row for each recipe, as docs/plan.md has it."""
    lines = ["| recipe | GPUs | GB on each, at the peak | of | at the peak in | TFLOP a step or pair | hours |"]
    lines.append("| --- | --: | --: | --: | --- | --: | --: |")
    for recipe in RECIPES:
        found = planned(recipe)
        sizes = f"{found['peak_bytes'] / 1e9:.1f} | {found['memory_bytes'] / 1e9:.0f}"
        hours = f"{found['hours']:.1f}" if found["units"] else ""
        link = f"[{recipe.name}](../examples/recipes/{recipe.name})"
        cells = f"{found['gpus']} | {sizes} | {found['peak_phase']} | {found['flops'] / 1e12:,.0f} | {hours}"
        lines.append(f"| {link} | {cells} |")
    return "\n".join(lines)


def _work(sender: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # trl prints its logs
        sender.send(compare(name, Path(folder, "model")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one row")
    parser.add_argument("--recipes", action="store_true", help="plan the recipes instead; nothing is measured")
    args = parser.parse_args()
    if args.recipes:
        print(recipes_table())
        return
    print("| | weights, MB | measured, MB | planned, MB | planned / measured | beside the weights |")
    print("| --- | --: | --: | --: | --: | --: |")
    context = multiprocessing.get_context("spawn")
    for name in [args.only] if args.only else CASES:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, name))
        process.start()
        weights, measured, planned = receiver.recv()
        process.join()
        ratios = f"{planned / measured:.2f} | {(planned - weights) / (measured - weights):.2f}"
        sizes = " | ".join(f"{size / 1e6:,.0f}" for size in (weights, measured, planned))
        print(f"| {name} | {sizes} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
