"""Pref-GRPO: a dispatcher that knows the reward `listener` and leaves the others to the host's own.

    listener-reward serve --scheme group            # the host pins transformers 4.46, so the judge is a server

In the training script, where `reward_dispatcher` is made, and with `--reward_spec listener:1.0`:

    from listener_reward.integrations.pref_grpo import ListenerDispatcher
    others = {name: weight for name, weight in reward_weights.items() if name != "listener"}
    host = RewardDispatcher(args=args, device=device, reward_weights=others) if others else None
    reward_dispatcher = ListenerDispatcher("http://127.0.0.1:8300", device=device, host=host)

The scripts of edits (train_flux1_kontext_edit.py and its like) hand the source to their own rewards. One word more
hands it to this one, and `edits=True` makes an edit without it an `InputError`:

    if reward_name in ("unifiedreward_edit_pairwise", "listener"):

The host's pairwise rewards show each pair in one order, count wins and round to three decimals; a parse failure is half
a win for both. Here a pair is shown in both orders and its probability enters a Bradley-Terry fit, whose log-odds are
the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_pictures
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, score

if TYPE_CHECKING:
    import torch

NAME = "listener"

PATH, PROMPT = ("path", "edited_path"), ("prompt", "instruction")
"""What the host calls the file and the text of an item, of an edit the second."""


class ListenerDispatcher:
    """Stands in for the host's `RewardDispatcher`, whose two methods it has."""

    def __init__(
        self,
        reward: Any = PAPER_CHECKPOINT,
        *,
        device: str | int | torch.device = "cpu",
        host: Any = None,
        modality: str = "image",
        edits: bool = False,
        **options: Any,
    ):
        """
        Args:
            reward: see `contract.as_reward`. The scheme is `group`: a call holds all images of its prompts.
            device: where the host wants its tensors, and where the judge is loaded unless `options` say otherwise; on
                the default device if this one is the CPU.
            host: the host's dispatcher, if other rewards are asked for beside this one.
            modality: "image", or "video" for files of videos, each judged as a storyboard.
            edits: whether each item has to have a source image.
        """
        import torch  # the host's

        if modality not in ("image", "video"):
            raise InputError(f"modality is {modality!r}; choose 'image' or 'video'")
        self.device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        wanted = None if self.device.type == "cpu" else self.device
        self.reward = as_reward(reward, options, scheme="group", device=wanted)
        self.host = host
        self.modality = modality
        self.edits = edits

    def build_reward_inputs(self) -> dict[str, list[dict]]:
        """An empty list for each reward, which the host fills with `{"path": ..., "prompt": ...}`, or for an edit with
        `{"edited_path": ..., "instruction": ..., "source_path": ...}`."""
        return {**(self.host.build_reward_inputs() if self.host else {}), NAME: []}

    def compute_rewards(
        self, reward_inputs: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """One float32 tensor `(B,)` for each reward, and arrays to log, in the order of the inputs.

        Raises:
            InputError, JudgeError: a file or prompt that cannot be used, a prompt with one image (the host's pairwise
                rewards have no pair either), or a judge that broke. The host's rewards raise `ValueError` likewise, and
                so stop the step.
        """
        import torch

        others = {name: items for name, items in reward_inputs.items() if name != NAME}
        tensors, logged = self.host.compute_rewards(others) if others and self.host else ({}, {})
        if others and not self.host:
            raise InputError(f"reward_inputs has {sorted(others)}; give the host's dispatcher for them as host=")
        items = reward_inputs.get(NAME)
        if not items:
            raise InputError(f"reward_inputs has no {NAME!r} inputs; fill what build_reward_inputs() gave")
        paths, prompts = ([_either(item, *names) for item in items] for names in (PATH, PROMPT))
        lost = [names[0] for names, found in ((PATH, paths), (PROMPT, prompts)) if None in found]
        if lost:
            raise InputError(f"reward_inputs[{NAME!r}] has items without {' and '.join(lost)}; each needs both")
        images = as_pictures(paths) if self.modality == "video" else paths
        scores, info = score(
            self.reward, images, prompts, sources=[item.get("source_path") for item in items], edits=self.edits
        )
        logged = {**logged, f"{NAME}_score": scores}
        if "standard_error" in info:  # the host takes means, of which NaN would be one
            logged[f"{NAME}_standard_error"] = info["standard_error"]
        return {**tensors, NAME: torch.as_tensor(scores, device=self.device)}, logged


def _either(item: Mapping[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)
