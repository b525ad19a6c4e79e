"""The house has floors: a module imports from the floors below its own, and within a folder no modules need each other.

Every import counts: relative ones, those inside functions, and those that only a type checker reads. An import that
climbs is a circle waiting to happen, and one that is hidden in a function is such a circle already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    # what a user gives and is told, and the words for it
    ("errors", "files", "progress", "addresses", "forks"),
    ("clusters",),
    ("media", "checkpoints"),
    ("pairs", "references"),
    ("verdict",),
    ("chat",),
    ("trace", "misfits"),
    # arithmetic on what models say
    ("shaping", "calibration", "advantages"),
    # models
    ("prefix",),
    ("models",),
    ("card", "ranking"),
    # judges
    ("listener", "conclude", "batching", "anchors"),
    ("anchor_sets", "meetings"),
    ("peers",),
    ("judge", "formats"),
    # data and measurement
    ("tiny",),
    ("datasets",),
    ("evaluate",),
    ("report", "scoring"),
    # the reward, and training a judge
    ("criteria",),
    ("reward",),
    ("remote", "mixture", "absolute"),
    ("train",),
    # the public names, and what is made of everything
    ("",),
    ("bench",),
    ("plan",),
    ("integrations",),
    ("recipes",),
    ("cli",),
)
"""Files and folders of listener_reward, the lowest first; those of one floor do not import each other. "" is the
package itself."""

FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def module_name(path: str) -> str:
    """`integrations/ddpo/log.py` as it is imported; a folder's `__init__` has the folder's name."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "integrations":
        parts = ("listener_reward", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, path: str, modules: Iterable[str]) -> set[str]:
    """The modules of this project that the source of the file at `path` imports, wherever in the file it does."""
    known, found = set(modules), set()
    package = module_name(path).split(".")
    if Path(path).name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # What is named may be a module itself; then it is what is imported, and not the folder that holds it.
            found |= {whole if (whole := f"{base}.{alias.name}") in known else base for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "listener_reward"}


def floor_of(module: str) -> int:
    """Where a module stands; a `KeyError` for one that has no floor yet: give it one in `FLOORS`."""
    return FLOOR[module.split(".")[1] if "." in module else ""]


def part_of(module: str) -> str:
    """The file or folder of listener_reward that a module is, or lies in."""
    return ".".join(module.split(".")[:2])


def climbing(sources: Mapping[str, str]) -> list[str]:
    """Imports, by the path of who makes them, that do not go to a lower floor or stay within one file or folder."""
    modules = [module_name(path) for path in sources]
    found = []
    for path, source in sources.items():
        here = module_name(path)
        for there in sorted(imported(source, path, modules)):
            if part_of(there) != part_of(here) and floor_of(there) >= floor_of(here):
                found.append(f"{here} imports {there}")
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import one another in a circle, the first once more at its end; empty where there is none."""
    modules = [module_name(path) for path in sources]
    arrows = {module_name(path): imported(source, path, modules) for path, source in sources.items()}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def project() -> dict[str, str]:
    """Path to source, of every module."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("listener_reward", "integrations")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def test_every_file_and_folder_has_a_floor_and_every_floor_is_there():
    assert {module.partition(".")[2].partition(".")[0] for module in map(module_name, project())} == set(FLOOR)


def test_imports_go_down():
    assert climbing(project()) == []


def test_no_modules_import_one_another_in_a_circle():
    assert circle(project()) == []


JUDGE, EVALUATION = "listener_reward/judge.py", "listener_reward/evaluate/run.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (JUDGE, "from listener_reward.evaluate.run import evaluate"),
        (JUDGE, "from listener_reward.evaluate import run"),
        (JUDGE, "from listener_reward import evaluate"),
        (JUDGE, "import listener_reward.evaluate.run as run"),
        (JUDGE, "import os, listener_reward.evaluate"),
        (JUDGE, "def late():\n    class Deep:\n        from listener_reward.evaluate import evaluate"),
        (JUDGE, "if TYPE_CHECKING:\n    from listener_reward.evaluate import Evaluation"),
        (JUDGE, "try:\n    import listener_reward.evaluate\nexcept ImportError:\n    pass"),
        (JUDGE, "from .evaluate import run"),
        (JUDGE, "from . import evaluate"),
        (JUDGE, "from listener_reward import __version__"),
        (JUDGE, "from listener_reward.integrations.video import ClipJudge"),
        ("listener_reward/models/hub.py", "from ..evaluate.run import evaluate"),
        ("listener_reward/models/hub.py", "from .. import evaluate"),
        ("listener_reward/models/__init__.py", "from ..evaluate import run"),
        ("listener_reward/pairs.py", "from listener_reward.verdict import Verdict"),
        ("integrations/serving/app.py", "from ...cli import options"),
    ],
)
def test_an_import_that_climbs_is_found(path: str, source: str):
    others = {EVALUATION: "", "listener_reward/evaluate/__init__.py": "", "listener_reward/verdict.py": ""}
    assert len(climbing({**others, path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (EVALUATION, "from listener_reward.judge import Judge"),
        (EVALUATION, "from listener_reward.evaluate.judged import apply_protocol"),
        (EVALUATION, "from .judged import apply_protocol"),
        ("integrations/serving/app.py", "from ..contract import score"),
        ("integrations/serving/app.py", "from listener_reward import __version__"),
        ("listener_reward/datasets/rows.py", "import datasets\nfrom datasets import load_dataset"),
    ],
)
def test_an_import_that_goes_down_or_stays_within_a_folder_is_fine(path: str, source: str):
    assert climbing({JUDGE: "", path: source}) == []


@pytest.mark.parametrize(
    "second",
    [
        "from listener_reward.evaluate.run import evaluate",
        "from .run import evaluate",
        "def late():\n    from . import run",
        "if TYPE_CHECKING:\n    from listener_reward.evaluate.run import Evaluation",
    ],
)
def test_a_circle_within_a_folder_is_found(second: str):
    first = {EVALUATION: "from listener_reward.evaluate.judged import apply_protocol"}
    measure = "listener_reward/evaluate/judged.py"
    assert circle({**first, measure: ""}) == []
    found = circle({**first, measure: second})
    assert set(found) == {"listener_reward.evaluate.run", "listener_reward.evaluate.judged"}


def test_a_circle_by_way_of_a_folders_init_is_found():
    """`from folder import name` runs the folder's `__init__`, which may be on its way already."""
    init = {"listener_reward/evaluate/__init__.py": "from listener_reward.evaluate.run import evaluate"}
    assert circle({**init, EVALUATION: "from listener_reward.evaluate import something"}) != []
