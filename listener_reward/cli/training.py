"""`demo`, `bench`, `train`, `merge` and `launch-config`: training, and what it costs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from listener_reward.cli.options import AsJson, Debug
from listener_reward.cli.printing import print_json, print_roundings
from listener_reward.cli.terminal import errors_in_one_line, quieten, stderr
from listener_reward.errors import InputError


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("listener-reward-demo"),
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="GRPO steps.", show_default="the recipe's own")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds data, sampling and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal: few steps, few pairs, no claim.")] = False,
    debug: Debug = False,
) -> None:
    """Train, evaluate and rank in a tiny world, on CPU, without a download.

    From the same base, data and seed it trains accuracy-only GRPO and listener-shaped GRPO, measures both beside the
    base, an SFT and a Bradley-Terry baseline, and writes `results.json` and `report.html`.
    """
    with errors_in_one_line(debug):
        quieten()
        from listener_reward.recipes.demo import run_demo

        run_demo(out, steps, seed, quick)


def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="`listener` (scoring a group's thoughts), `grpo` (the loss, and a whole step) or `rank` (judging "
            "every pair of some images).",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", help='Shape: "60m" for a laptop, "qwen2.5-vl-3b" or "qwen2.5-vl-7b" for a GPU.')
    ] = "60m",
    group: Annotated[int, typer.Option("--group", metavar="G", help="Completions of each prompt.")] = 8,
    groups: Annotated[int, typer.Option("--groups", help="Prompts in a GRPO step, one micro-batch each.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a completion; of a thought, on average.")] = 96,
    pixels: Annotated[int, typer.Option("--pixels", help="Edge of the square images.")] = 392,
    images: Annotated[int, typer.Option("--images", help="Images to rank.")] = 6,
    prompt_words: Annotated[int, typer.Option("--prompt-words", help="Words of the prompt.")] = 40,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    attention: Annotated[
        str, typer.Option("--attention", help='Of shared rows: "sdpa", or "flex" on a GPU (FlexAttention, compiled).')
    ] = "sdpa",
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters; without it every weight.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            help="Times each is run, after a warm-up if there are several; the median counts.",
            show_default="1 for grpo, else 5",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time the shared prefix against plain transformers and stock trl, with equal weights, data and seed.

    The weights are random, nothing is downloaded. For each it prints time, tokens, vision patches, peak memory, the
    fraction of the machine's own matrix rate, and by how much the results differ. The default `grpo` takes some minutes
    on two cores and 8 GB of memory; keep the machine idle beside it.

    `listener-reward bench grpo --group 8 --json`
    """
    with errors_in_one_line(debug):
        quieten()
        if what == "grpo":
            import listener_reward.train  # noqa: F401  says which extra is missing before any work is done
        from listener_reward.bench.run import report, run_bench
        from listener_reward.bench.shapes import Size

        if repeats is None:
            repeats = 1 if what == "grpo" else 5
        size = Size(
            model=model,
            pixels=pixels,
            group=group,
            groups=groups,
            tokens=tokens,
            images=images,
            prompt_words=prompt_words,
            dtype=dtype,
            attention=attention,
            repeats=repeats,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
        )
        with redirect_stdout(sys.stderr):
            results = run_bench(what, size, stderr())
        if as_json:
            print_json(results)
        else:
            report(results, Console())


def train(ctx: typer.Context, debug: Debug = False) -> None:
    """Train a judge by listener-shaped GRPO on your own pairs.

    `listener-reward train --config train.yaml`

    ```yaml
    # train.yaml
    model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct
    use_peft: true         # LoRA; without it every weight is trained
    dtype: bfloat16        # of the frozen base; leave it out where every weight is trained
    listener: Qwen/Qwen2.5-VL-7B-Instruct
    data: pairs.jsonl      # prompt, image_first, image_second, p_first
    output_dir: runs/first
    max_steps: 500
    num_generations: 8
    learning_rate: 1.0e-5  # for LoRA; 1.0e-6 where every weight is trained
    save_steps: 50
    ```

    The fields are those of `ListenerGRPOConfig`, which has all of trl's `GRPOConfig`, and of trl's `ModelConfig`. Any
    field can be given again as an option, which then wins:

    `listener-reward train --config train.yaml --learning_rate 2e-6 --seed 1`

    To go on after an interruption, run the same line with `--resume_from_checkpoint true`: it continues from the last
    checkpoint in `output_dir`. The finished folder, with LoRA an adapter and the name of its base, is a judge:
    `listener-reward compare --judge runs/first ...`. Needs the extra: `pip install "listener-reward[train]"`.
    `--debug`, where wanted, comes first.
    """
    with errors_in_one_line(debug):
        from listener_reward.train.run import main as run_training

        run_training(list(ctx.args))


def merge(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A LoRA judge: a folder, or a Hub name.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the whole weights.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default="the base's own")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write even if less than half of the update is kept.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge a LoRA judge into whole weights, having said how much of its update the dtype keeps.

    `listener-reward merge runs/first --out runs/first-merged --dtype float32`

    A judge needs no merging: it loads as base and adapter, which keeps the update whole. Merging is for programs that
    want whole weights, and for training on. Below half of the update it refuses. `--json` lists every module.
    """
    with errors_in_one_line(debug):
        quieten()
        from listener_reward.train.merging import merge_judge
        from listener_reward.train.rounding import together

        with redirect_stdout(sys.stderr):
            roundings = merge_judge(
                folder, out, dtype=dtype, force=force, tell=lambda found: as_json or print_roundings(found, stderr())
            )
        if as_json:
            overall, *modules = (each.to_dict() for each in (together(roundings), *roundings))
            print_json({"out": str(out), **overall, "modules": modules})
        else:
            print(f"The judge is in {out}")


def launch_config(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="one_gpu, ddp, fsdp2, zero2, zero3 or multi_node.", show_default=False)
    ],
    debug: Debug = False,
) -> None:
    """Print an accelerate configuration for `train` on more than one GPU or machine.

    `listener-reward launch-config fsdp2 > accelerate.yaml`

    `accelerate launch --config_file accelerate.yaml --num_processes 8 -m listener_reward.cli train --config train.yaml`

    Each says in its first lines what it shards and when to choose it. docs/launch.md has the rest, vLLM too.
    """
    with errors_in_one_line(debug):
        folder = resources.files("listener_reward") / "train" / "launch"
        names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
        if name not in names:
            raise InputError(f"name is {name!r}; choose one of {', '.join(names)}")
        print(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), end="")
