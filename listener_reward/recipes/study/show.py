"""Writes what is there of a study: its tables, and its figures where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from listener_reward.errors import MissingExtraError
from listener_reward.files import write_text
from listener_reward.recipes.study.plans import Study
from listener_reward.recipes.study.results import Records, tables


def write_results(study: Study, records: Records, folder: str | Path) -> list[Path]:
    """Writes `tables.md` and a figure for each question that has a run, and returns the paths."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "tables.md", tables(study, records))
    try:
        from listener_reward.recipes.study.drawing import draw_study
    except MissingExtraError:
        return [place / "tables.md"]
    return [place / "tables.md", *draw_study(study, records, place)]
