"""What training shares: each switch against stock trl, with the same data, seed and weights."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import (
    AttentionInterface,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.listener import load_listener
from listener_reward.models import transformers_vlm
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen3VLProcessor
from listener_reward.prefix.attention import base_model
from listener_reward.tiny.models import CHAT_TEMPLATE, MAX_PIXELS, MIN_PIXELS, PATCH, QUESTION, build_processor
from listener_reward.trace import Trace
from listener_reward.train import rewards, sharing
from listener_reward.train.config import ALL_OFF
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.sharing import find_groups, images_per_row, shuffle_groups, unsharded, without_images
from listener_reward.train.trainer import ListenerGRPOTrainer

Config = Callable[..., Any]
SWITCHES = [name for name in ALL_OFF if name.startswith("share_")]


def train(judge: Path, config: Any, pairs: Dataset, lora: bool = False) -> tuple[ListenerGRPOTrainer, dict[str, Any]]:
    """Trains and returns the trainer and what each step computed: completions, log-probabilities, losses, gradients.

    A reference model is another model than the policy at its start, so that the two cannot be mistaken for one another.
    """
    from transformers import TrainerCallback

    seen: dict[str, list[Any]] = {"completions": [], "frozen": [], "loss": [], "gradients": [], "passes": []}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            named = model.named_parameters()
            seen["gradients"].append({name: p.grad.clone() for name, p in named if p.grad is not None})

    peft = None
    if lora:
        torch.manual_seed(3)
        peft = LoraConfig(target_modules=LORA_TARGETS, r=4, init_lora_weights=False)
    trainer = ListenerGRPOTrainer(judge, config, pairs, peft_config=peft, callbacks=[Gradients()])
    reference: Any = trainer.ref_model
    if reference is not None:
        torch.manual_seed(4)
        for weight in reference.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
    rollout, logprobs = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies

    def watched_rollout(*args: Any, **kwargs: Any) -> Any:
        output = rollout(*args, **kwargs)
        seen["completions"].append(output[0])
        return output

    def watched_logprobs(*args: Any, **kwargs: Any) -> Any:
        output = logprobs(*args, **kwargs)
        record = output[0].detach().clone(), None if output[1] is None else output[1].detach().clone()
        seen["loss" if torch.is_grad_enabled() else "frozen"].append(record)
        return output

    trainer._generate_single_turn = watched_rollout
    trainer._get_per_token_logps_and_entropies = watched_logprobs
    language_model = base_model(trainer.model).model.language_model
    language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen["passes"].append((kwargs["inputs_embeds"].shape[1], torch.is_grad_enabled())),
        with_kwargs=True,
    )
    trainer.train()
    return trainer, seen


def assert_same(ours: dict[str, Any], stock: dict[str, Any], *, in_order: bool = True) -> None:
    """Completions, log-probabilities of the old policy and of the reference, those of the loss, and gradients."""
    assert ours["completions"] == stock["completions"]
    assert len(ours["frozen"]) == len(stock["frozen"])
    for mine, theirs in zip(ours["frozen"], stock["frozen"], strict=True):  # before the round is shuffled
        assert_same_record(mine, theirs)
    assert len(ours["loss"]) == len(stock["loss"]) > 0
    if in_order:
        for mine, theirs in zip(ours["loss"], stock["loss"], strict=True):
            assert_same_record(mine, theirs)
    # Only the first update: from then on the two are different models by rounding.
    mine, theirs = ours["gradients"][0], stock["gradients"][0]
    assert mine.keys() == theirs.keys()
    apart = sum((mine[name] - theirs[name]).norm() ** 2 for name in mine) ** 0.5
    assert apart <= 1e-5 * sum(grad.norm() ** 2 for grad in theirs.values()) ** 0.5


def assert_same_record(ours: tuple[Any, Any], stock: tuple[Any, Any]) -> None:
    (mine, my_entropy), (theirs, their_entropy) = ours, stock
    width = min(mine.shape[1], theirs.shape[1])
    # Beyond a completion's end stock trl has whatever the padding gives; the loss masks it, and ours is zero.
    real = mine[:, :width] != 0
    assert real.any(1).all()
    assert ((mine[:, :width] - theirs[:, :width]) * real).abs().max() < 1e-5
    assert (my_entropy is None) == (their_entropy is None)
    if my_entropy is not None:
        assert ((my_entropy[:, :width] - their_entropy[:, :width]) * real).abs().max() < 1e-4


OLD = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
SETTINGS = {
    "full": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "part of a group": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "reference": {"beta": 0.1},
    "old policy": OLD,
    "old policy and reference": OLD | {"beta": 0.1},
    "several updates": {"num_iterations": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "dapo": {"loss_type": "dapo", "mask_truncated_completions": True},
    "budget": {"token_budget": 80, "beta": 0.1, "num_iterations": 2},
    "budget and checkpointing": {"token_budget": 1, "gradient_checkpointing": True},
}
FROZEN = {"reference": 1, "old policy": 1, "old policy and reference": 2, "several updates": 1, "budget": 2}
"""Passes over a round without gradients: of the old policy, of the reference."""


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "LoRA"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_stock_trl(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, name: str, lora: bool
):
    # A large spread of the rewards, or the rounding of a nearly even listener fills the advantages.
    options = {"max_steps": 1, "scale_rewards": "none", "reward_weights": [1, 1, 1]} | SETTINGS[name]
    _, ours = train(formed_judge, grpo_config(**options), tiny_pairs, lora)
    _, stock = train(formed_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs, lora)
    size = options.get("per_device_train_batch_size", 8)
    assert [len(record) for record, _ in ours["frozen"]] == [8] * FROZEN.get(name, 0)
    if "old policy and reference" in name:
        old, reference = (record for record, _ in ours["frozen"])
        assert (old - reference).abs().max() > 1e-3, "else one could stand for the other"
    if "steps_per_generation" in options:  # there an update takes only some of the round's micro-batches
        stock["gradients"] = ours["gradients"]
    # Groups are shuffled whole, so rows and micro-batches come in another order; the sum is the same.
    assert_same(ours, stock, in_order=False)
    if "steps_per_generation" not in options:
        updates = slice(0, 8 // size)  # of the first update; the others are of two models
        mine, theirs = (torch.cat([widened(r[0]) for r in run["loss"][updates]]) for run in (ours, stock))
        assert_logprobs_match_in_any_order(mine, theirs)


def widened(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(logprobs, (0, 8 - logprobs.shape[1]))


def assert_logprobs_match_in_any_order(ours: torch.Tensor, stock: torch.Tensor) -> None:
    """Each of our rows is one of stock trl's, up to what stock trl has beyond a completion's end."""
    assert len(ours) == len(stock)
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


def test_rollouts_encode_images_in_the_precision_of_stock_trl(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config
):
    """`generate` encodes them before the forward pass that autocast is wrapped around; so does the prefill."""
    found = {}
    for name, switches in {"shared": {}, "stock": ALL_OFF}.items():
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1, bf16=True, **switches), tiny_pairs)
        dtypes: list[Any] = []
        model: Any = trainer.model
        linear = model.model.visual.merger.mlp[0]
        language = model.model.language_model.layers[0].mlp.up_proj
        linear.register_forward_hook(lambda *call, to=dtypes: to.append(("vision", call[2].dtype)))
        language.register_forward_hook(lambda *call, to=dtypes: to.append(("language", call[2].dtype)))
        trainer.train()
        found[name] = list(dict.fromkeys(dtypes))
    assert found["shared"] == found["stock"]
    assert found["shared"][0] == ("vision", torch.float32), "in the rollout"
    assert ("vision", torch.bfloat16) in found["shared"], "and in the loss"


@pytest.fixture(scope="module")
def stock_step() -> dict[str, Any]:
    """A step with every switch off, once the first test that needs it has put it here."""
    return {}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_changes_nothing(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, stock_step: dict[str, Any], switch: str
):
    options = {"max_steps": 1, "scale_rewards": "none"}
    trainer, ours = train(formed_judge, grpo_config(**(options | ALL_OFF | {switch: True})), tiny_pairs)
    stock = stock_step or train(formed_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs)[1]
    stock_step.update(stock)
    part = switch.removeprefix("share_")
    assert trainer.sharing == (frozenset() if part == "listener" else {part})
    assert_same(ours, stock, in_order=part != "groups")


@pytest.fixture(scope="module")
def qwen3_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with random weights, whose vision tower feeds the first layers of its language model too."""
    folder = tmp_path_factory.mktemp("qwen3-judge")
    stock = build_processor()
    tokenizer = stock.tokenizer
    token = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            | {"mrope_interleaved": True},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH}
        | {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0, 1]},
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model: Any = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
    )
    ImageOnlyQwen3VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION), listener=".", max_new_tokens=8).save(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "LoRA"])
