"""Log-probabilities of given tokens from the last hidden states, without the whole vocabulary's softmax in memory."""

from __future__ import annotations

from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from torch import Tensor

_VOCABULARY_AT_ONCE = 8192
"""Rows of the head that are float32 at a time: a whole head of 7B is 2 GB."""


def next_token_logprobs(head: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (n, A) float32 of each state's own tokens `ids` (n, A) after the states `hidden` (n, width).

    Everything after the hidden state is float32. A head in bfloat16 gives logits around 30 in steps of 0.125, so the
    log-odds of two labels would take a handful of values. A head that is no plain linear layer, such as a quantised
    one, one with adapters or one whose weights are elsewhere until it is called, computes its logits itself.
    """
    if type(head) is not torch.nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        logprobs = head(hidden).float().log_softmax(-1)
        return logprobs.gather(-1, ids.to(logprobs.device))
    ids = ids.to(head.weight.device)
    weights = torch.split(head.weight, _VOCABULARY_AT_ONCE)
    offsets = cast("Tensor | None", head.bias)
    biases = [None] * len(weights) if offsets is None else torch.split(offsets.float(), _VOCABULARY_AT_ONCE)
    with torch.autocast(hidden.device.type, enabled=False):
        states = hidden.to(head.weight.device).float()
        total = torch.stack(
            [
                torch.nn.functional.linear(states, weight.float(), bias).logsumexp(-1)
                for weight, bias in zip(weights, biases, strict=True)
            ]
        ).logsumexp(0)
        logits = torch.einsum("nw,naw->na", states, head.weight[ids].float())
        return logits + (0.0 if offsets is None else offsets[ids].float()) - total[:, None]


def token_logprobs(head: Any, hidden: Tensor, tokens: Tensor, chunk: int = 1024) -> Tensor:
    """Log-probability (n,) float32 of each of `tokens` (n,), a chunk at a time: the logits of all would be gigabytes.

    `hidden` (n, width) holds the states that predict them.
    """
    parts: list[Tensor] = []
    for states, chosen in zip(torch.split(hidden, chunk), torch.split(tokens, chunk), strict=True):
        logits = head(states).float()
        parts.append(logits.gather(-1, chosen[:, None].to(logits.device))[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)
