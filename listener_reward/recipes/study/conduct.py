"""Makes the runs of a study that are missing, side by side, and none twice."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from listener_reward.errors import InputError
from listener_reward.recipes.study.carry_out import carry_out, found, taught_names, teach
from listener_reward.recipes.study.configuration import key
from listener_reward.recipes.study.plans import Run, Study
from listener_reward.recipes.study.precheck import check_named
from listener_reward.recipes.study.runs import finished
from listener_reward.recipes.workers import Job, run_side_by_side


def due(study: Study, folder: str | Path, only: Collection[str] = ()) -> dict[str, Run]:
    """The runs that are not there yet, by key, in the order in which they will be made.

    Args:
        study: the plan.
        folder: the study's folder.
        only: names of arms, or beginnings of questions; none for all.

    Raises:
        InputError: nothing in the plan has a name of `only`.
    """
    done = finished(folder)
    chosen: dict[str, Run] = {}
    matched: set[str] = set()
    for run in study.runs():
        named = {name for name in only if run.arm_name == name or run.question.question.startswith(name)}
        matched |= named
        if (named or not only) and run.key not in done:
            chosen.setdefault(run.key, run)
    if lost := [name for name in only if name not in matched]:
        arms = dict.fromkeys(name for question in study.questions for name in question.arms)
        raise InputError(f"the study has no arm or question {lost[0]!r}; its arms are {', '.join(arms)}")
    return chosen


def conduct(
    study: Study,
    folder: str | Path,
    *,
    only: Collection[str] = (),
    at_once: int = 2,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Makes the missing runs, `at_once` side by side, and returns all finished ones by key.

    The runs of one judge are one job: it is trained once, and every measurement is kept as soon as it is made. What an
    interruption leaves is gone on with by the same call.

    Raises:
        InputError: data or a checkpoint of the missing runs is not there; none of them is begun.
        MissingExtraError: a package that they need is not there; none of them is begun.
        JobsFailedError: a run failed. All others are made first, and kept.
    """
    groups: dict[str, list[Run]] = {}
    missing = due(study, folder, only).values()
    check_named(missing)
    Path(folder).mkdir(parents=True, exist_ok=True)
    names = [name for name in taught_names(missing) if not Path(found(name, folder)).exists()]
    lessons: dict[str, Job] = {name: (teach, {"name": name, "folder": str(folder)}) for name in names}
    if lessons:  # two runs may need the same one
        run_side_by_side(lessons, at_once=at_once, console=console)
    for run in missing:
        groups.setdefault(key(run.arm, run.seed), []).append(run)
    jobs: dict[str, Job] = {}
    for number, runs in groups.items():
        name = f"{runs[0].label}, seed {runs[0].seed}"
        jobs[name if name not in jobs else f"{name} ({number})"] = (carry_out, {"runs": runs, "folder": str(folder)})
    run_side_by_side(jobs, at_once=at_once, console=console, keep_going=True)
    return finished(folder)
