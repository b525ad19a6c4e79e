"""What judges, listeners and rollouts share: looking at images, prefilling prompts, writing, reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from listener_reward.models.vision import MAX_PATCHES
from listener_reward.plan.passes import GRID, Architecture, Pass
from listener_reward.plan.tokens import Pair
from listener_reward.prefix.rows import budgeted

DRAWN = 8
"""Float32 copies of a step's logits while a token is drawn: warped, noise, softmax."""

ROOM = 32
"""Tokens for which a rollout's cache has room at first; the room doubles."""

VOCABULARY_AT_ONCE = 8192
"""Words of the head that are float32 at a time, see `models.head`."""

TAGS = 12
"""Tokens of the tags around a thought, up to the answer's place."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a model together."""

    pair: Pair
    prompts: int
    """Distinct chats."""
    rows: int
    """Completions of all of them."""
    thought: int
    """Tokens of a completion at most."""
    token_budget: int
    batch_size: int
    """Rows that are read in one go, where groups are smaller."""
    group: int
    """Completions of a chat."""
    orders: int = 1
    """Chats of a pair, which share its images."""

    @property
    def pairs(self) -> float:
        return self.prompts / self.orders

    @property
    def grids(self) -> list[GRID]:
        """Of the distinct images."""
        return list(self.pair.grids) * math.ceil(self.pairs)


def looked(model: Architecture, grids: Sequence[GRID], *, at_once: int | None = MAX_PATCHES) -> Pass:
    """The vision tower over images, in passes of at most `at_once` patches; None for all in one pass."""
    images = len(grids)
    per_image = max(math.prod(grid) for grid in grids)
    together = images if at_once is None else max(1, min(images, at_once // per_image))
    two = model.look([max(grids, key=math.prod)] * 2)  # tokens of images do not attend to one another's
    return Pass(two.peak * together // 2, two.kept * images // 2, two.flops * images / 2)


def decoding_parts(model: Architecture, asked: Asked) -> tuple[dict[str, int], float, float]:
    """Bytes of a rollout by part, its operations, and the bytes of weights that it reads."""
    length = asked.pair.total
    passes = list(budgeted([(length, [0])] * asked.prompts, asked.token_budget))
    fullest = max(map(len, passes))
    found = model.prefill([length] * fullest)
    each = found.kept / (fullest * length)  # bytes a token, of all layers
    kept = round(each * asked.prompts * length)
    joined = 2 if len(passes) > 1 else 1  # several passes' are copied into one, and all are there meanwhile
    room = ROOM
    while room < asked.thought:
        room *= 2
    own = round(each * asked.rows * room)
    logits = DRAWN * 4 * asked.rows * model.text.vocab_size
    moments = [
        {"keys and values": kept + own, "logits": logits},
        {"keys and values": kept * joined, "activations": found.peak - found.kept},
    ]
    flops = found.flops * asked.prompts / fullest + model.decoding_flops * asked.rows * asked.thought
    text = model.text
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    seen = length + asked.thought / 2
    flops += 4.0 * text.num_hidden_layers * text.num_attention_heads * width * seen * asked.rows * asked.thought
    return largest(moments), flops, float(model.decoding_bytes) * asked.thought


def largest(moments: Sequence[dict[str, int]]) -> dict[str, int]:
    """The moment at which most bytes are taken."""
    return max(moments, key=lambda parts: sum(parts.values()))


def fullest_pass(
    lengths: Sequence[tuple[int, Sequence[int]]], token_budget: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """Groups of a prompt and its continuations in passes of at most `token_budget` tokens.

    Args:
        lengths: tokens of each group's prompt and of its continuations.

    Returns:
        of the pass with most tokens the lengths of its prompts and those of each prompt's continuations; and the tokens
        of every pass.
    """
    passes = [
        [(lengths[group][0], [lengths[group][1][member] for member in members]) for group, members in row]
        for row in budgeted(lengths, token_budget)
    ]
    sizes = [sum(prompt + sum(some) for prompt, some in row) for row in passes]
    fullest = passes[sizes.index(max(sizes))]
    return [prompt for prompt, _ in fullest], [some for _, some in fullest], sizes


def listening(model: Architecture, asked: Asked) -> tuple[dict[str, int], float]:
    """Bytes of reading thoughts by part, and its operations."""
    written = asked.thought + TAGS
    groups = max(1, min(asked.prompts, asked.batch_size // asked.group))  # in one batch; a group is never cut
    lengths = [(asked.pair.total, [written] * asked.group)] * groups
    prompts, continuations, sizes = fullest_pass(lengths, asked.token_budget)
    found = model.read(prompts, continuations)
    look = looked(model, list(asked.pair.grids) * math.ceil(groups / asked.orders))
    rows = sum(map(len, continuations))
    features = {"image features": look.kept}
    size = torch.finfo(model.dtype).bits // 8
    moments: list[dict[str, int]] = [
        features | {"activations": look.peak - look.kept},
        features | {"activations": found.peak},
        features
        | {"activations": max(sizes) * model.text.hidden_size * size}
        | {"logits": 4 * VOCABULARY_AT_ONCE * (model.text.hidden_size + rows)},
    ]
    share = asked.prompts / groups
    return largest(moments), (found.flops * sum(sizes) / max(sizes) + look.flops) * share