def test_a_step_of_a_qwen3_vl_is_that_of_stock_trl(
    qwen3_judge: Path, tiny_pairs: Dataset, grpo_config: Config, monkeypatch, lora: bool
):
    # What random weights write is never well-formed: here all of it is, and its words decide which answer it gives.
    monkeypatch.setattr(rewards, "parse", lambda text, _: Trace(text, 2 if len(text) % 2 else 1))
    options = {"max_steps": 1, "scale_rewards": "none", "reward_weights": [1, 1, 1], "beta": 0.1, "token_budget": 150}
    trainer, ours = train(qwen3_judge, grpo_config(**options), tiny_pairs, lora)
    _, stock = train(qwen3_judge, grpo_config(**(options | ALL_OFF)), tiny_pairs, lora)
    assert type(base_model(trainer.model)).__name__ == "Qwen3VLForConditionalGeneration"
    assert trainer.sharing == {"rollout", "logprobs", "groups"}
    assert sum(grad.norm() for grad in stock["gradients"][0].values()) > 1e-3
    assert_same(ours, stock, in_order=False)


def test_the_work_is_done_once(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    patches = {}
    for name, switches in {"shared": {}, "stock": ALL_OFF}.items():
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1, **switches), tiny_pairs)
        count = [0]

        def counted(module: Any, args: Any, kwargs: Any, count: list[int] = count) -> None:
            count[0] += len(args[0] if args else kwargs["hidden_states"])

        model: Any = trainer.model
        model.model.visual.register_forward_pre_hook(counted, with_kwargs=True)
        trainer.train()
        patches[name] = count[0]
    assert patches["stock"] == 4 * patches["shared"] > 0, "groups of four"


