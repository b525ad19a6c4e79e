"""A study's file: questions, and for each of them the arms, the measurements and the seeds, before anything is run.

```yaml
title: Does the listener make a better judge?
planned_at: 2026-11-28
recipe: {steps: 160}        # what all arms share, over the defaults of `Recipe`
arms:
  accuracy-only GRPO: {weights: [1, 1, 0]}
  listener-shaped GRPO: {}
measurements:
  splits: {kind: splits, pairs: 300}
planned:
  - question: Does the listener make a better judge?
    arms: [accuracy-only GRPO, listener-shaped GRPO]
    measurements: [splits]
    seeds: [0, 1, 2, 3, 4]
    against: accuracy-only GRPO
added: []                   # what came to mind after results were seen; each with `added_at` and `reason`
```

Seeds are numbers that are written down, never a count: a seed that is left out afterwards is missed in every table.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from listener_reward.errors import InputError, meant
from listener_reward.files import quoted
from listener_reward.recipes.study.configuration import Arm, Measurement, key, measurement, read
from listener_reward.recipes.variants import Recipe


@dataclass(frozen=True)
class Question:
    """What is asked, and the runs that answer it."""

    question: str
    arms: Mapping[str, Arm]
    measurements: Mapping[str, Measurement]
    seeds: tuple[int, ...]
    vary: str | None = None
    """A field of `Recipe` that takes each of `over`, in every arm."""
    over: tuple[Any, ...] = ()
    against: str | None = None
    """The arm that every other one is compared with, paired by seed."""
    added_at: str | None = None
    """None for what was planned before any result was seen."""
    reason: str | None = None


class Run(NamedTuple):
    """One run of a study."""

    question: Question
    arm_name: str
    arm: Arm
    point: str | None
    """The value of the field that varies, or the measurement's name where there are several; None without either."""
    measured: Measurement
    seed: int
    value: Any = None
    """Of the field that varies, as the plan has it."""

    @property
    def key(self) -> str:
        return key(self.arm, self.seed, self.measured)

    @property
    def drawn(self) -> bool:
        """Whether the seed decides anything."""
        return self.arm.trains or self.measured.seeded

    @property
    def label(self) -> str:
        """The run's row in a table."""
        return self.arm_name if self.point is None else f"{self.arm_name}, {self.point}"


@dataclass(frozen=True)
class Study:
    """A plan: what is to be run, and what has been added to it."""

    title: str
    planned_at: str
    questions: tuple[Question, ...]

    def runs(self) -> Iterator[Run]:
        """Every run of every question: seed by seed, so that a study that is stopped has whole seeds.

        A run that two questions share comes twice, with the same key.
        """
        for question in self.questions:
            for position, seed in enumerate(question.seeds):
                for run in runs_of(question, seed):
                    if run.drawn or position == 0:
                        yield run


def compared_with(study: Study, arm: str) -> Study:
    """The study with every question that has this arm against it.

    Raises:
        InputError: no question has it.
    """
    known = dict.fromkeys(name for question in study.questions for name in question.arms)
    _of(known, arm, "against")
    asked = (replace(one, against=arm) if arm in one.arms else one for one in study.questions)
    return replace(study, questions=tuple(asked))


def runs_of(question: Question, seed: int) -> Iterator[Run]:
    """The runs of one seed. A run in which a seed decides nothing has seed 0."""
    for value in question.over or (None,):
        for arm_name, arm in question.arms.items():
            varied = arm
            if question.vary is not None:
                varied = replace(arm, recipe=replace(arm.recipe, **{question.vary: value}))
            for name, measured in question.measurements.items():
                point = name if len(question.measurements) > 1 else None
                if question.vary is not None:
                    point = f"{question.vary} {value}" + (f", {point}" if point else "")
                run = Run(question, arm_name, varied, point, measured, seed, value)
                yield run if run.drawn else run._replace(seed=0)


def read_study(path: str | Path) -> Study:
    """The study in a YAML file.

    Raises:
        InputError: the file cannot be read, or something in it is missing, unknown or of another type.
    """
    try:
        given: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the study {quoted(path)} cannot be read: {error}") from error
    return study_of(given)


