"""A listener that is the policy's own past: after every step it goes a little of the way to the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from listener_reward.errors import InputError
from listener_reward.files import quoted

PAST = "past"
"""The listener that is the policy's own past: as much memory as a listener of its size, and no frozen one."""

KEPT = "listener_past.safetensors"
"""Its weights in a checkpoint, without which a resumed run would listen to another past."""


class MovingPast(TrainerCallback):
    """`past = decay * past + (1 - decay) * policy`, in the past's own dtype, after every optimizer step."""

    def __init__(self, policy: Any, past: Any, decay: float):
        """
        Args:
            policy: the model in training, whole on this process.
            past: another model of the same parameters.
            decay: in [0, 1]; 1 leaves the past where it began.

        Raises:
            InputError: the two have other parameters.
        """
        self.decay = decay
        self.past = past
        fast, slow = (dict(model.named_parameters()) for model in (policy, past))
        if fast.keys() != slow.keys():
            raise InputError(f"listener is {PAST!r}, and the policy has other parameters than what it was loaded from")
        self.pairs = [(slow[name], parameter) for name, parameter in fast.items()]

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        for slow, fast in self.pairs:
            slow.lerp_(fast.to(slow), 1 - self.decay)

    def save(self, folder: Path) -> None:
        """Keeps the past in a checkpoint."""
        save_file({name: weight.contiguous() for name, weight in self.past.named_parameters()}, folder / KEPT)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Puts back the past of a checkpoint.

        Raises:
            InputError: the checkpoint has none.
        """
        if not (folder / KEPT).exists():
            raise InputError(f"{quoted(folder)} has no {KEPT}, so that the listener's past is lost; resume another one")
        weights = load_file(folder / KEPT)
        for name, parameter in self.past.named_parameters():
            parameter.copy_(weights[name])
