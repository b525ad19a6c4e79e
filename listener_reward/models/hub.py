"""Where a checkpoint is: an embedded name, a folder or the Hugging Face Hub; and the message where it is nowhere."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Generator
from importlib import resources
from pathlib import Path
from typing import Any, cast

from listener_reward.errors import InputError
from listener_reward.files import quoted

EMBEDDED = {
    "tiny": "judge",
    "tiny-base": "base",
    "tiny-listener": "listener",
    "tiny-edit-base": "edit-base",
    "tiny-edit-listener": "edit-listener",
    "tiny-relation-base": "relation-base",
    "tiny-relation-listener": "relation-listener",
}
"""Names of the checkpoints that come with the package: the trained judge, the base it grew from and a listener of
pairs, and the same two once they know edits; that listener is the judge's. Last, base and listener of two groups."""

_JSON = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "adapter_config.json",
)

_WHERE = ("revision", "cache_dir", "local_files_only", "token")


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


def lasting(name: str) -> str:
    """The name of a checkpoint as a card may keep it: a folder's path in full, any other name as it is."""
    return str(Path(name).resolve()) if name not in EMBEDDED and os.path.isdir(name) else name


def hub_options(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What to tell transformers of a name: its `revision`, and to read only the cache where the Hub cannot be reached.

    Left to itself it repeats every file's request for half a minute before it says so.

    Raises:
        InputError: a revision of a folder.
    """
    if revision is None:
        return _reached(name)
    if os.path.isdir(name):
        raise InputError(
            f"revision is {revision!r}, and {str(name)!r} is a folder; only a checkpoint on the Hub has revisions: "
            "leave it out"
        )
    return _reached(name) | {"revision": revision}


def _reached(name: str | Path) -> dict[str, Any]:
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        return {}
    from huggingface_hub import constants, get_session, is_offline_mode

    if not is_offline_mode():
        with contextlib.suppress(Exception):  # any failure, of any HTTP library, is the same answer
            get_session().head(constants.ENDPOINT, timeout=5)
            return {}
    return {"local_files_only": True}


def same_checkpoint(one: str | Path, other: str | Path) -> bool:
    """Whether two names, embedded ones and folders' paths among them, are of one checkpoint."""
    return lasting(resolve(one)) == lasting(resolve(other))


def find_file(name: str | Path, file: str, **options: Any) -> Path | None:
    """Where `file` of the checkpoint `name` is on this machine, fetched if need be; None where there is no such file.

    Of `options`, which are those of transformers, the ones that say where to look count.

    Raises:
        InputError: `name` is on the Hub and cannot be had.
    """
    if os.path.isdir(name):  # which knows names too long for a file, and those with a null byte
        path = Path(name, file)
        return path if path.is_file() else None
    from transformers import utils  # only a Hub name needs it

    given = {key: value for key, value in options.items() if key in _WHERE}
    if "local_files_only" not in given:
        given = hub_options(name) | given
    with loading(name):
        found: str | None = cast("Any", utils).cached_file(
            str(name),
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **given,
        )
    return Path(found) if found else None


@contextlib.contextmanager
def loading(name: str | Path) -> Generator[None]:
    """Around a library's call that reads the checkpoint `name`: its complaint becomes one `InputError`.

    Only what libraries raise of files is taken for a fault of the files. A `TypeError` or an `AttributeError` is a bug,
    and a `RuntimeError` is one too, or a full GPU; they come out as they are.

    Raises:
        InputError: the checkpoint cannot be fetched, or what is there cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    _check_json(name)
    try:
        yield
    except InputError:
        raise
    except OSError as error:  # a missing or damaged file, or no answer from the Hub
        raise InputError((cannot_load if os.path.exists(name) else _cannot_fetch)(name, error)) from error
    except (ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise InputError(cannot_load(name, error)) from error
    except Exception as error:
        if type(error) is not Exception:  # the bare class is what tokenizers, which is written in Rust, raises
            raise
        raise InputError(cannot_load(name, error)) from error


def _check_json(name: str | Path) -> None:
    """Raises `InputError` for a file of a folder that has to hold a JSON object and holds other JSON.

    transformers asks a list for its keys, which would look like a bug.
    """
    for path in (Path(name, file) for file in _JSON):
        if not os.path.isfile(path):
            continue
        stamp = os.stat(path)
        kind = _json_type(path, stamp.st_mtime_ns, stamp.st_size)
        if kind not in (None, "dict"):
            raise InputError(cannot_load(name, f"{path.name} holds a {kind}; it has to be a JSON object"))


@functools.lru_cache(maxsize=64)
def _json_type(path: Path, *stamp: int) -> str | None:
    """The type of what a JSON file holds, read once for each `stamp` of the file: a tokenizer's has megabytes.

    None for no JSON, or no text at all, which transformers says itself.
    """
    try:
        return type(json.loads(path.read_text(encoding="utf-8"))).__name__
    except ValueError:
        return None


def cannot_load(name: str | Path, error: Exception | str) -> str:
    """The message for a checkpoint that is there and cannot be used: why, and what to do."""
    where = f"at {quoted(name)}" if os.path.exists(name) else quoted(name)
    return (
        f"the checkpoint {where} cannot be loaded ({_in_one_line(error)}). Give the folder of a whole "
        'vision-language checkpoint, such as a Qwen2.5-VL or a Qwen3-VL, or use the embedded judge: "tiny"'
    )


def _cannot_fetch(name: str | Path, error: Exception) -> str:
    return (
        f"the checkpoint {quoted(name)} is not a local folder and could not be fetched from the Hugging Face Hub "
        f"({_in_one_line(error)}). Check the name and the connection, give a local folder, or use the embedded judge: "
        '"tiny"'
    )


def _in_one_line(error: Exception | str) -> str:
    return str(error).strip().partition("\n")[0][:500] or type(error).__name__
