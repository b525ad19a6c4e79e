"""DDPO of Stable Diffusion 3.5 on a served judge, with the settings of sd35_ddpo.yaml, which says how to start both.

python examples/recipes/sd35_ddpo.py examples/recipes/sd35_ddpo.yaml
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from listener_reward import RemoteReward
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer


def read(path: str) -> tuple[dict[str, Any], DDPOConfig]:
    """The recipe, and its part for the trainer."""
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return recipe, DDPOConfig(**recipe["ddpo"])


def main(path: str) -> None:
    import torch
    from diffusers import StableDiffusion3Pipeline

    recipe, config = read(path)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(recipe["pipeline"], torch_dtype=torch.bfloat16)
    prompts = Path(recipe["prompts"]).read_text(encoding="utf-8").splitlines()
    reward = RemoteReward(recipe["server"], scheme=recipe["scheme"])
    DDPOTrainer(pipeline.to("cuda"), reward, prompts, config).train(resume=True)


if __name__ == "__main__":
    main(sys.argv[1])
