"""Carries out runs: trains a judge where it is not there yet, and makes the measurements of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from listener_reward.absolute import AbsoluteReward
from listener_reward.errors import InputError
from listener_reward.files import write_text
from listener_reward.peers import load_peer
from listener_reward.recipes import generators
from listener_reward.recipes.study.configuration import DDPO, Arm, BestOfN, Splits, key
from listener_reward.recipes.study.plans import Run
from listener_reward.recipes.study.runs import keep, record_of, slug
from listener_reward.recipes.variants import (
    evaluate_judge,
    evaluate_splits,
    train_bradley_terry_variant,
    train_sft_variant,
    train_variant,
)
from listener_reward.recipes.workers import Report
from listener_reward.reward import ListenerReward

JUDGES, GENERATORS, CHECKPOINTS = "judges", "generators", "checkpoints"
"""Folders in a study's folder: trained judges, generators in training, listeners that were taught for the study."""

TRAINED = "training.json"
"""A judge's learning curves and seconds; written last, so that a judge without it is not finished."""

TAUGHT = "taught:"
"""Before a fraction: the tiny listener after that fraction of its lessons, such as "taught:0.25"."""


def carry_out(report: Report, runs: Sequence[Run], folder: str) -> None:
    """Makes runs of one arm and one seed, and keeps each as soon as it is done."""
    arm, seed = runs[0].arm, runs[0].seed
    model, training = trained(report, arm, seed, folder, slug(runs[0].label))
    for run in runs:
        begun = time.monotonic()
        results = measure(report, run, model, folder)
        keep(folder, run, record_of(run, results, time.monotonic() - begun, training))


# ------------------------------------------------------------------------------------------------------------- training


def judge_folder(folder: str | Path, arm: Arm, seed: int, name: str = "judge") -> Path:
    """Where an arm's judge of a seed is, under whatever name; where there is none, it is to be called by `name`."""
    number = key(arm, seed)
    found = sorted(Path(folder, JUDGES).glob(f"*-{number}"))
    return found[0] if found else Path(folder, JUDGES, f"{name}-{seed}-{number}")


def trained(report: Report, arm: Arm, seed: int, folder: str, name: str) -> tuple[str, dict[str, Any] | None]:
    """The arm's judge, trained if it is not there, and the record of its training; None for one that learns nothing."""
    if not arm.trains:
        return found(arm.recipe.base, folder), None
    place = judge_folder(folder, arm, seed, name)
    if not (place / TRAINED).exists():
        begun = time.monotonic()
        curves = _train(report, arm, seed, str(place), folder)
        record = {"curves": curves, "seconds": round(time.monotonic() - begun, 1)}
        write_text(place / TRAINED, json.dumps(record))
    return str(place), json.loads((place / TRAINED).read_text(encoding="utf-8"))


def _train(report: Report, arm: Arm, seed: int, out: str, folder: str) -> dict[str, list[Any]] | None:
    named = {name: found(getattr(arm.recipe, name), folder) for name in ("base", "listener")}
    recipe, options = replace(arm.recipe, **named), arm.options
    if arm.method == "sft":
        return train_sft_variant(report, out, seed, recipe, options)
    if arm.method == "bradley-terry":
        return train_bradley_terry_variant(report, out, seed, recipe, options)
    return train_variant(report, arm.weights, out, seed, recipe, options=options)


def taught_names(runs: Iterable[Run]) -> list[str]:
    """The listeners that runs need and that are taught for the study."""
    names = [name for run in runs for name in (run.arm.recipe.base, run.arm.recipe.listener)]
    return [name for name in dict.fromkeys(names) if name.startswith(TAUGHT)]


def found(name: str, folder: str | Path) -> str:
    """A checkpoint's name, and for one that is taught for the study its folder."""
    if not name.startswith(TAUGHT):
        return name
    return str(Path(folder, CHECKPOINTS, slug(name)))


def teach(report: Report, name: str, folder: str) -> None:
    """Teaches a listener for a fraction of the embedded one's lessons, from its seed.

    Raises:
        InputError: the fraction is none.
    """
    from listener_reward.recipes.pretrain import make

    try:
        fraction = float(name.removeprefix(TAUGHT))
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise InputError(f"{name!r} names no fraction of the lessons; give one in (0, 1], such as taught:0.25")
    place = Path(found(name, folder))
    scratch = place.with_name(f"{place.name}-scratch")
    make(report, "listener", 1, f"{place}-made", str(scratch), fraction)
    Path(f"{place}-made").rename(place)  # whole, or not there
    shutil.rmtree(scratch, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- measurements


def measure(report: Report, run: Run, model: str, folder: str) -> dict[str, Any]:
    """The results of one measurement of a judge."""
    arm, measured = run.arm, run.measured
    if isinstance(measured, Splits):
        return _on_splits(report, arm, measured, model)
    if isinstance(measured, BestOfN):
        return generators.best_of(report, reward_of(arm, model), measured.n, measured.prompts)
    assert isinstance(measured, DDPO)
    reward = reward_of(arm, model)
    return generators.over_optimise(
        report,
        reward,
        pair_judge_of(arm, model),
        Path(folder, GENERATORS, run.key),
        run.seed,
        epochs=measured.epochs,
        every=measured.every,
        samples=measured.samples,
        settings=dict(measured.settings),
    )


def _on_splits(report: Report, arm: Arm, measured: Splits, model: str) -> dict[str, Any]:
    if arm.method == "truth":
        raise InputError("method 'truth' is no judge of labelled pairs; measure it by best of n or ddpo")
    if arm.method == "bradley-terry":
        judge = load_peer(f"bradley-terry:{model}")
        table = evaluate_judge(report, judge, measured.splits, measured.pairs, measured.diagnostics)
    else:
        table = evaluate_splits(
            report,
            model,
            measured.splits,
            measured.pairs,
            listener=measured.listener,
            think=arm.method != "sft",  # it was taught to answer without a thought
            options=measured.judge,
            diagnostics=measured.diagnostics,
            thoughts=measured.thoughts,
        )
    # A name of this machine's folders, which a file that is handed on need not have.
    return {split: {name: value for name, value in row.items() if name != "judge"} for split, row in table.items()}


def reward_of(arm: Arm, model: str) -> Any:
    """An arm's judge as the reward of a generator."""
    if arm.method == "truth":
        return generators.utilities
    if arm.method == "bradley-terry":
        return AbsoluteReward(f"bradley-terry:{model}")
    return ListenerReward(model, batch_size=64, think=arm.method != "sft", listener="none")


def pair_judge_of(arm: Arm, model: str) -> Any:
    """The same as a judge of pairs; None for the truth."""
    from listener_reward.judge import Judge

    if arm.method == "truth":
        return None
    if arm.method == "bradley-terry":
        return load_peer(f"bradley-terry:{model}")
    return Judge.from_pretrained(model, batch_size=64, think=arm.method != "sft", listener="none")
