"""What a judge needs of its GPU: `listener-reward plan eval` and `plan serve`."""

from __future__ import annotations

import math
from typing import Any

from listener_reward.conclude import check_thinks
from listener_reward.judge import PAIRS_AT_ONCE
from listener_reward.listener import OWN_BASE, choose_listener
from listener_reward.models.hub import same_checkpoint
from listener_reward.plan.checkpoints import Checkpoint, dtype_of
from listener_reward.plan.passes import Architecture
from listener_reward.plan.plans import CONTEXT, Phase, Plan
from listener_reward.plan.reading import Asked, decoding_parts, listening, looked
from listener_reward.plan.tokens import Pairs


def plan_judging(
    what: str,
    checkpoint: Checkpoint,
    pairs: Pairs,
    *,
    listener: str | None = None,
    dtype: str | None = None,
    listener_dtype: str | None = None,
    bits: int = 16,
    think: bool = True,
    thoughts: int | None = None,
    max_new_tokens: int | None = None,
    thought: int | None = None,
    batch_size: int = 32,
    token_budget: int = 16384,
    vision_bytes: int = 2**29,
    together: int = PAIRS_AT_ONCE,
    on_cpu: bool = False,
) -> Plan:
    """The plan of a judge that judges `pairs`.

    Args:
        what: the command, "eval" or "serve".
        checkpoint: the reasoner's.
        pairs: what is judged.
        listener: as `Judge.from_pretrained` takes it; None for the checkpoint's own.
        dtype, listener_dtype: of the weights; None is bfloat16, on a CPU float32.
        bits: of the reasoner's weights, 4 or 8 where they are quantised.
        think: False for the fast mode.
        thoughts, max_new_tokens: None is the checkpoint's own number.
        thought: tokens of a completion on average, for the time; None for the longest.
        batch_size, token_budget, vision_bytes: the judge's.
        together: pairs that are asked at once.
        on_cpu: plan for a CPU, in float32, as it can be measured.

    Raises:
        InputError: a listener that cannot be found, or a dtype that is none.
    """
    card = checkpoint.card
    check_thinks(think, thoughts)
    number = (thoughts or card.thoughts) if think else 1
    written = (max_new_tokens or card.max_new_tokens) if think else 0
    orders = 2 if card.orders == "both" else 1
    default = "float32" if on_cpu else "bfloat16"
    reasoner = Architecture(checkpoint.config, dtype_of(dtype or default, checkpoint.config), bits, checkpoint.adapter)
    name = choose_listener(listener, card.listener)
    model = _listener(name, checkpoint, reasoner, listener_dtype or dtype or default)
    chats = min(together, pairs.number or together) * orders
    asked = Asked(
        pairs.longest,
        max(1, min(chats, batch_size // number)),  # a chat's thoughts are never parted
        max(1, min(chats, batch_size // number)) * number,
        written,
        token_budget,
        batch_size,
        number,
        orders,
    )
    held = {"weights": reasoner.weight_bytes + reasoner.adapter_bytes}
    if model is not None and model is not reasoner:
        held["listener"] = model.weight_bytes
    if not on_cpu:
        held["CUDA"] = CONTEXT
    kept = _features(reasoner, pairs, asked, vision_bytes)
    look = looked(reasoner, asked.grids)
    phases = [Phase("vision", held | {"image features": kept, "activations": look.peak - look.kept}, 0.0)]
    per_pair = 1 / asked.pairs
    phases[0].flops = look.flops / asked.pairs
    mean = (thought or written) / written if written else 1.0
    share = (pairs.mean + mean * written * number) / (pairs.longest.total + written * number)
    if think:
        parts, flops, moved = decoding_parts(reasoner, asked)
        phases.append(Phase("thoughts", held | {"image features": kept} | parts, flops * per_pair * share))
        phases[-1].moved = moved * per_pair * mean
    for who, reader in (("reading", reasoner), ("listener", model)):
        if reader is None:
            continue
        parts, flops = listening(reader, asked)
        seen = reader is reasoner  # whose features of these images are kept
        parts["image features"] = kept * (1 if seen else 2)
        phases.append(Phase(who, held | parts, (flops - look.flops * seen) * per_pair * share))
    notes = [*checkpoint.notes, *pairs.notes]
    parameters = {"reasoner": reasoner.parameters}
    if model is not None and model is not reasoner:
        parameters["listener"] = model.parameters
    return Plan(what, pairs, written, phases, 1, "pair", float(pairs.number), parameters, notes, _changes(think))


def _listener(name: Any, checkpoint: Checkpoint, reasoner: Architecture, dtype: str) -> Architecture | None:
    if name is None:
        return None
    if name in (OWN_BASE, ".") or same_checkpoint(name, checkpoint.name):
        return reasoner
    found = Checkpoint.of(name)
    return Architecture(found.config, dtype_of(dtype, found.config))


def _features(model: Architecture, pairs: Pairs, asked: Asked, most: int) -> int:
    """Of the images in a batch and of those kept from earlier batches."""
    batch = model.feature_bytes(sum(asked.pair.images)) * math.ceil(asked.pairs)
    every = model.feature_bytes(sum(asked.pair.images)) * max(pairs.number, math.ceil(asked.pairs))
    return max(batch, min(most, every))


def _changes(think: bool) -> dict[str, str]:
    changes = {
        "weights": "quantised weights, or a smaller model",
        "listener": "--listener base or none; a smaller listener",
        "keys and values": "--batch-size; fewer --thoughts",
        "activations": "token_budget; --max-pixels",
        "logits": "--batch-size",
        "image features": "vision_bytes",
    }
    return changes if think else {part: words for part, words in changes.items() if part != "keys and values"}
