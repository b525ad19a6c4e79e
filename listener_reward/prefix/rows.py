"""The shared-prefix engine: images and prompt once per group, then G continuations.

A group is one prompt (a chat with its images, tokenised) and G continuations of the prompt. Stock code runs G copies of
the prompt. Here a forward pass sees one row:

    prompt 1 | prompt 2 | ... | continuation 1.1 | continuation 1.2 | ... | continuation 2.1 | ...

Every token-wise layer computes each prompt once. Attention has two parts: prompts attend causally to themselves,
continuations to their own prompt and to themselves. Each continuation keeps the positions (M-RoPE) that it would have
alone, so the results are those of G copies up to rounding, with or without gradients. Memory and work grow with prompt
+ G * continuation. No mask of the whole row is made, but attention copies the prompt's keys and values for each
continuation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from listener_reward.prefix.attention import Layout, attention_inputs, base_model

IGNORED = -100
"""Label of a position that predicts nothing."""


class Prompt(NamedTuple):
    """A tokenised chat with its images, which the continuations of a group share."""

    ids: Tensor
    """Token ids (P,) int64, image placeholders expanded. P is at least 2."""
    positions: Tensor
    """M-RoPE positions (3, P) int64."""
    images: Any = None
    """The caller's own record of the prompt's images; the engine does not read it."""


def prompt_positions(
    model: Any,
    ids: Tensor,
    grids: Tensor | None,
    video_grids: Tensor | None = None,
    seconds_per_patch: Tensor | None = None,
) -> Tensor:
    """M-RoPE positions (3, P) int64 of one prompt `ids` (P,), whose images have patch grids `grids` (n, 3).

    The prompt's videos have patch grids `video_grids` (m, 3). `seconds_per_patch` (m,) is the time from one patch to
    the next, by which Qwen2.5-VL spaces positions.
    """
    core, config = base_model(model).model, base_model(model).config
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    positions, _ = core.get_rope_index(
        ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=grids,
        video_grid_thw=video_grids,
        second_per_grid_ts=seconds_per_patch,
    )
    return positions[:, 0]


def fork(model: Any, prompts: Sequence[Tensor], copies: Sequence[int]) -> int | None:
    """How many tokens to share of prompts that show the same images: the length of their common beginning.

    Each of the `copies[i]` continuations of `prompts[i]`, token ids (P,), repeats what follows the beginning.

    Returns:
        None where the prompts are better off apart: one alone, an image at its end or after it, or as it is shared
        fewer tokens are saved than are repeated.
    """
    if len(prompts) < 2:
        return None
    shortest = min(map(len, prompts))
    firsts = torch.stack([ids[:shortest] for ids in prompts])
    equal = (firsts == firsts[0]).all(0)[:-1]  # no end is empty
    common = int(equal.int().cumprod(0).sum())
    ends = [ids[common:] for ids in prompts]
    repeated = sum((number - 1) * len(end) for number, end in zip(copies, ends, strict=True))
    if common < 2 or (len(prompts) - 1) * common <= repeated:
        return None
    config = base_model(model).config
    shown = torch.cat([prompts[0][common - 1 : common], *ends])
    return None if ((shown == config.image_token_id) | (shown == config.video_token_id)).any() else common


def followed(prompt: Prompt, tokens: Tensor) -> Prompt:
    """`prompt` with text behind it, the tokens (C,) int64. It must not end with an image."""
    after = prompt.positions[:, -1:] + torch.arange(1, len(tokens) + 1, device=tokens.device)
    return Prompt(torch.cat([prompt.ids, tokens]), torch.cat([prompt.positions, after], dim=1), prompt.images)


class Row(NamedTuple):
    """Groups packed for one forward pass: `model(**row.inputs, ...)`."""

    inputs: dict[str, Any]
    """`input_ids` (1, S), `position_ids` (3, 1, S), the layout and a mask that keeps transformers from making one."""
    ends: Tensor
    """Index in the row of each continuation's last token, (N,) int64."""
    labels: Tensor
    """The token that each position predicts, (1, S) int64; `IGNORED` in prompts and after a continuation's end."""


