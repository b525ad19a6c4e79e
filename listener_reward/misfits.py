"""Says once that what a model writes, or would write, is not in the format that it is read by.

Such a model is scored all the same: malformed thoughts are data, and two labels have a softmax wherever they stand. So
the first judgements are watched for a checkpoint that was trained to answer otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import fmean

from listener_reward.errors import FormatError, FormatWarning

FIRST = 16
"""So many judgements are watched; one may go wrong by chance."""

LEAST_MASS = 0.01
"""Below this mean probability of the two labels together, their ratio says little about the answer."""


def fits(malformed: float, label_mass: float) -> bool:
    """Whether a format fits: at most half of the thoughts malformed, and the labels are not as good as never written.

    Args:
        malformed: fraction of the thoughts.
        label_mass: the labels' total probability at the answer slot, in [0, 1], the mean over the judgements.
    """
    return malformed <= 0.5 and label_mass >= LEAST_MASS


def check_format(judge: object) -> None:
    """Asks `judge` whether its few answers are in its format: no more come. A judge without a format is not asked.

    Raises:
        FormatError: they are not, and the judge is strict; else that is a `FormatWarning`.
    """
    check: Callable[[], None] | None = getattr(judge, "check_format", None)
    if check is not None:
        check()


class Misfits:
    """The first judgements of one model, and whether they fit its format."""

    def __init__(self, who: str, *, strict: bool = False):
        """
        Args:
            who: what messages call the model.
            strict: raise `FormatError` where there would be a warning.
        """
        self.who = who
        self.strict = strict
        self._malformed: list[bool] = []
        self._masses: list[float] = []
        self._example = ""
        self._told = False
        self._problem: str | None = None

    def see(self, masses: Sequence[float], malformed: Sequence[bool] = (), example: str = "") -> None:
        """Takes note of judgements.

        Args:
            masses: the labels' total probability at each answer slot, in [0, 1].
            malformed: whether each thought was malformed; empty for a model that writes none.
            example: one of the malformed completions.

        Raises:
            FormatError: the first `FIRST` do not fit, and the model is judged strictly; at every call from then on.
        """
        if len(self._masses) < FIRST:
            self._masses += masses
            self._malformed += malformed
            self._example = self._example or example
            if len(self._masses) >= FIRST:
                self._problem = self._found()
        self._tell()

    def end(self) -> None:
        """Looks at the judgements so far, even if they are fewer than `FIRST`: for who asks no more.

        Raises:
            FormatError: they do not fit, and the model is judged strictly.
        """
        if self._masses and len(self._masses) < FIRST:
            self._problem = self._found()
        self._tell()

    def _tell(self) -> None:
        if self._problem is None:
            return
        if self.strict:
            raise FormatError(self._problem)
        if not self._told:
            self._told = True
            warnings.warn(f"{self._problem}. Said once", FormatWarning, stacklevel=2)

    def _found(self) -> str | None:
        cure = (
            "give the checkpoint a card (listener_reward.json) with its question, tags and labels, such as "
            "`listener-reward card` finds and writes"
        )
        if self._malformed and not fits(fmean(self._malformed), 1.0):
            return (
                f"{sum(self._malformed)} of {self.who}'s first {len(self._malformed)} thoughts are malformed, such as "
                f"{self._example[:200]!r}; its verdicts may mean nothing: {cure}"
            )
        if not fits(0.0, fmean(self._masses)):
            return (
                f"{self.who} gives the two labels a probability of {fmean(self._masses):.2g} together at its answer "
                f"slot, so that it would answer otherwise; its verdicts may mean nothing: {cure}"
            )
        return None
