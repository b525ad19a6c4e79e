"""The command line: `listener-reward compare | rank | eval | demo | train`.

The answer goes to stdout and everything else to stderr, so `--json` prints one JSON object and nothing more. Exit
codes: 2 for input that cannot be used, 3 for a judge that broke. Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from listener_reward import __version__
from listener_reward.errors import InputError, JudgeError, MissingExtraError

if TYPE_CHECKING:
    from listener_reward.calibration import Calibrated
    from listener_reward.datasets.check import DataCheck
    from listener_reward.evaluate import Evaluation
    from listener_reward.judge import Judge
    from listener_reward.leaderboard import Leaderboard
    from listener_reward.ranking import Ranking
    from listener_reward.verdict import Verdict

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look at preference data.")
app.add_typer(data_app, name="data")

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help='"tiny" (embedded, CPU, no download), a checkpoint folder, or a Hub name.',
        show_default="the paper's released checkpoint",
    ),
]
ListenerName = Annotated[
    str | None,
    typer.Option("--listener", help='A listener: a folder, a Hub name, or "none".', show_default="the judge's own"),
]
NoThink = Annotated[bool, typer.Option("--no-think", help="Skip the reasoning: one forward pass for each order.")]
Thoughts = Annotated[
    int | None,
    typer.Option("--thoughts", metavar="K", min=1, help="Thoughts for each order.", show_default="the judge's own"),
]
AggregateName = Annotated[
    str | None,
    typer.Option(
        "--aggregate",
        help='"mean" of the thoughts, "majority" of their answers, "listener" (its mean), or "both".',
        show_default="the judge's own",
    ),
]
OrdersName = Annotated[
    str | None,
    typer.Option("--orders", help='"both", or "one" at random for half the cost.', show_default="the judge's own"),
]
EarlyStop = Annotated[
    float | None,
    typer.Option("--early-stop", metavar="P", help="No more thoughts once this sure, in (0.5, 1]; 1 changes nothing."),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The text that the images were generated from.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The console script."""
    app(prog_name="listener-reward")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"listener-reward {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Judge images against a prompt, with reasons that a second model has checked.

    Start with `listener-reward demo`: it trains, evaluates and ranks on this machine, without a download.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="The first image file.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The second image file.")],
    prompt: Prompt,
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    aggregate: AggregateName = None,
    orders: OrdersName = None,
    early_stop: EarlyStop = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which of two images people would prefer, and why.

    `listener-reward compare --judge tiny --prompt "two red circles" a.png b.png`
    """
    with _errors_in_one_line(debug):
        with _working("judging"):
            verdict = _load_judge(judge, listener, no_think, thoughts, aggregate, orders, early_stop).compare(
                prompt, first, second
            )
        if as_json:
            _print_json(verdict.to_dict())
        else:
            _print_verdict(verdict, first, second)


@app.command()
def rank(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="The image files to order.")],
    prompt: Prompt,
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    aggregate: AggregateName = None,
    orders: OrdersName = None,
    early_stop: EarlyStop = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            metavar="N",
            min=1,
            help="Make N comparisons, chosen as it goes; a quarter of all pairs is usually enough.",
            show_default="every pair",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Order images from best to worst, by comparing pairs of them.

    Scores are log-odds with mean zero: an image one above another is preferred 73 times in 100. In `--json`, `order`
    holds positions and `files` names, both best first; `scores` and `standard_errors` keep the order of the arguments.

    `listener-reward rank --judge tiny --prompt "two red circles" *.png`
    """
    with _errors_in_one_line(debug):
        with _working("judging"):
            loaded = _load_judge(judge, listener, no_think, thoughts, aggregate, orders, early_stop)
            ranking = loaded.rank(prompt, images, **({} if budget is None else {"budget": budget}))
        if as_json:
            _print_json(ranking.to_dict() | {"files": [images[place] for place in ranking.order]})
        else:
            _print_ranking(ranking, images)


