"""Training scenarios for `test_distributed.py`, in the process group they are launched in or in a single process.

    torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py OUT ddp fsdp2

A scenario is the same work however many processes share it: its completions are written down here or decoded greedily,
for a process's random numbers depend on its rank. Only `RESUMED` samples, and is compared with itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from trl.trainer import grpo_trainer

from listener_reward.datasets import load_pairs
from listener_reward.prefix.attention import base_model
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.trainer import ListenerGRPOTrainer

LAUNCH = Path(__file__).parents[1] / "listener_reward" / "train" / "launch"

SPANNING = "one group on both processes"
OWN = "own groups and a reference"
LORA = "LoRA with everything"
GREEDY = "rollouts"
GATHERED = "rollouts with images gathered"
UNEVEN = "rollouts of one prompt here and two there"
SPLIT = "rows split by the token budget"
RESUMED = "resumed"

SCENARIOS: dict[str, dict[str, Any]] = {
    SPANNING: {"num_generations": 8},
    OWN: {"num_generations": 4, "beta": 0.1},
    LORA: {  # log-probabilities of the old policy too: num_iterations asks for them
        "num_generations": 8,
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "gradient_checkpointing": True,
    },
    GREEDY: {"num_generations": 4, "generation_kwargs": {"do_sample": False}},
    GATHERED: {"num_generations": 4, "generation_kwargs": {"do_sample": False}, "gather_images": True},
    UNEVEN: {  # a pass of the prefill for each prompt
        "num_generations": 2,
        "generation_kwargs": {"do_sample": False},
        "shuffle_dataset": False,
        "token_budget": 1,
        "ds3_gather_for_generation": False,
    },
    SPLIT: {"num_generations": 8, "beta": 0.1, "token_budget": 90},  # more passes where completions are longer
    RESUMED: {
        "num_generations": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
    },
}
"""Fields of the configuration; a micro-batch has eight completions over all processes."""

LAUNCHES = {
    "ddp": tuple(SCENARIOS),
    "fsdp2": (SPANNING, OWN, LORA, SPLIT, UNEVEN, RESUMED),
    "zero2": (SPANNING, LORA, SPLIT, RESUMED),
    "zero3": (SPANNING, OWN, LORA, SPLIT, UNEVEN, RESUMED),
}
"""What is run by which launch: all by DDP, and what weights in parts could break by the others."""

THOUGHTS = (
    "image 1 : two right red right circles right clean . image 2 : one wrong red right star wrong clean .",
    "image 1 : one wrong blue wrong square wrong faded . image 2 : two right red right circles right clean .",
    "image 2 : two right red right circles right clean .",
)


class Fixed(ListenerGRPOTrainer):
    """Completions that depend on their place in the whole batch and on the step, and on nothing else.

    The listener is given three thoughts of the first half of a batch, and none or one of the second.
    """

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        processor: Any = self.processing_class
        tokenizer = processor.tokenizer
        size, whole = len(prompt_ids), len(prompt_ids) * self.accelerator.num_processes
        completions = []
        for row in range(size):
            place = self.accelerator.process_index * size + row
            first_half = place * 2 < whole
            formed = place % 4 != 3 if first_half else place % 4 == 1 and self.state.global_step > 0
            thought = THOUGHTS[place % len(THOUGHTS)]
            text = f"<think> {thought} </think><answer>{1 + place % 2}</answer>" if formed else thought[: 9 + place]
            completions.append([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        return completions, None


def run(name: str, out: Path, processes: int, **overrides: Any) -> dict[str, Any]:
    """Trains one scenario and returns what there is to compare."""
    defaults = {
        "output_dir": str(out / name),
        "listener": "tiny-listener",
        "per_device_train_batch_size": 8 // processes,
        "max_completion_length": 40,
        "max_steps": 2,
        "optim": "sgd",  # so that the change of the weights is the gradient, and not its sign
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    pairs = load_pairs("tiny:train", limit=4)
    if name == UNEVEN:
        pairs = pairs.select([0, 0, 1, 2])

    def trainer(**more: Any) -> Any:
        args = ListenerGRPOConfig(**(defaults | SCENARIOS[name] | overrides | more))
        kind = ListenerGRPOTrainer if "generation_kwargs" in SCENARIOS[name] or name == RESUMED else Fixed
        lora = LoraConfig(r=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM") if name == LORA else None
        return kind("tiny-base", args, pairs, peft_config=lora)

    first = trainer()
    start = copy(first.model.state_dict())
    heard = listened(first)
    passes: list[bool] = []
    base_model(first.model).model.language_model.register_forward_pre_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    with gathered() as sizes:
        first.train()
    end = copy(first.accelerator.get_state_dict(first.model_wrapped))
    result = {
        "distributed": first.accelerator.distributed_type.value,
        "processes": first.accelerator.num_processes,
        "sharing": first.sharing,
        "sharded": {type(module).__name__ for module in first.model.modules() if isinstance(module, FSDPModule)},
        "metrics": [entry for entry in first.state.log_history if "reward" in entry],
        "start": start,  # whole in a single process
        "end": end,  # sharded weights are gathered by the first process
        "heard": heard,
        "passes": sum(passes),
        "gathered": sum(sizes),
    }
    first.save_judge(out / name / f"judge-{first.accelerator.process_index}")
    if name == RESUMED:
        again = trainer(output_dir=str(out / "again"))
        again.train(resume_from_checkpoint=str(out / name / "checkpoint-1"))
        result["resumed"] = copy(again.accelerator.get_state_dict(again.model_wrapped))
    return result


def copy(weights: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (weights or {}).items()}


def listened(trainer: ListenerGRPOTrainer) -> list[int]:
    """How many thoughts this process's listener is given, call by call."""
    counts: list[int] = []
    listener: Any = trainer.listener
    stock = listener.p_first

    def counted(chats: Any, traces: Any) -> Any:
        counts.append(len(traces))
        return stock(chats, traces)

    object.__setattr__(listener, "p_first", counted)
    return counts