def test_the_language_model_reads_a_prompt_once(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    trainer, seen = train(formed_judge, grpo_config(max_steps=1, beta=0.1), tiny_pairs, lora=True)
    (completions,) = seen["completions"]
    prompts = prompt_lengths(trainer, tiny_pairs)
    assert len(completions) == 8 and len(prompts) == 8
    tokens = [count for count, _ in seen["passes"]]
    longest = max(map(len, completions))
    prefilled, drawn, (reference, loss) = tokens[0], tokens[1 : 1 + longest], tokens[1 + longest :]
    assert prefilled in {a + b - 2 for a in prompts for b in prompts}, "two prompts, all but their last token"
    assert drawn[0] == 8 and sum(drawn) <= 8 * longest
    assert reference == loss == prefilled + sum(map(len, completions))


def prompt_lengths(trainer: ListenerGRPOTrainer, pairs: Dataset) -> list[int]:
    """Tokens of each pair's prompt, with two images of nine."""
    processor: Any = trainer.processing_class
    template, tokenizer = processor.apply_chat_template, processor.tokenizer
    messages = [trainer.card.format.messages(prompt, frozenset()) for prompt in pairs["prompt"]]
    texts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in messages]
    return [len(tokenizer(text)["input_ids"]) + 2 * (9 - 1) for text in texts]


def test_a_token_budget_bounds_every_pass(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    """Of prefill, listener, reference and loss, none of which would be split without it."""
    heard: list[int] = []

    def run(budget: int) -> list[tuple[int, bool]]:
        heard.clear()
        config = grpo_config(max_steps=1, token_budget=budget)
        listener: Any = load_listener(str(formed_judge), Card.load(formed_judge), token_budget=budget)
        count = lambda _, __, kwargs: heard.append(kwargs["inputs_embeds"].shape[1])  # noqa: E731
        hook = listener.vlm.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
        trainer = ListenerGRPOTrainer(formed_judge, config, tiny_pairs, listener=listener)
        assert trainer.listener is listener
        passes: list[tuple[int, bool]] = []
        model: Any = trainer.model
        model.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: passes.append((kwargs["inputs_embeds"].shape[1], torch.is_grad_enabled())),
            with_kwargs=True,
        )
        trainer.train()
        hook.remove()
        return passes

    whole, read_whole = run(16384), len(heard)
    assert sum(grad for _, grad in whole) == 1
    assert sum(tokens > 8 for tokens, grad in whole if not grad) == 1, "one prefill; what is drawn is eight at a time"
    split, read_split = run(1), len(heard)
    assert sum(grad for _, grad in split) == 8 + 7, "one for each completion, and all but the last once more"
    assert sum(tokens > 8 for tokens, grad in split if not grad) == 2, "one prefill for each prompt"
    assert max(tokens for tokens, _ in split) < max(tokens for tokens, _ in whole) / 2
    assert read_split > read_whole
    middle = run(100)
    assert max(tokens for tokens, _ in middle) <= 100 < max(tokens for tokens, _ in whole)
    assert 1 < sum(grad for _, grad in middle) < 15


