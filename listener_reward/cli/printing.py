"""Answers on stdout: as tables for people, as one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from listener_reward.cli.terminal import plain

if TYPE_CHECKING:
    from listener_reward.datasets.check import DataCheck
    from listener_reward.evaluate import Evaluation
    from listener_reward.evaluate.asked import CriterionResult
    from listener_reward.evaluate.calibrate import Calibrated
    from listener_reward.evaluate.judged import ProtocolResult
    from listener_reward.evaluate.leaderboard import Leaderboard
    from listener_reward.evaluate.several import Measured
    from listener_reward.formats import Fit
    from listener_reward.ranking import Ranking
    from listener_reward.scoring import Scored
    from listener_reward.train.rounding import Rounding
    from listener_reward.verdict import Verdict


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(_finite(result), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_formats(fits: Sequence[Fit]) -> None:
    """What `card` tried, the best first, and what the model wrote when it was asked for each."""
    console = Console(highlight=False)
    table = Table("form", "asked for", "fits", "malformed", "label mass", box=box.SIMPLE_HEAD)
    for fit in fits:
        table.add_row(
            fit.form + (", leniently" if fit.lenient else ""),
            fit.asked,
            Text("yes", "green") if fit.fits else Text("no", "red"),
            f"{fit.malformed:.0%}",
            "-" if fit.label_mass is None else f"{fit.label_mass:.2f}",
        )
    console.print(table)
    for asked, example in {fit.asked: fit.example for fit in reversed(fits)}.items():
        console.print(Text.assemble(f"Asked for {asked}, it wrote: ", (_shortened(example), "italic")), soft_wrap=True)
    for problem in dict.fromkeys(fit.problem for fit in fits if fit.problem):
        console.print(plain(problem), markup=False, soft_wrap=True)


def _shortened(completion: str, longest: int = 100) -> str:
    """Begin and end of a completion on one line: its tags stand there."""
    line = plain(" ".join(completion.split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def print_verdict(verdict: Verdict, first: str, second: str) -> None:
    console = Console(highlight=False)
    if verdict.preferred is None:
        exact = verdict.p_first == 0.5
        console.print(
            "An exact tie."
            if exact
            else f"No preference: p = {verdict.p_first:.3f} for the first image, within the tie band.",
            style="bold",
        )
    else:
        name, p = (first, verdict.p_first) if verdict.preferred == 1 else (second, 1 - verdict.p_first)
        console.print(Text.assemble((plain(name), "bold green"), f" is preferred, p = {p:.3f}"), soft_wrap=True)
    if verdict.thoughts:
        table = Table("order", "answer", "p first", "listener", "thought", show_lines=True)
        for thought in verdict.thoughts:
            table.add_row(
                thought.order,
                "malformed" if thought.answer is None else str(thought.answer),
                f"{thought.p_first:.2f}",
                _listener_cell(thought.listener_p_first, thought.contradicted),
                Text(plain(thought.text)),
            )
        console.print(table)
    console.print(
        Text.assemble(
            "listener ",
            _listener_cell(verdict.listener_p_first, verdict.contradicted),
            f"   position gap {verdict.position_gap:+.3f}   malformed {verdict.malformed} of {len(verdict.thoughts)}"
            + ("" if verdict.label_mass is None else f"   label mass {verdict.label_mass:.2f}"),
        )
    )


def _listener_cell(p_first: float | None, contradicted: bool | None) -> Text:
    if p_first is None:
        return Text("none")
    return Text(f"{p_first:.2f} contradicts" if contradicted else f"{p_first:.2f}", "red" if contradicted else "")


def print_ranking(ranking: Ranking, images: list[str], what: str = "image") -> None:
    table = Table("", what, "score", "std. error")
    for position, place in enumerate(ranking.order, start=1):
        score, error = ranking.scores[place], ranking.standard_errors[place]
        table.add_row(str(position), Text(plain(images[place])), f"{score:+.2f}", f"{error:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{ranking.comparisons} comparisons; scores are log-odds with mean zero")


def print_anchors(answer: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    before = answer["prompts"] - answer["made"]
    there = f", {before} of them from before" if before else ""
    console.print(
        Text(plain(f"{answer['folder']} has anchors of {answer['prompts']} prompts{there}, by {answer['judge']}")),
        soft_wrap=True,
    )


def print_measured(measured: Measured, *, as_json: bool) -> None:
    """Several judges as a leaderboard, one as its record; nothing where none could be measured."""
    if as_json and measured.evaluations:
        print_json(measured.to_dict())
    elif measured.leaderboard:
        print_leaderboard(measured.leaderboard)
    elif measured.evaluations:
        print_evaluation(measured.evaluations[0])


def print_evaluation(evaluation: Evaluation) -> None:
    table = Table("metric", "value")
    for name, value in evaluation.to_dict().items():
        if name not in ("protocols", "by_criterion"):
            table.add_row(name.replace("_", " "), escape(plain(_cell(value))))
    console = Console(highlight=False)
    console.print(table)
    if evaluation.by_criterion:
        console.print(criteria_table(evaluation.by_criterion))
    console.print(protocols_table(evaluation.protocols))


def print_leaderboard(board: Leaderboard) -> None:
    console, result = Console(highlight=False), board.evaluations[0].protocols[0]
    for table in leaderboard_tables(board):
        console.print(table)
    console.print(
        f"{result.pairs} pairs of {result.prompts} prompts count. The difference is to {plain(board.against)}, on the "
        "same pairs; intervals and p draw prompts, not pairs.",
        markup=False,
    )


def criteria_table(results: Sequence[CriterionResult]) -> Table:
    """One judge: a row for each criterion."""
    table = _table("criterion", "accuracy", "95 % interval", "ece", "pairs", "ties")
    for result in results:
        found = _number(result.accuracy), _interval(result.accuracy_interval), _number(result.ece)
        table.add_row(escape(plain(result.criterion)), *found, str(result.n), str(result.n_ties))
    return table


def protocols_table(results: Sequence[ProtocolResult]) -> Table:
    """One judge: a row for each protocol."""
    table = _table("protocol", "value", "95 % interval", "always first", "in file order", "pairs")
    for result in results:
        baselines = _number(result.always_first), _number(result.always_first_in_file)
        table.add_row(result.protocol, _number(result.value), _interval(result.interval), *baselines, str(result.pairs))
    return table


def leaderboard_tables(board: Leaderboard) -> list[Table]:
    """Several judges: who is best by the protocol that decides, all other protocols, and the judges' habits.

    Below every share stands what always answering the first would have. No table is wider than a terminal of 80 columns
    where the judges' names are of 20 letters.
    """
    tables = [_ranked(board)]
    others = range(1, len(board.evaluations[0].protocols))
    for start in range(0, len(others), _ACROSS):
        columns = others[start : start + _ACROSS]
        table = _table("judge", *(board.evaluations[0].protocols[column].protocol for column in columns))
        for evaluation in board.evaluations:
            values = (_number(evaluation.protocols[column].value) for column in columns)
            table.add_row(_name(evaluation.judge), *values)
        _add_baselines(table, board, columns)
        tables.append(table)
    habits = _table("judge", "ece", "position gap", "malformed", "label mass", "missing")
    for evaluation in board.evaluations:
        found = evaluation.ece, evaluation.position_gap, evaluation.malformed_rate, evaluation.label_mass
        habits.add_row(_name(evaluation.judge), *map(_number, found), str(evaluation.missing))
    return [*tables, habits]


_ACROSS = 4
"""Protocols side by side in one table."""


def _ranked(board: Leaderboard) -> Table:
    table = _table("judge", "value", "95 % interval", "differ- ence", "its interval", "p")
    table.title = f"by {board.protocol}"
    for evaluation, test in zip(board.evaluations, board.tests, strict=True):
        first = evaluation.protocols[0]
        tested = (f"{test.difference:+.3f}", _interval(test.interval), f"{test.p_value:.2g}") if test else ()
        table.add_row(_name(evaluation.judge), _number(first.value), _interval(first.interval), *tested)
    _add_baselines(table, board, range(1))
    return table


def _add_baselines(table: Table, board: Leaderboard, columns: range) -> None:
    results = [board.evaluations[0].protocols[column] for column in columns]
    table.add_section()
    table.add_row("always first", *(_number(result.always_first) for result in results))
    if any(result.always_first_in_file is not None for result in results):
        table.add_row("in file order", *(_number(result.always_first_in_file) for result in results))


def table_of(*headers: str) -> Table:
    """Columns of numbers are never cut: what is too long for the terminal is the first column, which is folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, header in enumerate(headers):
        table.add_column(header, no_wrap=column > 0, overflow="fold", justify="left" if column == 0 else "right")
    return table


