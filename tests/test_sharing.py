"""What training shares: each switch against stock trl, with the same data, seed and weights."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import GRPOTrainer

from listener_reward.errors import InputError
from listener_reward.train.config import ALL_OFF
from listener_reward.train.run import LORA_TARGETS
from listener_reward.train.sharing import find_groups, images_per_row, shuffle_groups, unsharded, without_images
from listener_reward.train.trainer import ListenerGRPOTrainer

Config = Callable[..., Any]
SWITCHES = [name for name in ALL_OFF if name.startswith("share_")]


def train(judge: Path, config: Any, pairs: Dataset, lora: bool = False) -> tuple[ListenerGRPOTrainer, dict[str, Any]]:
    """Trains and returns the trainer and what each step computed: completions, log-probabilities, losses, gradients."""
    from transformers import TrainerCallback

    seen: dict[str, list[Any]] = {"completions": [], "logprobs": [], "gradients": []}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            named = model.named_parameters()
            seen["gradients"].append({name: p.grad.clone() for name, p in named if p.grad is not None})

    peft = None
    if lora:
        torch.manual_seed(3)
        peft = LoraConfig(target_modules=LORA_TARGETS, r=4, init_lora_weights=False)
    trainer = ListenerGRPOTrainer(judge, config, pairs, peft_config=peft, callbacks=[Gradients()])
    rollout, logprobs = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies

    def watched_rollout(*args: Any, **kwargs: Any) -> Any:
        output = rollout(*args, **kwargs)
        seen["completions"].append(output[0])
        return output

    def watched_logprobs(*args: Any, **kwargs: Any) -> Any:
        output = logprobs(*args, **kwargs)
        seen["logprobs"].append((output[0].detach().clone(), None if output[1] is None else output[1].detach().clone()))
        return output

    trainer._generate_single_turn = watched_rollout
    trainer._get_per_token_logps_and_entropies = watched_logprobs
    trainer.train()
    return trainer, seen


def assert_same(ours: dict[str, Any], stock: dict[str, Any], *, in_order: bool = True) -> None:
    assert ours["completions"] == stock["completions"]
    assert len(ours["logprobs"]) == len(stock["logprobs"]) > 0
    if in_order:
        for (mine, my_entropy), (theirs, their_entropy) in zip(ours["logprobs"], stock["logprobs"], strict=True):
            width = min(mine.shape[1], theirs.shape[1])
            # Beyond a completion's end stock trl has whatever the padding gives; the loss masks it, and ours is zero.
            real = mine[:, :width] != 0
            assert real.any()
            assert ((mine[:, :width] - theirs[:, :width]) * real).abs().max() < 1e-5
            assert (my_entropy is None) == (their_entropy is None)
            if my_entropy is not None:
                assert ((my_entropy[:, :width] - their_entropy[:, :width]) * real).abs().max() < 1e-4
    # Only the first update: from then on the two are different models by rounding.
    mine, theirs = ours["gradients"][0], stock["gradients"][0]
    assert mine.keys() == theirs.keys()
    apart = sum((mine[name] - theirs[name]).norm() ** 2 for name in mine) ** 0.5
    assert apart <= 1e-5 * sum(grad.norm() ** 2 for grad in theirs.values()) ** 0.5


SETTINGS = {
    "full": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "part of a group": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "reference": {"beta": 0.1},
    "old policy": {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
    "several updates": {"num_iterations": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "dapo": {"loss_type": "dapo", "mask_truncated_completions": True},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "LoRA"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_that_of_stock_trl(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, setting: dict[str, Any], lora: bool
):
    # A large spread of the rewards, or the rounding of a nearly even listener fills the advantages.
    options = {"max_steps": 1, "scale_rewards": "none", "reward_weights": [1, 1, 1]} | setting
    _, ours = train(formed_judge, grpo_config(**options), tiny_pairs, lora)
    _, stock = train(formed_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs, lora)
    # Groups are shuffled whole, so rows and micro-batches come in another order; the sum is the same.
    assert len(ours["logprobs"]) == len(stock["logprobs"])
    if "steps_per_generation" in options:  # there an update takes only some of the round's micro-batches
        assert ours["completions"] == stock["completions"]
    else:
        assert_same(ours, stock, in_order=False)
    mine, theirs = (torch.cat([widened(record[0]) for record in run["logprobs"][:1]]) for run in (ours, stock))
    if mine.shape == theirs.shape and "gradient_accumulation_steps" not in options:
        assert_logprobs_match_in_any_order(mine, theirs)


def widened(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(logprobs, (0, 8 - logprobs.shape[1]))


def assert_logprobs_match_in_any_order(ours: torch.Tensor, stock: torch.Tensor) -> None:
    """Each of our rows is one of stock trl's, up to what stock trl has beyond a completion's end."""
    real = ours != 0
    distance = ((ours[:, None] - stock[None]) * real[:, None]).abs().amax(-1)
    assert distance.min(1).values.max() < 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "LoRA"])
def test_mixed_precision_is_that_of_stock_trl(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, lora: bool):
    """float32 weights and bfloat16 products: trl's default on a GPU, where layers give other dtypes than they get."""
    options = {"max_steps": 1, "scale_rewards": "none", "beta": 0.1, "num_iterations": 2, "bf16": True}
    _, ours = train(formed_judge, grpo_config(**options), tiny_pairs, lora)
    _, stock = train(formed_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs, lora)
    assert ours["completions"] == stock["completions"]
    mine, theirs = (torch.cat([grad.flatten() for grad in run["gradients"][0].values()]) for run in (ours, stock))
    assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_changes_nothing(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, switch: str):
    options = {"max_steps": 1, "scale_rewards": "none"}
    trainer, ours = train(formed_judge, grpo_config(**(options | ALL_OFF | {switch: True})), tiny_pairs)
    _, stock = train(formed_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs)
    part = switch.removeprefix("share_")
    assert trainer.sharing == (frozenset() if part == "listener" else {part})
    assert_same(ours, stock, in_order=part != "groups")


