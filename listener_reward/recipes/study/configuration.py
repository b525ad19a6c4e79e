"""What decides the result of a run, as data: how a judge is trained (`Arm`) and what is measured of it.

Each is a frozen dataclass that goes to JSON and comes back equal. A run's `key` is a hash of them and of the seed, so
that equal runs have equal keys whatever the study calls them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

from listener_reward.errors import InputError, check_choice, meant
from listener_reward.recipes.study.thoughts import CHANGES
from listener_reward.recipes.variants import AS_YAML_READS, SPLITS, Recipe
from listener_reward.shaping import WEIGHTS

METHODS = ("grpo", "sft", "bradley-terry", "none", "truth")
"""How a judge comes about. "none" is the checkpoint as it is, and "truth" the utility that no judge ever sees."""


@dataclass(frozen=True)
class Arm:
    """One way to have a judge."""

    method: str = "grpo"
    weights: tuple[float, ...] = WEIGHTS
    """GRPO's, of format, accuracy and listener."""
    recipe: Recipe = field(default_factory=Recipe)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the trainer's configuration, which win: `ListenerGRPOConfig`, `SFTConfig`, or
    `TrainingArguments` for Bradley-Terry. With `use_peft: true` adapters are trained, and fields of LoRA are among
    them."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)

    @property
    def trains(self) -> bool:
        return self.method not in ("none", "truth")


@dataclass(frozen=True)
class Splits:
    """Accuracy, contradictions and calibration on labelled pairs."""

    kind: ClassVar[str] = "splits"
    seeded: ClassVar[bool] = False
    """Whether the seed of a run decides anything here, beside what it decided in training."""
    splits: tuple[str, ...] = SPLITS
    """Splits of the tiny world, or any data that `load_pairs` reads."""
    pairs: int = 300
    """Of each split."""
    listener: str | None = "tiny-listener"
    """Who counts contradictions: the same for every arm, whoever listened in training."""
    thoughts: str = "whole"
    """What the judge reads of its own thoughts before it answers: see `thoughts.CHANGES`."""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `Judge.from_pretrained`, such as `thoughts: 8`."""
    diagnostics: bool = False
    """Whether `diagnose` is kept of each split, for a report's pages."""

    def __post_init__(self) -> None:
        check_choice("thoughts", self.thoughts, CHANGES)


@dataclass(frozen=True)
class BestOfN:
    """The true utility of the best of n samples of the tiny diffusion model, by the judge."""

    kind: ClassVar[str] = "best of n"
    seeded: ClassVar[bool] = False
    n: int = 64
    prompts: int = 40


@dataclass(frozen=True)
class DDPO:
    """DDPO of the tiny diffusion model by the judge's reward, and the true utility along the way."""

    kind: ClassVar[str] = "ddpo"
    seeded: ClassVar[bool] = True
    epochs: int = 80
    every: int = 10
    """Epochs from one measurement to the next."""
    samples: int = 24
    """Pictures of each held-out prompt."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `DDPOConfig`, which win over those of `generators.SETTINGS`."""


Measurement = Splits | BestOfN | DDPO

KINDS: Mapping[str, type[Measurement]] = {kind.kind: kind for kind in get_args(Measurement)}


def measurement(given: Any, where: str) -> Measurement:
    """A mapping with `kind` and the fields of that kind as a measurement.

    Raises:
        InputError: there is no such kind, or as `read`.
    """
    kind, rest = _with_kind(given, where)
    return read(KINDS[kind], rest, where)


def _with_kind(given: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(given, Mapping) or "kind" not in given:
        raise InputError(f"{where} is {given!r}; give a mapping with a kind: {', '.join(KINDS)}")
    rest = dict(cast("Mapping[str, Any]", given))
    kind = rest.pop("kind")
    check_choice(f"{where}.kind", kind, KINDS)
    return kind, rest


def to_dict(value: Arm | Measurement) -> dict[str, Any]:
    """The fields as JSON-able values; a measurement's `kind` comes first."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return plain if isinstance(value, Arm) else {"kind": value.kind, **plain}


def key(arm: Arm, seed: int, measured: Measurement | None = None) -> str:
    """Ten hexadecimal digits that stand for a run, or without a measurement for a trained judge."""
    decides = {"arm": to_dict(arm), "seed": seed, "measurement": None if measured is None else to_dict(measured)}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]


D = TypeVar("D")


def read(kind: type[D], given: Any, where: str) -> D:
    """A mapping as a dataclass; what it does not name has the field's default.

    Raises:
        InputError: a field that there is not, or a value of another type than the field's.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {given!r}; give a mapping of fields")
    named = cast("Mapping[str, Any]", given)
    hints, known = get_type_hints(kind), {one.name: one for one in fields(cast("Any", kind))}
    values: dict[str, Any] = {}
    for name, value in named.items():
        if name not in known:
            raise InputError(f"{where} has no field {name!r}{meant(name, known)}")
        place = f"{where}.{name}"
        if is_dataclass(hints[name]):
            values[name] = read(cast("Any", hints[name]), value, place)
            continue
        one = known[name]
        default = one.default if one.default_factory is MISSING else one.default_factory()
        values[name] = _fitting(value, default, place)
    return kind(**values)


def _fitting(value: Any, default: Any, where: str) -> Any:
    """`value` where it is of the type of `default`; a list for a tuple, and a whole number for a fraction."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; give a list")
        numbers = bool(default) and isinstance(default[0], float)
        return tuple(float(one) if numbers and type(one) is int else one for one in cast("list[Any]", value))
    if isinstance(default, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; give a mapping")
        return dict(cast("Mapping[str, Any]", value))
    if default is None or value is None:
        return value
    wanted = type(default)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        hint = f"; {AS_YAML_READS}" if wanted is float and isinstance(value, str) else ""
        raise InputError(f"{where} is {value!r}; it takes a value such as {default!r}{hint}")
    return value
