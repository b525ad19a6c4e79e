"""DDPO for diffusers pipelines: `DDPOTrainer(pipeline, reward=ListenerReward(), prompts=...).train()`."""

from listener_reward.errors import missing

if fault := missing("diffusers", "DDPO"):
    raise fault

from .config import DDPOConfig
from .rollout import ReplayError
from .trainer import DDPOTrainer

__all__ = ["DDPOConfig", "DDPOTrainer", "ReplayError"]
