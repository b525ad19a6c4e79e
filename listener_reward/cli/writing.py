"""What commands write beside the answer: a page, a calibration. What cannot be written is refused before the work."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from listener_reward import __version__
from listener_reward.cli.terminal import stderr
from listener_reward.errors import InputError
from listener_reward.files import folder_made_whole, quoted

if TYPE_CHECKING:
    from listener_reward.evaluate.calibrate import Calibrated
    from listener_reward.evaluate.several import Measured
    from listener_reward.judge import Judge


def check_writable(name: str, out: Path | None) -> None:
    if out is None and not os.path.isdir(name):
        raise InputError(
            f"judge is {quoted(name)}, which is no folder of yours to write in; give --out for a calibrated copy"
        )
    if out is not None and os.path.exists(out):
        raise InputError(f"out is {quoted(out)}, which exists; give a folder to make")


def write_calibration(
    name: str,
    out: Path | None,
    judge: Judge,
    result: Calibrated,
    asked: Mapping[str, Any],
    criterion: str | None = None,
) -> Path:
    """Keeps the calibration beside the weights, with the way of judging and the criterion that it was fitted for.

    `asked` are the options that the judge was loaded with.
    """
    from listener_reward.card import Card
    from listener_reward.listener import choose_listener
    from listener_reward.models.hub import lasting, resolve

    fast = "" if judge.think else "fast_"
    changes: dict[str, Any] = {f"{fast}calibration": result.calibration}
    if criterion is not None:
        field = f"{fast}criterion_calibrations"
        changes = {field: {**getattr(judge.card, field), criterion: result.calibration}}
    if judge.think:  # what was asked of a judge that does not think says nothing of how it should when it does
        kept = ("thoughts", "aggregate", "orders", "early_stop", "max_new_tokens", "sampling_temperature")
        changes |= {field: getattr(judge.card, field) for field in kept}
    read = ("format", "listener", "listener_temperature", "listener_grounding") if "card" in asked else ()
    changes |= {field: getattr(judge.card, field) for field in ("masking", *read)}
    if (listener := asked.get("listener")) is not None:
        # A folder is named from here; the card would read a relative name from where it lies itself.
        changes["listener"] = None if (chosen := choose_listener(listener, None)) is None else lasting(chosen)
    if out is None:
        Card.amend(name, **changes)
        return Path(name)
    import shutil

    folder = resolve(name)
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder)
    with folder_made_whole(out) as beside:
        shutil.copytree(folder, beside, dirs_exist_ok=True)
        replace(Card.load(folder), **changes).save(beside)  # its listener is absolute by now, or a name
    return out


def check_page(option: str, path: Path) -> None:
    """Refuses a file that could not be written, before the judging."""
    if os.path.isdir(path):
        raise InputError(f"{option} is {quoted(path)}, which is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError for a name with a null byte
        raise InputError(f"{option} is {quoted(path)}, whose folder cannot be made ({error}); give another") from error


def write_html(path: Path, data: str, measured: Measured, asked: Mapping[str, Any]) -> None:
    """The page of `eval`. It names the data and the judges as they were asked for."""
    from datetime import datetime, timezone

    from listener_reward.evaluate.diagnostics import diagnose
    from listener_reward.report import write_report

    evaluations, board = measured.evaluations, measured.leaderboard
    rows = board.to_dict()["judges"] if board else [evaluations[0].to_dict()]
    seen = {"split": evaluations[0].data, "against": board.against if board else None}
    order = {evaluation.judge: place for place, evaluation in enumerate(evaluations)}
    protocol, first = evaluations[0].protocols[0], evaluations[0]
    ties = f", {first.n_ties} of them ties between people" if first.n_ties else ""
    results = {
        "title": ", ".join(list(order)[:3]) + (f" and {len(order) - 3} more" if len(order) > 3 else "") + f" on {data}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["listener-reward", *sys.argv[1:]]),
        "summary": f"{first.n} labelled pairs{ties}. "
        f"By {protocol.protocol}, {protocol.pairs} pairs of {protocol.prompts} prompts count.",
        "notes": [f"Not measured: {error}" for error in measured.failures],
        "table": [
            row | seen | {"model": evaluation.judge, "diagnostics": diagnose(evaluation)}
            for row, evaluation in zip(rows, evaluations, strict=True)
        ],
        "pairs": sorted(measured.pairs, key=lambda pair: order[pair["model"]]),
        "pairs_title": "The worst mistakes",
        "pairs_note": "For each judge the wrong verdicts that are farthest from the people's votes, the worst first; "
        "then a few right ones, drawn at random, for contrast.",
        "settings": {"data": data} | {name: value for name, value in asked.items() if value is not None},
        "versions": {"listener-reward": __version__, "python": platform.python_version()},
    }
    stderr().print(f"report: {write_report(path, results)}", markup=False, soft_wrap=True)
