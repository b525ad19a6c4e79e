"""Training with the rewards beyond the paper: weights, refusals, and a listener that is one's own past."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from listener_reward.errors import InputError
from listener_reward.train.past import KEPT, MovingPast
from listener_reward.train.trainer import ListenerGRPOTrainer

Configure = Callable[..., Any]


def test_each_part_has_its_weight_and_is_logged(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(
        listener=str(formed_judge),
        more_listeners=[str(formed_judge)],
        combine_listeners="least",
        counterfactual_weight=0.25,
        gain_weight=0.125,
        vote_smoothing=0.1,
        max_steps=1,
    )
    trainer = ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
    assert trainer.reward_weights.tolist() == [1, 0.5, 0.5, 0.25, 0.125]
    assert args.reward_weights == [1, 0.5, 0.5], "the caller's configuration can be used again"
    assert len(trainer.reward.listeners) == 2
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    parts = [logs[f"rewards/{name}/mean"] for name in ("format", "accuracy", "listener", "counterfactual", "gain")]
    assert parts[0] > 0
    weighted = sum(weight * part for weight, part in zip((1, 0.5, 0.5, 0.25, 0.125), parts, strict=True))
    assert logs["reward"] == pytest.approx(weighted, abs=1e-5)


def test_off_is_the_papers_reward(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(listener=str(formed_judge))
    trainer = ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
    assert trainer.args is args
    assert [part.__name__ for part in trainer.reward.functions] == ["format", "accuracy", "listener"]
    assert trainer.reward_weights.tolist() == [1, 0.5, 0.5] and trainer.past is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("counterfactual_weight", -1),
        ("gain_weight", float("nan")),
        ("vote_smoothing", 1.5),
        ("listener_decay", 2),
        ("combine_listeners", "most"),
    ],
)
def test_a_value_out_of_range_is_named(grpo_config: Configure, field: str, value: Any):
    with pytest.raises(InputError, match=f"{field} is"):
        grpo_config(**{field: value})


def test_without_a_listener_there_is_nothing_to_ask(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    args = grpo_config(listener="none", reward_weights=[1, 1, 0], gain_weight=0.5, vote_smoothing=0.1)
    with pytest.raises(InputError, match="gain_weight, vote_smoothing needs a listener, and there is none"):
        ListenerGRPOTrainer(formed_judge, args, tiny_pairs)


# --- one's own past


def test_the_past_follows_by_what_its_decay_leaves():
    policy, past = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for model, weight in ((policy, 1.0), (past, 0.0)):
        torch.nn.init.constant_(model.weight, weight)
    moving = MovingPast(policy, past, 0.75)
    moving.on_step_end()
    assert past.weight.item() == 0.25  # 0.75 * 0 + 0.25 * 1
    moving.on_step_end()
    assert past.weight.item() == 0.4375  # 0.75 * 0.25 + 0.25 * 1
    with pytest.raises(InputError, match="the policy has other parameters"):
        MovingPast(policy, torch.nn.Linear(1, 1), 0.5)


def test_a_policy_listens_to_its_own_past(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure, tmp_path: Path):
    args = grpo_config(listener="past", listener_decay=0.5, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = ListenerGRPOTrainer(formed_judge, args, tiny_pairs)
    assert trainer.listener is not None and trainer.past is not None
    past, policy = trainer.past.past, trainer.accelerator.unwrap_model(trainer.model)
    assert past is not policy and not any(parameter.requires_grad for parameter in past.parameters())
    begun = {name: weight.clone() for name, weight in policy.named_parameters()}
    assert all(torch.equal(weight, begun[name]) for name, weight in past.named_parameters())
    trainer.train()
    after = dict(policy.named_parameters())
    assert any(not torch.equal(weight, begun[name]) for name, weight in after.items())
    for name, weight in past.named_parameters():
        assert torch.allclose(weight, (begun[name] + after[name]) / 2, atol=1e-7), name
    assert trainer.card.listener != "past", "the past is this run's, and no checkpoint"

    checkpoint = tmp_path / "run" / "checkpoint-1"
    again = ListenerGRPOTrainer(formed_judge, grpo_config(listener="past", listener_decay=0.5), tiny_pairs)
    again._load_from_checkpoint(str(checkpoint))
    assert again.past is not None
    assert all(
        torch.equal(one, other) for one, other in zip(again.past.past.parameters(), past.parameters(), strict=True)
    )
    (checkpoint / KEPT).unlink()
    with pytest.raises(InputError, match="the listener's past is lost"):
        again._load_from_checkpoint(str(checkpoint))


def test_a_policy_with_adapters_has_no_past(formed_judge: Path, tiny_pairs: Any, grpo_config: Configure):
    from peft import LoraConfig

    with pytest.raises(InputError, match="leave out use_peft and sharding, or take listener 'base'"):
        ListenerGRPOTrainer(
            formed_judge, grpo_config(listener="past"), tiny_pairs, peft_config=LoraConfig(target_modules="all-linear")
        )
