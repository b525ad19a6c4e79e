"""What is there of a study, as Markdown tables: means over seeds with 95 % t-intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from listener_reward.evaluate.intervals import t_interval
from listener_reward.recipes.study.plans import Question, Run, Study

Records = Mapping[str, Mapping[str, Any]]
"""Finished runs by key."""


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    factor: float
    digits: int
    difference: str
    """The unit of a difference."""


def _percent(title: str) -> Metric:
    return Metric(f"{title} (%)", 100, 1, "points")


METRICS = {
    "accuracy": _percent("accuracy"),
    "contradiction_rate": _percent("thoughts that the listener contradicts"),
    "malformed_rate": _percent("malformed completions"),
    "ece": _percent("expected calibration error"),
    "tokens": Metric("tokens of thoughts for a pair", 1, 1, "tokens"),
    "true utility": Metric("true utility (at most 6.7)", 1, 2, "utility"),
    "own view": _percent("pictures that the judge prefers to the untrained model's"),
    "KL": Metric("KL from the untrained model (nats)", 1, 3, "nats"),
    "color": _percent("pictures in the prompt's colour"),
    "shape": _percent("pictures of the prompt's shape"),
    "count": _percent("pictures with the prompt's count"),
    "clean": _percent("pictures that are neither faded nor glitched"),
    "framed": _percent("framed pictures"),
}
"""Every metric of every kind of measurement, in the order of the tables."""


def figures(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A run's numbers by metric and column: a split, a number of samples, an epoch. What was not measured is absent."""
    results = record["results"]
    if record["measurement"]["kind"] != "splits":
        return results
    return {
        metric: {split: scores[metric] for split, scores in results.items() if scores.get(metric) is not None}
        for metric in METRICS
    }


def columns_of(record: Mapping[str, Any], metric: str) -> dict[str, float]:
    """A run's numbers of one metric as a table shows them: several splits have their mean as a last column."""
    found = figures(record).get(metric, {})
    if record["measurement"]["kind"] != "splits" or len(found) < 2:
        return found
    return {**found, "mean": sum(found.values()) / len(found)}


def rows_of(question: Question) -> dict[str, list[Run]]:
    """A question's runs by their row in the table, one for each seed."""
    rows: dict[str, list[Run]] = {}
    for run in Study("", "", (question,)).runs():
        rows.setdefault(run.label, []).append(run)
    return rows


def tables(study: Study, records: Records) -> str:
    """The study as Markdown: for each question what was planned, what is there, and a table for each metric."""
    lines = [f"# {study.title}", "", f"Planned on {study.planned_at}. {counted(study, records)}"]
    for question in study.questions:
        lines += ["", f"## {question.question}", "", _told(question, records)]
        for metric in METRICS:
            lines += _table(question, records, metric)
        lines += _peaks(question, records)
    if notes := _circumstances(records, study):
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def counted(study: Study, records: Records) -> str:
    """How many of the planned runs, and of those added, are there; and how many in the folder nobody planned."""
    sets = [
        {run.key for run in study.runs() if (run.question.added_at is None) == planned} for planned in (True, False)
    ]
    planned, added = sets[0], sets[1] - sets[0]
    words = [f"{_there(planned, records)} planned runs are there"]
    if added:
        words.append(f"{_there(added, records)} were added afterwards")
    if strangers := len(records.keys() - planned - added):
        words.append(f"{strangers} in the folder belong to no question")
    return "; ".join(words) + "."


def _there(keys: set[str], records: Records) -> str:
    return f"{len(keys & records.keys())} of {len(keys)}"


def _told(question: Question, records: Records) -> str:
    keys = {run.key for rows in rows_of(question).values() for run in rows}
    seeds = ", ".join(map(str, question.seeds))
    when = "" if question.added_at is None else f"Added on {question.added_at}, {question.reason}. "
    return f"{when}Seeds {seeds}: {_there(keys, records)} runs are there."


