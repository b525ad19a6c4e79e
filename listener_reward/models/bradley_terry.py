"""A vision-language model with a scalar head: a prompt and one image to a score, as ImageReward and HPSv3 do.

Scores are log-odds by Bradley-Terry: people prefer one image to another with probability sigmoid(difference). Such a
model writes no thought, and a score costs one forward pass. Its folder holds the backbone as transformers saves it, the
processor, the head, and `bradley_terry.json`, by which it is told from a judge's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from PIL.Image import Image
from safetensors.torch import load_file as _load_file  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file as _save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from transformers import AutoModel

from listener_reward.chat import QWEN_RESERVED, neutralise, reserved_tokens
from listener_reward.errors import InputError
from listener_reward.files import quoted, replace_file, write_text
from listener_reward.models.hub import find_file, loading, resolve
from listener_reward.models.placement import chosen_device, limit_pixels
from listener_reward.models.processing import load_processor
from listener_reward.models.transformers_vlm import default_device
from listener_reward.pairs import PromptLike, as_prompt

CARD, HEAD = "bradley_terry.json", "bradley_terry.safetensors"

VERSION = 1
"""Of what `messages` asks: a folder of another version was trained to be asked otherwise."""

MAX_PROMPT_CHARS = 4000
"""Longer prompts are cut, as `ChatFormat.max_prompt_chars` cuts a judge's."""


class BradleyTerryModel(nn.Module):
    """A backbone and a linear head on the hidden state of the last token."""

    def __init__(self, backbone: Any, processor: Any, head: nn.Linear | None = None):
        """
        Args:
            backbone: a transformers model whose outputs have a `last_hidden_state`.
            processor: its processor, as `load_processor` gives it.
            head: from hidden size to 1, float32; None is a new one that scores everything 0.
        """
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.reserved = reserved_tokens(processor.tokenizer) | frozenset(QWEN_RESERVED)
        if head is None:
            head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.head = head

    @classmethod
    def from_base(cls, name: str | Path, *, dtype: Any = torch.float32, max_pixels: int | None = None) -> Any:
        """A new head on the checkpoint `name`, on the CPU.

        Raises:
            InputError: the checkpoint cannot be found, reached or read.
        """
        folder = resolve(name)
        processor = load_processor(folder)
        limit_pixels(processor, max_pixels)
        return cls(_backbone(folder, dtype), processor)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None, dtype: Any = None) -> Any:
        """A trained model, frozen; bfloat16 on a GPU and float32 on a CPU unless `dtype` says.

        Raises:
            InputError: the folder holds none, or one of another version.
        """
        card, head = (find_file(folder, file) for file in (CARD, HEAD))
        if card is None or head is None:
            raise InputError(f"{quoted(folder)} holds no {CARD} with {HEAD}; give a folder of train_bradley_terry")
        with loading(folder):
            said: Any = json.loads(card.read_text(encoding="utf-8"))
            weights = _load_file(head)
        version: Any = cast("Mapping[str, Any]", said).get("version") if isinstance(said, Mapping) else None
        if version != VERSION or weights.keys() != {"weight", "bias"}:
            raise InputError(f"{quoted(folder)} is of version {version!r}, and this release reads version {VERSION}")
        place = chosen_device(device) if device else default_device()
        kind = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        linear = nn.Linear(weights["weight"].shape[1], 1)
        linear.load_state_dict(weights)
        model = cls(_backbone(str(folder), kind), load_processor(str(folder)), linear)
        return model.to(place).eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Writes what `from_pretrained` reads; the card comes last, so that half a folder is none."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(place)
        self.processor.save_pretrained(place)
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.head.state_dict().items()}
        replace_file(place / HEAD, lambda file: _save_file(weights, file))
        write_text(place / CARD, json.dumps({"kind": "bradley-terry", "version": VERSION}, indent=2) + "\n")

    def inputs(self, prompts: Sequence[PromptLike], images: Sequence[Image]) -> dict[str, Tensor]:
        """B prompts and images as arguments of a call, on the CPU; a prompt's sources stand before its image.

        Raises:
            InputError: a prompt has a criterion: there is one score.
        """
        texts: list[str] = []
        pictures: list[list[Image]] = []
        for prompt, image in zip(prompts, images, strict=True):
            asked = as_prompt(prompt)
            if asked.criterion is not None:
                raise InputError(
                    f"criterion is {asked.criterion!r}, and a Bradley-Terry model has one score; leave it out"
                )
            chat = messages(asked.text, len(asked.sources), self.reserved)
            texts.append(self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            pictures.append([*(source.image for source in asked.sources), image])
        return dict(self.processor(text=texts, images=pictures, padding=True, return_tensors="pt"))

    def forward(self, **inputs: Any) -> Tensor:
        """Scores (B,), float32, of what `inputs` made."""
        hidden = self.backbone(**inputs).last_hidden_state
        last = inputs["attention_mask"].cumsum(1).argmax(1)  # whichever side is padded
        return self.head(hidden[torch.arange(len(hidden), device=hidden.device), last].float())[:, 0]

    @torch.inference_mode()
    def score(self, prompts: Sequence[PromptLike], images: Sequence[Image]) -> list[float]:
        """One score for each image, in log-odds."""
        device = self.head.weight.device
        return self(**{name: value.to(device) for name, value in self.inputs(prompts, images).items()}).tolist()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """For transformers' `Trainer`."""
        self.backbone.gradient_checkpointing_enable(**options)


def messages(text: str, sources: int, reserved: frozenset[str]) -> list[dict[str, Any]]:
    """The one turn that such a model reads: sources, the image, the prompt."""
    safe = neutralise(text[:MAX_PROMPT_CHARS], reserved)
    images = [{"type": "image"} for _ in range(sources + 1)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": safe}]}]


def _backbone(folder: str, dtype: Any) -> Any:
    with loading(folder):
        return AutoModel.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            folder, dtype=dtype, trust_remote_code=False
        )
