"""Several judges on the same pairs: who is best, by how much, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.evaluate.measure import PROTOCOLS, ProtocolResult, compare

if TYPE_CHECKING:
    from rich.table import Table

    from listener_reward.evaluate.intervals import PairedTest
    from listener_reward.evaluate.run import Evaluation


@dataclass(frozen=True)
class Leaderboard:
    """Evaluations of several judges on the same pairs, the best first."""

    evaluations: tuple[Evaluation, ...]
    protocol: str
    """The first of the protocols: it orders the judges and is what the tests are about."""
    against: str
    """The judge that all others are tested against."""
    tests: tuple[PairedTest | None, ...]
    """For each evaluation, that judge minus `against`, on the same pairs; None for `against` itself."""

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-able values."""
        rows = [
            evaluation.to_dict() | {"paired": test.to_dict() if test else None}
            for evaluation, test in zip(self.evaluations, self.tests, strict=True)
        ]
        return {"protocol": self.protocol, "against": self.against, "judges": rows}


def leaderboard(evaluations: Sequence[Evaluation], against: Evaluation | None = None) -> Leaderboard:
    """Orders judges by their first protocol and tests each against one of them.

    Args:
        evaluations: of the same pairs, by the same protocols, as `evaluate` and `evaluate_scores` return them.
        against: one of them; None for the best. Against the best of many a small p-value means less than it says, since
            the best was chosen for being ahead.

    Raises:
        InputError: no evaluation, or they are of different pairs or protocols.
    """
    if not evaluations:
        raise InputError("evaluations is empty; give at least one")
    names = [[result.protocol for result in evaluation.protocols] for evaluation in evaluations]
    if not names[0] or any(other != names[0] for other in names):
        raise InputError(f"the judges were measured by different protocols ({names}); give the same ones to all")

    def value(evaluation: Evaluation) -> float:
        found = evaluation.protocols[0].value
        return float("-inf") if found is None else found

    ordered = sorted(evaluations, key=value, reverse=True)
    rival = ordered[0] if against is None else against
    protocol = names[0][0]
    tests = [None if one is rival else _test(one, rival, protocol) for one in ordered]
    return Leaderboard(tuple(ordered), protocol, rival.judge, tuple(tests))


def _test(one: Evaluation, other: Evaluation, protocol: str) -> PairedTest | None:
    if one.answers is None or other.answers is None:
        raise InputError("an evaluation has no answers to compare; take it as evaluate returned it")
    return compare(one.answers, other.answers, protocol)


# ---------------------------------------------------------------------------------------------------------------------
# Tables for people
# ---------------------------------------------------------------------------------------------------------------------


def protocols_table(results: Sequence[ProtocolResult]) -> Table:
    """One judge: a row for each protocol."""
    table = _table("protocol", "value", "95 % interval", "always first", "in file order", "pairs")
    for result in results:
        baselines = number(result.always_first), number(result.always_first_in_file)
        table.add_row(result.protocol, number(result.value), interval(result.interval), *baselines, str(result.pairs))
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
            values = (number(evaluation.protocols[column].value) for column in columns)
            table.add_row(plain(evaluation.judge), *values)
        _add_baselines(table, board, columns)
        tables.append(table)
    habits = _table("judge", "ece", "position gap", "malformed", "missing")
    for evaluation in board.evaluations:
        found = evaluation.ece, evaluation.position_gap, evaluation.malformed_rate
        habits.add_row(plain(evaluation.judge), *map(number, found), str(evaluation.missing))
    return [*tables, habits]


_ACROSS = 4
"""Protocols side by side in one table."""


def _ranked(board: Leaderboard) -> Table:
    table = _table("judge", "value", "95 % interval", "differ- ence", "its interval", "p")
    table.title = f"by {board.protocol}"
    for evaluation, test in zip(board.evaluations, board.tests, strict=True):
        first = evaluation.protocols[0]
        tested = (f"{test.difference:+.3f}", interval(test.interval), f"{test.p_value:.2g}") if test else ()
        table.add_row(plain(evaluation.judge), number(first.value), interval(first.interval), *tested)
    _add_baselines(table, board, range(1))
    return table


def _add_baselines(table: Table, board: Leaderboard, columns: range) -> None:
    results = [board.evaluations[0].protocols[column] for column in columns]
    table.add_section()
    table.add_row("always first", *(number(result.always_first) for result in results))
    if any(result.always_first_in_file is not None for result in results):
        table.add_row("in file order", *(number(result.always_first_in_file) for result in results))


def _table(*names: str) -> Table:
    """Columns of numbers are never cut: what is too long for the terminal is the first column, which is folded."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, name in enumerate(names):
        # A header stands on as many lines as it has words, so that it is no wider than its numbers.
        words = name.replace("-", "-\n") if name in PROTOCOLS else name if "%" in name else name.replace(" ", "\n")
        table.add_column(words, no_wrap=column > 0, overflow="fold", justify="left" if column == 0 else "right")
    return table


def number(value: float | None) -> str:
    """Three decimals: no set of this size tells more."""
    return "" if value is None else f"{value:.3f}"


def interval(value: tuple[float, float] | None) -> str:
    """Both ends of an interval."""
    return "" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


def plain(text: str) -> str:
    """A name of somebody's file or model, without markup and control characters."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text).replace("[", r"\[")
