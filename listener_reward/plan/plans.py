"""A plan: phases of a run with the bytes of each part, operations, hours, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from listener_reward.plan.tokens import Pairs

CONTEXT = 1_000_000_000
"""Bytes that CUDA itself, its kernels and its libraries take of a GPU, about."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it."""

    name: str
    memory: float
    """Bytes."""
    rate: float
    """Dense products in bfloat16, operations a second."""
    bandwidth: float
    """Of memory, bytes a second."""


KNOWN_GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("3090", 24e9, 71e12, 0.936e12),
        Gpu("4090", 24e9, 165e12, 1.008e12),
        Gpu("l40s", 48e9, 362e12, 0.864e12),
        Gpu("a100-40", 40e9, 312e12, 1.555e12),
        Gpu("a100-80", 80e9, 312e12, 2.039e12),
        Gpu("h100", 80e9, 989e12, 3.35e12),
        Gpu("h200", 141e9, 989e12, 4.8e12),
    )
}


@dataclass
class Phase:
    """One part of a run, in which memory is taken by these parts."""

    name: str
    parts: dict[str, int]
    """Bytes on one GPU at the phase's peak, by what holds them."""
    flops: float = 0.0
    """Operations of one GPU in the unit that the plan counts: a step, or a pair."""
    moved: float = 0.0
    """Bytes of weights that decoding reads, one step after the other, in which products hardly count."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def seconds(self, rate: float, bandwidth: float | None) -> float:
        """At rates that are reached, and not those on paper."""
        return self.flops / rate + (self.moved / bandwidth if bandwidth else 0.0)


@dataclass
class Plan:
    """What `listener-reward plan` prints."""

    what: str
    """The command that is planned."""
    pairs: Pairs
    thought: int
    """Tokens that are written for a pair at most."""
    phases: list[Phase]
    gpus: int
    unit: str
    """What `flops` are counted for: "step" or "pair"."""
    units: float
    """How many of these the run has, on one GPU; 0 where that cannot be known."""
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, str] = field(default_factory=dict)
    """What to change where a part is too large, by the part."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    def seconds(self, rate: float, bandwidth: float | None) -> float:
        """Of one unit, as `Phase.seconds`."""
        return sum(phase.seconds(rate, bandwidth) for phase in self.phases)

    def hours(self, rate: float, bandwidth: float | None) -> float:
        return self.units * self.seconds(rate, bandwidth) / 3600

    def advice(self, memory: float) -> list[str]:
        """What to change so that the largest phase fits into `memory` bytes; empty where it does."""
        if self.peak.total <= memory:
            return []
        parts = sorted(self.peak.parts.items(), key=lambda part: -part[1])
        return [f"{part} ({size / 1e9:.1f} GB): {self.changes[part]}" for part, size in parts if part in self.changes][
            :4
        ]

    def to_dict(self, *, memory: float | None, rate: float | None, bandwidth: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "what": self.what,
            "gpus": self.gpus,
            "parameters": self.parameters,
            "tokens": self.pairs.to_dict(self.thought),
            "phases": [
                {"name": each.name, "bytes": each.total, "parts": each.parts, "flops": each.flops}
                for each in self.phases
            ],
            "peak_bytes": self.peak.total,
            "peak_phase": self.peak.name,
            "unit": self.unit,
            "units": self.units,
            "flops": self.flops,
            "notes": self.notes,
        }
        if rate is not None:
            found["hours"] = self.hours(rate, bandwidth)
        if memory is not None:
            found |= {"memory_bytes": memory, "fits": self.peak.total <= memory, "changes": self.advice(memory)}
        return found
