"""Several judges on the same pairs: who is best, by how much, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.evaluate.judged import compare

if TYPE_CHECKING:
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
    if one.judged is None or other.judged is None:
        raise InputError("an evaluation has no judged pairs to compare; take it as evaluate returned it")
    return compare(one.judged, other.judged, protocol)