def test_the_trainer_hands_its_budget_to_the_listener(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    for options, lora in (({}, False), ({"listener": "base"}, True)):
        peft = LoraConfig(target_modules=LORA_TARGETS, r=4) if lora else None
        config = grpo_config(token_budget=1234, **options)
        trainer: Any = ListenerGRPOTrainer(formed_judge, config, tiny_pairs, peft_config=peft)
        assert trainer.listener.vlm.token_budget == 1234


@pytest.mark.parametrize("extra", [0, 2])
def test_split_rows_keep_the_activations_of_one(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, monkeypatch, extra: int
):
    """And passes that are run for another process's sake change nothing."""
    kept: dict[int, int] = {}
    found = {}
    for budget in (16384, 1):
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1, token_budget=budget), tiny_pairs)
        stock, size = trainer._compute_loss, [0]
        grads: dict[str, torch.Tensor] = {}
        if budget == 1:
            monkeypatch.setattr(sharing, "_most", lambda number, *_: number + extra)

        def counted(*args: Any, stock: Any = stock, size: list[int] = size, **kwargs: Any) -> Any:
            def pack(tensor: torch.Tensor) -> torch.Tensor:
                size[0] += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return stock(*args, **kwargs)

        def keep(*_: Any, model: Any = trainer.model, grads: dict[str, torch.Tensor] = grads) -> None:
            grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        trainer._compute_loss = counted
        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
        kept[budget], found[budget] = size[0], grads
    model: Any = trainer.model
    weights = sum(p.numel() for p in model.parameters())  # saved for the products of each pass that is kept
    assert kept[1] - weights < (kept[16384] - weights) / 2
    apart = sum((found[1][name] - grad).norm() ** 2 for name, grad in found[16384].items()) ** 0.5
    assert apart <= 1e-5 * sum(grad.norm() ** 2 for grad in found[16384].values()) ** 0.5


def test_the_listener_forgets_a_rounds_images(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    trainer: Any = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=2), tiny_pairs)
    features = trainer.listener.vlm.features
    trainer.train()
    assert features.encoded > 2, "the probe's and some round's"
    assert not features._kept


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


OTHERS = {
    "decode_images_once": (GRPOTrainer, "_generate_and_score_completions"),
    "exact_resume": (GRPOTrainer, "_get_train_sampler"),
    "share_groups": (grpo_trainer, "shuffle_sequence_dict"),
    "gather_images": (grpo_trainer, "gather_object"),
}


@pytest.mark.parametrize("switch", OTHERS)
def test_what_else_trl_has_changed_is_left_to_it_and_said(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog, monkeypatch, switch: str
):
    owner, name = OTHERS[switch]
    stock, calls = getattr(owner, name), []

    def changed(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return stock(*given, **named)

    monkeypatch.setattr(owner, name, changed)
    with caplog.at_level(logging.WARNING, "listener_reward"):
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1), tiny_pairs)
    state = "off" if switch == "gather_images" else "on"
    assert f"{switch} is {state}, but trl's own code runs, because trl {trl.__version__} has" in caplog.text
    assert f"{name}(given, named)" in caplog.text
    assert trainer.sharing == {"rollout", "logprobs", "groups"} - {switch.removeprefix("share_")}
    trainer.train()
    assert calls
    if switch == "decode_images_once":
        assert isinstance(calls[0][1][0]["images"][0], Image.Image), "decoded by datasets"
    if switch == "gather_images":
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        with trainer._light_gathering():
            assert grpo_trainer.gather_object is changed


