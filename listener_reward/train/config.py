"""The configuration of listener-shaped GRPO: trl's, with the paper's defaults and the listener's fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from listener_reward.errors import InputError
from listener_reward.models.options import check_options
from listener_reward.prefix.attention import KERNELS
from listener_reward.shaping import WEIGHTS
from listener_reward.trace import Masking

AS_COPIES = {"share_rollout": False, "share_logprobs": False, "share_listener": False, "share_groups": False}
"""Every completion pays for its own prompt and images."""

ALL_OFF = {**AS_COPIES, "decode_images_once": False, "gather_images": True, "exact_resume": False}
"""The switches as stock trl has it: what there is to compare with, and where to go if one of them is in the way."""


@dataclass
class ListenerGRPOConfig(GRPOConfig):
    """trl's `GRPOConfig` with the listener's fields. Every field of trl's works as it does there."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "listener_options"]

    card: str | None = field(
        default=None,
        metadata={
            "help": "A file with the policy's card, in place of the one that its checkpoint has: the question, tags "
            "and labels to train in. `listener-reward card` writes one; the trained judge keeps it."
        },
    )
    listener: str | None = field(
        default=None,
        metadata={
            "help": "Who listens: a checkpoint (folder, Hub name or embedded name), 'base' for the policy's own base "
            "with its adapters off (needs LoRA), 'none' (needs a listener weight of 0), or nothing for the listener "
            "that the policy's checkpoint names. An address such as 'http://localhost:8000/v1' is that listener behind "
            "an OpenAI-compatible server, which costs the trainer no memory."
        },
    )
    listener_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of a listener loaded from a checkpoint; by default bfloat16 on a GPU, else float32."},
    )
    listener_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "How a listener is loaded from a checkpoint, by the names of docs/options.md, for example "
            "{quantization: 4bit, device: cuda:1, max_pixels: 401408, memory: 8GB}."
        },
    )
    max_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Larger pictures are scaled down to this many pixels before the policy sees them; the trained "
            "judge keeps the limit. Nothing for the checkpoint's own."
        },
    )
    listener_batch_size: int = field(
        default=32, metadata={"help": "Thoughts that the listener reads in one forward pass."}
    )
    listener_grounding: float | None = field(
        default=None,
        metadata={
            "help": "How much the listener discounts a thought that it, looking at the images, would not have written "
            "itself: its confidence shrinks towards 1/2 by exp(grounding * mean log-probability per token). 0 is the "
            "paper's listener; nothing takes what the policy's checkpoint says."
        },
    )
    masking: Masking = field(
        default="answer",
        metadata={
            "help": "What is removed from a thought before the listener reads it: 'answer' (the answer tag, the "
            "paper's reading) or 'verdict' (also sentences that say which image is better)."
        },
    )
    gain_weight: float = field(
        default=0.0,
        metadata={
            "help": "Beyond the paper: weight of a reward for what the listener gains over its view without a thought "
            "(docs/method.md). With reward_weights [1, 0.5, 0] and gain_weight 0.5 the study's judges were better "
            "where votes are noisy."
        },
    )
    listener_on_failure: str = field(
        default="mask",
        metadata={
            "help": "What a NaN from the listener does: 'mask' leaves the completion out of its group's advantages and "
            "counts it, 'raise' stops the run. It is never a reward of zero."
        },
    )
    malformed_rounds: int = field(
        default=20,
        metadata={
            "help": "Stop, with one of the completions, after so many rounds of rollouts in a row whose completions "
            "are all malformed: they earn nothing, and nothing is learnt from them. 0 goes on."
        },
    )
    decode_images_once: bool = field(
        default=True,
        metadata={
            "help": "Decode each image once per generation round, and preprocess it once for each of the round's two "
            "batches (rollout and log-probabilities); off does both for every completion."
        },
    )
    share_rollout: bool = field(
        default=True,
        metadata={
            "help": "Prefill each prompt once for its group's completions, and stop paying for finished ones; the "
            "tokens are the same."
        },
    )
    share_logprobs: bool = field(
        default=True,
        metadata={
            "help": "Compute log-probabilities (policy, old, reference) and the loss with each group's images and "
            "prompt once; equal up to rounding."
        },
    )
    share_listener: bool = field(
        default=True,
        metadata={"help": "Let the listener read a group's thoughts after one prompt and its images once."},
    )
    share_groups: bool = field(
        default=True,
        metadata={
            "help": "Shuffle a generation round by whole groups, so that micro-batches hold them; off shuffles rows."
        },
    )
    share_attention: str = field(
        default="sdpa",
        metadata={
            "help": "How the attention of a shared row is computed: 'sdpa', or 'flex' for FlexAttention, which "
            "compiles and needs a GPU; compare them with `listener-reward bench grpo --attention`."
        },
    )
    token_budget: int = field(
        default=16384,
        metadata={
            "help": "Tokens of the language model in one forward pass of the rollout's prefill, the listener, the "
            "shared log-probabilities and the loss; groups that do not fit are split over several, each with the "
            "prompt again. In the loss all passes but the last are computed twice, so that the activations of one are "
            "all that is kept. per_device_train_batch_size still bounds the rows of a micro-batch."
        },
    )
    gather_images: bool = field(
        default=False,
        metadata={"help": "Send every prompt's images to every process for the completions table, as stock trl does."},
    )
    exact_resume: bool = field(
        default=True,
        metadata={"help": "Resume with the saved weights and the data order of the run; off does what stock trl does."},
    )
    reward_weights: list[float] | None = field(
        default_factory=lambda: list(WEIGHTS),
        metadata={"help": "Weights of the format, accuracy and listener rewards; [1, 1, 0] is accuracy-only GRPO."},
    )
    loss_type: str = field(default="grpo", metadata={"help": "trl's loss_type; the paper's is 'grpo', trl's 'dapo'."})
    log_completions: bool = field(
        default=True, metadata={"help": "Keep completions with their pairs' ids, as Parquet files in output_dir."}
    )
    num_completions_to_print: int | None = field(
        default=0, metadata={"help": "Completions that are also printed each time; nothing for all of them."}
    )
    log_multimodal: bool = field(
        default=False, metadata={"help": "Log images with the completions; off, they are named by their pair's id."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            self.use_cpu, self.bf16 = True, False
        super().__post_init__()
        _one_of("masking", self.masking, ("answer", "verdict"))
        _one_of("listener_on_failure", self.listener_on_failure, ("mask", "raise"))
        _one_of("listener_dtype", self.listener_dtype, (None, "auto", "bfloat16", "float16", "float32"))
        if isinstance(self.listener_options, str):
            raise InputError(
                f"listener_options is {self.listener_options!r}; give a mapping, such as {{quantization: 4bit}}"
            )
        check_options(self.listener_options or {}, "listener_options")
        if self.listener_dtype is not None and "dtype" in (self.listener_options or {}):
            raise InputError("listener_dtype and listener_options both name a dtype; leave one of them out")
        if self.listener_batch_size < 1:
            raise InputError(f"listener_batch_size is {self.listener_batch_size}; it must be at least 1")
        _one_of("share_attention", self.share_attention, KERNELS)
        if not (isinstance(self.gain_weight, int | float) and 0 <= self.gain_weight < math.inf):
            raise InputError(f"gain_weight is {self.gain_weight!r}; give a number of at least 0")
        if self.malformed_rounds < 0:
            raise InputError(f"malformed_rounds is {self.malformed_rounds}; give a number of rounds, or 0 to go on")
        if self.token_budget < 1:
            raise InputError(f"token_budget is {self.token_budget}; it must be at least 1, and a prompt is hundreds")
        if not _three_numbers(self.reward_weights):
            raise InputError(
                f"reward_weights is {self.reward_weights!r}; it needs three numbers, for format, accuracy and "
                "listener, for example [1, 0.5, 0.5]"
            )
        assert self.steps_per_generation is not None
        cycle = self.steps_per_generation * self.num_iterations
        every = self.save_steps * self.gradient_accumulation_steps
        if self.save_strategy == "steps" and self.save_steps >= 1 and every % cycle:  # below 1: a fraction
            whole = cycle // math.gcd(cycle, self.gradient_accumulation_steps)
            raise InputError(
                f"save_steps={self.save_steps} would save in the middle of a generation round, from where no run can "
                f"resume exactly; make save_steps a multiple of {whole}"
            )

    @property
    def all_weights(self) -> list[float]:
        """`reward_weights`, and that of the gain where it has one, in the order of `ShapedReward.functions`."""
        return [*(self.reward_weights or ()), *([self.gain_weight] if self.gain_weight else ())]


def without_image_token(generation_kwargs: dict[str, Any] | None, image_token_id: int) -> dict[str, Any]:
    """Sampling options for vLLM with which it never writes an image placeholder; what they already say stays.

    A sampled placeholder stands for an image that is not there, and the next forward pass would fail on it. trl
    suppresses it where transformers samples, and not where vLLM does.
    """
    given = generation_kwargs or {}
    # JSON and YAML have strings for keys; vLLM wants token ids.
    bias = {int(token): value for token, value in (given.get("logit_bias") or {}).items()}
    return given | {"logit_bias": {image_token_id: -100.0} | bias}


def _three_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(weight, int | float) and math.isfinite(weight) for weight in value)
    )


def _one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
