"""Training with a listener behind an address: the rewards of one in this process, and none of its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import Served, serving
from transformers.utils import logging

from listener_reward.card import Card
from listener_reward.judge import Judge
from listener_reward.train.trainer import ListenerGRPOTrainer

logging.set_verbosity_error()


@pytest.fixture(scope="module")
def listener_vlm(formed_judge: Path) -> Any:
    listener = Card.load(formed_judge).listener
    assert listener is not None
    return Judge.from_pretrained(listener, listener="none", device="cpu").reasoner


def rewards(trainer: ListenerGRPOTrainer) -> list[dict[str, float]]:
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    return [{name: entry[name] for name in ("reward", "rewards/listener/mean", "loss")} for entry in entries]


def test_a_listener_behind_an_address_gives_the_same_rewards(
    formed_judge: Path, listener_vlm: Any, tiny_pairs: Any, grpo_config: Callable[..., Any]
):
    here = ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs)
    here.train()
    with serving(Served(listener_vlm)) as server:
        there = ListenerGRPOTrainer(formed_judge, grpo_config(listener=server.address), tiny_pairs)
        there.train()
        assert there.listener is not None
        vlm: Any = there.listener.vlm
        assert vlm.backend == f"tiny@{server.address}" and not hasattr(vlm, "model")
        asked = len(server.requests)
    assert asked > 8
    assert len(rewards(here)) == 2
    for one, other in zip(rewards(here), rewards(there), strict=True):
        assert other == pytest.approx(one, abs=1e-4)
    assert there.card.listener == Card.load(formed_judge).listener, "an address is no part of what is saved"