@pytest.mark.parametrize("switch", ["gather_images", "share_groups"])
def test_what_trl_no_longer_has_is_not_replaced(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, monkeypatch, switch: str
):
    owner, name = OTHERS[switch]
    monkeypatch.delattr(owner, name)
    trainer = ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs)
    assert f"has no trl.trainer.grpo_trainer.{name}" in trainer.left_to_trl[switch]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("head", "gives the model no fused_lm_head and no shift_labels"),
        ("labels", "gives the model no shift_labels"),
        ("output", "fused head has no log_probs"),
    ],
)
def test_a_fused_head_that_is_another_is_left_to_trl_and_said(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog, monkeypatch, missing: str, said: str
):
    if missing == "output":

        @dataclass
        class Output:
            entropy: Any = None

        monkeypatch.setattr("trl.trainer.utils.FusedCausalLMOutput", Output)
    else:

        def head(model: Any, **_: Any) -> None:
            stock = model.forward
            if missing == "labels":
                model.forward = lambda *args, fused_lm_head=False, **kwargs: stock(*args, **kwargs)
            else:
                model.forward = lambda *args, **kwargs: stock(*args, **kwargs)

        monkeypatch.setattr(grpo_trainer, "add_fused_lm_head", head)
    with caplog.at_level(logging.WARNING, "listener_reward"):
        trainer = ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs)
    assert trainer.sharing == {"rollout", "groups"}
    assert "share_logprobs is on, but trl's own code runs, because" in caplog.text and said in caplog.text


def test_each_reason_to_fall_back_is_said(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog, monkeypatch
):
    trainer = ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs)

    def said(**state: Any) -> tuple[frozenset[str], str]:
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "listener_reward"):
            for name, value in state.items():
                patch.setattr(trainer, name, value, raising=False)
            return trainer._what_is_shared(), caplog.text

    assert said() == ({"rollout", "logprobs", "groups"}, "")
    shared, text = said(use_vllm=True)
    assert shared == {"logprobs", "groups"} and text.count("share_") == 1
    assert "share_rollout is on, but trl's own code runs, because vLLM samples" in text
    shared, text = said(aux_loss_enabled=True)
    assert shared == {"rollout", "groups"} and text.count("share_") == 1
    assert "share_logprobs is on, but trl's own code runs, because the load-balancing loss of experts" in text
    for version, wanted in ((1, frozenset()), (2, {"rollout", "logprobs", "groups"})):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version), deepspeed_plugin=None)
        accelerator = SimpleNamespace(state=state, unwrap_model=lambda model: model)
        shared, text = said(is_fsdp_enabled=True, accelerator=accelerator)
        assert shared == wanted
        assert text.count("trl's own code runs, because FSDP version 1 flattens") == (3 if version == 1 else 0)


def test_a_listener_that_cannot_share_says_so(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog, monkeypatch
):
    monkeypatch.setattr(transformers_vlm, "_TOLD", set())
    with caplog.at_level(logging.WARNING, "listener_reward"):
        listener: Any = load_listener(str(formed_judge), Card.load(formed_judge), attn_implementation="eager")
    assert "every chat pays for its own prompt, because the model was loaded with attn_implementation='eager'" in (
        caplog.text
    )
    assert not listener.vlm.shared_prefix
    ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1), tiny_pairs, listener=listener).train()


def test_attention_that_another_library_owns_is_left_alone_and_said(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog
):
    def theirs(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("shared_prefix", None)
        return sdpa_attention_forward(*args, **kwargs)

    before = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", theirs)
    try:
        with caplog.at_level(logging.WARNING, "listener_reward"):
            trainer = ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1), tiny_pairs)
        assert trainer.sharing == frozenset()
        assert caplog.text.count("theirs stands in for transformers' 'sdpa' attention") == 4, "three parts, listener"
        trainer.train()
        assert AttentionInterface()["sdpa"] is theirs
    finally:
        AttentionInterface.register("sdpa", before)


def test_a_trl_that_nothing_can_fall_back_to_is_refused_on_import():
    code = "from trl import GRPOTrainer\nGRPOTrainer._save_checkpoint = lambda self, model: None\n"
    code += "import listener_reward.train.trainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "has GRPOTrainer._save_checkpoint(self, model), and listener-reward expects (self, model, trial)"
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
    ours: Any = shuffle_groups(batch)
    after = torch.rand(1)
    torch.manual_seed(0)
    stock: Any = shuffle_sequence_dict(batch)
    after_stock = torch.rand(1)
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
