"""The settings of `DDPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from listener_reward.advantages import AdvantageStd
from listener_reward.errors import InputError, check_choice

from .rollout import RESERVED
from .schedulers import Dynamics

_CHOICES = {
    "loss": ("ppo", "nft"),
    "train": ("lora", "full"),
    "advantage": ("group", "prompt", "components"),
    "advantage_std": get_args(AdvantageStd),
    "dynamics": get_args(Dynamics),
    "mixed_precision": ("no", "bf16"),
    "on_hacking": ("warn", "stop"),
}
_AT_LEAST_ONE = (
    *("epochs", "num_inference_steps", "prompts_per_epoch", "images_per_prompt", "batch_size", "updates_per_epoch"),
    *("inner_epochs", "lora_rank", "save_every", "keep_checkpoints", "prompt_buffer", "prompt_min_count"),
)
_POSITIVE = ("learning_rate", "max_grad_norm", "clip_range", "advantage_clip", "nft_beta", "replay_tolerance")
_NOT_NEGATIVE = ("kl", "weight_decay", "sample_every", "sample_prompts")


@dataclass
class DDPOConfig:
    """Settings of sampling, learning and keeping. Numbers of images are per process."""

    output_dir: str = "ddpo"
    """Gets the LoRA, `metrics.jsonl`, `samples/`, `checkpoints/` and `config.json`."""
    epochs: int = 100
    """Each epoch samples images, scores them and updates the weights."""
    seed: int = 0
    """Every draw is a function of this seed, the epoch, the process and the batch; so a resumed run repeats them."""

    # Sampling
    num_inference_steps: int = 20
    """Training needs fewer steps than final images: Flow-GRPO trains with 10 and draws with 40."""
    call: dict[str, Any] = field(default_factory=dict)
    """What else each call of the pipeline gets: guidance_scale, negative_prompt, height, width, num_frames."""
    prompts_per_epoch: int = 8
    images_per_prompt: int = 8
    """The size of a group. Small groups have noisy means; peers use 8 to 24."""
    batch_size: int = 8
    """Images in one call of the pipeline, in sampling and in training alike: kernels round by batch size, and the
    ratio of a replay must be 1."""
    noise_level: float | None = None
    """See `log_prob_scheduler`; None is DDPO's 1 for DDIM and Flow-GRPO's 0.7 for flow matching."""
    dynamics: Dynamics = "cps"
    """The SDE for flow-matching models. "cps" leaves no noise in the images, "flow_sde" is Flow-GRPO's own."""
    window: tuple[float, float] = (0.0, 0.6)
    """The part of the schedule, as fractions, whose steps are noisy and trained; the stock sampler does the other
    steps. Early steps decide what is in the image; noise in late steps only blurs the reward. (0, 1) is DDPO's and
    Flow-GRPO's."""

    # Learning
    loss: Literal["ppo", "nft"] = "ppo"
    """"ppo" clips the noisy steps' probability ratios (DDPO, GRPO). "nft" is DiffusionNFT's forward-process loss: it
    samples without noise, and adds noise to the results for training."""
    train_fraction: float = 1.0
    """Fraction of the noisy steps (with "nft", of all steps) that is trained, drawn anew for each batch."""
    updates_per_epoch: int = 1
    """Optimizer steps in a pass over an epoch's images. With one, every ratio is 1 and nothing is clipped."""
    inner_epochs: int = 1
    """Passes over an epoch's images."""
    advantage: Literal["group", "prompt", "components"] = "group"
    """"group" centres rewards on the prompt's other images of the epoch (GRPO), "prompt" on the prompt's rewards of the
    last epochs too (ddpo-pytorch), which needs rewards on one scale and prompts that return. "components" is for a
    `Mixture`: each component is normalised within the group before they are summed by weight, and the sum is then as
    with "group" (GDPO, see `advantages.normalised_sum`); the log keeps the mixture's own score."""
    advantage_std: AdvantageStd = "batch"
    """Which rewards' standard deviation divides the advantages: the batch's or the group's; see
    `advantages.group_advantages`."""
    advantage_noise: bool | None = None
    """Whether advantages are divided by the scores' own standard errors too, so that a group whose spread is within
    them does not get unit variance; see `advantages.group_advantages`. None, the default: where the reward reports a
    `standard_error`, as `ListenerReward` does; a resumed run goes on as it began. With True a reward that reports none
    is an error, and so is `advantage="prompt"`, which knows no spread of a group."""
    prompt_buffer: int = 32
    """With `advantage="prompt"`, how many of a prompt's latest rewards are kept."""
    prompt_min_count: int = 16
    """With `advantage="prompt"`, a prompt with fewer rewards takes the epoch's mean and standard deviation."""
    advantage_clip: float = 5.0
    clip_range: float = 1e-4
    """Small, because log-probabilities are means over a latent's dimensions. The log has the clipped fraction."""
    nft_beta: float = 1.0
    kl: float = 0.03
    """Weight of the divergence from the base, the model with its adapters off. With "ppo" the divergence is between the
    two Gaussians; with "nft" it is the mean squared difference of the outputs. 0 saves a forward pass for each step."""
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    # What is trained
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    lora_alpha: float | None = None
    """None is the rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the adapted layers. The default is the attention of every diffusers denoiser."""
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    """"bf16" runs a float32 pipeline under autocast. A pipeline loaded in bfloat16 needs "no". Adapters are float32 in
    either case."""
    replay_tolerance: float = 1e-4
    """Largest difference of a replayed log-probability from the recorded one, checked before the first update."""

    # Watching and keeping
    log_with: Any = None
    """accelerate's trackers: "tensorboard", "wandb", or a list."""
    sample_every: int = 10
    """Epochs between grids of the first `sample_prompts` prompts, from fixed seeds, by the pipeline's own scheduler; 0
    draws none. The base and the end of the run are always drawn."""
    sample_prompts: int = 8
    win_rate: bool = True
    """Has the reward compare each of these grids with the base's, image by image: `win_rate`, `reward_over_base`. Costs
    a call of the reward with 2 x `sample_prompts` images; switch it off for a server that waits for larger groups."""
    save_every: int = 10
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    on_hacking: Literal["warn", "stop"] = "warn"
    """What to do when the reward rises while agreement, diversity or the second reward falls; see `hacking.py`."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for names, fits, what in (
            (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
            (_POSITIVE, lambda value: value > 0, "above 0"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise InputError(f"{name} is {getattr(self, name)}; it must be {what}")
        if not 0 < self.train_fraction <= 1:
            raise InputError(f"train_fraction is {self.train_fraction}; it is a fraction above 0 and up to 1")
        if (self.prompts_per_epoch * self.images_per_prompt) % self.batch_size:
            raise InputError(
                f"batch_size is {self.batch_size}; it must divide prompts_per_epoch x images_per_prompt = "
                f"{self.prompts_per_epoch * self.images_per_prompt}, because all batches must be of one size"
            )
        if self.updates_per_epoch > self.batches:
            raise InputError(
                f"updates_per_epoch is {self.updates_per_epoch} with {self.batches} batches an epoch; it can be at "
                "most that number"
            )
        if self.advantage != "prompt" and self.images_per_prompt < 2:
            raise InputError("images_per_prompt is 1, which is no group; give at least 2, or advantage='prompt'")
        if self.advantage == "prompt" and self.advantage_noise:
            raise InputError("advantage_noise is about the spread of a group, and advantage is 'prompt'; leave it out")
        if self.train == "full" and self.kl:
            raise InputError(f"kl is {self.kl}, and with train='full' there is no base to switch to; give kl=0")
        taken = [name for name in RESERVED if name in self.call]
        if taken:
            raise InputError(f"call has {', '.join(taken)}, which the trainer sets; leave it out")

    @property
    def batches(self) -> int:
        """Calls of the pipeline in an epoch."""
        return self.prompts_per_epoch * self.images_per_prompt // self.batch_size
