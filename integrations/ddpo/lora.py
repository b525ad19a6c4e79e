"""The trained part of a diffusers pipeline: LoRA on its denoisers, or all of their weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from listener_reward.errors import InputError, MissingExtraError

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict
except ImportError as error:
    raise MissingExtraError('DDPO needs peft: pip install "listener-reward[diffusers]"') from error

DENOISERS = ("unet", "transformer", "transformer_2")
"""The names of a diffusers pipeline's denoising networks."""

ADAPTER = "default"


def denoisers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's denoisers by name.

    Raises:
        InputError: it has none of `DENOISERS`.
    """
    found = {name: getattr(pipeline, name, None) for name in DENOISERS}
    modules = {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not modules:
        raise InputError(f"{type(pipeline).__name__} has no {', '.join(DENOISERS)}; give a diffusers pipeline")
    return modules


def add_lora(
    modules: Mapping[str, torch.nn.Module], *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> None:
    """Adds float32 LoRA layers to each module. The layers change nothing yet; their first values depend on `seed`
    alone.

    Raises:
        InputError: a module has adapters already, or no layer with a name that ends in one of `targets`.
    """
    for name, module in modules.items():
        if getattr(module, "peft_config", None):
            raise InputError(
                f"the pipeline's {name} has adapters already; merge them first: pipeline.fuse_lora() and "
                "pipeline.unload_lora_weights()"
            )
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")  # pyright: ignore[reportArgumentType]
        add = getattr(module, "add_adapter", None)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                inject_adapter_in_model(config, module, ADAPTER) if add is None else add(config, ADAPTER)
        except ValueError as error:
            raise InputError(f"lora_targets is {list(targets)}, which does not fit the {name}: {error}") from error
        for parameter in trainable([module]):
            parameter.data = parameter.data.float()  # bfloat16 would round most of an update away


def trainable(modules: Iterator[torch.nn.Module] | Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that take gradients, in the modules' order."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def adapters_off(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """The modules as they were before `add_lora`."""
    layers = [layer for module in modules.values() for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_lora(pipeline: Any, modules: Mapping[str, torch.nn.Module], folder: str | Path) -> None:
    """Writes each module's LoRA into `folder`.

    The files are read by the pipeline's own `load_lora_weights`, alpha included, if there is one. Three cases, by
    module:

    - `pipeline.load_lora_weights(folder)`;
    - a second denoiser such as Wan 2.2's: `pipeline.load_lora_weights(folder/transformer_2,
      load_into_transformer_2=True)`;
    - a pipeline without a LoRA loader such as PixArt's: `pipeline.transformer =
      PeftModel.from_pretrained(pipeline.transformer, folder/transformer)`.
    """
    folder = Path(folder)
    save = getattr(pipeline, "save_lora_weights", None)
    known = inspect.signature(save).parameters if save is not None else {}
    for name, module in modules.items():
        weights = get_peft_model_state_dict(module, adapter_name=ADAPTER)
        configs: Any = module.peft_config
        config = configs[ADAPTER]
        into = folder if f"{name}_lora_layers" in known else folder / name
        main = name if f"{name}_lora_layers" in known else name.removesuffix("_2")
        if save is not None and f"{main}_lora_layers" in known:
            # Without the metadata alpha is lost, and loading takes it for equal to the rank.
            save(into, **{f"{main}_lora_layers": weights, f"{main}_lora_adapter_metadata": config.to_dict()})
        else:
            into.mkdir(parents=True, exist_ok=True)
            weights = {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}
            save_file(weights, into / "adapter_model.safetensors")
            config.save_pretrained(into)
