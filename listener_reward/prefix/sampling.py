"""Samples a group: prefills the prompt once, draws G completions, and drops finished ones from the batch.

The tokens are those that transformers' own `generate` draws with the same seed. `generate` prepares everything as
always; its public argument `custom_generate` replaces only the loop over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from listener_reward.prefix.attention import Decoding, Layout, attention_inputs, base_model, check_used
from listener_reward.prefix.rows import Prompt, budgeted, pack, read_only_at

COMPACT_BELOW = 0.75
"""Finished rows are dropped once at most this fraction is unfinished: dropping copies the other rows' keys and
values."""


Kept = dict[int, tuple[Tensor, Tensor]]
"""Each layer's keys and values of B prompts, (B, heads, longest prompt but one token, dim)."""


@torch.no_grad()
def prefill(
    model: Any,
    prompts: Sequence[Prompt],
    vision: Callable[[Sequence[Prompt]], dict[str, Any]],
    *,
    ends: Sequence[Sequence[Tensor]] | None = None,
    token_budget: int | None = None,
    synced: bool = False,
) -> Kept:
    """Reads all but the last token of each prompt, in passes of at most `token_budget` tokens.

    With `ends`, `prompts[i]` is what several prompts begin with, and `ends[i]` the tokens (C,) that follow it in each
    of them. What is kept is then of those, one after the other, and their beginning is read once.

    `vision` returns the forward pass's image arguments for some of the prompts. A prompt that alone exceeds the budget
    has its own pass. With `synced`, every process runs as many passes as the process with most: all processes gather
    sharded weights together.
    """
    passes: list[Kept] = []
    tails = [[0] for _ in prompts] if ends is None else [[len(end) for end in some] for some in ends]
    lengths = [(len(prompt.ids), own) for prompt, own in zip(prompts, tails, strict=True)]
    batches = list(budgeted(lengths, token_budget or sum(length + sum(own) for length, own in lengths)))
    done = 0
    while _any_going(torch.tensor(done < len(batches), device=prompts[0].ids.device), synced):
        batch = batches[min(done, len(batches) - 1)]
        some = [prompts[number] for number, _ in batch]
        after = [[] if ends is None else [ends[number][member] for member in members] for number, members in batch]
        row = pack(some, after, open_end=ends is None)
        layout: Layout = row.inputs["shared_prefix"]
        layout.kept = {}
        with read_only_at(model, row, row.ends[:0]):  # nothing is predicted here
            model(**row.inputs, **vision(some), logits_to_keep=1, use_cache=False)
        check_used(layout, model)
        if done < len(batches):
            passes.append(layout.kept)
        done += 1
    if len(passes) == 1:
        return passes[0]
    width = max(length + max(own) for length, own in lengths) - 1

    def join(layer: int, which: int) -> Tensor:
        parts = [kept[layer][which] for kept in passes]
        return torch.cat([pad(part, (0, 0, 0, width - part.shape[2])) for part in parts])

    return {layer: (join(layer, 0), join(layer, 1)) for layer in passes[0]}


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Prompt],
    owner: Sequence[int],
    kept: Kept,
    *,
    pad_token_id: int,
    synced: bool = False,
    **options: Any,
) -> Tensor:
    """One completion for each row, by `model.generate`.

    Args:
        model: a model that `prefix.unsupported` has nothing against, inside PEFT's wrapper or not.
        prompts: the prompts, and `kept` what `prefill` gave for them.
        owner: the prompt of each of N rows.
        pad_token_id: what stands before shorter prompts and after shorter completions.
        synced: go on until every process's rows are finished, which sharded weights require. transformers does not pass
            its own `synced_gpus` to a `custom_generate`.
        options: for `generate`: a generation_config, logits processors, max_new_tokens, ...

    Returns:
        Token ids (N, longest prompt + longest completion) int64, prompts padded on the left, as `generate` gives them.
    """
    owner = list(owner)
    device = prompts[0].ids.device
    width = max(len(prompt.ids) for prompt in prompts)
    padded = [pad(prompt.ids, (width - len(prompt.ids), 0), value=pad_token_id) for prompt in prompts]
    seen = [pad(torch.ones_like(prompt.ids), (width - len(prompt.ids), 0)) for prompt in prompts]
    last = torch.stack([prompt.positions[0, -1] for prompt in prompts])[owner]
    decoding = Decoding([len(prompt.ids) - 1 for prompt in prompts], kept, owner, device)
    base = base_model(model)
    return cast("Any", type(base)).generate(  # the class's own, for an instance may have been given another
        base,
        input_ids=torch.stack(padded)[owner],
        attention_mask=torch.stack(seen)[owner],
        custom_generate=partial(
            _draw, decoding=decoding, positions=last.to(device), filler=pad_token_id, synced=synced
        ),
        **({} if "generation_config" in options else {"pad_token_id": pad_token_id}),
        **options,
    )


def _draw(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    decoding: Decoding,
    positions: Tensor,
    filler: int,
    synced: bool,
    **_: Any,
) -> Tensor:
    """`generate`'s loop over tokens, for all rows (N, longest prompt) at once; returns them with their completions.

    `positions` (N,) are those of the prompts' last tokens, and `filler` is the token after the end of a completion.
    """
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)  # of all rows
    rows = torch.arange(len(input_ids), device=input_ids.device)  # those that are still computed
    scores = torch.empty(0)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    while _any_going(going, synced):
        step = {
            "input_ids": input_ids[rows, -1][None],
            "position_ids": (positions[rows] + decoding.step)[None, None].expand(3, 1, -1),
        }
        logits = model(**step, **attention_inputs(decoding, step["input_ids"]), use_cache=False).logits[0].float()
        if decoding.step == 0:
            check_used(decoding, model)
        decoding.step += 1
        if scores.numel() == 0:
            scores = logits.new_zeros(len(input_ids), logits.shape[-1])
        # All rows take part in the draw, finished rows too, so that each row gets the random numbers that it gets in
        # `generate`.
        scores[rows] = logits
        warped = logits_processor(input_ids, scores.clone())
        if generation_config.do_sample:
            token = torch.multinomial(warped.softmax(-1), num_samples=1)[:, 0]
        else:
            token = warped.argmax(-1)
        if ends:
            token = token.where(going, filler)
        input_ids = torch.cat([input_ids, token[:, None]], dim=1)
        going = going & ~stopping_criteria(input_ids, None)
        alive = going[rows]
        count = int(alive.sum())
        if 0 < count <= COMPACT_BELOW * len(rows):
            rows = rows[alive]
            decoding.keep(alive)
    return input_ids


def _any_going(going: Tensor, synced: bool) -> bool:
    """Whether any row is unfinished; with sharded weights on any process, since all must run the same passes."""
    alive = going.any()
    if synced:
        alive = alive.int()
        cast("Any", dist).all_reduce(alive, op=dist.ReduceOp.MAX)
    return bool(alive)
