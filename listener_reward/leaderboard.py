"""Several judges on the same pairs: who is best, by how much, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.measure import PROTOCOLS, ProtocolResult, compare

if TYPE_CHECKING:
    from rich.table import Table

    from listener_reward.evaluate import Evaluation
    from listener_reward.intervals import PairedTest


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


def leaderboard_tables(board: Leaderboard) -> tuple[Table, Table]:
    """Several judges: who is best by the protocol that decides, with the baselines, and all other numbers."""
    ranked = _table("judge", board.protocol, "95 % interval", "difference", "95 % interval", "p")
    others = [result.protocol for result in board.evaluations[0].protocols[1:]]
    rest = _table("judge", *others, "ece", "position gap", "malformed", "missing")
    for evaluation, test in zip(board.evaluations, board.tests, strict=True):
        first, *more = evaluation.protocols
        tested = (f"{test.difference:+.3f}", interval(test.interval), f"{test.p_value:.2g}") if test else ("", "", "")
        ranked.add_row(plain(evaluation.judge), number(first.value), interval(first.interval), *tested)
        habits = evaluation.ece, evaluation.position_gap, evaluation.malformed_rate
        rest.add_row(
            plain(evaluation.judge), *(number(r.value) for r in more), *map(number, habits), str(evaluation.missing)
        )
    baselines = board.evaluations[0].protocols
    ranked.add_section()
    ranked.add_row("always first", number(baselines[0].always_first))
    if (in_file := baselines[0].always_first_in_file) is not None:
        ranked.add_row("always first, in file order", number(in_file))
    return ranked, rest


def _table(*names: str) -> Table:
    from rich.table import Table

    table = Table()
    for column, name in enumerate(names):
        whole = name == "95 % interval" or name in PROTOCOLS or name == "protocol"
        table.add_column(name, no_wrap=whole, overflow="fold" if column == 0 else "ellipsis")
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
