"""Several judges, and files of other models' scores, on the same pairs: measured, put in order, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.evaluate.gallery import Gallery, scored_gallery
from listener_reward.evaluate.leaderboard import Leaderboard, leaderboard
from listener_reward.evaluate.run import Evaluation, evaluate, evaluate_scores
from listener_reward.verdict import PairJudge

if TYPE_CHECKING:
    import datasets

    from listener_reward.evaluate.scores import Scores


@dataclass(frozen=True)
class Measured:
    """What `evaluate_judges` found."""

    evaluations: tuple[Evaluation, ...]
    """The best first, where there is a leaderboard."""
    leaderboard: Leaderboard | None
    """None where one judge or one file was all that was asked for, or none could be measured."""
    pairs: list[dict[str, Any]]
    """Each one's worst mistakes and some right verdicts, as `report.write_report` takes them."""
    failures: tuple[Exception, ...]
    """Why a judge is not among `evaluations`, for each that is not."""

    def to_dict(self) -> dict[str, Any]:
        """The leaderboard, or the one evaluation, as JSON-able values; empty where nothing could be measured."""
        if self.leaderboard is not None:
            return self.leaderboard.to_dict()
        return self.evaluations[0].to_dict() if self.evaluations else {}


def evaluate_judges(
    judges: Sequence[PairJudge | Callable[[], PairJudge]],
    pairs: datasets.Dataset | datasets.IterableDataset,
    *,
    scores: Sequence[Scores] = (),
    against: Scores | None = None,
    protocols: Sequence[str] | None = None,
    validation: datasets.Dataset | datasets.IterableDataset | None = None,
    mistakes: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Measured:
    """Measures every judge and every file of scores; with more than one of them, says who is best.

    One judge that cannot be loaded or that breaks does not lose the others' results.

    Args:
        judges: judges, or functions without arguments that load one: of those, one is in memory at a time.
        pairs: as `evaluate` reads them.
        scores: files of scores, as `read_scores` reads them, that are measured like the judges.
        against: a further file, and what all others are tested against; None for the best of all.
        protocols: as for `evaluate`.
        validation: as for `evaluate`.
        mistakes: how many wrong verdicts of each to keep for looking at; None keeps no pairs.
        batch_size: as for `evaluate`.
        progress: show progress bars on standard error.

    Raises:
        InputError: neither judges nor scores; or, as `evaluate` and `evaluate_scores` have it, a fault of the pairs,
            the protocols or a file of scores.
        InputError, MissingExtraError, JudgeError: what a judge raised, where that judge is all that is asked for.
    """
    if not (judges or scores):
        raise InputError("judges and scores are both empty; give at least one of either")
    found = [evaluate_scores(file, pairs, protocols=protocols, validation=validation) for file in scores]
    rival = against and evaluate_scores(against, pairs, protocols=protocols, validation=validation)
    entries: list[dict[str, Any]] = []
    if mistakes is not None:
        for scored in (*found, *([rival] if rival else [])):
            entries += scored_gallery(scored, pairs, mistakes=mistakes)
    failures: list[Exception] = []

    def measure(judge: PairJudge) -> None:
        """Here the judge ends with the call: a variable of the loop would hold it while the next one is loaded."""
        gallery = None if mistakes is None else Gallery(judge.name, mistakes)
        watch = gallery and gallery.add
        found.append(
            evaluate(
                judge,
                pairs,
                batch_size=batch_size,
                progress=progress,
                protocols=protocols,
                watch=watch,
                validation=validation,
            )
        )
        entries.extend(gallery.pairs if gallery else [])

    for given in judges:
        try:
            measure(given if isinstance(given, PairJudge) else given())
        except (InputError, MissingExtraError, JudgeError) as error:
            if len(judges) + len(scores) == 1:
                raise
            failures.append(error)
    several = bool(found) and len(judges) + len(scores) + bool(rival) > 1
    board = leaderboard([*found, rival] if rival else found, rival) if several else None
    return Measured(board.evaluations if board else tuple(found), board, entries, tuple(failures))
