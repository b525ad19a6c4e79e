"""Carries out runs: trains a judge where it is not there yet, and makes the measurements of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from listener_reward.files import write_text
from listener_reward.peers import load_peer
from listener_reward.recipes.study.configuration import Arm, Splits, key
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

JUDGES = "judges"
"""The folder of trained judges in a study's folder."""

TRAINED = "training.json"
"""A judge's learning curves and seconds; written last, so that a judge without it is not finished."""


def carry_out(report: Report, runs: Sequence[Run], folder: str) -> None:
    """Makes runs of one arm and one seed, and keeps each as soon as it is done."""
    arm, seed = runs[0].arm, runs[0].seed
    model, training = trained(report, arm, seed, folder, slug(runs[0].label))
    for run in runs:
        begun = time.monotonic()
        results = measure(report, run, model, folder)
        keep(folder, run, record_of(run, results, time.monotonic() - begun, training))


def judge_folder(folder: str | Path, arm: Arm, seed: int, name: str = "judge") -> Path:
    """Where an arm's judge of a seed is, under whatever name; where there is none, it is to be called by `name`."""
    number = key(arm, seed)
    found = sorted(Path(folder, JUDGES).glob(f"*-{number}"))
    return found[0] if found else Path(folder, JUDGES, f"{name}-{seed}-{number}")


def trained(report: Report, arm: Arm, seed: int, folder: str, name: str) -> tuple[str, dict[str, Any] | None]:
    """The arm's judge, trained if it is not there, and the record of its training; None for one that learns nothing."""
    if not arm.trains:
        return arm.recipe.base, None
    place = judge_folder(folder, arm, seed, name)
    if not (place / TRAINED).exists():
        begun = time.monotonic()
        curves = _train(report, arm, seed, str(place))
        record = {"curves": curves, "seconds": round(time.monotonic() - begun, 1)}
        write_text(place / TRAINED, json.dumps(record))
    return str(place), json.loads((place / TRAINED).read_text(encoding="utf-8"))


def _train(report: Report, arm: Arm, seed: int, out: str) -> dict[str, list[Any]] | None:
    recipe, options = arm.recipe, dict(arm.options)
    if arm.method == "sft":
        return train_sft_variant(report, out, seed, recipe, options)
    if arm.method == "bradley-terry":
        return train_bradley_terry_variant(report, out, seed, recipe, options)
    return train_variant(report, arm.weights, out, seed, recipe, options=options)


def measure(report: Report, run: Run, model: str, folder: str) -> dict[str, Any]:
    """The results of one measurement of a judge."""
    arm, measured = run.arm, run.measured
    assert isinstance(measured, Splits)
    if arm.method == "bradley-terry":
        judge = load_peer(f"bradley-terry:{model}")
        return evaluate_judge(report, judge, measured.splits, measured.pairs, measured.diagnostics)
    return evaluate_splits(
        report,
        model,
        measured.splits,
        measured.pairs,
        listener=measured.listener,
        think=arm.method != "sft",  # it was taught to answer without a thought
        options=measured.judge,
        diagnostics=measured.diagnostics,
    )