def test_the_work_is_done_once(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    patches = {}
    for name, switches in {"shared": {}, "stock": ALL_OFF}.items():
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1, **switches), tiny_pairs)
        count = [0]

        def counted(module: Any, args: Any, kwargs: Any, count: list[int] = count) -> None:
            count[0] += len(args[0] if args else kwargs["hidden_states"])

        trainer.model.model.visual.register_forward_pre_hook(counted, with_kwargs=True)
        trainer.train()
        patches[name] = count[0]
    assert patches["stock"] == 4 * patches["shared"] > 0, "groups of four"


def test_what_cannot_be_shared_is_said(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog):
    options = {"max_steps": 1, "model_init_kwargs": {"attn_implementation": "eager"}}
    with caplog.at_level(logging.WARNING, "listener_reward"):
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(**options), tiny_pairs)
    assert trainer.sharing == frozenset()
    assert "share_rollout is on, but trl's own code runs, because the model was loaded with" in caplog.text
    assert "attn_implementation='eager'" in caplog.text
    trainer.train()


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("_generate_single_turn", "rollout"),
        ("_get_per_token_logps_and_entropies", "logprobs"),
        ("_prepare_inputs", "groups"),
    ],
)
def test_what_trl_has_changed_is_left_to_it_and_said(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog, monkeypatch, method: str, part: str
):
    stock, calls = getattr(GRPOTrainer, method), []

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, method, changed)
    with caplog.at_level(logging.WARNING, "listener_reward"):
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1), tiny_pairs)
    assert trainer.sharing == {"rollout", "logprobs", "groups"} - {part}
    assert f"share_{part} is on, but trl's own code runs, because trl {trl.__version__} has" in caplog.text
    assert f"GRPOTrainer.{method}(self, args, kwargs)" in caplog.text and "which trl 1.16 has" in caplog.text
    trainer.train()
    assert calls


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "GRPOTrainer._save_checkpoint = lambda self, model: None",
            "has GRPOTrainer._save_checkpoint(self, model), and listener-reward overrides (self, model, trial)",
        ),
        ("del grpo_trainer.gather_object", "has no trl.trainer.grpo_trainer.gather_object"),
    ],
)
def test_a_trl_that_nothing_can_fall_back_to_is_refused_on_import(change: str, said: str):
    trl_changed = f"from trl import GRPOTrainer\nfrom trl.trainer import grpo_trainer\n{change}\n"
    code = trl_changed + "import listener_reward.train.trainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"trl {trl.__version__} {said}" in result.stderr
    assert 'pip install "trl==1.16"' in result.stderr


