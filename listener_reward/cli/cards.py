"""`card`: which format a checkpoint answers in, as a card to judge with."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from listener_reward.cli.options import AsJson, Debug, judge_options, load_judge
from listener_reward.cli.printing import print_formats, print_json
from listener_reward.cli.terminal import errors_in_one_line, stderr, working
from listener_reward.cli.writing import check_page
from listener_reward.errors import InputError
from listener_reward.files import quoted

if TYPE_CHECKING:
    from listener_reward.card import Card
    from listener_reward.formats import Fit
    from listener_reward.pairs import PreferencePair

UNFIT = 1
"""The exit code where no format fits: the command worked, and its answer is no."""


_OF_JUDGING = (
    *("listener", "card", "no_think", "thoughts", "aggregate", "orders", "early_stop", "max_new_tokens"),
    *("sampling_temperature", "masking", "clips", "strict", "lenient", "listener_option", "accept_less"),
)
"""Options that say how a judge judges. What a card says is looked for here, and no listener is loaded."""


@judge_options(leave_out=_OF_JUDGING)
def card(
    name: Annotated[str, typer.Argument(metavar="NAME", help='A checkpoint: a folder, a Hub name, or "tiny".')],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PAIRS",
            help="Pairs to try the formats on, as `eval --data` takes them; their votes are not looked at.",
            show_default="pictures of the embedded tiny world",
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", metavar="N", min=1, help="How many pairs each wording is asked about.")
    ] = 8,
    question: Annotated[
        Path | None,
        typer.Option(
            "--question",
            metavar="FILE",
            help="A text file with the question that the checkpoint was trained on, to be tried as well: with {first}, "
            "{second} and {prompt} where images and prompt stand.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="The longest completion; a model that thinks at length may need thousands. The card keeps it.",
            show_default="the checkpoint's own, or 512",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The card to write.")] = Path("card.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    unfit: Annotated[
        bool, typer.Option("--unfit", help="Write the nearest format even where none fits, to go on from by hand.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Any,
) -> None:
    """Find the format that a checkpoint answers in, and write it as a card to judge with.

    A checkpoint that was not trained here may answer in JSON, in a phrase, or in other tags, and is judged wrongly
    until its card says so. This command asks the checkpoint about a few pairs in each known wording, and reads what it
    wrote in each known form:

    `listener-reward card org/model --data pairs.jsonl --out card.json`

    A format *fits* where at most half of the completions are malformed and the labels have some probability where the
    answer stands. The best one is written, with whatever else the checkpoint's own card says. Then judge with it:
    `Judge.from_pretrained("org/model", card="card.json")`, or copy the file into the checkpoint's folder as
    `listener_reward.json`.

    Where no format fits, nothing is written and the exit code is 1. The table shows what the model wrote: a completion
    that was cut off needs `--max-new-tokens`, and a question of the checkpoint's own goes into `--question`.
    """
    with errors_in_one_line(debug):
        if not force and os.path.exists(out):
            raise InputError(f"out is {quoted(out)}, which exists; give another name, or --force to replace it")
        check_page("out", out)
        wording = None if question is None else _text(question)
        with working("judging", spinner=False):  # there is a progress bar
            from listener_reward.card import Card
            from listener_reward.formats import best_of, questions, try_formats
            from listener_reward.models.hub import resolve
            from listener_reward.progress import progress_bars

            own = Card.load(resolve(name))
            tried = _pairs(data, pairs)
            judge = load_judge(name, listener="none", **how)
            limit = own.max_new_tokens if max_new_tokens is None else max_new_tokens
            known = None if own == Card() else own.format
            with progress_bars(visible=sys.stderr.isatty(), transient=True) as bars:
                task = bars.add_task("asking", total=len(questions(known, wording)))
                fits = try_formats(
                    judge.reasoner,
                    tried,
                    own=known,
                    question=wording,
                    max_new_tokens=limit,
                    temperature=own.sampling_temperature,
                    step=lambda asked: bars.update(task, advance=1, note=asked),
                )
        best = best_of(fits)
        chosen = best or (fits[0] if unfit else None)
        if chosen is not None:
            _card(own, chosen, limit).write(out)
        written = None if chosen is None else str(out)
        if as_json:
            print_json({"fits": best is not None, "formats": [fit.to_dict() for fit in fits], "written": written})
        else:
            print_formats(fits)
            _tell(name, best, fits, out, written is not None)
        if best is None:
            raise typer.Exit(UNFIT)


def _text(question: Path) -> str:
    from listener_reward.chat import ChatFormat

    try:
        text = question.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # a ValueError for what is no text, and a name with a null byte
        raise InputError(f"question is {quoted(question)}, which cannot be read ({error}); give a text file") from error
    return ChatFormat(question=text).question


def _pairs(data: str | None, n: int) -> list[PreferencePair]:
    from listener_reward.pairs import PreferencePair

    if data is None:
        from listener_reward.tiny.drawing import draw_pair
        from listener_reward.tiny.world import split_pairs

        drawn = enumerate(split_pairs("id", n))
        return [PreferencePair(p.wording, *draw_pair(p), p.p_first, str(number), "tiny:id") for number, p in drawn]
    from listener_reward.datasets import load_pairs

    rows: Any = load_pairs(data, limit=n)
    return [
        PreferencePair(row["prompt"], row["images"][0], row["images"][1], row["p_first"], row["id"], row["dataset"])
        for row in rows
    ]


def _card(own: Card, fit: Fit, max_new_tokens: int) -> Card:
    """The checkpoint's card with the format that fits; a calibration belongs to the format that it was fitted in."""
    from listener_reward.calibration.maps import Calibration

    kept = replace(own, max_new_tokens=max_new_tokens)
    if fit.chat_format == own.format:
        return kept
    return replace(
        kept,
        format=fit.chat_format,
        calibration=Calibration(),
        fast_calibration=Calibration(),
        criterion_calibrations={},
        fast_criterion_calibrations={},
    )


def _tell(name: str, best: Fit | None, fits: list[Fit], out: Path, written: bool) -> None:
    console = stderr()
    if best is not None:
        lenient = ", lenient=True" if best.lenient else ""
        console.print(
            f"The card is in {out}: Judge.from_pretrained({name!r}, card={str(out)!r}{lenient})",
            markup=False,
            soft_wrap=True,
        )
        if best.lenient:
            console.print(
                "It fits only if answers are read leniently, which training is not: fine-tune the model first",
                soft_wrap=True,
            )
        return
    said = "No format fits" + (f"; the nearest one is in {out}" if written else ", and no card is written")
    if max(fit.cut for fit in fits) > 0.5:
        said += ". Most completions stopped at the limit of new tokens: give a larger --max-new-tokens"
    console.print(said, markup=False, soft_wrap=True)
