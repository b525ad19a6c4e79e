"""What travels with a checkpoint beside its weights: how it is asked, who listens to it, how sure it may be.

`listener_reward.json` lies in the checkpoint's folder. A checkpoint without one is read with the defaults.
"""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

from listener_reward.calibration.maps import Calibration
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError, check_choice
from listener_reward.files import quoted, write_text
from listener_reward.models.adapters import base_of, options_of_base
from listener_reward.models.hub import find_file
from listener_reward.trace import Masking
from listener_reward.verdict import Aggregate, Mode, Orders

CARD = "listener_reward.json"

CardLike: TypeAlias = "Card | Mapping[str, Any] | str | os.PathLike[str]"
"""What `Card.read` takes: a card, its fields, or the name of a file."""


@dataclass(frozen=True, slots=True)
class Card:
    """The settings of a checkpoint as a judge."""

    format: ChatFormat = field(default_factory=ChatFormat)
    listener: str | None = None
    """The listener's checkpoint: an embedded name, a Hub name, a folder, or one relative to the checkpoint's own."""
    listener_temperature: float = 1.0
    """Divides the log-odds of the listener's answer, in training too; 1 is the paper's listener.

    It is no calibration: a listener is read with it before its grounding, and rewards are made of what comes out. What
    verdicts make of that is `calibration`, where the reasoner's only temperature stands."""
    listener_grounding: float = 0.0
    """How much the listener discounts a thought that it would not have written itself; 0 is the paper's listener."""
    masking: Masking = "answer"
    thoughts: int = 1
    """Thoughts sampled for each order."""
    aggregate: Aggregate = "mean"
    """How thoughts become a verdict: the mean of their probabilities, a majority of their answers, the listener's mean
    having read them, or the reasoner and the listener together."""
    orders: Orders = "both"
    """Whether a pair is shown in both orders, or in one drawn at random at half the cost."""
    early_stop: float | None = None
    """No further thoughts once all would prefer the same image with this probability; see `conclude.settled`."""
    sampling_temperature: float = 1.0
    max_new_tokens: int = 512
    calibration: Calibration = field(default_factory=Calibration)
    """Fitted on votes by `listener-reward calibrate`, for verdicts made in its `mode`.

    One without a mode, as older cards have it, is taken to be for what the card says of thoughts, aggregate, orders and
    early stop, and keeps that mode when they change."""
    fast_calibration: Calibration = field(default_factory=Calibration)
    """The same without thoughts."""
    criterion_calibrations: Mapping[str, Calibration] = field(default_factory=dict[str, Calibration], hash=False)
    """For verdicts by a criterion of that name, fitted by `listener-reward calibrate --criterion`. A verdict by another
    one goes by `calibration`, with a warning if that was fitted."""
    fast_criterion_calibrations: Mapping[str, Calibration] = field(default_factory=dict[str, Calibration], hash=False)
    """The same without thoughts."""

    def __post_init__(self) -> None:
        for name, least in (("thoughts", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")
        for name in ("listener_temperature", "sampling_temperature", "listener_grounding"):
            value = getattr(self, name)
            least = 1e-3 if name == "listener_temperature" else 0.0
            if not isinstance(value, int | float) or not least <= value < float("inf"):
                raise InputError(f"{name} is {value!r}; give a finite number of at least {least}")
        for name, allowed in (("masking", Masking), ("aggregate", Aggregate), ("orders", Orders)):
            check_choice(name, getattr(self, name), get_args(allowed))
        if self.early_stop is not None and not (
            isinstance(self.early_stop, int | float) and 0.5 < self.early_stop <= 1
        ):
            raise InputError(f"early_stop is {self.early_stop!r}; give a probability in (0.5, 1], or null for never")
        if not isinstance(self.listener, str | None):
            raise InputError(f"listener is {self.listener!r}; give the name of a checkpoint, or null for none")
        for name, think in (("calibration", True), ("fast_calibration", False)):
            calibration: Calibration = getattr(self, name)
            if calibration.mode is None and calibration != Calibration():
                object.__setattr__(self, name, replace(calibration, mode=self.mode(think)))

    def calibration_for(self, think: bool, criterion: str | None = None) -> Calibration:
        """The calibration of verdicts with or without thoughts, by a criterion if it has its own."""
        general = self.calibration if think else self.fast_calibration
        if criterion is None:
            return general
        return (self.criterion_calibrations if think else self.fast_criterion_calibrations).get(criterion, general)

    def mode(self, think: bool = True) -> Mode:
        """How this card has verdicts made. Without thoughts none can be counted, and none be left out."""
        if think:
            return Mode(True, self.thoughts, self.aggregate, self.orders, self.early_stop)
        return Mode(False, 1, "mean" if self.aggregate == "majority" else self.aggregate, self.orders)

    def save(self, folder: str | Path) -> None:
        """Writes the card into a checkpoint's folder; a card that was there stays whole until the new one is."""
        self.write(Path(folder, CARD))

    def write(self, path: str | Path) -> None:
        """Writes the card as the file `path`, which `read` reads."""
        calibrations: dict[str, Any] = {
            name: getattr(self, name).to_dict() for name in ("calibration", "fast_calibration")
        }
        for name in ("criterion_calibrations", "fast_criterion_calibrations"):
            calibrations[name] = {criterion: each.to_dict() for criterion, each in getattr(self, name).items()}
        saved = asdict(self) | {"format": self.format.to_dict()} | calibrations
        text = json.dumps(saved, indent=2, ensure_ascii=False)
        # A pair of numbers reads better on one line. No string is touched: JSON has no line break inside one.
        text = re.sub(r"\[\n\s+(-?[\d.e-]+),\n\s+(-?[\d.e-]+)\n\s+\]", r"[\1, \2]", text)
        write_text(path, text + "\n")

    @classmethod
    def amend(cls, folder: str | Path, **changes: Any) -> Card:
        """Changes fields of the card in `folder`, and leaves a listener that is given relative to it as it is."""
        path = Path(folder, CARD)
        saved: Any = _read(path) if path.exists() else {}
        card = replace(cls.from_dict(saved, str(path)), **changes)
        card.save(folder)
        return card

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], where: str = CARD) -> Card:
        """Reads the fields that `save` wrote; one that is left out has its default.

        Raises:
            InputError: names `where`, the field that is unknown or out of range, and what it may be.
        """
        if not isinstance(saved, Mapping):
            raise InputError(f"{where} holds a {type(saved).__name__}; it has to be a JSON object")
        saved = dict(saved)
        temperature = saved.pop("temperature", 1.0)
        known = {entry.name for entry in fields(cls)}
        if unknown := set(saved) - known:
            raise InputError(f"{where} has unknown fields {sorted(unknown)}; it may have {sorted(known)}")
        readers: dict[str, Callable[[Any], Any]] = {
            "format": ChatFormat.from_dict,
            "calibration": Calibration.from_dict,
            "fast_calibration": Calibration.from_dict,
            "criterion_calibrations": _by_criterion,
            "fast_criterion_calibrations": _by_criterion,
        }
        try:
            values: dict[str, Any] = {
                name: readers[name](value) if name in readers else value for name, value in saved.items()
            }
            return cls(**values | _tempered(values, temperature))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    @classmethod
    def read(cls, given: CardLike) -> Card:
        """A card as a caller gives one: itself, its fields, a JSON file, or a folder with a `listener_reward.json`.

        Raises:
            InputError: there is no such file, or it is no card.
        """
        if isinstance(given, Card):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given, "card")
        if not isinstance(given, str | os.PathLike):
            raise InputError(f"card is {given!r:.80}; give a Card, its fields, or the name of a JSON file")
        path = Path(given, CARD) if os.path.isdir(given) else Path(given)
        if not os.path.exists(path):  # which knows names too long for a file
            raise InputError(
                f"card is {quoted(given)}, and there is no file {quoted(path)}; `listener-reward card` finds and "
                "writes one"
            )
        return cls.from_dict(_read(path), str(path))

    @classmethod
    def load(cls, name: str | Path, given: CardLike | None = None, *, revision: str | None = None) -> Card:
        """The card of a checkpoint folder or Hub name. Without one an adapter has its base's, a model the defaults.

        Args:
            name: the checkpoint. A listener that begins with "." is relative to it.
            given: a card in place of the checkpoint's own, whole: what it leaves out has the defaults.
            revision: of a checkpoint on the Hub.

        Raises:
            InputError: a card that cannot be read, or a checkpoint that cannot be had.
        """
        if given is not None:
            return cls.read(given)._beside(name, Path(name) if os.path.isdir(name) else None)
        options = {} if revision is None else {"revision": revision}
        path = find_file(name, CARD, **options)
        if path is None:
            base = base_of(name, **options)
            if base is None:
                return cls()
            return cls.load(base, revision=options_of_base(base, options, name).get("revision"))
        return cls.from_dict(_read(path), str(path))._beside(name, path.parent)

    def _beside(self, name: str | Path, folder: Path | None) -> Card:
        """The card with a relative listener found from the checkpoint `name`, whose files are in `folder`."""
        if self.listener is None or not self.listener.startswith("."):
            return self
        if self.listener == "." and not os.path.isdir(name):
            return replace(self, listener=str(name))
        if folder is None:
            raise InputError(
                f"listener is {self.listener!r}, a folder beside the checkpoint, and {quoted(name)} is on the Hub; "
                "give the listener's name, or its folder's whole path"
            )
        return replace(self, listener=str((folder / self.listener).resolve()))


def _by_criterion(saved: Any) -> dict[str, Calibration]:
    if not isinstance(saved, Mapping):
        raise InputError(f"a card's calibrations by criterion are {saved!r:.80}; give {{name: calibration}}")
    given = cast("Mapping[Any, Any]", saved)
    return {str(name): Calibration.from_dict(each) for name, each in given.items()}


def _tempered(values: dict[str, Any], temperature: Any) -> dict[str, Any]:
    """The calibrations of an older card, which had the reasoner's temperature in a field of its own, with it in them.

    It divided the log-odds that the maps of the answer divide once more; so their temperatures are multiplied.
    """
    if not isinstance(temperature, int | float) or not 1e-3 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature!r}; give a finite number of at least 0.001")
    if temperature == 1:
        return {}
    calibrations = {name: values.get(name, Calibration()) for name in ("calibration", "fast_calibration")}
    return {
        name: replace(
            each, reasoner_platt=replace(each.reasoner_platt, temperature=each.reasoner_platt.temperature * temperature)
        )
        for name, each in calibrations.items()
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); mend it, or take it away to use the defaults") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file that can") from error