def test_flex_attention_without_a_gpu_falls_back_and_says_so(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog
):
    with caplog.at_level(logging.WARNING, "listener_reward"):
        ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1, share_attention="flex"), tiny_pairs).train()
    assert "share_attention is 'flex', but 'sdpa' runs" in caplog.text


# ---------------------------------------------------------------- the parts


def test_groups_are_found_by_tokens_and_pixels():
    ids = [torch.tensor(row) for row in ([1, 2], [1, 2], [1, 3], [1, 2], [1, 2])]
    pixels = [torch.full((4, 2), value) for value in (0.0, 0.0, 0.0, 1.0, 0.0)]
    grids = [torch.tensor([[1, 2, 2]])] * 4 + [torch.tensor([[1, 4, 1]])]
    groups = find_groups(ids, pixels, grids)
    assert groups.first == [0, 2, 3, 4]
    assert groups.rows == [[0, 1], [2], [3], [4]]


def test_groups_stay_together_and_the_random_numbers_are_those_of_trl():
    from trl.trainer.utils import shuffle_sequence_dict

    batch = {
        "prompt_ids": torch.arange(12).div(4, rounding_mode="floor")[:, None],
        "pixel_values": [torch.zeros(4, 2)] * 12,
        "image_grid_thw": [torch.tensor([[1, 2, 2]])] * 12,
        "row": torch.arange(12),
        "nothing": None,
        "number": torch.tensor(3),
    }
    torch.manual_seed(0)
    ours, after = shuffle_groups(batch), torch.rand(1)
    torch.manual_seed(0)
    stock, after_stock = shuffle_sequence_dict(batch), torch.rand(1)
    assert torch.equal(after, after_stock)
    assert sorted(ours["row"].tolist()) == list(range(12)) and ours["row"].tolist() != list(range(12))
    assert all(len(set(ours["prompt_ids"][i : i + 4, 0].tolist())) == 1 for i in (0, 4, 8))
    assert ours["prompt_ids"][0] == stock["prompt_ids"][0], "the group that comes first in trl's order"
    assert ours["nothing"] is None and ours["number"] == 3


def test_images_are_counted_by_their_placeholders():
    class Config:
        image_token_id = 9

        class vision_config:
            spatial_merge_size = 2

    grids = torch.tensor([[1, 4, 4], [1, 2, 2], [1, 2, 4]])
    ids = torch.tensor([[9, 9, 9, 9, 1, 9], [0, 0, 0, 9, 9, 1], [0, 0, 0, 0, 1, 1]])
    assert images_per_row(ids, grids, Config) == [2, 1, 0]


def test_prompts_without_images_are_light():
    image = Image.new("RGB", (200, 200))
    prompts = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]}]]
    light = without_images(prompts)
    assert light == [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]]
    assert len(pickle.dumps(light)) < 200 < 100_000 < len(pickle.dumps(prompts))
    assert without_images([1.0, None, "text"]) == [1.0, None, "text"]


def test_a_listener_is_whole_under_zero_3():
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config as unset

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    set_hf_deepspeed_config(config)
    try:
        with unsharded():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset()
    with unsharded():
        pass
    assert not is_deepspeed_zero3_enabled()


def test_a_budget_that_cannot_be_is_refused(grpo_config: Config):
    with pytest.raises(InputError, match="token_budget is 0"):
        grpo_config(token_budget=0)
    with pytest.raises(InputError, match="share_attention is 'flash'; it must be one of 'sdpa', 'flex'"):
        grpo_config(share_attention="flash")
