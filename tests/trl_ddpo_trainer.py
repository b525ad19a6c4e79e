"""Three steps of trl's own `DDPOTrainer` with the tiny judge as its reward: python trl_ddpo_trainer.py sync|async

With that trl laid over the environment, `pip install --no-deps --target trl-ddpo trl==0.23.1 tensorboardX protobuf` and
`PYTHONPATH=trl-ddpo`; `tests/test_adapters.py` runs it where TRL_DDPO_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import tiny_pipelines
from accelerate import PartialState
from trl import (  # an older release than what is checked here
    DDPOConfig,  # pyright: ignore[reportAttributeAccessIssue]
    DDPOTrainer,  # pyright: ignore[reportAttributeAccessIssue]
    DefaultDDPOStableDiffusionPipeline,  # pyright: ignore[reportAttributeAccessIssue]
)

from listener_reward.integrations.trl import ddpo_reward

PROMPTS = ["two red circles", "a blue star"]


def main(mode: str) -> None:
    PartialState()  # trl logs through it before it makes one
    folder = tempfile.mkdtemp()
    tiny_pipelines.build("sd15").save_pretrained(folder)
    config = DDPOConfig(
        num_epochs=3,
        save_freq=100,
        sample_num_steps=2,
        sample_batch_size=4,
        sample_num_batches_per_epoch=2,
        train_batch_size=4,
        train_gradient_accumulation_steps=2,
        mixed_precision="no",
        async_reward_computation=mode == "async",
        project_kwargs={"project_dir": folder},
    )
    logged: list[dict] = []

    def hook(prompt_image_data, global_step, tracker):
        for images, prompts, _, rewards, info in prompt_image_data:
            assert images.shape[0] == len(prompts) == len(rewards) == len(info["standard_error"])
            logged.append({"step": global_step, "rewards": rewards.numpy()})

    def prompt_fn():
        return np.random.default_rng().choice(PROMPTS), {}

    config.log_with = "tensorboard"  # the trainer hands the first tracker to the hook, and needs one
    trainer = DDPOTrainer(
        config,
        ddpo_reward("tiny", device="cpu", think=False),
        prompt_fn,
        DefaultDDPOStableDiffusionPipeline(folder, use_lora=True),
        image_samples_hook=hook,
    )
    weights = [weight for weight in trainer.sd_pipeline.unet.parameters() if weight.requires_grad]
    before = [parameter.detach().clone() for parameter in weights]
    trainer.train()
    moved = sum(not after.equal(start) for start, after in zip(before, weights, strict=True))
    assert moved, "no weight has moved"
    rewards = np.concatenate([entry["rewards"] for entry in logged])
    assert np.isfinite(rewards).all() and rewards.std() > 0
    print(f"three steps, {mode}: {len(rewards)} rewards, {moved} of {len(weights)} weights moved")


if __name__ == "__main__":
    main(sys.argv[1])