@app.command("rank-videos")
def rank_videos(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="The video files: mp4, webm, mov, mkv, gif.")],
    prompt: Prompt,
    judge: JudgeName = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help='"storyboard": a grid of frames as one image. "frames": frame against frame, averaged. "video": the '
            "model's own video input, with times. \"clip\": all frames of a side as images.",
        ),
    ] = "storyboard",
    frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, help="Frames to look at in each video.")] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            help="Look at this many frames per second from the start, the same moments in each video.",
            show_default="frames spread evenly over the video",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", help="The videos' frames per second.", show_default="the files' own")
    ] = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Order videos from best to worst, by comparing every pair of them.

    Scores and `--json` are those of `rank`. Files other than gif need PyAV: `pip install "listener-reward[video]"`.

    `listener-reward rank-videos --judge tiny --strategy frames --prompt "two red circles" *.mp4`
    """
    with _errors_in_one_line(debug):
        with _working("judging"):
            from listener_reward.integrations.video import rank_videos  # pyright: ignore[reportMissingImports]

            loaded = _load_judge(judge, listener, no_think, thoughts)
            chosen: Any = strategy
            ranking = rank_videos(loaded, prompt, videos, strategy=chosen, frames=frames, fps=fps, rate=rate)
        if as_json:
            _print_json(ranking.to_dict() | {"files": [videos[place] for place in ranking.order]})
        else:
            _print_ranking(ranking, videos, "video")


@app.command("eval")
def evaluate_pairs(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help='Labelled pairs: "tiny:id", "tiny:ood", "tiny:wrong", "hpdv2:FOLDER", a JSONL, JSON, CSV or Parquet '
            'file, or a Hub data set "org/name:split".',
        ),
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help='As for the other commands, or a peer: "pickscore", "clip", "clip:FOLDER", "imscore:ImageReward", '
            '"openai:MODEL@http://localhost:8000/v1". Give it several times for one table of all.',
            show_default="the paper's released checkpoint",
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            help="What a model that was run elsewhere says of these pairs: id and p_first, margin, or score_first and "
            "score_second; or image and score. JSONL, JSON, CSV or Parquet. Several times for several models.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="FILE", help="A file of scores to test every judge against, on the same pairs."
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="A published protocol: imagereward, hpsv2, hpsv2-inversion, hpsv3-pair, pickscore, genai-bench, "
            "videogen-with-ties, mmrb2, tau-b, spearman ... (docs/evaluation.md). Several times for several.",
            show_default="those of the data set",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            metavar="SPEC",
            help="Other pairs, on which the protocol pickscore chooses its tie threshold, as published: "
            '"pickapic:yuvalkirstain/pickapic_v1:validation_unique".',
            show_default="cross-fitted on the pairs themselves",
        ),
    ] = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    aggregate: AggregateName = None,
    orders: OrdersName = None,
    early_stop: EarlyStop = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Judge at most N pairs: all those of prompts drawn at random. Of a stream, the first N pairs.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the order in which a pair's images are shown.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Read data larger than memory as it comes.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE.html",
            help="Also write one page with all of it: reliability, order, contradictions, the worst mistakes.",
        ),
    ] = None,
    mistakes: Annotated[
        int, typer.Option("--mistakes", metavar="N", min=0, help="Worst mistakes of each judge to show on the page.")
    ] = 24,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure judges on labelled pairs: by published protocols, calibration, contradictions, symmetry.

    `listener-reward eval --judge tiny --data tiny:ood --json`

    Who is best on your own pairs, and is that more than chance?

    `listener-reward eval --data pairs.jsonl --judge tiny --judge pickscore --judge openai:MODEL@URL`

    A model that was run elsewhere, from its scores alone (no picture is read):

    `listener-reward eval --data hpdv2:FOLDER --scores mine.jsonl --against theirs.csv`

    A page to look at, with the mistakes it is surest of:

    `listener-reward eval --judge tiny --data tiny:ood --html tiny-ood.html`
    """
    with _errors_in_one_line(debug):
        broken: list[Exception] = []
        shown: list[dict[str, Any]] = []
        if html is not None:
            _check_page("html", html)
        with _working("judging", spinner=False):  # the evaluation has its own progress bar
            from listener_reward.datasets import load_pairs
            from listener_reward.evaluate import evaluate, evaluate_scores
            from listener_reward.gallery import Gallery, scored_gallery
            from listener_reward.leaderboard import leaderboard
            from listener_reward.measure import check_protocols
            from listener_reward.scores import read_scores

            check_protocols(protocol or ())
            files = [read_scores(path) for path in scores or ()]
            rival = read_scores(against) if against else None
            names = judge or ([] if files else [None])
            options: dict[str, Any] = {"limit": limit, "seed": seed, "check_images": bool(names)}
            if validation == data:
                raise InputError(
                    f"validation is {validation!r}, the data itself; choose its tie threshold on other pairs"
                )
            sets = [spec for spec in (data, validation) if spec is not None]
            pairs, *apart = [
                load_pairs(spec, **options, stream=True) if stream else load_pairs(spec, **options) for spec in sets
            ]
            how: dict[str, Any] = {"protocols": protocol, "validation": apart[0] if apart else None}
            found = [evaluate_scores(file, pairs, **how) for file in files]
            other = evaluate_scores(rival, pairs, **how) if rival else None
            if html is not None:
                for scored in (*found, *([other] if other else [])):
                    shown += scored_gallery(scored, pairs, mistakes=mistakes)
            for name in names:
                try:
                    loaded = _load_rater(name, listener, no_think, thoughts, aggregate, orders, early_stop)
                    gallery = Gallery(loaded.name, mistakes)
                    watch = None if html is None else gallery.add
                    progress = sys.stderr.isatty()
                    found.append(evaluate(loaded, pairs, progress=progress, watch=watch, **how))
                    shown += gallery.pairs
                except (InputError, MissingExtraError, JudgeError) as error:
                    if len(names) + len(files) == 1:
                        raise
                    broken.append(error)  # the others' results are not lost for it
            together = [*found, other] if other else found
            board = leaderboard(together, other) if found and len(names) + len(files) + bool(other) > 1 else None
        if board:
            _print_json(board.to_dict()) if as_json else _print_leaderboard(board)
        elif found:
            _print_json(found[0].to_dict()) if as_json else _print_evaluation(found[0])
        if html is not None and found:
            asked = {"seed": seed, "limit": limit, "listener": listener, "no_think": no_think or None}
            asked |= {"thoughts": thoughts, "aggregate": aggregate, "orders": orders, "early_stop": early_stop}
            _write_html(html, data, board.evaluations if board else found, board, shown, asked, broken)
        if broken:
            for error in broken[:-1]:
                _stderr().print(Text.assemble(("Error: ", "bold red"), _plain(str(error))), soft_wrap=True)
            raise broken[-1]


