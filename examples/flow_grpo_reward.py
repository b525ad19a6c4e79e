"""The judge as the reward of flow_grpo's loop: what you change there, in a loop of the same shape.

    python examples/flow_grpo_reward.py --steps 2

In flow_grpo itself (scripts/train_sd3.py), two lines change; both were flow_grpo.rewards.multi_score(device, ...):

    reward_fn = listener_multi_score("http://127.0.0.1:8300")
    eval_reward_fn = reward_fn

The URL is that of a `listener-reward serve`: flow_grpo's environment and this package's need not agree on transformers,
and all its processes score against the same reference images. Here the tiny judge is loaded in the process, and images
are drawn instead of generated; there is no generator to train, so only the advantages are shown.
"""

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from listener_reward.integrations.flow_grpo import listener_multi_score
from listener_reward.tiny.drawing import draw
from listener_reward.tiny.world import sample_candidate, sample_prompt, utility, wording

GROUP = 4


def sample(rng: random.Random, scene, k: int) -> tuple[torch.Tensor, list[float]]:
    """Stands in for the pipeline: `k` images NCHW in [0, 1] of a prompt, and how good they truly are."""
    scenes = [sample_candidate(scene, rng) for _ in range(k)]
    pictures = [np.asarray(draw(one, rng).resize((64, 64)), np.float32) / 255 for one in scenes]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2), [utility(scene, one) for one in scenes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="batches of one epoch")
    parser.add_argument("--reward", default="tiny", help="a judge, or the URL of a server")
    args = parser.parse_args()

    reward_fn = listener_multi_score(args.reward)
    executor = ThreadPoolExecutor(max_workers=8)
    rng, samples = random.Random(0), []
    for _ in range(args.steps):  # sampling goes on while earlier batches are scored
        scene = sample_prompt(rng, held=False)
        prompts = [wording(scene, rng)] * GROUP
        images, true = sample(rng, scene, GROUP)
        rewards = executor.submit(reward_fn, images, prompts, [{}] * GROUP, only_strict=True)
        time.sleep(0)
        samples.append({"prompts": prompts, "rewards": rewards, "true": true})

    for batch in samples:
        details, _ = batch["rewards"].result()
        rewards = {key: torch.as_tensor(value).float() for key, value in details.items()}
        avg = rewards["avg"]
        advantages = (avg - avg.mean()) / (avg.std() + 1e-4)
        print(f"{batch['prompts'][0]}: standard error {rewards['standard_error'].mean():.2f}")
        for advantage, true in zip(advantages.tolist(), batch["true"], strict=True):
            print(f"  advantage {advantage:+.2f}   true utility {true:.1f}")


if __name__ == "__main__":
    main()
