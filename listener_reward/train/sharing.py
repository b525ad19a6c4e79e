"""Connects `ListenerGRPOTrainer` to the shared-prefix engine: rollouts, log-probabilities, whole groups.

Each function replaces one computation that stock trl repeats for every copy of a prompt. Groups are found by content:
rows with equal prompt tokens and equal pixels are one group, in any order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from listener_reward.prefix.attention import base_model, check_used
from listener_reward.prefix.rows import IGNORED, Prompt, Row, budgeted, pack, prompt_positions
from listener_reward.prefix.sampling import prefill, sample


class Groups(NamedTuple):
    """The distinct prompts of a batch of B rows."""

    first: list[int]
    """A row of each prompt, in order of appearance."""
    rows: list[list[int]]
    """The rows of each prompt."""


def find_groups(prompts: Sequence[Tensor], pixels: Sequence[Tensor], grids: Sequence[Tensor]) -> Groups:
    """Rows with equal prompt tokens (P,), pixel values (patches, dim) and grids (images, 3)."""
    groups = Groups([], [])
    by_text: dict[bytes, list[int]] = {}
    for row, ids in enumerate(prompts):
        known = by_text.setdefault(ids.cpu().numpy().tobytes(), [])
        for group in known:
            first = groups.first[group]
            if torch.equal(grids[first], grids[row]) and torch.equal(pixels[first], pixels[row]):
                groups.rows[group].append(row)
                break
        else:
            known.append(len(groups.first))
            groups.first.append(row)
            groups.rows.append([row])
    return groups


def share(
    model: Any, prompts: Sequence[Tensor], pixel_values: Tensor, grids: Tensor, num_images: Sequence[int]
) -> tuple[Groups, list[Prompt]]:
    """A batch's rows as groups: `prompts` are its B unpadded prompts, the rest as trl hands it on, row by row."""
    grid_rows = grids.split(list(num_images))
    pixel_rows = pixel_values.split([int(part.prod(-1).sum()) for part in grid_rows])
    groups = find_groups(prompts, pixel_rows, grid_rows)
    return groups, [
        Prompt(prompts[row], prompt_positions(model, prompts[row], grid_rows[row]), (pixel_rows[row], grid_rows[row]))
        for row in groups.first
    ]


def as_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The images of prompts made by `share` as arguments of a forward pass."""
    pixels, grids = zip(*(prompt.images for prompt in prompts), strict=True)
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}


def images_per_row(input_ids: Tensor, grids: Tensor, config: Any) -> list[int]:
    """How many images each row (B, P) of prompts has, counted from the placeholder tokens."""
    merged = grids.prod(-1) // config.vision_config.spatial_merge_size**2
    ends = merged.cumsum(0)
    tokens = (input_ids == config.image_token_id).sum(-1).cumsum(0)
    upto = torch.searchsorted(ends, tokens, right=True)
    return torch.diff(upto, prepend=upto.new_zeros(1)).tolist()


# ---------------------------------------------------------------------------------------------------------- rollouts
@contextlib.contextmanager
def shared_rollouts(model: Any, token_budget: int, *, synced: bool = False) -> Iterator[None]:
    """Inside, `model.generate` prefills every distinct prompt of a batch once; the tokens are the same.

    With `synced`, all processes run the same number of passes, which sharded weights require.
    """
    base = base_model(model)

    def generate(
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        mm_token_type_ids: Tensor | None = None,  # the placeholders in input_ids say the same
        **options: Any,
    ) -> Tensor:
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        counts = images_per_row(input_ids, image_grid_thw, base.config)
        groups, shared = share(base, prompts, pixel_values, image_grid_thw, counts)
        with replaced(base.model, "get_image_features", _without_autocast(base.model.get_image_features)):
            kept = prefill(base, shared, as_inputs, token_budget=token_budget, synced=synced)
        owner = [0] * len(prompts)
        for number, rows in enumerate(groups.rows):
            for row in rows:
                owner[row] = number
        pad_id = options["generation_config"].pad_token_id
        output = sample(base, shared, owner, kept, pad_token_id=pad_id, synced=synced, **options)
        new = output[:, max(len(prompt) for prompt in prompts) :]
        return torch.cat([input_ids, new], dim=1)

    base.generate = generate
    try:
        yield
    finally:
        del base.generate


def _without_autocast(encode: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `generate` encodes images before the forward pass that accelerate has wrapped in autocast."""

    @functools.wraps(encode)
    def plain(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(pixel_values.device.type, enabled=False):
            return encode(pixel_values, *args, **kwargs)

    return plain


# ------------------------------------------------------------------------------------------------- log-probabilities
def micro_batches(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, size: int | None, vision: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor, int, dict[str, Any]]]:
    """A batch in parts of at most `size` rows, with the images of each: arguments of `shared_logprobs`."""
    size = size or len(input_ids)
    counts, grids = vision["num_images"], vision["image_grid_thw"]
    grid_rows = grids.split(list(counts))
    pixel_rows = vision["pixel_values"].split([int(part.prod(-1).sum()) for part in grid_rows])
    for start in range(0, len(input_ids), size):
        part = slice(start, start + size)
        images = {
            "pixel_values": torch.cat(pixel_rows[part]),
            "image_grid_thw": torch.cat(grid_rows[part]),
            "num_images": counts[part],
        }
        yield input_ids[part], attention_mask[part], logits_to_keep, images


