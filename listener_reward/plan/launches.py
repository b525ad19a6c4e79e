"""An accelerate configuration, as far as it says what each GPU holds."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from listener_reward.errors import InputError

Sharding = Literal["none", "ddp", "fsdp", "zero2", "zero3"]


@dataclass(frozen=True)
class Launch:
    """How many processes train, and which of weights, gradients and optimizer each holds a part of."""

    processes: int = 1
    sharding: Sharding = "none"
    optimizer_offloaded: bool = False
    """Whether the optimizer is in CPU memory."""
    weights_offloaded: bool = False

    @classmethod
    def of(cls, name: str | None, gpus: int | None) -> Launch:
        """The configuration of `launch-config NAME`, or a file; `gpus` instead of its number of processes.

        Raises:
            InputError: there is no such configuration, or no GPU.
        """
        if gpus is not None and gpus < 1:
            raise InputError(f"gpus is {gpus}; give at least 1")
        if name is None:
            return cls(gpus or 1, "ddp" if (gpus or 1) > 1 else "none")
        neither = f"launch is {name!r}, neither a name of launch-config nor a readable file"
        folder = resources.files("listener_reward") / "train" / "launch"
        packaged = folder.joinpath(f"{name}.yaml")
        try:
            text = packaged.read_text("utf-8") if packaged.is_file() else Path(name).read_text(encoding="utf-8")
            found: Any = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(neither) from error
        if not isinstance(found, dict):
            raise InputError(neither)
        kind = str(found.get("distributed_type", "NO"))
        deepspeed, fsdp = _mapping(found, "deepspeed_config", name), _mapping(found, "fsdp_config", name)
        stage = _number(deepspeed, "zero_stage", 2, name, least=0)
        processes = gpus or _number(found, "num_processes", 1, name, least=1)
        sharding: Sharding
        if kind == "DEEPSPEED":
            sharding = "zero3" if stage == 3 else "zero2"
        elif kind == "FSDP":
            sharding = "fsdp"
        else:
            sharding = "ddp" if processes > 1 else "none"
        offloaded = bool(fsdp.get("fsdp_offload_params"))
        return cls(
            processes,
            sharding,
            offloaded or deepspeed.get("offload_optimizer_device", "none") != "none",
            offloaded or deepspeed.get("offload_param_device", "none") != "none",
        )


def _mapping(found: dict[str, Any], field: str, name: str) -> dict[str, Any]:
    """The settings in a field, none where it is left out or empty."""
    value = found.get(field) or {}
    if not isinstance(value, dict):
        raise InputError(f"launch is {name!r}, whose {field} is {value!r:.80}; it holds settings, one a line")
    return value


def _number(found: dict[str, Any], field: str, default: int, name: str, *, least: int) -> int:
    value = default if found.get(field) is None else found[field]
    try:
        if isinstance(value, bool) or int(value) < least or int(value) != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"launch is {name!r}, whose {field} is {value!r:.80}; give a whole number of at least {least}"
        ) from None
    return int(value)