def study_of(given: Any) -> Study:
    """A study from what its file says; errors as `read_study`."""
    file = _named(given, "the study", ("title", "planned_at", "recipe", "arms", "measurements", "planned", "added"))
    for needed in ("title", "planned_at", "arms", "measurements", "planned"):
        if not file.get(needed):
            raise InputError(f"the study has no {needed}; see `listener-reward study --help` for an example")
    shared = _named(file.get("recipe") or {}, "recipe")
    read(Recipe, shared, "recipe")
    arms = {str(name): _arm(arm or {}, shared, f"arms.{name}") for name, arm in _named(file["arms"], "arms").items()}
    measurements = {
        str(name): measurement(value, f"measurements.{name}")
        for name, value in _named(file["measurements"], "measurements").items()
    }
    questions = [
        _question(entry, f"{part}[{number}]", arms, measurements, added=part == "added")
        for part in ("planned", "added")
        for number, entry in enumerate(file.get(part) or ())
    ]
    return Study(str(file["title"]), _date(file["planned_at"], "planned_at"), tuple(questions))


def _arm(given: Any, shared: Mapping[str, Any], where: str) -> Arm:
    named = _named(given, where)
    own = _named(named.get("recipe") or {}, f"{where}.recipe")
    return read(Arm, {**named, "recipe": {**shared, **own}}, where)


_ASKED = ("question", "arms", "measurements", "seeds", "vary", "over", "against")


def _question(
    given: Any, where: str, arms: Mapping[str, Arm], measurements: Mapping[str, Measurement], *, added: bool
) -> Question:
    entry = _named(given, where, (*_ASKED, "added_at", "reason") if added else _ASKED)
    for needed in ("question", "arms", "measurements", "seeds", *(("added_at", "reason") if added else ())):
        if not entry.get(needed):
            raise InputError(f"{where} has no {needed}")
    seeds = entry["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in cast("list[Any]", seeds)):
        raise InputError(f"{where}.seeds is {seeds!r}; name the seeds, such as [0, 1, 2, 3, 4]")
    if len({*seeds}) < len(cast("list[int]", seeds)):
        raise InputError(f"{where}.seeds is {seeds!r}; a seed stands there twice")
    vary, over = entry.get("vary"), tuple(entry.get("over") or ())
    if (vary is None) != (not over):
        raise InputError(f"{where} has vary {vary!r} and over {list(over)!r}; a field that varies needs its values")
    if vary is not None:
        for value in over:
            read(Recipe, {vary: value}, f"{where}.over")
    chosen = {name: _of(arms, name, f"{where}.arms") for name in entry["arms"]}
    against = entry.get("against")
    if against is not None:
        _of(chosen, against, f"{where}.against")
    return Question(
        question=str(entry["question"]),
        arms=chosen,
        measurements={name: _of(measurements, name, f"{where}.measurements") for name in entry["measurements"]},
        seeds=tuple(cast("list[int]", seeds)),
        vary=vary,
        over=over,
        against=against,
        added_at=_date(entry["added_at"], f"{where}.added_at") if added else None,
        reason=str(entry["reason"]) if added else None,
    )


def _named(given: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """A mapping, whose names are all `known` where that is given."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {given!r}; give a mapping")
    found = dict(cast("Mapping[str, Any]", given))
    for name in found if known is not None else ():
        _of(dict.fromkeys(known or ()), name, where)
    return found


def _of(known: Mapping[str, Any], name: Any, where: str) -> Any:
    if name not in known:
        there = meant(name, known) or f"; there are {', '.join(known)}"
        raise InputError(f"{where} names {name!r}, which there is not{there}")
    return known[name]


def _date(given: Any, where: str) -> str:
    """A day as YAML reads it, or as text."""
    try:
        return (given if isinstance(given, datetime.date) else datetime.date.fromisoformat(str(given))).isoformat()
    except ValueError as error:
        raise InputError(f"{where} is {given!r}; give a day, such as 2026-11-28") from error