def _table(question: Question, records: Records, metric: str) -> list[str]:
    rows = rows_of(question)
    found = {
        row: [columns_of(records[run.key], metric) for run in runs if run.key in records] for row, runs in rows.items()
    }
    columns = list(dict.fromkeys(column for runs in found.values() for run in runs for column in run))
    if not columns:
        return []
    shown, head = METRICS[metric], f"| {' | '.join(columns)} |"
    lines = ["", shown.title, "", f"| arm | runs {head}", "| --- " * (2 + len(columns)) + "|"]
    for row, runs in rows.items():
        cells = [cell([run[column] for run in found[row] if column in run], shown) for column in columns]
        lines.append(f"| {row} | {len(found[row])} of {len(runs)} | {' | '.join(cells)} |")
    differences = list(compared(question, records, metric))
    if differences:
        against = f"minus {question.against}, paired by seed ({shown.difference})"
        lines += ["", f"{shown.title}, {against}", "", f"| arm | seeds {head}", "| --- " * (2 + len(columns)) + "|"]
        for row, gaps in differences:
            cells = [cell(gaps.get(column, []), shown, sign=True) for column in columns]
            lines.append(f"| {row} | {max(map(len, gaps.values()), default=0)} | {' | '.join(cells)} |")
    return lines


def _peaks(question: Question, records: Records) -> list[str]:
    """Where a row's mean true utility is highest, and what is lost from there to the last column, paired by seed."""
    lines: list[str] = []
    shown = METRICS["true utility"]
    for row, runs in rows_of(question).items():
        found = [figures(records[run.key]).get("true utility", {}) for run in runs if run.key in records]
        if found and (columns := list(found[0])):
            peak = max(columns, key=lambda column: np.mean([run[column] for run in found]))
            cells = [cell([run[column] for run in found], shown) for column in (peak, columns[-1])]
            lost = cell([run[columns[-1]] - run[peak] for run in found], shown, sign=True)
            lines.append(f"| {row} | {len(found)} of {len(runs)} | {peak} | {' | '.join(cells)} | {lost} |")
    if not lines:
        return []
    head = "| arm | runs | where the mean is highest | there | at the end | end minus highest |"
    return ["", f"{shown.title}: what is lost after its peak", "", head, "| --- " * 6 + "|", *lines]


def compared(question: Question, records: Records, metric: str) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each row's differences from that of the arm `against`, by column: those of all seeds that both have."""
    rows = rows_of(question)
    for row, runs in rows.items():
        if question.against in (None, runs[0].arm_name):
            continue
        others = next(
            each for each in rows.values() if each[0].arm_name == question.against and each[0].point == runs[0].point
        )
        gaps: dict[str, list[float]] = {}
        for seed in question.seeds if len(runs) > 1 or len(others) > 1 else question.seeds[:1]:
            mine, theirs = (_of_seed(each, seed, records, metric) for each in (runs, others))
            for column in mine.keys() & theirs.keys():
                gaps.setdefault(column, []).append(mine[column] - theirs[column])
        if gaps:
            yield row, gaps


def _of_seed(runs: Sequence[Run], seed: int, records: Records, metric: str) -> dict[str, float]:
    """A row's numbers of one seed; where seeds decide nothing in it, its one run stands beside every seed."""
    for run in runs:
        if (run.seed == seed or not run.drawn) and run.key in records:
            return columns_of(records[run.key], metric)
    return {}


def cell(values: Sequence[float], shown: Metric, *, sign: bool = False) -> str:
    """Mean and 95 % interval, as a table shows them; without an interval where there is one value, "-" without any."""
    if not values:
        return "-"
    mean, half = t_interval(np.array(values) * shown.factor)
    text = f"{mean:{'+' if sign else ''}.{shown.digits}f}"
    return text if half is None else f"{text} ± {half:.{shown.digits}f}"


def _circumstances(records: Records, study: Study) -> list[str]:
    """A line for each thing, beside the configuration, in which the runs of the study are not alike."""
    keys = {run.key for run in study.runs()}
    mine = [records[key] for key in sorted(keys & records.keys())]
    lines: list[str] = []
    for name in dict.fromkeys(name for record in mine for name in record["versions"]):
        if len(found := {str(record["versions"].get(name)) for record in mine}) > 1:
            lines.append(f"Made with several versions of {name}: {', '.join(sorted(found))}.")
    for name in dict.fromkeys(name for record in mine for name in record["checkpoints"]):
        found = {record["checkpoints"][name] for record in mine if name in record["checkpoints"]}
        if len(found) > 1:
            lines.append(f"Made with several weights of {name}: {', '.join(sorted(map(str, found)))}.")
    return lines
