"""`listener-reward train`: one YAML file, overrides on the command line, resume after an interruption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, TrlParser, get_peft_config

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.trainer import ListenerGRPOTrainer, last_checkpoint

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""LoRA on the language model's projections; `all-linear` would also adapt the vision tower."""


@dataclass
class DataArguments:
    """What to train on."""

    data: str = field(
        default="",
        metadata={"help": "Pairs to train on: a file, 'tiny:train', 'hpdv2:FOLDER' or a Hub name (see load_pairs)."},
    )
    data_limit: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    data_seed: int = field(default=0, metadata={"help": "Seeds which of a pair's images comes first."})


def main(argv: list[str]) -> None:
    """Trains a reasoner as `argv` says and writes the judge into `output_dir`."""
    parser = TrlParser((DataArguments, ListenerGRPOConfig, ModelConfig), prog="listener-reward train")  # pyright: ignore[reportArgumentType]
    data_args, args, model_args = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
    train(data_args, args, model_args)


def train(data_args: DataArguments, args: ListenerGRPOConfig, model_args: ModelConfig) -> ListenerGRPOTrainer:
    """Trains, resumes where `args.resume_from_checkpoint` asks for it, and saves the judge."""
    if not data_args.data:
        raise InputError("data is not set; name the pairs to train on, for example data: tiny:train")
    if model_args.model_name_or_path is None:
        raise InputError("model_name_or_path is not set; name the reasoner to start from, for example tiny-base")
    if model_args.use_peft and model_args.lora_target_modules is None:
        model_args.lora_target_modules = [LORA_TARGETS]
    peft_config: Any = get_peft_config(model_args)
    if peft_config is not None and peft_config.target_modules == {LORA_TARGETS}:
        peft_config.target_modules = LORA_TARGETS  # one string is a pattern, a list holds names
    trainer = ListenerGRPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=load_pairs(data_args.data, limit=data_args.data_limit, seed=data_args.data_seed),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    assert args.output_dir is not None
    trainer.save_judge(args.output_dir)
    trainer.accelerator.print(f"The judge is in {args.output_dir}: Judge.from_pretrained({args.output_dir!r})")
    trainer.end()
    return trainer


def checkpoint_to_resume(args: ListenerGRPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, or `true` for the newest complete one if any."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        return str(wanted)
    newest = last_checkpoint(args.output_dir or ".")
    return None if newest is None else str(newest)
