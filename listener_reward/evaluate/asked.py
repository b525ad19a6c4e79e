"""What pairs ask: refused before anything is judged where a judge cannot be asked it, and counted by criterion."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.evaluate.confidence import expected_calibration_error
from listener_reward.evaluate.intervals import clustered_interval

if TYPE_CHECKING:
    import datasets

GENERAL = "general"
"""What the pairs without a criterion are called beside those that have one."""


@dataclass(frozen=True, slots=True)
class CriterionResult:
    """A judge's metrics on the pairs of one criterion; each means what it means in `Evaluation`."""

    criterion: str
    n: int
    n_ties: int
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    ece: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self) | {"accuracy_interval": self.accuracy_interval and list(self.accuracy_interval)}


def by_criterion(
    criteria: list[str | None],
    labels: np.ndarray,
    right: np.ndarray,
    p_first: np.ndarray | None,
    prompts: np.ndarray,
) -> tuple[CriterionResult, ...]:
    """The metrics of each criterion, by name, those of the general question last; none where no pair has a criterion.

    Args:
        criteria: n names, None for the general question.
        labels: (n,) fractions of people who prefer the first image.
        right: (n,) bool, whether the judge prefers the majority's image.
        p_first: (n,) the judge's probabilities, NaN for a missing one; None for scores that are no probabilities.
        prompts: (n,) prompt numbers, of which intervals draw.
    """
    names = sorted({name for name in criteria if name is not None})
    if not names:
        return ()
    asked = np.array([GENERAL if name is None else name for name in criteria], dtype=object)
    several = [*names, *([GENERAL] if None in criteria else [])]
    return tuple(_result(name, asked == name, labels, right, p_first, prompts) for name in several)


def _result(
    name: str,
    chosen: np.ndarray,
    labels: np.ndarray,
    right: np.ndarray,
    p_first: np.ndarray | None,
    prompts: np.ndarray,
) -> CriterionResult:
    decided = labels[chosen] != 0.5
    earned = (decided & right[chosen]).astype(float)
    ece = None
    if p_first is not None and (known := chosen & ~np.isnan(p_first)).any():
        ece = expected_calibration_error(labels[known], p_first[known])
    return CriterionResult(
        name,
        n=int(chosen.sum()),
        n_ties=int((~decided).sum()),
        accuracy=float(earned.sum() / decided.sum()) if decided.any() else None,
        accuracy_interval=clustered_interval(earned, decided.astype(float), prompts[chosen]),
        ece=ece,
    )


def check_asked(judge: object, pairs: datasets.Dataset | datasets.IterableDataset) -> None:
    """Refuses pairs that the judge has no question about, before any is judged.

    A judge with a method `check_question` is asked; any other refuses by itself when such a pair comes, and so does
    every judge of a stream, of which nobody knows what will come.

    Raises:
        InputError: the judge's own.
    """
    while not hasattr(judge, "check_question") and hasattr(judge, "judge"):  # a journal, or a judge on many processes
        judge = getattr(judge, "judge")  # noqa: B009
    check: Any = getattr(judge, "check_question", None)
    if check is None or not isinstance(pairs, Sized):
        return
    for sources, criterion in sorted(set(questions_of(pairs)), key=str):
        try:
            check(sources=sources, criterion=criterion)
        except InputError as error:
            if criterion is None:
                raise
            raise InputError(f"{error}; or judge by the general question, with #general after the data") from error


def questions_of(pairs: Any) -> Iterator[tuple[int, str | None]]:
    """The number of sources and the criterion of every pair; none where the data has neither. No image is looked at."""
    columns = [name for name in ("sources", "criterion") if name in pairs.column_names]
    if not columns:
        return
    import pyarrow.compute as pc  # where there is a data set, it is there

    for table in pairs.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        sources = criteria = [None] * table.num_rows
        if "sources" in columns:
            sources = pc.list_value_length(table["sources"]).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        if "criterion" in columns:
            criteria = table["criterion"].to_pylist()
        yield from ((count or 0, name) for count, name in zip(sources, criteria, strict=True))
