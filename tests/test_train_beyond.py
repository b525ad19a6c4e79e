"""Training with the reward beyond the paper's: its weight, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from listener_reward.errors import InputError
from listener_reward.train.trainer import ListenerGRPOTrainer

Configure = Callable[..., Any]


def test_each_part_has_its_weight_and_is_logged(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(listener=str(formed_judge), gain_weight=0.125, max_steps=1)
    trainer = ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
    assert trainer.reward_weights.tolist() == [1, 0.5, 0.5, 0.125]
    assert args.reward_weights == [1, 0.5, 0.5], "the caller's configuration can be used again"
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    parts = [logs[f"rewards/{name}/mean"] for name in ("format", "accuracy", "listener", "gain")]
    assert parts[0] > 0
    weighted = sum(weight * part for weight, part in zip((1, 0.5, 0.5, 0.125), parts, strict=True))
    assert logs["reward"] == pytest.approx(weighted, abs=1e-5)


def test_off_is_the_papers_reward(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(listener=str(formed_judge))
    trainer = ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
    assert trainer.args is args
    assert [part.__name__ for part in trainer.reward.functions] == ["format", "accuracy", "listener"]
    assert trainer.reward_weights.tolist() == [1, 0.5, 0.5]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "much"])
def test_a_value_out_of_range_is_named(grpo_config: Configure, value: Any):
    with pytest.raises(InputError, match="gain_weight is"):
        grpo_config(gain_weight=value)


def test_without_a_listener_there_is_nothing_to_gain(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(listener="none", reward_weights=[1, 1, 0], gain_weight=0.5)
    with pytest.raises(InputError, match="gain_weight needs a listener, and there is none"):
        ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
