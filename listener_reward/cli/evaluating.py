"""`eval`, `calibrate` and `data check`: what needs labelled pairs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from listener_reward.cli.journals import Journals
from listener_reward.cli.options import (
    AsJson,
    Debug,
    JudgeName,
    JudgeOptions,
    asked,
    check_taken,
    judge_options,
    load_judge,
)
from listener_reward.cli.printing import print_calibrated, print_check, print_json, print_measured
from listener_reward.cli.terminal import errors_in_one_line, print_error, working
from listener_reward.cli.writing import check_page, check_writable, write_calibration, write_html
from listener_reward.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help='Labelled pairs: "tiny:id", "tiny:ood", "tiny:wrong", "hpdv2:FOLDER", a JSONL, JSON, CSV or Parquet '
        'file, or a Hub data set "org/name:split".',
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        rich_help_panel="The judge",
        help='As for the other commands, or a peer: "pickscore", "clip", "clip:FOLDER", "imscore:ImageReward", '
        '"openai:MODEL@http://localhost:8000/v1". Give it several times for one table of all.',
        show_default="the paper's released checkpoint",
    ),
]
ScoreFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--scores",
        metavar="FILE",
        help="What a model that was run elsewhere says of these pairs: id and p_first, margin, or score_first and "
        "score_second; or image and score. JSONL, JSON, CSV or Parquet. Several times for several models.",
    ),
]
Against = Annotated[
    Path | None,
    typer.Option("--against", metavar="FILE", help="A file of scores to test every judge against, on the same pairs."),
]
Protocols = Annotated[
    list[str] | None,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="A published protocol: imagereward, hpsv2, hpsv2-inversion, hpsv3-pair, pickscore, genai-bench, "
        "videogen-with-ties, mmrb2, tau-b, spearman ... (docs/evaluation.md). Several times for several.",
        show_default="those of the data set",
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation",
        metavar="SPEC",
        help="Other pairs, on which the protocol pickscore chooses its tie threshold, as published: "
        '"pickapic:yuvalkirstain/pickapic_v1:validation_unique".',
        show_default="cross-fitted on the pairs themselves",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        min=1,
        help="Judge at most N pairs: all those of prompts drawn at random. Of a stream, the first N pairs.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seeds the order in which a pair's images are shown.")]
Stream = Annotated[bool, typer.Option("--stream", help="Read data larger than memory as it comes.")]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE.html",
        help="Also write one page with all of it: reliability, order, contradictions, the worst mistakes.",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Judge all pairs anew, also those that the same line judged before it was stopped."),
]
Mistakes = Annotated[
    int, typer.Option("--mistakes", metavar="N", min=0, help="Worst mistakes of each judge to show on the page.")
]


@judge_options()
def evaluate_pairs(
    data: Data,
    judge: Judges = None,
    scores: ScoreFiles = None,
    against: Against = None,
    protocol: Protocols = None,
    validation: Validation = None,
    limit: Limit = None,
    seed: Seed = 0,
    stream: Stream = False,
    html: Html = None,
    mistakes: Mistakes = 24,
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Measure judges on labelled pairs: by published protocols, calibration, contradictions, symmetry.

    `listener-reward eval --judge tiny --data tiny:ood --json`

    Who is best on your own pairs, and is that more than chance?

    `listener-reward eval --data pairs.jsonl --judge tiny --judge pickscore --judge openai:MODEL@URL`

    A model that was run elsewhere, from its scores alone (no picture is read):

    `listener-reward eval --data hpdv2:FOLDER --scores mine.jsonl --against theirs.csv`

    On eight GPUs, each of which judges an eighth:

    `accelerate launch --num_processes 8 -m listener_reward.cli eval --judge runs/first --data pairs.jsonl`

    A page to look at, with the mistakes it is surest of:

    `listener-reward eval --judge tiny --data tiny:ood --html tiny-ood.html`

    An evaluation that is stopped goes on where it was when the same line is run again.
    """
    from listener_reward.evaluate.processes import divided, first_speaks, joined, place

    rank, processes = place()
    with first_speaks(), errors_in_one_line(debug), joined():
        if html is not None:
            check_page("html", html)
        with working("judging", spinner=False):  # the evaluation has its own progress bar
            from listener_reward.evaluate.judged import check_protocols
            from listener_reward.evaluate.scores import read_scores
            from listener_reward.evaluate.several import evaluate_judges

            check_protocols(protocol or ())
            files = [read_scores(path) for path in scores or ()]
            rival = read_scores(against) if against else None
            names = judge or ([] if files else [None])
            check_taken(names, how)
            question: dict[str, Any] = {
                "data": data,
                "validation": validation,
                "limit": limit,
                "seed": seed,
                "stream": stream,
            }
            if processes > 1:  # each has a journal of what it has judged itself
                question["process"] = f"{rank} of {processes}"
            journals = Journals(how, question, fresh=fresh)
            pairs, apart = _load(data, validation, limit=limit, seed=seed, stream=stream, check_images=bool(names))
            with journals:
                measured = evaluate_judges(
                    [divided(partial(journals.load, name)) for name in names],
                    pairs,
                    scores=files,
                    against=rival,
                    protocols=protocol,
                    validation=apart,
                    mistakes=None if html is None else mistakes,
                    batch_size=64 * processes,
                    progress=sys.stderr.isatty(),
                )
        print_measured(measured, as_json=as_json)
        if html is not None and measured.evaluations and rank == 0:
            write_html(html, data, measured, {"seed": seed, "limit": limit} | asked(how))
        for error in measured.failures[:-1]:
            print_error(error)
        if measured.failures:
            raise measured.failures[-1]
        journals.remove()


