"""How much of an adapter's update is left when it is added to weights of a dtype and the sum is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding left of one module's update, as sums that add up over modules."""

    module: str
    update: float
    """Squared norm of the update dW."""
    lost: float
    """Squared norm of (round(W + dW) - W) - dW."""
    changed: int
    """Entries that the update would change."""
    unchanged: int
    """Those of them that rounding leaves at W."""

    @property
    def error(self) -> float:
        """Relative norm of what rounding changed; 0 keeps the update, 1 is as far off as no update."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0

    @property
    def kept(self) -> float:
        """1 - `error`, at least 0."""
        return max(0.0, 1 - self.error)

    @property
    def unchanged_share(self) -> float:
        """Of the entries that the update would change, the fraction that stay as they were."""
        return self.unchanged / self.changed if self.changed else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "kept": self.kept,
            "error": self.error,
            "unchanged": self.unchanged_share,
        }


def rounding_of(module: str, weight: Tensor, update: Tensor) -> Rounding:
    """What is left of `update`, float32, when it is added to `weight` and rounded to the dtype of `weight`."""
    before = weight.float()
    after = (before + update).to(weight.dtype).float()
    wanted = update != 0
    lost = (after.double() - before.double() - update.double()).square().sum()
    return Rounding(
        module,
        float(update.double().square().sum()),
        float(lost),
        int(wanted.sum()),
        int((wanted & (after == before)).sum()),
    )


def together(roundings: Sequence[Rounding], module: str = "overall") -> Rounding:
    """The same of several modules as one."""
    return Rounding(
        module,
        sum(each.update for each in roundings),
        sum(each.lost for each in roundings),
        sum(each.changed for each in roundings),
        sum(each.unchanged for each in roundings),
    )
