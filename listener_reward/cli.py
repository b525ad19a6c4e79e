"""The command line: `listener-reward compare | rank | eval | demo | train`.

The answer goes to stdout and everything else to stderr, so `--json` prints one JSON object and nothing more. Exit
codes: 2 for input that cannot be used, 3 for a judge that broke. Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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
    from listener_reward.evaluate import Evaluation
    from listener_reward.judge import Judge
    from listener_reward.ranking import Ranking
    from listener_reward.verdict import Verdict

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which of two images people would prefer, and why.

    `listener-reward compare --judge tiny --prompt "two red circles" a.png b.png`
    """
    with _errors_in_one_line(debug):
        with _working("judging"):
            verdict = _load_judge(judge, listener, no_think, thoughts).compare(prompt, first, second)
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Order images from best to worst, by comparing every pair of them.

    Scores are log-odds with mean zero: an image one above another is preferred 73 times in 100. In `--json`, `order`
    holds positions and `files` names, both best first; `scores` and `standard_errors` keep the order of the arguments.

    `listener-reward rank --judge tiny --prompt "two red circles" *.png`
    """
    with _errors_in_one_line(debug):
        with _working("judging"):
            ranking = _load_judge(judge, listener, no_think, thoughts).rank(prompt, images)
        if as_json:
            _print_json(ranking.to_dict() | {"files": [images[place] for place in ranking.order]})
        else:
            _print_ranking(ranking, images)


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
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Judge the first N pairs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the order in which a pair's images are shown.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a judge on labelled pairs: accuracy, contradictions, calibration, symmetry.

    `listener-reward eval --judge tiny --data tiny:ood --json`
    """
    with _errors_in_one_line(debug):
        with _working("judging", spinner=False):  # the evaluation has its own progress bar
            from listener_reward.datasets import load_pairs
            from listener_reward.evaluate import evaluate

            pairs = load_pairs(data, limit=limit, seed=seed)
            loaded = _load_judge(judge, listener, no_think, thoughts)
            evaluation = evaluate(loaded, pairs, progress=sys.stderr.isatty())
        if as_json:
            _print_json(evaluation.to_dict())
        else:
            _print_evaluation(evaluation)


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


# ---------------------------------------------------------------------------------------------------------------------
# Between the commands and the package


def _load_judge(name: str | None, listener: str | None, no_think: bool, thoughts: int | None) -> Judge:
    from listener_reward.judge import Judge
    from listener_reward.reward import PAPER_CHECKPOINT

    given = {"listener": listener, "thoughts": thoughts}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    return Judge.from_pretrained(PAPER_CHECKPOINT if name is None else name, think=not no_think, **options)


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
        console.print("An exact tie.", style="bold")
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


def _print_ranking(ranking: Ranking, images: list[str]) -> None:
    table = Table("", "image", "score", "std. error")
    for position, place in enumerate(ranking.order, start=1):
        score, error = ranking.scores[place], ranking.standard_errors[place]
        table.add_row(str(position), Text(_plain(images[place])), f"{score:+.2f}", f"{error:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{ranking.comparisons} comparisons; scores are log-odds with mean zero")


def _print_evaluation(evaluation: Evaluation) -> None:
    table = Table("measure", "value")
    for name, value in evaluation.to_dict().items():
        table.add_row(name.replace("_", " "), escape(_plain(_cell(value))))
    Console(highlight=False).print(table)


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
