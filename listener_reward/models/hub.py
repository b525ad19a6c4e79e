"""Where a checkpoint is: an embedded name, a folder or the Hugging Face Hub; and the message where it is nowhere."""

from __future__ import annotations

import contextlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from listener_reward.errors import InputError

EMBEDDED = {"tiny": "judge", "tiny-base": "base", "tiny-listener": "listener"}
"""Names of the checkpoints that come with the package: the trained judge, the base it grew from, its listener."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError)
"""What transformers raises of a checkpoint that is missing, cut short, of another architecture or not one at all."""


def resolve(name: str | Path) -> str:
    """The folder of an embedded name; any other name as it is."""
    name = str(name)
    if name not in EMBEDDED:
        return name
    folder = Path(str(resources.files("listener_reward"))) / "tiny" / "weights" / EMBEDDED[name]
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"the embedded checkpoint {name!r} is missing from this installation ({folder}); reinstall the package, or "
            "make it anew with: python -m listener_reward.recipes.pretrain"
        )
    return str(folder)


def hub_options(name: str | Path) -> dict[str, Any]:
    """What to tell transformers of a name on the Hub: read only the cache where the Hub cannot be reached.

    Left to itself it repeats every file's request for half a minute before it says so.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        return {}
    from huggingface_hub import constants, get_session, is_offline_mode

    if not is_offline_mode():
        with contextlib.suppress(Exception):  # any failure, of any HTTP library, is the same answer
            get_session().head(constants.ENDPOINT, timeout=5)
            return {}
    return {"local_files_only": True}


def cannot_load(name: str | Path, error: Exception | str) -> str:
    """The message for a checkpoint that cannot be had: what was tried, why it failed, what to do."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if Path(name).exists():
        return (
            f"the checkpoint at {str(name)!r} cannot be loaded ({reason}). Give the folder of a whole Qwen2.5-VL or "
            'Qwen3-VL checkpoint, or use the embedded judge: "tiny"'
        )
    return (
        f"the checkpoint {str(name)!r} is not a local folder and could not be fetched from the Hugging Face Hub "
        f'({reason}). Check the name and the connection, give a local folder, or use the embedded judge: "tiny"'
    )
