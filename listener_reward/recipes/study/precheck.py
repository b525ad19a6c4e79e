"""What runs of a study name is looked for before the first of them: one that trains for hours must not end there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from listener_reward.errors import InputError, missing
from listener_reward.listener import OWN_BASE, choose_listener
from listener_reward.models.hub import find_file, resolve
from listener_reward.models.options import is_address
from listener_reward.recipes.study.carry_out import TAUGHT
from listener_reward.recipes.study.configuration import Splits
from listener_reward.recipes.study.plans import Run
from listener_reward.recipes.variants import as_spec

CONFIGS = ("config.json", "adapter_config.json")


def check_named(runs: Iterable[Run]) -> None:
    """Looks for the data and the checkpoints that runs name, each once, and loads neither.

    Raises:
        InputError: something is not there; the message names it, and who asks for it.
        MissingExtraError: a generator is measured, and diffusers is not installed.
    """
    data: dict[str, str] = {}
    checkpoints: dict[str, str] = {}
    for run in runs:
        if not isinstance(run.measured, Splits) and (fault := missing("diffusers", run.measured.kind)):
            raise fault
        for name in _data_of(run):
            data.setdefault(name, run.label)
        for name in _checkpoints_of(run):
            checkpoints.setdefault(name, run.label)
    for name, label in checkpoints.items():
        _check(label, name)
    if data:
        from listener_reward.datasets import load_pairs
        from listener_reward.datasets.load import open_pairs

        for name, label in data.items():
            try:
                if name.startswith("tiny:"):
                    load_pairs(name, limit=1)
                else:
                    open_pairs(name, limit=1, seed=0, columns=None, stream=True)
            except InputError as error:
                raise InputError(f"{label}: {error}") from error


def _data_of(run: Run) -> Iterator[str]:
    if run.arm.trains:
        yield run.arm.recipe.data
    if isinstance(run.measured, Splits):
        yield from map(as_spec, run.measured.splits)


def _checkpoints_of(run: Run) -> Iterator[str]:
    arm, listeners = run.arm, [run.measured.listener] if isinstance(run.measured, Splits) else []
    if arm.method == "grpo":
        listeners.append(arm.recipe.listener)
    bases = [] if arm.method == "truth" else [arm.recipe.base]
    for name in (*bases, *(choose_listener(each or None, None) for each in listeners)):
        if name not in (None, OWN_BASE) and not name.startswith(TAUGHT) and not is_address(name):
            yield name


def _check(label: str, name: str) -> None:
    try:
        there = any(find_file(resolve(name), file) for file in CONFIGS)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    if not there:
        raise InputError(f"{label}: the checkpoint {name!r} cannot be found or has no config.json; check the name")
