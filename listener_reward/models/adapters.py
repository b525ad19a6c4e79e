"""Checkpoints that are an adapter: which base they stand on, and how they are put on it without being merged."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.models.hub import EMBEDDED, cannot_load, find_file, hub_options, loading, resolve

ADAPTER = "adapter_config.json"
"""The file by which PEFT's checkpoints are known."""

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def base_of(name: str | Path, **options: Any) -> str | None:
    """The checkpoint that the adapter `name` was trained on; None where `name` holds a model's own weights.

    A base that is a folder is looked for from the adapter's folder and then from the working directory.

    Args:
        name: a folder or a Hub name.
        options: those of transformers for the Hub, such as `revision`.

    Raises:
        InputError: a configuration that cannot be read or names no base, or a base whose folder is not there.
    """
    path = find_file(name, ADAPTER, **options)
    if path is None:
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{ADAPTER} has no readable base_model_name_or_path ({type(error).__name__})"
        raise InputError(cannot_load(name, reason)) from error
    if not isinstance(base, str) or not base:
        raise InputError(cannot_load(name, f"base_model_name_or_path in {ADAPTER} is {base!r}; name the base"))
    if base in EMBEDDED:
        return resolve(base)
    for folder in (path.parent / base, Path(base)):
        if os.path.isdir(folder):  # which knows names too long for a file
            return str(folder.resolve())
    parts = Path(base).parts
    for embedded, folder in EMBEDDED.items():  # of another installation of this package
        if parts[-3:] == ("tiny", "weights", folder):
            return resolve(embedded)
    if Path(base).is_absolute() or base.startswith(".") or len(parts) > 2:
        reason = f"it is an adapter to {base!r}, which is not there; set base_model_name_or_path in its {ADAPTER}"
        raise InputError(cannot_load(name, reason))
    return base


def lora_rank(name: str | Path, **options: Any) -> int:
    """The largest rank of the adapter `name`, that of single layers counted.

    Args:
        name, options: as of `base_of`.

    Raises:
        InputError: it is no LoRA adapter.
    """
    path = find_file(name, ADAPTER, **options)
    saved: Any = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    if saved.get("peft_type") != "LORA":
        raise InputError(cannot_load(name, f"it is an adapter of type {saved.get('peft_type')!r}; vLLM takes LORA"))
    patterns: dict[str, int] = saved.get("rank_pattern") or {}
    return max([int(saved["r"]), *map(int, patterns.values())])


def weights_of(name: str | Path, **options: Any) -> Path:
    """The folder on this machine with the adapter `name`, fetched if need be, for who knows of no revisions.

    Args:
        name, options: as of `base_of`.

    Raises:
        InputError: there are no weights beside its configuration.
    """
    for file in _WEIGHTS:
        if (path := find_file(name, file, **options)) is not None:
            return path.parent.resolve()
    raise InputError(cannot_load(name, f"it has no {_WEIGHTS[0]}"))


def brings_processor(name: str | Path, **options: Any) -> bool:
    """Whether a processor lies beside the adapter `name`; else its base's is meant."""
    return any(find_file(name, file, **options) for file in _PROCESSORS)


def options_of_base(base: str, options: dict[str, Any], name: str | Path) -> dict[str, Any]:
    """transformers' `options` for the adapter `name` as they hold for its `base`.

    A base has revisions of its own; PEFT keeps in the adapter's configuration which one it was trained on.
    """
    ours = ("revision", "local_files_only")
    given = hub_options(base) | {key: value for key, value in options.items() if key not in ours}
    path = find_file(name, ADAPTER, **options)
    revision = None if path is None else json.loads(path.read_text(encoding="utf-8")).get("revision")
    return given if revision is None or os.path.isdir(base) else given | {"revision": revision}


def put_on(model: Any, name: str | Path, **options: Any) -> Any:
    """The base `model` with the adapter `name` on it, unmerged: a frozen PEFT model, whose adapter is float32.

    Raises:
        InputError: an adapter that cannot be read, lacks weights, or is no change of layers.
        MissingExtraError: PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtraError(
            f'{str(name)!r} is an adapter and needs peft, which is not installed: pip install "listener-reward[train]"'
        )
    import peft

    library = cast("Any", peft)
    with loading(name):
        config = library.PeftConfig.from_pretrained(str(name), **options)
        if config.is_prompt_learning:
            reason = f"{config.peft_type} adds to the prompt; only adapters of layers, such as LoRA, are supported"
            raise InputError(cannot_load(name, reason))
        config.inference_mode = True
        adapted = library.PeftModel(model, config)
        report = adapted.load_adapter(str(name), "default", **options)
    if report.missing_keys:
        some = ", ".join(sorted(report.missing_keys)[:3])
        reason = f"{len(report.missing_keys)} of the adapter's weights are missing, among them {some}"
        raise InputError(cannot_load(name, reason))
    return adapted.eval().requires_grad_(False)
