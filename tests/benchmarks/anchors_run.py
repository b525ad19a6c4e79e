"""Whether anchors' scale moves over a training run: the scores of fixed images before and after 40 epochs of DDPO.

    python tests/benchmarks/anchors_run.py --out run       # five minutes on a free core

The embedded diffusion model is trained on the embedded judge by anchors that it has drawn before, 8 samples of each
prompt of which 4 are kept. Twelve of its pictures, drawn before training, are scored at both ends of the run: by those
anchors, by anchors that were taken from the first group seen, and by a copy of the reward that went through a pickle.
The group scheme's mean is 0 at every epoch; by anchors the mean reward says how far the run has come.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from listener_reward import Judge, ListenerReward
from listener_reward.anchor_sets import fill_folder
from listener_reward.integrations.best_of_n import samples
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer
from listener_reward.tiny.diffusion import CALL, load_pipeline

PROMPTS = ["two red circles", "a blue square", "three green stars"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for anchors and checkpoints")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    judge, pipeline = Judge.from_pretrained("tiny", listener="none"), load_pipeline()
    drawn = {prompt: samples(pipeline, prompt, range(8), 8, CALL) for prompt in PROMPTS}
    list(fill_folder(args.out / "anchors", PROMPTS, drawn.__getitem__, judge, 4))
    fixed = [image for prompt in PROMPTS for image in samples(pipeline, prompt, range(1000, 1004), 4, CALL)]
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]

    by_folder = ListenerReward(judge, scheme="anchors", anchors=args.out / "anchors")
    by_group = ListenerReward("tiny", listener="none", scheme="anchors")

    def reward(images: Any, prompts: Any, metadata: Any) -> Any:
        by_group(images, prompts)  # so that it sees the run, too
        return by_folder(images, prompts)

    before = [each(fixed, prompts)[0] for each in (by_folder, by_group)]
    config = DDPOConfig(
        output_dir=str(args.out / "ddpo"),
        epochs=args.epochs,
        num_inference_steps=6,
        call={"guidance_scale": CALL["guidance_scale"]},
        prompts_per_epoch=2,
        images_per_prompt=4,
        batch_size=8,
        learning_rate=3e-3,
        clip_range=2e-3,
        advantage_noise=False,
        sample_every=args.epochs,
        win_rate=False,
    )
    trainer = DDPOTrainer(pipeline, reward, PROMPTS, config)
    trainer.train()
    after = [each(fixed, prompts)[0] for each in (by_folder, by_group, pickle.loads(pickle.dumps(by_group)))]

    means = [row["reward_mean"] for row in trainer.history]
    print(
        f"mean reward of the first five epochs {np.mean(means[:5]):+.2f}, of the last five {np.mean(means[-5:]):+.2f}"
    )
    for name, old, new in zip(("folder", "first groups", "pickled"), (*before, before[1]), after, strict=True):
        largest = np.abs(new - old).max()
        print(f"{name}: {np.sum(old == new)} of {len(fixed)} scores equal to the bit; largest change {largest:g}")


if __name__ == "__main__":
    main()