def _table(*names: str) -> Table:
    """A header stands on as many lines as it has words, so that it is no wider than its numbers."""
    from listener_reward.evaluate.judged import PROTOCOLS

    return table_of(
        *(
            name.replace("-", "-\n") if name in PROTOCOLS else name if "%" in name else name.replace(" ", "\n")
            for name in names
        )
    )


def _name(judge: str) -> Text:
    """A judge's name, which may be a file's or a model's, in one line and without markup."""
    return Text(plain(judge).replace("\n", "\N{REPLACEMENT CHARACTER}"))


def _number(value: float | None) -> str:
    """Three decimals: no set of this size tells more."""
    return "" if value is None else f"{value:.3f}"


def _interval(value: tuple[float, float] | None) -> str:
    """Both ends of an interval."""
    return "" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


def print_check(check: DataCheck) -> None:
    table = Table("", "found")
    for name, words in check.lines():
        table.add_row(name, escape(plain(words)))
    console = Console(highlight=False)
    console.print(table)
    for title, style, lines in (
        ("broken", "yellow", check.broken_named),
        ("note", "yellow", check.notes),
        ("problem", "bold red", check.problems),
    ):
        for line in lines:
            console.print(Text.assemble((f"{title}: ", style), plain(line)), soft_wrap=True)
    verdict = ("This data can be used.", "bold green") if check.usable else ("This data cannot be used.", "bold red")
    console.print(Text.assemble(verdict))