@contextlib.contextmanager
def gathered() -> Iterator[list[int]]:
    """The bytes that this process gives to `gather_object`, call by call."""
    sizes: list[int] = []
    stock = grpo_trainer.gather_object

    def counted(values: Any) -> Any:
        sizes.append(len(pickle.dumps(values)))
        return stock(values)

    with mock.patch.object(grpo_trainer, "gather_object", counted):
        yield sizes


def launched_with(name: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file NAME.yaml --num_processes 2` gives to its processes."""
    line = f"--config_file {LAUNCH / name}.yaml --num_processes 2 --main_process_port 0 any.py"
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line.split()))
    if args.use_deepspeed:
        config: Any = defaults
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


@contextlib.contextmanager
def on_cpu(name: str) -> Iterator[dict[str, Any]]:
    """A launch of `launch/NAME.yaml` without a GPU, and the fields of the configuration that go with it.

    accelerate 1.15 has FSDP for accelerators alone: it asks for the distributed type. Told that gloo is one, it shards
    on the CPU, and all that follows is its own code and torch's. DeepSpeed has a CPU accelerator of its own.
    """

    def gloo(*_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    if name == "ddp":
        yield {}
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, launched_with(name) | {"ACCELERATE_TORCH_DEVICE": "cpu"}))
        if name == "fsdp2":
            stack.enter_context(mock.patch.object(PartialState, "_prepare_backend", gloo))
        yield {"use_cpu": False, "ddp_backend": "gloo"}


def main(out: Path, launches: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # each trainer ends with a garbage collection, which need not look at what was imported
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for launch in launches:
        with on_cpu(launch) as fields:
            for name in LAUNCHES[launch]:
                torch.save(run(name, out / launch, world, **fields), out / launch / f"{name}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
