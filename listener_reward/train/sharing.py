"""What `ListenerGRPOTrainer` hands to the shared-prefix engine: rollouts, log-probabilities, whole groups.

Each function stands in for one thing that stock trl does for every copy of a prompt. They find a group by looking: rows
with the same prompt tokens and the same pixels are one, in whatever order they come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from listener_reward.prefix import IGNORED, Prompt, base_model, check_used, pack, prompt_positions
from listener_reward.rollout import prefill, sample


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
    """How many images stand in each row (B, P) of prompts: the placeholders say it, image by image."""
    merged = grids.prod(-1) // config.vision_config.spatial_merge_size**2
    ends = merged.cumsum(0)
    tokens = (input_ids == config.image_token_id).sum(-1).cumsum(0)
    upto = torch.searchsorted(ends, tokens, right=True)
    return torch.diff(upto, prepend=upto.new_zeros(1)).tolist()


# ---------------------------------------------------------------------------------------------------------- rollouts
@contextlib.contextmanager
def shared_rollouts(model: Any, token_budget: int, *, synced: bool = False) -> Iterator[None]:
    """Inside, `model.generate` prefills every distinct prompt of a batch once; the tokens are the same.

    With `synced`, all processes run the same number of passes, as sharded weights need it.
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
    model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, vision: dict[str, Any], autocast: Any
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies (B, logits_to_keep) of the completions, by one pass over their groups.

    `model` has trl's fused head, which is given each position's label and scores it at the policy's temperature. A
    reference model's head gives no entropies.
    """
    prompt_ids, completion_ids = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
    prompt_mask, mask = (part.bool() for part in attention_mask.split([prompt_ids.shape[1], logits_to_keep], dim=1))
    prompts = [ids[kept] for ids, kept in zip(prompt_ids, prompt_mask, strict=True)]
    groups, shared = share(model, prompts, vision["pixel_values"], vision["image_grid_thw"], vision["num_images"])
    row = pack(shared, [[completion_ids[r, mask[r]] for r in rows] for rows in groups.rows], open_end=False)
    with autocast():
        output = model(**row.inputs, **as_inputs(shared), shift_labels=row.labels, fused_lm_head=True)
    check_used(row.inputs["shared_prefix"], model)
    order = torch.tensor([r for rows in groups.rows for r in rows], device=input_ids.device)
    scored = row.labels[0] != IGNORED

    def unpack(values: Tensor) -> Tensor:
        flat = values.new_zeros(mask.shape).masked_scatter(mask[order], values[0, scored])
        return flat[order.argsort()]

    return unpack(output.log_probs), None if output.entropy is None else unpack(output.entropy)


# ------------------------------------------------------------------------------------------------------------- groups
def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """trl's `shuffle_sequence_dict`, by whole groups: micro-batches that hold a group's members share its prompt.

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
    """Prompts without the pictures in their messages: what is left costs nothing to send to other processes."""

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
    """`module.name` is `value` inside."""
    stock = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, stock)