@app.command()
def calibrate(
    data: Annotated[
        str, typer.Option("--data", help="Labelled pairs, as `eval --data` takes them; none that you will report on.")
    ],
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    aggregate: AggregateName = None,
    orders: OrdersName = None,
    early_stop: EarlyStop = None,
    method: Annotated[
        str, typer.Option("--method", help='Of the verdict: "temperature", "isotonic", or "auto" for the likelier one.')
    ] = "auto",
    sure: Annotated[
        float | None,
        typer.Option(
            "--sure",
            metavar="P",
            help="Prefer an image only where that is right this often, and else tie.",
            show_default="the tie band that is right most often",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for a copy that is calibrated.", show_default="the judge's own folder"),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the reliability.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Use N pairs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the choice and the division of the pairs.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit on votes how sure a judge may be, and keep it beside its weights.

    Half of the prompts are fitted on, a fifth chooses between methods and the tie band, and the rest is measured: ECE,
    Brier, likelihood and reliability before and after. A calibration belongs to a way of judging, so the options for
    thoughts, orders and listener are kept with it.

    `listener-reward calibrate --judge runs/first --data votes.jsonl --plot reliability.svg`
    """
    with _errors_in_one_line(debug):
        with _working("judging", spinner=False):
            from listener_reward.calibration import calibrate as fit
            from listener_reward.datasets import load_pairs
            from listener_reward.reward import PAPER_CHECKPOINT

            name = PAPER_CHECKPOINT if judge is None else judge
            _check_writable(name, out)
            if plot is not None:
                _check_page("plot", plot)
            pairs = load_pairs(data, limit=limit, seed=seed)
            loaded = _load_judge(judge, listener, no_think, thoughts, aggregate, orders, early_stop)
            result = fit(
                loaded,
                pairs,
                method=method,  # pyright: ignore[reportArgumentType]
                sure=sure,
                seed=seed,
                progress=sys.stderr.isatty(),
            )
            folder = _write_calibration(name, out, loaded, result, listener)
            if plot is not None:
                from listener_reward.reliability import reliability_svg

                curves = {"before": (result.labels, result.p_before), "after": (result.labels, result.p_after)}
                plot.write_text(reliability_svg(curves), encoding="utf-8")
        if as_json:
            _print_json(result.to_dict() | {"folder": str(folder)})
        else:
            _print_calibrated(result, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Data


@data_app.command("check")
def check_data(
    data: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='A file in any format read here, or what `eval --data` takes: "imagereward:FOLDER", "org/name:split".',
        ),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Look at the first N pairs only.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the order in which a pair's images are shown.")] = 0,
    max_broken: Annotated[
        float | None,
        typer.Option(
            "--max-broken",
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of pairs with an unreadable image above which the data cannot be used.",
            show_default="0.2",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is in preference data, and whether it can be used: format, labels, ties, images, duplicates, prompts.

    Every image is read once. The exit code is 2 where the data cannot be used.

    `listener-reward data check pairs.jsonl`
    """
    with _errors_in_one_line(debug):
        with _working("checking", spinner=False):  # the check has its own progress bar
            from listener_reward.datasets import MAX_BROKEN
            from listener_reward.datasets.check import check_data

            most = MAX_BROKEN if max_broken is None else max_broken
            check = check_data(data, limit=limit, seed=seed, max_broken=most, progress=sys.stderr.isatty())
        if as_json:
            _print_json(check.to_dict())
        else:
            _print_check(check)
        if not check.usable:
            raise typer.Exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@app.command()
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
    base and an SFT baseline, and writes `results.json` and `report.html`.
    """
    with _errors_in_one_line(debug):
        _quieten()
        from listener_reward.demo import run_demo

        run_demo(out, steps, seed, quick)


@app.command()
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
    share of the machine's own matrix rate, and by how much the results differ. The default `grpo` takes some minutes
    on two cores and 8 GB of memory; keep the machine idle beside it.

    `listener-reward bench grpo --group 8 --json`
    """
    with _errors_in_one_line(debug):
        _quieten()
        if what == "grpo":
            import listener_reward.train  # noqa: F401  says which extra is missing before any work is done
        from listener_reward.bench.run import report, run_bench
        from listener_reward.bench.shapes import Size

        times = repeats if repeats is not None else 1 if what == "grpo" else 5
        shape = (model, pixels, group, groups, tokens, images, prompt_words, dtype, attention, times)
        size = Size(*shape, lora, gradient_checkpointing)
        with redirect_stdout(sys.stderr):
            results = run_bench(what, size, _stderr())
        if as_json:
            _print_json(results)
        else:
            report(results, Console())


@app.command(
    no_args_is_help=True,
    # Parsing stops at the first value, so that every option of the training configuration reaches its own parser.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(ctx: typer.Context, debug: Debug = False) -> None:
    """Train a judge by listener-shaped GRPO on your own pairs.

    `listener-reward train --config train.yaml`

    ```yaml
    # train.yaml
    model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct
    use_peft: true         # LoRA; without it every weight is trained
    listener: Qwen/Qwen2.5-VL-7B-Instruct
    data: pairs.jsonl      # prompt, image_first, image_second, p_first
    output_dir: runs/first
    max_steps: 500
    num_generations: 8
    learning_rate: 1.0e-6
    save_steps: 50
    ```

    The fields are those of `ListenerGRPOConfig`, which has all of trl's `GRPOConfig`, and of trl's `ModelConfig`. Any
    field can be given again as an option, which then wins:

    `listener-reward train --config train.yaml --learning_rate 2e-6 --seed 1`

    To go on after an interruption, run the same line with `--resume_from_checkpoint true`: it continues from the last
    checkpoint in `output_dir`. The finished folder is a judge: `listener-reward compare --judge runs/first ...`. Needs
    the extra: `pip install "listener-reward[train]"`. `--debug`, where wanted, comes first.
    """
    with _errors_in_one_line(debug):
        from listener_reward.train.run import main as run_training

        run_training(list(ctx.args))


@app.command("launch-config", no_args_is_help=True)
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
    with _errors_in_one_line(debug):
        folder = resources.files("listener_reward").joinpath("train", "launch")
        names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
        if name not in names:
            raise InputError(f"name is {name!r}; choose one of {', '.join(names)}")
        print(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"), end="")


# ---------------------------------------------------------------------------------------------------------------------
# Serving


@app.command()
def serve(
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help='"reference", "group" or "auto"; see `ListenerReward`.')
    ] = "reference",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            min=2,
            help="Wait until N images of a prompt have come, in whatever requests, and compare them with one another.",
            show_default="do not wait",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address; mind that there is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8300,
    name: Annotated[str, typer.Option("--name", help="What clients call the reward.")] = "listener",
    debug: Debug = False,
) -> None:
    """Serve a judge as a reward over HTTP, as JSON, for trainers that cannot share its environment.

    `POST /compute` is what Flow-Factory's remote rewards and `RemoteReward` ask, `POST /score` what UniRL asks,
    `GET /health` what both ask first.

    `listener-reward serve --judge tiny`
    """
    with _errors_in_one_line(debug):
        with _working("loading the judge"):
            from listener_reward.integrations.collector import GroupCollector  # pyright: ignore[reportMissingImports]
            from listener_reward.integrations.server import make_server  # pyright: ignore[reportMissingImports]
            from listener_reward.reward import ListenerReward

            loaded = _load_judge(judge, listener, no_think, thoughts)
            chosen: Any = "group" if group_size else scheme
            reward: Any = ListenerReward(loaded, scheme=chosen, on_failure="nan")
            server = make_server(
                GroupCollector(reward, group_size) if group_size else reward, host=host, port=port, name=name
            )
        with server:
            _stderr().print(f"serving on http://{host}:{server.server_address[1]}", soft_wrap=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()


# ---------------------------------------------------------------------------------------------------------------------
# Between the commands and the package


def _load_rater(name: str | None, *options: Any) -> Any:
    """A judge of ours, with the options that `_load_judge` takes, or a peer, which knows of none of them."""
    from listener_reward.peers import is_peer, load_peer

    return load_peer(name) if name and is_peer(name) else _load_judge(name, *options)


def _load_judge(
    name: str | None,
    listener: str | None,
    no_think: bool,
    thoughts: int | None,
    aggregate: str | None = None,
    orders: str | None = None,
    early_stop: float | None = None,
) -> Judge:
    from listener_reward.judge import Judge
    from listener_reward.reward import PAPER_CHECKPOINT

    given = {
        "listener": listener,
        "thoughts": thoughts,
        "aggregate": aggregate,
        "orders": orders,
        "early_stop": early_stop,
    }
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    return Judge.from_pretrained(PAPER_CHECKPOINT if name is None else name, think=not no_think, **options)


def _check_writable(name: str, out: Path | None) -> None:
    if out is None and not Path(name).is_dir():
        raise InputError(
            f"judge is {name!r}, which is no folder of yours to write in; give --out for a calibrated copy"
        )
    if out is not None and out.exists():
        raise InputError(f"out is {str(out)!r}, which exists; give a folder to make")


def _write_calibration(name: str, out: Path | None, judge: Judge, result: Calibrated, listener: str | None) -> Path:
    from listener_reward.checkpoint import EMBEDDED, Card, resolve

    changes: dict[str, Any] = {"calibration" if judge.think else "fast_calibration": result.calibration}
    if judge.think:  # what was asked of a judge that does not think says nothing of how it should when it does
        kept = ("thoughts", "aggregate", "orders", "early_stop")
        changes |= {field: getattr(judge.card, field) for field in kept}
    if listener is not None:
        # A folder is named from here; the card would read a relative name from where it lies itself.
        local = listener not in EMBEDDED and Path(listener).is_dir()
        changes["listener"] = None if listener == "none" else str(Path(listener).resolve()) if local else listener
    if out is None:
        Card.amend(name, **changes)
        return Path(name)
    import shutil

    folder = resolve(name)
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder)
    shutil.copytree(folder, out)
    replace(Card.load(folder), **changes).save(out)  # its listener is absolute by now, or a name
    return out


def _check_page(option: str, path: Path) -> None:
    """Refuses a file that could not be written, before the judging."""
    if path.is_dir():
        raise InputError(f"{option} is {str(path)!r}, which is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} is {str(path)!r}, whose folder cannot be made ({error}); give another") from error


def _write_html(
    path: Path,
    data: str,
    evaluations: Sequence[Evaluation],
    board: Leaderboard | None,
    pairs: list[dict[str, Any]],
    asked: dict[str, Any],
    broken: list[Exception],
) -> None:
    """The page of `eval`. It names the data and the judges as they were asked for."""
    from datetime import UTC, datetime

    from listener_reward.diagnostics import diagnose
    from listener_reward.report import write_report

    rows = board.to_dict()["judges"] if board else [evaluations[0].to_dict()]
    seen = {"split": evaluations[0].data, "against": board.against if board else None}
    order = {evaluation.judge: place for place, evaluation in enumerate(evaluations)}
    protocol, first = evaluations[0].protocols[0], evaluations[0]
    ties = f", {first.n_ties} of them ties between people" if first.n_ties else ""
    results = {
        "title": ", ".join(list(order)[:3]) + (f" and {len(order) - 3} more" if len(order) > 3 else "") + f" on {data}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["listener-reward", *sys.argv[1:]]),
        "summary": f"{first.n} labelled pairs{ties}. "
        f"By {protocol.protocol}, {protocol.pairs} pairs of {protocol.prompts} prompts count.",
        "notes": [f"Not measured: {error}" for error in broken],
        "table": [
            row | seen | {"model": evaluation.judge, "diagnostics": diagnose(evaluation)}
            for row, evaluation in zip(rows, evaluations, strict=True)
        ],
        "pairs": sorted(pairs, key=lambda pair: order[pair["model"]]),
        "pairs_title": "The worst mistakes",
        "pairs_note": "For each judge the wrong verdicts that are farthest from the people's votes, the worst first; "
        "then a few right ones, drawn at random, for contrast.",
        "settings": {"data": data} | {name: value for name, value in asked.items() if value is not None},
        "versions": {"listener-reward": __version__, "python": platform.python_version()},
    }
    _stderr().print(f"report: {write_report(path, results)}", markup=False, soft_wrap=True)


@contextmanager
def _errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turns the errors a user can act on into one line on stderr and an exit code; all others are faults of ours."""
    try:
        yield
    except (InputError, MissingExtraError, JudgeError) as error:
        if debug:
            raise
        _stderr().print(Text.assemble(("Error: ", "bold red"), _plain(str(error))), soft_wrap=True)
        raise typer.Exit(3 if isinstance(error, JudgeError) else 2) from None


@contextmanager
def _working(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Keeps stdout for the answer, and other packages' bars and warnings off the screen; our own warnings stay."""
    _quieten()
    console = _stderr()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(Text.assemble(("Warning: ", "bold yellow"), _plain(str(message))), soft_wrap=True)

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"listener_reward(\.|$)")
        warnings.showwarning = show
        if spinner and console.is_terminal:
            with console.status(what):
                yield
        else:
            yield


def _quieten() -> None:
    """Takes effect because transformers is not imported yet; what the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():  # at a terminal a download of gigabytes should be seen
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(_finite(answer), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_verdict(verdict: Verdict, first: str, second: str) -> None:
    console = Console(highlight=False)
    if verdict.preferred is None:
        exact = verdict.p_first == 0.5
        console.print(
            "An exact tie."
            if exact
            else f"No preference: p = {verdict.p_first:.3f} for the first image, within the tie band.",
            style="bold",
        )
    else:
        name, p = (first, verdict.p_first) if verdict.preferred == 1 else (second, 1 - verdict.p_first)
        console.print(Text.assemble((_plain(name), "bold green"), f" is preferred, p = {p:.3f}"), soft_wrap=True)
    if verdict.thoughts:
        table = Table("shown", "answer", "p first", "listener", "thought", show_lines=True)
        for thought in verdict.thoughts:
            table.add_row(
                thought.order,
                "malformed" if thought.answer is None else str(thought.answer),
                f"{thought.p_first:.2f}",
                _listener_cell(thought.listener_p_first, thought.contradicted),
                Text(_plain(thought.text)),
            )
        console.print(table)
    console.print(
        Text.assemble(
            "listener ",
            _listener_cell(verdict.listener_p_first, verdict.contradicted),
            f"   position gap {verdict.position_gap:+.3f}   malformed {verdict.malformed} of {len(verdict.thoughts)}",
        )
    )


def _listener_cell(p_first: float | None, contradicted: bool | None) -> Text:
    if p_first is None:
        return Text("none")
    return Text(f"{p_first:.2f} contradicts" if contradicted else f"{p_first:.2f}", "red" if contradicted else "")


def _print_ranking(ranking: Ranking, images: list[str], what: str = "image") -> None:
    table = Table("", what, "score", "std. error")
    for position, place in enumerate(ranking.order, start=1):
        score, error = ranking.scores[place], ranking.standard_errors[place]
        table.add_row(str(position), Text(_plain(images[place])), f"{score:+.2f}", f"{error:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{ranking.comparisons} comparisons; scores are log-odds with mean zero")


def _print_evaluation(evaluation: Evaluation) -> None:
    from listener_reward.leaderboard import protocols_table

    table = Table("measure", "value")
    for name, value in evaluation.to_dict().items():
        if name != "protocols":
            table.add_row(name.replace("_", " "), escape(_plain(_cell(value))))
    console = Console(highlight=False)
    console.print(table)
    console.print(protocols_table(evaluation.protocols))


def _print_leaderboard(board: Leaderboard) -> None:
    from listener_reward.leaderboard import leaderboard_tables

    console, result = Console(highlight=False), board.evaluations[0].protocols[0]
    for table in leaderboard_tables(board):
        console.print(table)
    console.print(
        f"{result.pairs} pairs of {result.prompts} prompts count. The difference is to {_plain(board.against)}, on the "
        "same pairs; intervals and p draw prompts, not pairs.",
        markup=False,
    )


def _print_check(check: DataCheck) -> None:
    table = Table("", "found")
    for name, words in check.lines():
        table.add_row(name, escape(_plain(words)))
    console = Console(highlight=False)
    console.print(table)
    for title, style, lines in (
        ("broken", "yellow", check.broken_named),
        ("note", "yellow", check.notes),
        ("problem", "bold red", check.problems),
    ):
        for line in lines:
            console.print(Text.assemble((f"{title}: ", style), _plain(line)), soft_wrap=True)
    verdict = ("This data can be used.", "bold green") if check.usable else ("This data cannot be used.", "bold red")
    console.print(Text.assemble(verdict))


def _print_calibrated(result: Calibrated, folder: Path) -> None:
    from listener_reward.reliability import reliability

    console = Console(highlight=False)
    table = Table("measure", "before", "after")
    for who, before, after in (
        ("", result.before, result.after),
        ("listener ", result.listener_before, result.listener_after),
    ):
        for name in before or ():
            table.add_row(who + name, _cell((before or {})[name]), _cell((after or {})[name]))
    console.print(table)
    table = Table("confidence", "pairs", "people who agree", "")
    for one in reliability(result.labels, result.p_after):
        bar = "\N{FULL BLOCK}" * round(one.agreement * 20)
        table.add_row(f"{one.low:.2f} to {one.high:.2f}", str(one.n), f"{one.agreement:.3f}", bar)
    console.print(table)
    console.print(
        f"fitted on {result.n_fit} pairs, chosen on {result.n_validation}, measured on {result.n_test}; "
        f"tie band {result.calibration.tie_band:g}; written to {_plain(str(folder))}",
        soft_wrap=True,
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_cell, value))
    return "none" if value is None else str(value)


def _plain(text: str) -> str:
    """`text` without control characters: a model's words and a file's name must not drive the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


if __name__ == "__main__":
    main()
