"""The workloads of `listener-reward bench`, each done as the user's alternative does it ("plain") and as this package
does ("shared").

The listener has two alternatives: `model(**inputs).logits[:, -1]` ("plain"), which computes all logits to read the
last, and the last alone, by `logits_to_keep=1` ("last_logit").

Each way of each workload runs in a process of its own, so that its peak of memory is its own, and leaves what it
computed in a file, so that the ways can be compared number by number. Weights are random: cost is measured here, and
what training is worth by the arms of `recipes`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from listener_reward.bench.meter import Reading, in_use, metered
from listener_reward.bench.shapes import Size, group_chats, pictures, words
from listener_reward.card import Card
from listener_reward.chat import Chat, ChatFormat
from listener_reward.judge import Judge
from listener_reward.models.transformers_vlm import TransformersVLM

Computed = dict[str, torch.Tensor]


def time_listener(folder: Path, size: Size, way: str) -> tuple[Reading, Computed]:
    """The listener's probabilities after the thoughts of a group. The first run warms up and does not count."""
    vlm = TransformersVLM.from_pretrained(
        folder, dtype=size.dtype, batch_size=size.group, token_budget=2**20, attention=size.attention
    )
    chats, thoughts = group_chats(size, vlm.reserved)
    prefixes = [ChatFormat().answer_slot(thought) for thought in thoughts]
    reading = _reading(vlm)
    log_probs = torch.empty(0)
    kept = {"logits_to_keep": 1} if way == "last_logit" else {}
    ask = vlm.label_logprobs if way == "shared" else partial(_plain_log_probs, vlm, **kept)
    for number in range(size.repeats + 1):
        vlm.features.clear()
        with metered([vlm.model], reading) if number else contextlib.nullcontext():
            log_probs = ask(chats, prefixes, ("1", "2"))
    return reading, {"log-probability": log_probs}


@torch.inference_mode()
def _plain_log_probs(
    vlm: TransformersVLM, chats: list[Chat], prefixes: list[str], labels: Sequence[str], **kept: int
) -> torch.Tensor:
    """What one writes without this package."""
    template = vlm.processor.apply_chat_template
    texts = [template(chat.messages, tokenize=False, add_generation_prompt=True) for chat in chats]
    texts = [text + prefix for text, prefix in zip(texts, prefixes, strict=True)]
    images = [picture.image for chat in chats for picture in chat.images]
    inputs = vlm.processor(images=images, text=texts, padding=True, return_tensors="pt").to(vlm.model.device)
    logits = vlm.model(**inputs, **kept).logits[:, -1]
    ids = vlm.tokenizer.convert_tokens_to_ids(list(labels))
    return logits.float().log_softmax(-1)[:, ids].cpu()


def time_rank(folder: Path, size: Size, way: str) -> tuple[Reading, Computed]:
    """Ranks images by a judge that compares every pair in both orders. The first run warms up and does not count."""
    vlm = TransformersVLM.from_pretrained(
        folder, dtype=size.dtype, batch_size=16, shared_prefix=way == "shared", attention=size.attention
    )
    judge = Judge(vlm, None, Card.load(folder), think=False)
    images = pictures(size.images, size)
    reading = _reading(vlm)
    scores = torch.empty(0)
    prompt = words(size.prompt_words, random.Random(size.seed))
    for number in range(size.repeats + 1):
        vlm.features.clear()
        with metered([vlm.model], reading) if number else contextlib.nullcontext():
            scores = torch.tensor(judge.rank(prompt, images).scores)
    return reading, {"score": scores}


def time_loss(folder: Path, size: Size, way: str) -> tuple[Reading, Computed]:
    """The GRPO loss of fixed completions, forward and backward."""
    from listener_reward.bench.trainers import make_trainer

    trainer, _ = make_trainer(folder, size, way == "shared")
    model = trainer.accelerator.unwrap_model(trainer.model)
    chats, _ = group_chats(size, frozenset())
    rng = random.Random(size.seed)
    thoughts = [words(size.tokens, rng) for _ in chats]
    processor = trainer.processing_class
    texts = [processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True) for chat in chats]
    images = [picture.image for chat in chats for picture in chat.images]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
    completion = processor.tokenizer(thoughts, return_tensors="pt")["input_ids"].to(model.device)
    generator = torch.Generator().manual_seed(size.seed)
    advantages = torch.randn(len(chats), generator=generator).to(model.device)
    batch = {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(completion.numel()),
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "num_images": [2] * len(chats),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(completion)], dim=1),
    }
    seen: list[torch.Tensor] = []
    stock = trainer._get_per_token_logps_and_entropies

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        seen.append(result[0].detach().float().cpu())
        return result

    trainer._get_per_token_logps_and_entropies = watched
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would have set
    reading = Reading()
    loss = torch.tensor(0.0)
    for number in range(size.warm_up + size.repeats):
        model.zero_grad(set_to_none=True)
        with metered([model], reading, backward=True) if number >= size.warm_up else contextlib.nullcontext():
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
    return reading, {"log-probability": seen[-1], "loss": loss.detach().cpu()[None], **_gradients(model)}


def time_step(folder: Path, size: Size, way: str) -> tuple[Reading, Computed]:
    """One optimizer step: rollout, listener, loss, update."""
    from transformers import TrainerCallback

    from listener_reward.bench.trainers import make_trainer

    computed: Computed = {}
    reading = Reading()

    class Watch(TrainerCallback):
        """Meters the steps. Only the first step's gradients are compared: later on, rounding has made two different
        models."""

        meter: Any = None

        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            counts = state.global_step >= size.warm_up
            self.meter = metered(models, reading, backward=True) if counts else contextlib.nullcontext()
            self.meter.__enter__()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if not computed:
                computed.update(_gradients(model))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.meter.__exit__(None, None, None)

    trainer, listener = make_trainer(folder, size, way == "shared", callbacks=[Watch()])
    model = trainer.accelerator.unwrap_model(trainer.model)
    models = [model, listener.vlm.model]
    rollout = trainer._generate_single_turn
    tokens: list[torch.Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        completions, more = rollout(*args, **kwargs)
        tokens.append(torch.tensor(completions).float())
        return completions, more

    trainer._generate_single_turn = watched
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    return reading, {
        "sampled token": tokens[0],
        "reward": torch.tensor([logged["reward"]]),
        "loss": torch.tensor([logged["loss"]]),
        **computed,
    }


WORKLOADS: dict[str, Callable[[Path, Size, str], tuple[Reading, Computed]]] = {
    "listener": time_listener,
    "rank": time_rank,
    "loss": time_loss,
    "step": time_step,
}


def _reading(vlm: TransformersVLM) -> Reading:
    """For runs after a warm-up, "before" is the loaded model. Weights stay in their file until read, so they are read
    here."""
    for weight in vlm.model.parameters():
        weight.sum()
    return Reading(before=in_use())


def _gradients(model: Any) -> Computed:
    """The gradients by name, in the weights' own dtype: a real model's gradients are gigabytes."""
    named = model.named_parameters()
    return {f"grad {name}": p.grad.detach().to("cpu", copy=True) for name, p in named if p.grad is not None}