def print_calibrated(result: Calibrated, folder: Path) -> None:
    from listener_reward.evaluate.confidence import reliability

    console = Console(highlight=False)
    table = Table("metric", "before", "after")
    for who, before, after in (
        ("", result.before, result.after),
        ("listener ", result.listener_before, result.listener_after),
    ):
        for name in before or ():
            table.add_row(who + name, _cell((before or {})[name]), _cell((after or {})[name]))
    console.print(table)
    table = Table("confidence", "pairs", "people who agree", "")
    for one in reliability(result.labels, result.p_after):
        bar = "\N{FULL BLOCK}" * round(one.agreement * 20)
        table.add_row(f"{one.low:.2f} to {one.high:.2f}", str(one.n), f"{one.agreement:.3f}", bar)
    console.print(table)
    console.print(
        f"fitted on {result.n_fit} pairs, chosen on {result.n_validation}, measured on {result.n_test}; "
        f"tie band {result.calibration.tie_band:g}; written to {plain(str(folder))}",
        soft_wrap=True,
    )


def print_scored(scored: Scored) -> None:
    console = Console(highlight=False)
    told = [f"{scored.pairs} pairs"]
    told += [f"{scored.resumed} of them scored before"] if scored.resumed else []
    told += [f"{scored.failed} without a verdict, see the column error"] if scored.failed else []
    told += [f"{scored.left_out} rows of the data are no pairs"] if scored.left_out else []
    told += [f"{scored.seconds:.0f} s", f"written to {plain(str(scored.out))}"]
    console.print("; ".join(told), soft_wrap=True)


def print_roundings(roundings: Sequence[Rounding], console: Console) -> None:
    """How much of an adapter's update rounding keeps: modules of one name together, the worst alone, and overall."""
    from listener_reward.train.rounding import together

    table = _table("modules", "update kept", "error", "entries unchanged")
    kinds: dict[str, list[Rounding]] = {}
    for each in roundings:
        kinds.setdefault(each.module.rpartition(".")[2], []).append(each)
    rows = [together(some, f"{kind} ({len(some)})") for kind, some in kinds.items()]
    if roundings:
        rows.append(max(roundings, key=lambda each: each.error))
    for each in (*rows, together(roundings)):
        table.add_row(plain(each.module), f"{each.kept:.0%}", f"{each.error:.3g}", f"{each.unchanged_share:.0%}")
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_cell, value))
    return "none" if value is None else str(value)
