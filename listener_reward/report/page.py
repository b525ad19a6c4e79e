"""Writes the results of a run as one HTML page that opens anywhere: no server, no network, no second file.

The other modules of this folder turn numbers into text and coordinates; `report.html` holds all markup. Prompts and
thoughts come from data sets and models, so they are untrusted: the template escapes every value, and the page's
security policy allows no request and no script but its own. A value that is missing, None or NaN is shown as a dash: a
page about a half-finished run is better than none.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from listener_reward.files import write_text
from listener_reward.report.pairs import filters, pair_card, ranked
from listener_reward.report.plots import (
    METRICS,
    coverage_panel,
    curve_panel,
    gap_panel,
    reliability_panel,
    variant_color,
)
from listener_reward.report.tables import (
    COLUMNS,
    MORE_COLUMNS,
    Caption,
    accuracy_axis,
    by_split,
    captions_of,
    criteria,
    protocols,
    splits,
)
from listener_reward.report.values import (
    DASH,
    to_decimals,
    to_ends,
    to_list,
    to_mapping,
    to_number,
    to_percent,
    to_printable,
    to_text,
)


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write `results` to `path` as one self-contained HTML page (UTF-8) and return the path.

    Folders that do not exist are made. `results` may hold what follows. What is not there is left out of the page; what
    is there and empty is shown as such.

    - `title`, `created`, `command`, `summary`: text; `notes`: list of text; `versions`, `settings`: name to value.
    - `table`: one mapping per model and split, `Evaluation.to_dict()` with `model` and `split` added, and optionally
      `diagnostics` (`diagnostics.diagnose`), `paired` (`PairedTest.to_dict()`) and `against`, the model it is to.
    - `splits`: split to `title` and `meaning`, how the page calls it and what it says of it, in the order of the page.
      A split that is not there has its own name for a title.
    - `curves`: variant to `{"step": [...], "reward": [...], "accuracy": [...], "listener": [...], "contradiction":
      [...], "malformed": [...]}`, lists of equal length; rates in [0, 1]; None where nothing was measured.
    - `ranking`: `Ranking.to_dict()` with `prompt` and `images` (base64 of PNG, JPEG or WebP) added, and optionally the
      prompt's `sources` (likewise).
    - `pairs`: mappings with `prompt`, `split`, `model`, `p_first`, `first_png`, `second_png` (base64) and `verdict`
      (`Verdict.to_dict()`), optionally `id`, `source_pngs` and `criterion`; as `Gallery.pairs` has them. `pairs_title`
      and `pairs_note`: text.
    """
    template = _environment().from_string(
        importlib.resources.files("listener_reward.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    curves = to_mapping(results.get("curves"))
    table = [to_mapping(row) for row in to_list(results.get("table"))]
    colors = _colors([*curves, *(str(row.get("model")) for row in table)])
    scale = accuracy_axis(table)
    captions = captions_of(results.get("splits"))
    pairs = [pair_card(to_mapping(pair), captions) for pair in to_list(results.get("pairs"))]
    page = template.render(
        has=set(results),
        title=results.get("title") or "Listener reward: report",
        created=results.get("created"),
        command=results.get("command"),
        summary=results.get("summary"),
        notes=to_list(results.get("notes")),
        columns=COLUMNS,
        more_columns=MORE_COLUMNS,
        scale=scale,
        splits=splits(table, captions, scale),
        protocols=protocols(table, captions),
        criteria=criteria(table, captions),
        breakdown=_breakdown(table, captions, colors),
        variants=[{"name": name, "color": colors[name]["color"]} for name in curves],
        panels=[curve_panel(metric, curves) for metric in METRICS],
        ranking=ranked(to_mapping(results.get("ranking"))),
        pairs_title=results.get("pairs_title") or "Judged pairs",
        pairs_note=results.get("pairs_note"),
        pairs=pairs,
        filters=filters(pairs),
        settings=[(name, to_text(value)) for name, value in to_mapping(results.get("settings")).items()],
        versions=[(name, to_text(value)) for name, value in to_mapping(results.get("versions")).items()],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=to_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The script is named in the page's policy by its hash, so that no other script runs even if one got in.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment


def _colors(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One colour for each model, the same in all drawings; a fifth model has the first colour again, dashed."""
    distinct = dict.fromkeys(names)
    return {name: {"color": variant_color(index), "dashed": index >= 4} for index, name in enumerate(distinct)}


def _breakdown(
    table: Sequence[Mapping[str, Any]], captions: Mapping[str, Caption], colors: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The splits whose rows have `diagnostics`."""
    parts = []
    for caption, rows in by_split([row for row in table if "diagnostics" in row], captions):
        models = [_model(row) | colors[str(row.get("model"))] for row in rows]
        parts.append({"title": caption.title, "models": models, "coverage": coverage_panel(models)})
    return parts


def _model(row: Mapping[str, Any]) -> dict[str, Any]:
    found = to_mapping(row.get("diagnostics"))
    bins = [to_mapping(one) for one in to_list(found.get("bins"))]
    position, contradictions = to_mapping(found.get("position")), to_mapping(found.get("contradictions"))
    by_pair = to_mapping(contradictions.get("by_pair"))
    kept = [to_mapping(one) for one in to_list(found.get("kept"))]
    return {
        "name": row.get("model"),
        "ece": to_decimals(row.get("ece"), 3),
        "n": to_decimals(row.get("n"), 0),
        "reliability": reliability_panel(bins),
        "bins": [
            {
                "range": f"{to_percent(one.get('low')) or DASH} to {to_percent(one.get('high')) or DASH}",
                "n": to_decimals(one.get("n"), 0),
                "agreement": to_decimals(one.get("agreement"), 1, percent=True),
                **_accuracy(one),
            }
            for one in bins
        ],
        "coverage": found.get("coverage"),
        "kept": [
            {"wanted": to_percent(one.get("wanted")), "fraction": to_percent(one.get("share")), **_accuracy(one)}
            for one in kept
        ],
        "gaps": gap_panel(position.get("counts")),
        "position": {
            "n": to_decimals(position.get("n"), 0),
            "mean": to_decimals(position.get("mean"), 3, sign=True),
            "mean_size": to_decimals(position.get("mean_size"), 3),
            "none": to_number(position.get("mean_size")) == 0,
            "turned": to_decimals(position.get("turned"), 1, percent=True),
            "interval": to_ends(position, 1, percent=True),
            "to_first": to_decimals(position.get("to_first"), 1, percent=True),
            "to_second": to_decimals(position.get("to_second"), 1, percent=True),
        },
        "contradictions": {
            "thoughts": to_decimals(contradictions.get("thoughts"), 0),
            "rate": to_decimals(contradictions.get("rate"), 1, percent=True),
            "interval": to_ends(contradictions, 1, percent=True),
            "right": to_decimals(contradictions.get("right"), 1, percent=True),
            "wrong": to_decimals(contradictions.get("wrong"), 1, percent=True),
            "by_pair": [_accuracy(to_mapping(by_pair.get(name))) for name in ("none", "some", "all")],
        }
        if contradictions
        else None,
    }


def _accuracy(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": to_decimals(found.get("accuracy"), 1, percent=True),
        "interval": to_ends(found, 1, percent=True),
        "n": to_decimals(found.get("n"), 0),
    }
