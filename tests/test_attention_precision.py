"""Attention of rollouts in half precision, where keys are as large as those of Qwen2.5.

Its key projections have biases: the published norms of a head's keys are 172 in the 3B model, 274 in the 7B and 779 in
the 1.5B. The norms of the queries are guesses.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_qwens import Case, build, continuations, make_case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from listener_reward.prefix import attention
from listener_reward.prefix.attention import Decoding, attention_inputs
from listener_reward.prefix.rows import IGNORED, pack
from listener_reward.prefix.sampling import prefill

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


# ---------------------------------------------------------------- whole models

ROWS = ((4, 4), (4,))
"""Tokens of each continuation of two prompts."""


def model_with_biased_keys(kind: str, key_norm: float, query_norm: float, **dtype: Any) -> Any:
    """A small model whose attention has a constant of Qwen2.5's size in every score.

    Qwen3 normalises its keys and has no biases; here it is given both, and the norm's weight makes them large.
    """
    model = build(kind, **({} if kind == "qwen2_5_vl" else {"attention_bias": True}))
    torch.manual_seed(5)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        dim = attention.head_dim
        slow = [dim // 2 - 2, dim // 2 - 1, dim - 2, dim - 1]
        for name, norm in (("k", key_norm), ("q", query_norm)):
            projection = getattr(attention, f"{name}_proj")
            projection.weight.data.normal_(0, 0.3)
            projection.weight.data.view(-1, dim, projection.in_features)[:, slow] = 0
            constant = torch.zeros(projection.out_features // dim, dim)
            constant[:, slow] = norm / 2 if kind == "qwen2_5_vl" else 4
            projection.bias.data.copy_(constant.flatten())
            if kind != "qwen2_5_vl":
                getattr(attention, f"{name}_norm").weight.data[slow] = norm / dim**0.5
        for projection in (attention.v_proj, attention.o_proj):
            projection.weight.data.normal_(0, 0.3)
    return model.eval().to(**dtype)


def by_copies(case: Case, groups: list[list[Tensor]]) -> Tensor:
    """Logits (places, vocabulary) of every continuation's own pass, by transformers' own attention."""
    return torch.cat([case.alone(number, tokens) for number, group in enumerate(groups) for tokens in group])


def in_one_row(case: Case, groups: list[list[Tensor]]) -> Tensor:
    """The same from a shared row, as labels are read and the loss is computed."""
    row = pack(case.prompts, groups, open_end=True)
    logits = case.model(**row.inputs, **case.vision, use_cache=False).logits[0]
    return logits[(row.labels[0] != IGNORED).index_fill(0, row.ends, True)]


@torch.no_grad()
def step_by_step(case: Case, groups: list[list[Tensor]]) -> Tensor:
    """The same from a prefill and a step for each token, as completions are sampled."""
    device = case.prompts[0].ids.device
    kept = prefill(case.model, case.prompts, lambda _: case.vision)
    owner = [number for number, group in enumerate(groups) for _ in group]
    decoding = Decoding([len(prompt.ids) - 1 for prompt in case.prompts], kept, owner, device)
    last = torch.stack([case.prompts[number].ids[-1] for number in owner])
    start = torch.stack([case.prompts[number].positions[0, -1] for number in owner])
    tokens = torch.cat([last[:, None], torch.stack([tokens for group in groups for tokens in group])], dim=1)
    steps = []
    for place in range(tokens.shape[1]):
        positions = (start + place)[None, None].expand(3, 1, -1)
        step = {"input_ids": tokens[None, :, place], "position_ids": positions}
        steps.append(case.model(**step, **attention_inputs(decoding, tokens), use_cache=False).logits[0])
        decoding.step += 1
    return torch.stack(steps, dim=1).flatten(0, 1)


def gradient(model: Any, logits: Tensor) -> Tensor:
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits.double() * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([grad.double().flatten() for name, grad in found.items() if "language_model" in name])


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_prefill_steps_reading_and_loss_err_no_more_than_plain_transformers(kind: str, mode: str, monkeypatch):
    """Against the same weights in double precision."""
    low = torch.float32 if mode == "autocast" else getattr(torch, mode)
    norms = 172, 20
    groups = continuations(ROWS)
    exact = make_case(model_with_biased_keys(kind, *norms, dtype=low).double())
    case = make_case(model_with_biased_keys(kind, *norms, dtype=low))
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast")
    expected = by_copies(exact, groups)
    truth = gradient(exact.model, expected)
    expected = expected.detach().log_softmax(-1)

    def off(logits: Tensor) -> float:
        return error(logits.detach().double().log_softmax(-1), expected)

    with cast:
        stock = by_copies(case, groups)
    allowed = 1.2 * off(stock)
    slope = 1.2 * error(gradient(case.model, stock), truth)
    for worth in (2**60, 0):  # padded, and a call for each continuation
        monkeypatch.setattr(attention, "WORTH_A_CALL", worth)
        with cast:
            shared = in_one_row(case, groups)
        assert off(shared) <= allowed
        assert error(gradient(case.model, shared), truth) <= slope
    with cast:
        assert off(step_by_step(case, groups)) <= allowed


def test_keys_that_are_rounded_in_the_scores_would_be_seen(monkeypatch):
    """What the test above would say of scores in bfloat16."""
    monkeypatch.setattr(attention, "_product", torch.matmul)
    groups = continuations(ROWS)
    exact = make_case(model_with_biased_keys("qwen2_5_vl", 172, 20, dtype=torch.bfloat16).double())
    case = make_case(model_with_biased_keys("qwen2_5_vl", 172, 20, dtype=torch.bfloat16))
    with torch.no_grad():
        expected = by_copies(exact, groups).log_softmax(-1)
        stock = error(by_copies(case, groups).double().log_softmax(-1), expected)
        assert error(step_by_step(case, groups).double().log_softmax(-1), expected) > 2 * stock
