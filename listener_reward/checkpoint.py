"""What travels with a checkpoint beside its weights: how it is asked, who listens to it, how sure it may be.

`listener_reward.json` lies in the checkpoint's folder. A checkpoint without one is read with the defaults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.trace import Masking

CARD = "listener_reward.json"
EMBEDDED = {"tiny": "judge", "tiny-base": "base", "tiny-listener": "listener"}
"""Names of the checkpoints that come with the package: the trained judge, the base it grew from, its listener."""


@dataclass(frozen=True, slots=True)
class Card:
    """The settings of a checkpoint as a judge."""

    format: ChatFormat = field(default_factory=ChatFormat)
    listener: str | None = None
    """The listener's checkpoint: an embedded name, a Hub name, a folder, or one relative to the checkpoint's own."""
    temperature: float = 1.0
    """Divides the log-odds of the reasoner's answer; 1 is the raw model."""
    listener_temperature: float = 1.0
    masking: Masking = "answer"
    thoughts: int = 1
    """Thoughts sampled for each of the two orders."""
    sampling_temperature: float = 1.0
    max_new_tokens: int = 512

    def save(self, folder: str | Path) -> None:
        saved = asdict(self) | {"format": self.format.to_dict()}
        Path(folder, CARD).write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, saved: dict[str, Any], where: str = CARD) -> Card:
        known = {entry.name for entry in fields(cls)}
        if unknown := set(saved) - known:
            raise InputError(f"{where} has unknown fields {sorted(unknown)}; it may have {sorted(known)}")
        return cls(**{**saved, "format": ChatFormat.from_dict(saved["format"])} if "format" in saved else saved)

    @classmethod
    def load(cls, name: str | Path) -> Card:
        """The card of a checkpoint folder or Hub name; the defaults where it has none."""
        path = _card_path(name)
        if path is None:
            return cls()
        try:
            card = cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON ({error}); mend it or take it away to use the defaults") from error
        if card.listener is not None and card.listener.startswith("."):
            card = replace(card, listener=str((path.parent / card.listener).resolve()))
        return card


def resolve(name: str | Path) -> str:
    """The folder of an embedded name; any other name as it is."""
    name = str(name)
    if name not in EMBEDDED:
        return name
    folder = Path(str(resources.files("listener_reward"))) / "tiny" / "weights" / EMBEDDED[name]
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"the embedded checkpoint {name!r} is missing from this installation ({folder}); reinstall the package, or "
            "make it anew with: python -m listener_reward.tiny.pretrain"
        )
    return str(folder)


def _card_path(name: str | Path) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        return folder / CARD if (folder / CARD).exists() else None
    from transformers.utils import cached_file  # only a Hub name needs it

    found = cached_file(
        str(name), CARD, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None