def pack(
    prompts: Sequence[Prompt], continuations: Sequence[Sequence[Tensor]], *, open_end: bool, kernel: str = "sdpa"
) -> Row:
    """One row of several groups; `continuations[i]` are the token ids (C,) that follow `prompts[i]`.

    A prompt's last token is moved to the start of each continuation, so that a continuation's predictions all lie in
    its own segment. With `open_end` the row also holds each continuation's last token, which predicts the next token;
    without, the last token is only a label. `kernel`, one of `KERNELS`, computes the row's attention.
    """
    segments = [(prompt, c) for prompt, group in zip(prompts, continuations, strict=True) for c in group]
    ids = [prompt.ids[:-1] for prompt in prompts]
    positions = [prompt.positions[:, :-1] for prompt in prompts]
    labels = [torch.full_like(part, IGNORED) for part in ids]
    lengths: list[int] = []
    for prompt, tokens in segments:
        segment_ids = torch.cat([prompt.ids[-1:], tokens if open_end else tokens[:-1]])
        ids.append(segment_ids)
        positions.append(prompt.positions[:, -1:] + torch.arange(len(segment_ids), device=segment_ids.device))
        labels.append(pad(tokens, (0, len(segment_ids) - len(tokens)), value=IGNORED))
        lengths.append(len(segment_ids))
    row = torch.cat(ids)[None]
    prefixes, groups = [len(prompt.ids) - 1 for prompt in prompts], [len(group) for group in continuations]
    layout = Layout(prefixes, lengths, groups, row.device, kernel)
    inputs = {"input_ids": row, "position_ids": torch.cat(positions, dim=1)[:, None], **attention_inputs(layout, row)}
    ends = sum(layout.prefixes) + torch.tensor(lengths, dtype=torch.long, device=row.device).cumsum(0) - 1
    return Row(inputs, ends, torch.cat(labels)[None])


def budgeted(lengths: Sequence[tuple[int, Sequence[int]]], budget: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Splits groups into rows of at most `budget` tokens.

    `lengths[i]` is the length of prompt i and those of its continuations. A row is a list of (group, its members). A
    group that alone exceeds the budget is split over several rows, each with the prompt again. One prompt with one
    continuation is never split.
    """
    row: list[tuple[int, list[int]]] = []
    used = 0
    for group, (prompt, continuations) in enumerate(lengths):
        members: list[int] = []
        for member, length in enumerate(continuations):
            extra = length + (0 if members else prompt)
            if used + extra > budget and (row or members):
                yield [*row, (group, members)] if members else row
                row, used, members, extra = [], 0, [], length + prompt
            members.append(member)
            used += extra
        if members:
            row.append((group, members))
    if row:
        yield row


@contextlib.contextmanager
def read_only_at(model: Any, row: Row, places: Tensor) -> Generator[None]:
    """Inside, only the tokens of `row` at `places` (n,) have a meaningful last hidden state, and the rest cost less.

    The last layer computes keys and values of every token, but queries, attention output and MLP only at `places`. For
    passes without gradients.
    """
    last = base_model(model).model.language_model.layers[-1]
    row.inputs["shared_prefix"].read = last.self_attn.layer_idx, places
    fed = places if len(places) else places.new_zeros(1)  # kernels of 4-bit weights divide by the number of tokens

    def pick(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        picked.append(args[0].shape[:2])
        return (args[0][:, fed], *args[1:])

    def place(_: Any, __: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(*picked.pop(), output.shape[-1])  # of another dtype than the input under autocast
        return whole.index_copy_(1, places, output[:, : len(places)])

    picked: list[torch.Size] = []
    hooks: list[RemovableHandle] = []
    for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp):
        hooks += [module.register_forward_pre_hook(pick), module.register_forward_hook(place)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