def _load(data: str, validation: str | None, *, stream: bool, **options: Any) -> tuple[Any, Any]:
    """The pairs, and those for the tie threshold, or None."""
    from listener_reward.datasets import load_pairs

    if validation == data:
        raise InputError(f"validation is {validation!r}, the data itself; choose its tie threshold on other pairs")
    sets = [None if spec is None else load_pairs(spec, stream=stream, **options) for spec in (data, validation)]
    return sets[0], sets[1]


@judge_options()
def calibrate(
    data: Annotated[
        str, typer.Option("--data", help="Labelled pairs, as `eval --data` takes them; none that you will report on.")
    ],
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            metavar="NAME",
            help="Fit verdicts by this criterion: on the pairs with that label, or on all where none is labelled so.",
            show_default="the general question",
        ),
    ] = None,
    judge: JudgeName = None,
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
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the reliability; needs matplotlib.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Use N pairs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the choice and the division of the pairs.")] = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Fit on votes how sure a judge may be, and keep it beside its weights.

    Half of the prompts are fitted on, a fifth chooses between methods and the tie band, and the rest is measured: ECE,
    Brier, likelihood and reliability before and after. A calibration belongs to a way of judging, so the options for
    thoughts, orders and listener are kept with it.

    `listener-reward calibrate --judge runs/first --data votes.jsonl --plot reliability.svg`
    """
    with errors_in_one_line(debug):
        with working("judging", spinner=False):
            from listener_reward.datasets import load_pairs
            from listener_reward.evaluate.calibrate import calibrate as fit
            from listener_reward.reward import PAPER_CHECKPOINT

            name = PAPER_CHECKPOINT if judge is None else judge
            check_writable(name, out)
            if plot is not None:
                check_page("plot", plot)
                # Here, so that its extra is missed before the work.
                from listener_reward.evaluate.plotting import reliability_figure, save_svg
            pairs = load_pairs(data, limit=limit, seed=seed)
            question = {"calibrated on": data, "limit": limit, "seed": seed}
            question |= {} if criterion is None else {"criterion": criterion}
            with (journals := Journals(how, question, fresh=fresh, loads=load_judge)):
                loaded: Any = journals.load(judge)
                result = fit(
                    loaded,
                    pairs,
                    criterion=criterion,
                    method=method,  # pyright: ignore[reportArgumentType]
                    sure=sure,
                    seed=seed,
                    progress=sys.stderr.isatty(),
                )
            folder = write_calibration(name, out, loaded, result, asked(how), criterion)
            journals.remove()
            if plot is not None:
                curves = {"before": (result.labels, result.p_before), "after": (result.labels, result.p_after)}
                save_svg(reliability_figure(curves), plot)  # pyright: ignore[reportPossiblyUnboundVariable]
        if as_json:
            print_json(result.to_dict() | {"folder": str(folder)})
        else:
            print_calibrated(result, folder)


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
            help="Fraction of pairs with an unreadable image above which the data cannot be used.",
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
    with errors_in_one_line(debug):
        with working("checking", spinner=False):  # the check has its own progress bar
            from listener_reward.datasets import MAX_BROKEN
            from listener_reward.datasets.check import check_data

            most = MAX_BROKEN if max_broken is None else max_broken
            check = check_data(data, limit=limit, seed=seed, max_broken=most, progress=sys.stderr.isatty())
        if as_json:
            print_json(check.to_dict())
        else:
            print_check(check)
        if not check.usable:
            raise typer.Exit(2)
