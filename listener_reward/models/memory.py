"""How much of a batch fits a budget in bytes, and what is said where memory runs out."""

from __future__ import annotations

import contextlib
import math
import re
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from listener_reward.errors import JudgeError, missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch

from listener_reward.media.clips import Clip, Visual
from listener_reward.prefix.attention import base_model


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a forward pass of one model takes beside its weights, without gradients, from the model's shape."""

    kept: int
    """For each token: keys and values of every layer, and the features of what the token stands for."""
    computed: int
    """For each token: what one layer has at once, at its widest."""
    row: int
    """For each completion that is sampled: its scores over the vocabulary, four times over while it is drawn."""

    @classmethod
    def of(cls, model: Any) -> Footprint:
        config = base_model(model).config.get_text_config()
        size = base_model(model).dtype.itemsize
        heads = config.num_attention_heads
        width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        head = getattr(config, "head_dim", None) or width // heads
        keys = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head
        vision = getattr(base_model(model).config, "vision_config", None)
        deeper = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        # A layer's input, what it adds and the norm of it, twice in float32; the MLP's gate, up and their product; or
        # in attention the queries, its output and the keys with their copy.
        widest = max(3 * inner * size, 2 * (heads * head + keys) * size) + width * (3 * size + 8)
        return cls(
            kept=config.num_hidden_layers * keys * size + (1 + deeper) * width * size,
            computed=widest,
            row=4 * 4 * config.vocab_size,
        )

    def tokens(self, memory: int) -> int:
        """Tokens of a forward pass in `memory` bytes, one at least."""
        return max(1, memory // self.computed)

    def chat(self, prompt: int, rows: int, new: int) -> int:
        """Bytes that stay while `rows` completions of at most `new` tokens are sampled of a chat of `prompt` tokens."""
        room = max(32, 2 ** math.ceil(math.log2(max(1, new))))  # which doubles when it runs out
        return prompt * self.kept + rows * (room * self.kept + self.row)


def tokens_of(processor: Any, visual: Visual) -> int:
    """About how many tokens of the language model a picture or a clip becomes; 0 where the processor does not say."""
    images: Any = processor.image_processor
    if not _says_patches(images):
        return 0
    factor = (images.patch_size * images.merge_size) ** 2
    if isinstance(visual, Clip):
        width, height = processor.video_processor.frame_size(len(visual.frames), *visual.frames[0].image.size)
        return math.ceil(len(visual.frames) / images.temporal_patch_size) * width * height // factor
    width, height = visual.image.size
    return math.ceil(min(max(width * height, images.size["shortest_edge"]), images.size["longest_edge"]) / factor)


def patch_bytes(processor: Any) -> int:
    """Bytes of a token's patches in the processor's memory, float32; 0 where the processor does not say."""
    images: Any = processor.image_processor
    if not _says_patches(images):
        return 0
    return 4 * 3 * images.temporal_patch_size * (images.patch_size * images.merge_size) ** 2


def _says_patches(image_processor: Any) -> bool:
    """Whether it says what its patches are, as those of the Qwen-VL family do."""
    return hasattr(image_processor, "patch_size") and hasattr(image_processor, "merge_size")


@contextlib.contextmanager
def out_of_memory(what: str, cure: str) -> Generator[None]:
    """Around work that may fill the memory: running out is a `JudgeError` in one line, which names what to change.

    What the failed pass had is freed first, so that a caller may go on with a smaller batch.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        failed: Exception = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of torch's allocator for the processor's memory
            raise
        failed = error
    traceback.clear_frames(failed.__traceback__)
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(failed), re.I)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    wanted = f", which asked for {asked[1]} more" if asked else ""
    raise JudgeError(f"memory ran out while {what}{wanted}; {cure}") from None
