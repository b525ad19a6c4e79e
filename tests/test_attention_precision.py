"""Attention of rollouts in half precision, where keys are as large as those of Qwen2.5.

Its key projections have biases: the published norms of a head's keys are 172 in the 3B model, 274 in the 7B and 779 in
the 1.5B. The norms of the queries are guesses.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from listener_reward.prefix.attention import Decoding

HEADS, KV_HEADS, DIM, PROMPT = 4, 2, 128, 600


def biased(norm: float) -> Tensor:
    """A constant in the slowly turning dimensions, where Qwen2.5 has its own."""
    bias = torch.zeros(DIM)
    bias[56:64], bias[120:128] = 1, -1
    return bias / bias.norm() * norm


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_norm", "query_norm"), [(0, 0), (172, 20), (274, 40), (779, 40)])
def test_a_step_of_a_rollout_attends_as_rightly_as_sdpa(dtype: torch.dtype, key_norm: float, query_norm: float):
    torch.manual_seed(0)
    rows = 2
    prompt_keys = (torch.randn(1, KV_HEADS, PROMPT, DIM) + biased(key_norm)).to(dtype)
    prompt_values = torch.randn(1, KV_HEADS, PROMPT, DIM).to(dtype)
    cache = Decoding([PROMPT], {0: (prompt_keys, prompt_values)}, [0] * rows, "cpu")
    own_keys, own_values = [], []
    query = ours = torch.empty(0)
    for _ in range(3):
        query = (torch.randn(1, HEADS, rows, DIM) + biased(query_norm)).to(dtype)
        own_keys.append((torch.randn(1, KV_HEADS, rows, DIM) + biased(key_norm)).to(dtype))
        own_values.append(torch.randn(1, KV_HEADS, rows, DIM).to(dtype))
        ours = cache.attend(SimpleNamespace(layer_idx=0), query, own_keys[-1], own_values[-1], DIM**-0.5)
        cache.step += 1
        assert ours.dtype == dtype

    def whole(prompt: Tensor, own: list[Tensor]) -> Tensor:  # (rows, heads, prompt and own tokens, dim)
        return torch.cat([prompt.expand(rows, -1, -1, -1), torch.cat([x.transpose(0, 2) for x in own], dim=2)], dim=2)

    asked, keys, values = query.transpose(0, 2), whole(prompt_keys, own_keys), whole(prompt_values, own_values)
    truth = scaled_dot_product_attention(asked.double(), keys.double(), values.double(), enable_gqa=True)
    stock = scaled_dot_product_attention(asked, keys, values, enable_gqa=True)
    assert error(ours[0], truth[:, :, 0]) <= 1.5 * error(stock, truth)


def test_autocast_does_not_round_the_scores():
    """Weights in float32 under autocast are what a trainer with `bf16: true` has."""
    torch.manual_seed(0)
    keys, values = torch.randn(1, KV_HEADS, PROMPT, DIM) + biased(274), torch.randn(1, KV_HEADS, PROMPT, DIM)
    query = torch.randn(1, HEADS, 1, DIM) + biased(40)
    new = torch.randn(1, KV_HEADS, 1, DIM) + biased(274), torch.randn(1, KV_HEADS, 1, DIM)

    def attend() -> Tensor:
        cache = Decoding([PROMPT], {0: (keys, values)}, [0], "cpu")
        return cache.attend(SimpleNamespace(layer_idx=0), query, *new, DIM**-0.5)

    exact = attend()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = attend()
    assert error(rounded, exact.double()) <= 0.005
