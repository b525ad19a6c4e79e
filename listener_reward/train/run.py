"""`listener-reward train`: one YAML file, overrides on the command line, resume after an interruption."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, meant
from listener_reward.models.hub import EMBEDDED
from listener_reward.models.memory import out_of_memory
from listener_reward.models.options import Quantization
from listener_reward.models.placement import quantized
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.lora import lora_of
from listener_reward.train.resuming import check_resumable, last_checkpoint
from listener_reward.train.trainer import ListenerGRPOTrainer

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """What to train on."""

    data: str = field(
        default="",
        metadata={"help": "Pairs to train on: a file, 'tiny:train', 'hpdv2:FOLDER' or a Hub name (see load_pairs)."},
    )
    data_limit: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    image_order_seed: int = field(default=0, metadata={"help": "Seeds which of a pair's images comes first."})


class _Parser(TrlParser):
    """trl's parser; what it complains of is an `InputError` and not a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Checks the names and, as if they stood on the command line, the values of the YAML file."""
        fields = {action.dest: action for action in self._actions}
        for name, value in values.items():
            if name not in fields:
                raise InputError(f"unknown field {name!r}{meant(name, fields)}")
            if (isinstance(value, list) and fields[name].nargs is None) or (
                isinstance(value, bool) and fields[name].type in (int, float)
            ):
                raise InputError(f"{name} is {value!r}; it takes one {getattr(fields[name].type, '__name__', 'value')}")
        return super().set_defaults_with_config(
            **{name: str(value) if type(value) in (int, float) else value for name, value in values.items()}
        )


def main(argv: list[str]) -> None:
    """Trains a reasoner as `argv` says and writes the judge into `output_dir`.

    Raises:
        InputError: a file that cannot be read, an unknown field, or a value that does not fit its field.
    """
    train(*parse(argv))


def parse(argv: list[str]) -> tuple[DataArguments, ListenerGRPOConfig, ModelConfig]:
    """`--config FILE` and the fields given beside it, which win."""
    parser = _Parser((DataArguments, ListenerGRPOConfig, ModelConfig), prog="listener-reward train")  # pyright: ignore[reportArgumentType]
    if argv and argv[-1] == "--config":
        raise InputError("--config needs a file, for example --config train.yaml")
    try:
        return parser.parse_args_and_config(argv, fail_with_unknown_args=True)  # pyright: ignore[reportReturnType]
    except InputError:
        raise
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the training configuration cannot be used: {error}") from error


def train(data_args: DataArguments, args: ListenerGRPOConfig, model_args: ModelConfig) -> ListenerGRPOTrainer:
    """Trains, resumes where `args.resume_from_checkpoint` asks for it, and saves the judge."""
    if not data_args.data:
        raise InputError("data is not set; name the pairs to train on, for example data: tiny:train")
    if model_args.model_name_or_path is None:
        raise InputError("model_name_or_path is not set; name the reasoner to start from, for example tiny-base")
    if args.output_dir in EMBEDDED:
        raise InputError(
            f"output_dir is {args.output_dir!r}, the name of an embedded checkpoint, which would be loaded in "
            f"its place; choose another folder, such as ./{args.output_dir}-run"
        )
    bits = _bits(model_args)
    _check_installed(args, model_args)
    peft_config = lora_of(model_args)
    loading: dict[str, Any] = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if (revision := revision_of(model_args)) is not None:
        loading["revision"] = revision
    if bits is not None:
        loading["quantization_config"] = quantized(bits, model_args.dtype or "float32")
    given: Any = args.model_init_kwargs or {}
    args.model_init_kwargs = loading | given
    resume = checkpoint_to_resume(args)
    pairs = load_pairs(data_args.data, limit=data_args.data_limit, seed=data_args.image_order_seed)
    with out_of_memory("the trainer was set up", _LIGHTER):
        trainer = ListenerGRPOTrainer(
            model=model_args.model_name_or_path, args=args, train_dataset=pairs, peft_config=peft_config
        )
    with out_of_memory("it trained", _SMALLER):
        trainer.train(resume_from_checkpoint=resume)
    assert args.output_dir is not None
    trainer.save_judge(args.output_dir)
    as_trained = f", quantization={bits!r}" if bits else ""
    trainer.accelerator.print(
        f"The judge is in {args.output_dir}: Judge.from_pretrained({args.output_dir!r}{as_trained})"
    )
    _leave(trainer)
    return trainer


def revision_of(model_args: ModelConfig) -> str | None:
    """The policy's revision; None for the newest, which has a name that folders have, too."""
    return None if model_args.model_revision == "main" else model_args.model_revision


_LIGHTER = (
    "set use_peft: true, load_in_4bit: true for the policy or listener_options: {quantization: 4bit} for the listener, "
    "or shard the weights (listener-reward launch-config fsdp2)"
)

_SMALLER = (
    "lower per_device_train_batch_size, token_budget, max_completion_length or max_pixels, or set "
    "gradient_checkpointing: true"
)


def _bits(model_args: ModelConfig) -> Quantization | None:
    """How the frozen weights under an adapter are rounded.

    Raises:
        InputError: without adapters rounded weights would have to be trained themselves.
    """
    bits: Quantization | None = "4bit" if model_args.load_in_4bit else "8bit" if model_args.load_in_8bit else None
    if bits is not None and not model_args.use_peft:
        raise InputError(
            f"load_in_{bits} is set, and rounded weights cannot be trained; set use_peft: true, or leave it out"
        )
    return bits


def _check_installed(args: ListenerGRPOConfig, model_args: ModelConfig) -> None:
    """Raises `InputError` for a setting that names a package which is not installed, before anything is loaded."""
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    asked = [("report_to", name, name) for name in trackers if name in _TRACKERS]
    if args.use_vllm:
        asked.append(("use_vllm", "true", "vllm"))
    attention = model_args.attn_implementation
    if attention == "flash_attention_2" and find_spec("kernels") is None:  # which transformers takes instead
        asked.append(("attn_implementation", attention, "flash_attn"))
    for setting, value, package in asked:
        if find_spec(package) is None:
            install = f"pip install {package.replace('_', '-')}"
            raise InputError(f"{setting} is {value}, and {package} is not installed: {install}, or leave {setting} out")


_TRACKERS = ("wandb", "tensorboard", "mlflow", "comet_ml", "trackio", "swanlab", "clearml")
"""Trackers of transformers that are a package of the same name."""


def _leave(trainer: ListenerGRPOTrainer) -> None:
    """Ends the trackers and the process group, after which the other processes cannot be reached.

    The model's distributed wrapper goes first. If it were the last to hold the group, the group would be destroyed
    while the interpreter's lock is held, and wait for a thread of gloo's that may be waiting for that lock: the run
    would be done and not end (seen with torch 2.13).
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()  # what later releases call trainer.end()


def checkpoint_to_resume(args: ListenerGRPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or `true` for the newest whole one if any.

    With `true`, a newer checkpoint that is broken is passed over, and a warning names file and fault.

    Raises:
        InputError: the folder does not exist, or what is in it cannot be resumed.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        newest = last_checkpoint(args.output_dir or ".", logger.warning if args.process_index == 0 else None)
        return None if newest is None else str(newest)
    folder = Path(wanted)
    if not folder.is_dir():
        raise InputError(
            f"resume_from_checkpoint is {str(wanted)!r}, which is not a folder; give a checkpoint's folder, or "
            "true for the newest one in output_dir"
        )
    check_resumable(folder)
    return str(wanted)
