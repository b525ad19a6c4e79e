"""What a plan knows of a checkpoint: its configuration, its tokenizer and image limits where they are at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from listener_reward.bench.shapes import SHAPES_BY_NAME
from listener_reward.card import Card, CardLike
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.media.images import MAX_SIDE
from listener_reward.models.adapters import base_of, options_of_base
from listener_reward.models.families import family_of
from listener_reward.models.hub import hub_options, loading, resolve
from listener_reward.models.older_transformers import smart_resize
from listener_reward.models.processing import load_processor
from listener_reward.plan.passes import GRID

CHARACTERS_A_TOKEN = 4.3
"""Of English in Qwen's vocabulary, where there is no tokenizer: the question has 651 characters and 151 tokens."""

TEMPLATE_TOKENS = 20
"""Of Qwen2.5-VL's chat template, around the question."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
_QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
_QWEN3_4B_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16} | {
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}


def _qwen2_5(shape: str, *, tied: bool) -> Any:
    text, tower = SHAPES_BY_NAME[shape]
    return Qwen2_5_VLConfig(
        text_config=_MROPE | text,
        vision_config=tower | {"out_hidden_size": text["hidden_size"], "window_size": 112},
        tie_word_embeddings=tied,
    )


def _qwen3_4b() -> Any:
    return Qwen3VLConfig(text_config=_QWEN3_4B, vision_config=_QWEN3_4B_TOWER, tie_word_embeddings=True)


BUILT_IN = {
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: _qwen2_5("qwen2.5-vl-3b", tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: _qwen2_5("qwen2.5-vl-7b", tied=False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_4b,
    "Qwen/Qwen3-VL-4B-Thinking": _qwen3_4b,
}
"""Shapes of checkpoints on the Hub, for where the Hub cannot be reached."""

_LIMITS = {"qwen2_5_vl": (4 * 28 * 28, 16384 * 28 * 28), "qwen3_vl": (65536, 16777216)}
"""Least and most pixels of an image, as those checkpoints have it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before its weights are loaded."""

    name: str
    config: Any
    card: Card
    processor: Any = None
    """None where it is not at hand; tokens of text are then estimated."""
    adapter: Any = None
    """PEFT's configuration, where the checkpoint is an adapter on a base."""
    built_in: bool = False
    max_pixels: int | None = None
    """A limit that is given, below the checkpoint's own."""

    @classmethod
    def of(
        cls,
        name: str,
        *,
        like: str | None = None,
        card: CardLike | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
    ) -> Checkpoint:
        """The checkpoint `name`: an embedded name, a folder, or a name on the Hub.

        `like` is another one, whose shapes it will have, where it is not there yet. `card` replaces the checkpoint's
        own. `revision` is that of a name on the Hub.

        Raises:
            InputError: it cannot be found or reached, and its shapes are not built in; or a card that cannot be read.
        """
        card = None if card is None else Card.read(card)
        found = resolve(like or name)
        try:
            there = whole = hub_options(found, revision)
            base, adapter = base_of(found, **there), None
            if base is not None:
                from peft import PeftConfig

                with loading(found):
                    adapter = PeftConfig.from_pretrained(found, **there)
                whole = options_of_base(base, there, found)
            base = base or found
            with loading(base):
                config = AutoConfig.from_pretrained(base, trust_remote_code=False, **whole)
            if family_of(config.model_type, where=base, config=config.to_dict()).processor is None:
                raise InputError(
                    f"{name!r} is a {config.model_type} model, which no plan knows: only Qwen's families are counted. "
                    "Name one of its size by --like, or measure the run itself"
                )
            own, processor = Card.load(found, card, revision=revision), load_processor(found, **there)
            return cls(name, config, own, processor, adapter, max_pixels=max_pixels)
        except InputError:
            if found not in BUILT_IN:
                raise
            return cls(name, BUILT_IN[found](), card or Card(), built_in=True, max_pixels=max_pixels)

    @property
    def notes(self) -> list[str]:
        """What a reader of the plan should know of where the shapes come from."""
        if not self.built_in:
            return []
        return [f"{self.name}: not at hand; its shapes are those built in, and tokens of text are estimated"]

    def text_tokens(self, text: str) -> int:
        if self.processor is None:
            return math.ceil(len(text) / CHARACTERS_A_TOKEN)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question_tokens(self, chat_format: ChatFormat) -> int:
        """Of the question and the chat template, without prompt and images."""
        messages = chat_format.messages("")
        if self.processor is None:
            words = "".join(part.get("text", "") for turn in messages for part in turn["content"])
            return TEMPLATE_TOKENS + math.ceil(len(words) / CHARACTERS_A_TOKEN)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(self.processor.tokenizer(text)["input_ids"]) - 2  # two placeholders, which images take the place of

    def grid(self, width: int, height: int) -> GRID:
        """Patches of an image of that size in pixels."""
        tower = self.config.vision_config
        merge, patch = tower.spatial_merge_size, tower.patch_size
        scale = min(1.0, MAX_SIDE / max(width, height))
        least, most = self._limits()
        height, width = smart_resize(
            max(1, round(height * scale)), max(1, round(width * scale)), patch * merge, min(least, most), most
        )
        return 1, height // patch, width // patch

    def tokens(self, grid: GRID) -> int:
        return math.prod(grid) // self.config.vision_config.spatial_merge_size**2

    def _limits(self) -> tuple[int, int]:
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        if size is not None:
            least, most = size["shortest_edge"], size["longest_edge"]
        else:
            least, most = _LIMITS[self.config.model_type]
        return least, min(most, self.max_pixels or most)


def dtype_of(name: Any, config: Any) -> torch.dtype:
    """The dtype that weights are loaded in: float32 where none is given, the checkpoint's own for "auto".

    Raises:
        InputError: a name that is none.
    """
    if name == "auto":
        name = getattr(config, "dtype", None) or "bfloat16"
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {name!r}; give the name of a torch dtype, such as 'bfloat16', or 'auto'")
    return dtype
