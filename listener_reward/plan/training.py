"""What a training run needs of each GPU: `listener-reward plan train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.listener import OWN_BASE, choose_listener
from listener_reward.models.options import is_address
from listener_reward.plan.checkpoints import Checkpoint, dtype_of
from listener_reward.plan.launches import Launch
from listener_reward.plan.passes import Architecture
from listener_reward.plan.plans import CONTEXT, Phase, Plan
from listener_reward.plan.reading import Asked, decoding_parts, fullest_pass, largest, listening, looked
from listener_reward.plan.tokens import Pairs, assumed, of_data
from listener_reward.train.lora import lora_of
from listener_reward.train.run import parse, revision_of

BUCKETS = 2_000_000_000
"""Bytes of DeepSpeed's buckets for communication, at its defaults: two of half a billion numbers in bfloat16."""


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted where the data is not here, or not known before the run."""

    image_size: tuple[int, int] | None = None
    """Width and height of every image; None reads the data."""
    prompt_tokens: int = 40
    pairs: int | None = None
    """Pairs of the data."""
    thought: int | None = None
    """Tokens of a completion on average, for the time; None for the longest."""


def plan_training(
    argv: Sequence[str],
    *,
    launch: Launch | None = None,
    assumptions: Assumptions | None = None,
    on_cpu: bool = False,
) -> Plan:
    """The plan of `listener-reward train` with the arguments `argv`.

    Args:
        argv: `--config FILE` and fields beside it.
        launch: what each of several GPUs holds; None for one GPU.
        assumptions: what stands in for data that is not here.
        on_cpu: plan for this package's own runs on a CPU, in float32, as they can be measured.

    Raises:
        InputError: a configuration that cannot be used, a checkpoint or data that cannot be found.
    """
    run = _Run(argv, launch or Launch(), assumptions or Assumptions(), on_cpu)
    return run.plan()


class _Run:
    def __init__(self, argv: Sequence[str], launch: Launch, assumptions: Assumptions, on_cpu: bool):
        self.launch, self.assumptions, self.on_cpu = launch, assumptions, on_cpu
        # The parser looks for a GPU and refuses bf16 without one; what is planned for need not be here.
        asked = _given(argv)
        self.data, self.args, self.model_args = parse(
            [*argv, "--bf16", "false", "--fp16", "false", "--use_cpu", "true"]
        )
        half = None if str(asked.get("bf16", not on_cpu)).lower() == "false" else torch.bfloat16
        self.autocast = torch.float16 if str(asked.get("fp16", "false")).lower() == "true" else half
        if self.model_args.model_name_or_path is None:
            raise InputError("model_name_or_path is not set; name the reasoner to start from, for example tiny-base")
        name = self.model_args.model_name_or_path
        self.policy_checkpoint = Checkpoint.of(
            name, card=self.args.card, max_pixels=self.args.max_pixels, revision=revision_of(self.model_args)
        )
        if self.policy_checkpoint.adapter is not None:
            raise InputError(f"{name!r} is an adapter, and new adapters need whole weights under them; merge it first")
        self.thought = self.args.max_completion_length or 256
        self.sampled_together = self.args.steps_per_generation or self.args.gradient_accumulation_steps
        """Micro-batches whose completions are sampled together."""
        self.notes = self.policy_checkpoint.notes
        card = self.policy_checkpoint.card
        self.pairs = self._pairs(card.format)
        self.notes += self.pairs.notes
        self.policy, self.listener = self._policy(), self._listener(card.listener)

    # ------------------------------------------------------------------------------------------------- what there is
    def _pairs(self, chat_format: ChatFormat) -> Pairs:
        return find_pairs(self.policy_checkpoint, chat_format, self.data, self.assumptions)

    def _policy(self) -> Architecture:
        model_args, args, config = self.model_args, self.args, self.policy_checkpoint.config
        given: Any = args.model_init_kwargs or {}
        self.loaded = dtype_of(given.get("dtype") or model_args.dtype, config)
        # FSDP2 gathers weights in the precision of the arithmetic, and DeepSpeed holds them in it.
        computed = self.loaded if self.launch.sharding in ("none", "ddp") else self.autocast or self.loaded
        return Architecture(
            config,
            computed,
            bits=bits_of(model_args),
            lora=lora_of(model_args),
            trained=True,
            checkpointing=bool(args.gradient_checkpointing),
            autocast=self.autocast,
            on_cpu=self.on_cpu,
        )

    def _listener(self, own: str | None) -> Architecture | None:
        """The listener's model; None for nobody, for the policy's own base, and for one behind an address."""
        name = choose_listener(self.args.listener or None, own)
        if name in (None, OWN_BASE) or is_address(name):
            return None
        assert isinstance(name, str)
        options: Any = self.args.listener_options or {}
        found = Checkpoint.of(name, revision=options.get("revision"))
        self.notes += [note for note in found.notes if note not in self.notes]
        place = options.get("device") or options.get("device_map")
        if place is not None and str(place) not in ("cpu", "cuda", "cuda:0"):
            self.notes.append(f"the listener is counted on the policy's GPU; listener_options put it on {place}")
        default = "float32" if self.on_cpu else "bfloat16"
        dtype = dtype_of(options.get("dtype") or self.args.listener_dtype or default, found.config)
        return Architecture(found.config, dtype, bits=bits_of(SimpleNamespace(**options)))

    # ------------------------------------------------------------------------------------------------------ the plan
    def plan(self) -> Plan:
        args = self.args
        group = args.num_generations or 1
        rows = args.per_device_train_batch_size
        round_rows = rows * self.sampled_together
        longest = self.pairs.longest
        prompts = max(1, math.ceil(round_rows / group))
        asked = Asked(
            longest,
            prompts,
            round_rows,
            self.thought,
            args.token_budget,
            batch_size=args.listener_batch_size,
            group=min(group, round_rows),
        )
        tower = self.policy.config.vision_config
        patch = 3 * tower.temporal_patch_size * tower.patch_size**2 * 4
        patches = round_rows * patch * sum(math.prod(grid) for grid in longest.grids)
        held = self._held()
        phases = [self._rollout(asked, held, patches)]
        named = choose_listener(args.listener, self.policy_checkpoint.card.listener)
        if self.listener is not None or (named and not is_address(named)):
            parts, flops = listening(self.listener or self.policy, asked)
            phases.append(Phase("listener", held | {"patches": patches} | parts, flops))
        micro = min(rows, round_rows)
        phases.append(self._loss(asked, held, patches, patches * micro // round_rows, micro, min(group, micro)))
        phases.append(self._update(held, patches))
        return self._finished(phases, group * 1.0, round_rows)

    def _finished(self, phases: list[Phase], group: float, round_rows: int) -> Plan:
        args, launch = self.args, self.launch
        rounds = args.gradient_accumulation_steps / (self.sampled_together * args.num_iterations)
        passes = float(args.gradient_accumulation_steps)
        # Phases are planned for the longest pairs. Time goes by the mean.
        mean = self.assumptions.thought or self.thought
        longest, typical = self.pairs.longest.total, self.pairs.mean
        rows = {"rollout": rounds, "listener": rounds, "loss": passes, "update": 1.0}
        share = (typical + mean * min(group, round_rows)) / (longest + self.thought * min(group, round_rows))
        for phase in phases:
            phase.flops *= rows[phase.name] * share
            phase.moved *= rows[phase.name] * mean / self.thought
        completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * launch.processes
        steps = float(args.max_steps)
        if args.max_steps <= 0:
            steps = math.ceil(args.num_train_epochs * self.pairs.number * group * args.num_iterations / completions)
        if launch.sharding in ("zero2", "zero3", "fsdp"):
            self.notes.append(f"{launch.sharding}: what is sharded follows its documentation and was not measured")
        if self.args.use_vllm:
            self.notes.append("use_vllm: vLLM's own memory is vllm_gpu_memory_utilization of each GPU, beside the rest")
        policy = self.policy
        parameters = {"policy": policy.parameters, "trained": sum(p.numel() for p in policy.trainable)}
        if self.listener is not None:
            parameters["listener"] = self.listener.parameters
        return Plan(
            "train",
            self.pairs,
            self.thought,
            phases,
            launch.processes,
            "step",
            steps,
            parameters,
            self.notes,
            self._changes(),
        )

    # ------------------------------------------------------------------------------------------------------- phases
    def _held(self) -> dict[str, int]:
        """What is in memory all the time, after the first step."""
        policy, launch, count = self.policy, self.launch, self.launch.processes
        trained = sum(p.numel() for p in policy.trainable)
        sharded = launch.sharding in ("zero3", "fsdp")
        whole = policy.weight_bytes
        if launch.sharding == "fsdp":  # which keeps what was loaded, and gathers it in the arithmetic's precision
            whole = policy.parameters * (torch.finfo(self.loaded).bits // 8)
        weights = whole + policy.adapter_bytes
        reference = whole if self.args.beta and policy.lora is None else 0
        held = {"weights": weights // count if sharded else weights}
        if sharded:
            held["gathered layers"] = 2 * policy.largest_layer
        if reference:
            held["reference"] = reference // count if sharded else reference
        if launch.weights_offloaded:
            held["weights"] = 0
        if self.listener is not None:
            held["listener"] = self.listener.weight_bytes
        states = self._state_bytes(trained)
        if launch.sharding in ("zero2", "zero3"):
            states += 4 * trained  # DeepSpeed's own float32 copy
        if launch.sharding not in ("none", "ddp"):
            states //= count
        held["optimizer"] = 0 if launch.optimizer_offloaded else states
        if launch.sharding in ("zero2", "zero3"):
            held["buckets"] = BUCKETS
        if not self.on_cpu:
            held["CUDA"] = CONTEXT
        return held

    def _state_bytes(self, trained: int) -> int:
        """Of the optimizer: Adam's two moments, in the trained weights' own dtype, or as its name says."""
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if "8bit" in name:
            return 2 * trained
        if "adafactor" in name or name == "sgd":
            return 0
        return 2 * sum(p.numel() * self._trained_size(p) for p in self.policy.trainable)

    def _trained_size(self, weight: Any) -> int:
        """Bytes a number of what is trained: adapters are float32, whole weights as they were loaded."""
        if self.policy.lora is not None:
            return weight.element_size()
        return torch.finfo(self.loaded).bits // 8

    def _gradients(self) -> int:
        """Bytes of all gradients on one GPU."""
        launch, count = self.launch, self.launch.processes
        size = sum(p.numel() * self._trained_size(p) for p in self.policy.trainable)
        if launch.sharding in ("zero2", "zero3") and self.autocast is not None:
            size = sum(p.numel() * 2 for p in self.policy.trainable)
        if launch.sharding == "ddp":
            return 2 * size  # DDP sums them in buckets of its own
        return size if launch.sharding == "none" else size // count

    def _rollout(self, asked: Asked, held: dict[str, int], patches: int) -> Phase:
        policy, args = self.policy, self.args
        parts = dict(held) | {"patches": patches}
        if args.use_vllm:
            return Phase("rollout", parts, 0.0)
        if self.launch.sharding == "zero3" and args.ds3_gather_for_generation:
            parts["gathered layers"] = policy.weight_bytes
        found, flops, moved = decoding_parts(policy, asked)
        look = looked(policy, asked.pair.grids * asked.prompts, at_once=None)
        found = largest([found, {"activations": look.peak}])
        return Phase("rollout", parts | found, flops + look.flops, moved)

    def _loss(self, asked: Asked, held: dict[str, int], patches: int, own: int, rows: int, group: int) -> Phase:
        """`rows` of a micro-batch in groups, of which the fullest pass keeps its activations."""
        args, policy = self.args, self.policy
        groups = math.ceil(rows / group)
        lengths = [(asked.pair.total, [self.thought] * min(group, rows - group * n)) for n in range(groups)]
        prompts, continuations, sizes = fullest_pass(lengths, args.token_budget)
        grids = list(asked.pair.grids) * len(prompts)
        again = args.gradient_accumulation_steps > 1
        learnt, head = policy.learn(prompts, continuations, grids, added=again)
        # A micro-batch's own copy of its patches goes before the backward pass, in which torch's head takes more.
        parts = held | {
            "patches": patches + (0 if self.on_cpu else own),
            "activations": learnt.peak - head,
            "logits": head,
            "gradients": self._gradients() if again else 0,
        }
        if not again and self.launch.sharding in ("fsdp", "zero2", "zero3"):
            parts["gradients"] = self._gradients()
        flops = learnt.flops * sum(sizes) / max(sizes)
        forward = learnt.flops / 4 if args.gradient_checkpointing else learnt.flops / 3
        extra = (len(sizes) - 1) / len(sizes)  # computed again, because one pass's activations are kept
        extra += bool(args.beta) + (self.sampled_together * args.num_iterations > args.gradient_accumulation_steps)
        return Phase("loss", parts, flops + extra * forward * sum(sizes) / max(sizes))

    def _update(self, held: dict[str, int], patches: int) -> Phase:
        parts = held | {"patches": patches, "gradients": self._gradients()}
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if name == "adamw_torch":  # which works on all weights at once
            parts["activations"] = self._gradients()
        return Phase("update", parts)

    def _changes(self) -> dict[str, str]:
        args, policy = self.args, self.policy
        fewer = [] if policy.lora is not None else ["use_peft: true trains adapters"]
        whole = self.launch.sharding in ("none", "ddp") and policy.lora is None
        shard = ["launch-config fsdp2 or zero3 shards it over the GPUs"] if whole else []
        half = ["dtype: bfloat16"] if policy.lora is not None and self.loaded == torch.float32 else []
        listen = ["listener: base needs none"] if policy.lora is not None else ["a smaller listener"]
        keep = [] if args.gradient_checkpointing else ["gradient_checkpointing: true"]
        small = ["smaller per_device_train_batch_size", "token_budget", "max_completion_length", "max_pixels"]
        changes = {
            "weights": [*half, *shard] or ["a smaller model"],
            "listener": listen,
            "reference": ["beta: 0", *fewer],
            "optimizer": [*fewer, *shard, "optim: adamw_bnb_8bit"],
            "gradients": [*fewer, *shard],
            "activations": [*keep, *small],
            "logits": ["token_budget", "per_device_train_batch_size"],
            "keys and values": ["fewer steps_per_generation", "per_device_train_batch_size", "max_completion_length"],
            "patches": ["fewer steps_per_generation", "per_device_train_batch_size", "max_pixels"],
            "gathered layers": ["launch-config fsdp2", "ds3_gather_for_generation: false"],
        }
        return {part: "; ".join(some) for part, some in changes.items() if some}


def find_pairs(checkpoint: Checkpoint, chat_format: ChatFormat, data: Any, assumptions: Assumptions) -> Pairs:
    """The pairs of the data, or those that stand for it where an image size is given."""
    number = assumptions.pairs or data.data_limit or 0
    if assumptions.image_size is not None:
        size = assumptions.image_size
        return assumed(checkpoint, chat_format, size, assumptions.prompt_tokens, number, "assumed")
    if not data.data:
        raise InputError("data is not set; name the pairs to train on, or give --image-size WIDTHxHEIGHT")
    return of_data(checkpoint, chat_format, data.data, data.data_limit, data.image_order_seed)


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """What the YAML file and the arguments say themselves, by name."""
    found: dict[str, Any] = {}
    for place, word in enumerate(argv):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        value = value if equals else next(iter(argv[place + 1 : place + 2]), "")
        if name == "config" and Path(value).is_file():
            try:
                found = (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}) | found
            except (ValueError, yaml.YAMLError):
                return {}  # which the parser itself says
        else:
            found[name] = value
    return found


def bits_of(options: Any) -> int:
    """Bits of a weight, by the names that options for quantisation go by; 16 for none."""
    named = str(getattr(options, "quantization", None) or "").lower()
    if getattr(options, "load_in_4bit", False) or "4" in named:
        return 4
    return 8 if getattr(options, "load_in_8bit", False) or "8" in named else 16