def shared_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    vision: dict[str, Any],
    autocast: Any,
    *,
    token_budget: int,
    kernel: str = "sdpa",
    synced: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies (B, logits_to_keep) of completions, in passes of at most `token_budget` tokens.

    `model` has trl's fused head, which scores each position's label at the policy's temperature. A reference model's
    head gives no entropies. A group over the budget is split over several passes, each with its prompt again. With
    gradients only the last pass keeps its activations; see `_run`. With `synced`, every process runs as many passes as
    the process with most: all processes gather sharded weights together.
    """
    prompt_ids, completion_ids = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
    prompt_mask, mask = (part.bool() for part in attention_mask.split([prompt_ids.shape[1], logits_to_keep], dim=1))
    prompts = [ids[kept] for ids, kept in zip(prompt_ids, prompt_mask, strict=True)]
    groups, shared = share(model, prompts, vision["pixel_values"], vision["image_grid_thw"], vision["num_images"])
    counts = mask.sum(1).tolist()
    lengths = [(len(p.ids), [counts[r] for r in rows]) for p, rows in zip(shared, groups.rows, strict=True)]
    passes: list[tuple[Row, dict[str, Tensor]]] = []
    order: list[int] = []
    for parts in budgeted(lengths, token_budget):
        members = [[groups.rows[group][member] for member in some] for group, some in parts]
        pass_prompts = [shared[group] for group, _ in parts]
        completions = [[completion_ids[r, mask[r]] for r in rows] for rows in members]
        passes.append((pack(pass_prompts, completions, open_end=False, kernel=kernel), as_inputs(pass_prompts)))
        order += [r for rows in members for r in rows]
    passes += [_predicting_nothing(*passes[0])] * (_most(len(passes), input_ids.device, synced) - len(passes))
    with autocast():
        outputs = _run(model, passes)
    for row, _ in passes:
        check_used(row.inputs["shared_prefix"], model)
    scored = torch.cat([row.labels[0] != IGNORED for row, _ in passes])
    rows = torch.tensor(order, device=input_ids.device)

    def unpack(values: Sequence[Tensor]) -> Tensor:
        flat = torch.cat(list(values), dim=1)[0]
        return flat.new_zeros(mask.shape).masked_scatter(mask[rows], flat[scored])[rows.argsort()]

    logprobs, entropies = zip(*outputs, strict=True)
    return unpack(logprobs), None if entropies[0] is None else unpack(entropies)


def _run(model: Any, passes: Sequence[tuple[Row, dict[str, Tensor]]]) -> list[tuple[Tensor, Tensor | None]]:
    """Log-probabilities and entropies (1, S) of each pass, all inside one forward call of `model`.

    There is one call, because distributed training's wrappers expect a backward pass for each forward call. With
    gradients, every pass but the last is computed again in the backward pass, so that only one pass's activations are
    in memory. Under ZeRO-3 all activations are kept: on recomputation DeepSpeed does not gather the weight of trl's
    fused head.
    """
    base = base_model(model)
    stock = base.forward

    def score(number: int) -> tuple[Tensor, Tensor | None]:
        row, images = passes[number]
        output = stock(**row.inputs, **images, shift_labels=row.labels, fused_lm_head=True)
        return output.log_probs, output.entropy

    def forward(*_: Any, **__: Any) -> list[tuple[Tensor, Tensor | None]]:
        again = range(len(passes) - 1 if torch.is_grad_enabled() and not is_deepspeed_zero3_enabled() else 0)
        outputs: list[Any] = [checkpoint(score, number, use_reentrant=False) for number in again]
        return outputs + [score(number) for number in range(len(again), len(passes))]

    with replaced(base, "forward", forward):
        return model(input_ids=passes[0][0].inputs["input_ids"])


def _predicting_nothing(row: Row, images: dict[str, Tensor]) -> tuple[Row, dict[str, Tensor]]:
    """A pass that only keeps processes in step. Its log-probabilities are zeros that depend on the weights."""
    return row._replace(labels=torch.full_like(row.labels, IGNORED)), images


def _most(number: int, device: Any, synced: bool) -> int:
    """`number`, or the largest of all processes' numbers if `synced`."""
    if not synced:
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


# ------------------------------------------------------------------------------------------------------------- groups
def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """trl's `shuffle_sequence_dict`, by whole groups, so that a micro-batch holds members of one group and shares its
    prompt.

    It draws the same random numbers as trl's. `batch` has its pixel values and grids split by rows.
    """
    permutation = torch.randperm(len(batch["prompt_ids"])).tolist()
    groups = find_groups(batch["prompt_ids"], batch["pixel_values"], batch["image_grid_thw"])
    group_of = {row: number for number, rows in enumerate(groups.rows) for row in rows}
    appearance = {number: place for place, number in enumerate(dict.fromkeys(group_of[row] for row in permutation))}
    order = sorted(permutation, key=lambda row: appearance[group_of[row]])

    def arrange(values: Any) -> Any:
        if values is None or (isinstance(values, Tensor) and values.ndim == 0):
            return values
        return values[order] if isinstance(values, Tensor) else [values[row] for row in order]

    return {name: arrange(values) for name, values in batch.items()}


def without_images(values: list[Any]) -> list[Any]:
    """Prompts without the pictures in their messages, so that sending them to other processes is cheap."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if not (key == "image" and hasattr(item, "size"))}
        return value

    return strip(values)


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Models loaded inside are whole on every process, also under DeepSpeed's ZeRO-3.

    transformers shards what `from_pretrained` loads while a ZeRO-3 configuration is alive. A frozen listener needs its
    weights in every forward pass, and how many passes it takes depends on a process's own completions, so gathering
    them together would wait for ever.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    alive = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            deepspeed.set_hf_deepspeed_config(alive)


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` inside, and restored afterwards. An attribute of the class is not left on the
    instance."""
    own, stock = name in vars(module), getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock) if own else delattr(module, name)
