"""The parts of trl that training overrides, and which switches are lost if a part has changed.

trl does not promise to keep its private parts. A changed part turns off the switches that need it, and trl's own code
runs instead. Work is refused (`require`) only where trl's code cannot stand in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import trl
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils

from listener_reward.errors import MissingExtraError

_METHODS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": [
        *("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    ],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_per_token_logps_and_entropies": [
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
        *("spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    ],
    "_get_train_sampler": ["self", "dataset"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_checkpoint": ["self", "model", "trial"],
}
_FUNCTIONS = {"gather_object": ["object"], "shuffle_sequence_dict": ["seq_dict"]}

SWITCHES = {
    "share_rollout": ("_generate_single_turn",),
    "share_logprobs": ("_get_per_token_logps_and_entropies",),
    "share_groups": ("_prepare_inputs", "shuffle_sequence_dict"),
    "decode_images_once": ("_generate_and_score_completions",),
    "gather_images": ("_generate_and_score_completions", "gather_object"),
    "exact_resume": ("_get_train_sampler", "_load_from_checkpoint"),
}
"""What each switch of the configuration overrides or replaces."""

_TESTED = "which trl 1.16 has"


def changes() -> dict[str, str]:
    """The switches that this trl does not allow, each with the reason, in words that can follow "because"."""
    parts = [(GRPOTrainer, _METHODS), (grpo_trainer, _FUNCTIONS)]
    found = {
        name: reason
        for owner, expected in parts
        for name, parameters in expected.items()
        if (reason := change(owner, name, parameters))
    }
    return {
        switch: f"{found[name]}, {_TESTED}"
        for switch, names in SWITCHES.items()
        for name in reversed(names)
        if name in found
    }


def lacks_fused_head(model: Any) -> str | None:
    """What `sharing.shared_logprobs` misses of the head that trl has given to `model`, a plain one; None if nothing."""
    given = inspect.signature(model.forward, follow_wrapped=False).parameters
    if missing := [name for name in ("fused_lm_head", "shift_labels") if name not in given]:
        return f"trl {trl.__version__} gives the model no {' and no '.join(missing)}, {_TESTED}"
    output = getattr(trl_utils, "FusedCausalLMOutput", None)
    has = () if output is None else {field.name for field in fields(output)}
    if missing := [name for name in ("log_probs", "entropy") if name not in has]:
        return f"the output of trl {trl.__version__}'s fused head has no {' and no '.join(missing)}, {_TESTED}"
    return None


def dropped_inputs(made: Iterable[str]) -> list[str]:
    """Which of the model's inputs, by the names that its processor gives them, trl leaves out of training's passes."""
    handed_on = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    if "pixel_values" not in handed_on:  # another trl, whose way of handing them on is not known
        return []
    return sorted(set(made) - set(handed_on))


def require(owner: Any, name: str, expected: Sequence[str]) -> None:
    """Raises MissingExtraError where a part of trl that nothing can take the place of is not as expected."""
    if reason := change(owner, name, expected):
        raise MissingExtraError(f'{reason}. It is tested with trl 1.16: pip install "trl==1.16"')


def change(owner: Any, name: str, expected: Sequence[str], library: Any = trl) -> str | None:
    """How the callable `name` of a class or module of `library` differs from one with the `expected` parameters.

    None if it does not.
    """
    stock = getattr(owner, name, None)
    found = None if stock is None else list(inspect.signature(stock).parameters)
    if found == list(expected):
        return None
    where = f"{owner.__name__}.{name}"
    signature = f"no {where}" if found is None else f"{where}({', '.join(found)})"
    release = f"{library.__name__} {library.__version__}"
    return f"{release} has {signature}, and listener-reward expects ({', '.join(expected)})"


require(GRPOTrainer, "_save_checkpoint", _METHODS["_save_checkpoint"])  # no switch turns the override off
