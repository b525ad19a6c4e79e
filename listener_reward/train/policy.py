"""What is known of the policy before it is loaded: checkpoint, revision, processor and card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import trl

from listener_reward.card import Card
from listener_reward.errors import InputError
from listener_reward.models.adapters import base_of
from listener_reward.models.hub import hub_options, lasting, resolve
from listener_reward.models.placement import limit_pixels
from listener_reward.models.processing import load_processor
from listener_reward.train.config import ListenerGRPOConfig
from listener_reward.train.guard import dropped_inputs


@dataclass(frozen=True)
class Policy:
    """The checkpoint that is trained."""

    name: str
    """As the caller has it: a folder, a Hub name, or an embedded name."""
    folder: str
    """As the model is loaded by: in full, because adapters name it as their base."""
    revision: str | None
    """On the Hub."""
    processor: Any
    card: Card

    @classmethod
    def open(cls, model: str | Path, args: ListenerGRPOConfig) -> Policy:
        """Reads what is in the checkpoint beside its weights.

        Raises:
            InputError: the checkpoint cannot be found or reached, is an adapter, has no chat template, or takes inputs
                that trl would drop.
        """
        folder = lasting(resolve(model))
        revision: str | None = (args.model_init_kwargs or {}).get("revision")  # pyright: ignore[reportAttributeAccessIssue]
        there = hub_options(folder, revision)
        if (base := base_of(folder, **there)) is not None:
            raise InputError(
                f"the model {str(model)!r} is an adapter on {base!r}, and new adapters need whole weights under them; "
                f"merge it first: listener-reward merge {model} --out FOLDER"
            )
        card = replace(Card.load(folder, args.card, revision=revision), masking=args.masking)
        if args.listener_grounding is not None:
            card = replace(card, listener_grounding=args.listener_grounding)
        processor = load_policy_processor(folder, **there)
        limit_pixels(processor, args.max_pixels)
        _refuse_dropped_inputs(folder, processor, card)
        return cls(str(model), folder, revision, processor, card)


def load_policy_processor(model: str, **options: Any) -> Any:
    """The processor of the checkpoint to train; `options` are transformers' for the Hub, such as `revision`.

    Raises:
        InputError: the checkpoint cannot be found or reached, is of another architecture, or has no chat template.
    """
    processor = load_processor(model, **options)
    if processor.chat_template is None:
        raise InputError(f"the checkpoint {model!r} has no chat template; add its chat_template.jinja to the folder")
    return processor


def _refuse_dropped_inputs(model: str, processor: Any, card: Card) -> None:
    """Refuses a model with inputs of its own that trl does not know: it would be trained on other images than shown."""
    stills = PIL.Image.new("RGB", (64, 48)), PIL.Image.new("RGB", (48, 64))
    chat = card.format.chat("", *stills)
    text = processor.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
    made = processor(text=[text], images=[[picture.image for picture in chat.images]], return_tensors="pt")
    if dropped := dropped_inputs(made):
        raise InputError(
            f"the checkpoint {model!r} cannot be trained: trl {trl.__version__} does not hand its inputs "
            f"{', '.join(dropped)} on to the model. It can judge and listen as it is"
        )
