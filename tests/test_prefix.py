"""The shared-prefix engine against one forward pass for every continuation."""

from __future__ import annotations

import inspect
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_qwens import IMAGE, Case, build, continuations, make_case
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from listener_reward.errors import InputError
from listener_reward.models.vision import patches_by_product
from listener_reward.prefix import attention
from listener_reward.prefix.attention import Layout, attention_inputs, check_used, unsupported
from listener_reward.prefix.rows import IGNORED, Prompt, budgeted, followed, pack, prompt_positions, read_only_at
from listener_reward.prefix.sampling import prefill, sample

LENGTHS = ((5, 9, 3), (4, 4, 8, 1))
EQUAL = ((6, 6), (6, 6))


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def case(request) -> Case:
    return make_case(build(request.param))


def packed_logprobs(case: Case, groups: list[list[Tensor]], prompts=None, vision=None, kernel="sdpa") -> Tensor:
    row = pack(prompts or case.prompts, groups, open_end=False, kernel=kernel)
    logits = case.model(**row.inputs, **(vision or case.vision), use_cache=False).logits[0]
    check_used(row.inputs["shared_prefix"], case.model)
    wanted = row.labels[0] != IGNORED
    return logits[wanted].log_softmax(-1).gather(-1, row.labels[0, wanted][:, None])[:, 0]


def plain_logprobs(case: Case, groups: list[list[Tensor]]) -> Tensor:
    parts = []
    for number, group in enumerate(groups):
        for tokens in group:
            logits = case.alone(number, tokens)[:-1]
            parts.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return torch.cat(parts)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert ours.keys() == stock.keys()
    scale = max(grad.norm() for grad in stock.values())
    for name, grad in stock.items():
        assert (ours[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3 * scale), name


@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL])
def test_log_probabilities_and_gradients_are_those_of_single_passes(case, lengths):
    case = make_case(case.model, same_prompts=lengths is EQUAL)
    groups = continuations(lengths)
    weights = torch.randn(sum(map(sum, lengths)), generator=torch.Generator().manual_seed(3))
    stock = plain_logprobs(case, groups)
    expected = gradients(case.model, (stock * weights).sum())
    ours = packed_logprobs(case, groups)
    assert (ours - stock).abs().max() < 1e-5
    assert_same_gradients(gradients(case.model, (ours * weights).sum()), expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [[1, 9, 30], [2, 25]]])
def test_a_call_for_each_continuation_gives_the_same(case, lengths, monkeypatch):
    """Where lengths differ a CPU does not pad: log-probabilities and gradients of both ways, for both to be tested."""
    groups = continuations(lengths)
    weights = torch.randn(sum(map(sum, lengths)), generator=torch.Generator().manual_seed(3))
    padded = packed_logprobs(case, groups)
    expected = gradients(case.model, (padded * weights).sum())
    monkeypatch.setattr(attention, "WORTH_A_CALL", 0)
    calls = watch_attention(monkeypatch)
    ours = packed_logprobs(case, groups)
    assert len(calls) == 3 * (2 + sum(map(len, lengths))), "each prompt and continuation in each layer"
    assert (ours - padded).abs().max() < 1e-5
    assert_same_gradients(gradients(case.model, (ours * weights).sum()), expected)


@torch.no_grad()
@pytest.mark.parametrize("worth", [0, 2**60])
def test_what_is_not_read_is_not_computed_and_the_rest_is_the_same(case, worth, monkeypatch):
    monkeypatch.setattr(attention, "WORTH_A_CALL", worth)
    row = pack(case.prompts, continuations(LENGTHS), open_end=True)
    whole = case.model.model(**row.inputs, **case.vision, use_cache=False).last_hidden_state[0]
    places = torch.cat([row.ends, row.ends[1:2] - 1])
    row = pack(case.prompts, continuations(LENGTHS), open_end=True)
    queries = []
    last = case.model.model.language_model.layers[-1].self_attn
    hook = last.q_proj.register_forward_hook(lambda _, args, output: queries.append(args[0].shape[1]))
    with read_only_at(case.model, row, places):
        some = case.model.model(**row.inputs, **case.vision, use_cache=False).last_hidden_state[0]
    hook.remove()
    assert queries == [len(places)]
    torch.testing.assert_close(some[places], whole[places], atol=1e-5, rtol=1e-5)
    assert (some - whole).abs().max() > 0.1, "what is not read is not there"
    again = case.model.model(**pack(case.prompts, continuations(LENGTHS), open_end=True).inputs, **case.vision)
    assert torch.equal(again.last_hidden_state[0], whole), "and all of it is, once the reading is over"


@torch.no_grad()
def test_an_open_end_predicts_what_comes_next(case):
    groups = continuations(LENGTHS)
    row = pack(case.prompts, groups, open_end=True)
    logits = case.model(**row.inputs, **case.vision, logits_to_keep=row.ends, use_cache=False).logits[0]
    expected = [case.alone(number, tokens)[-1] for number, group in enumerate(groups) for tokens in group]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_empty_continuation_is_the_bare_prompt(case):
    groups = [[torch.tensor([], dtype=torch.long), torch.tensor([50, 51])], [torch.tensor([], dtype=torch.long)]]
    row = pack(case.prompts, groups, open_end=True)
    logits = case.model(**row.inputs, **case.vision, logits_to_keep=row.ends, use_cache=False).logits[0]
    torch.testing.assert_close(logits[0], case.alone(0, groups[0][0])[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[2], case.alone(1, groups[1][0])[-1], atol=1e-5, rtol=1e-5)
    assert packed_logprobs(case, groups).shape == (2,), "labels of the one continuation that has tokens"


def test_lora_with_gradient_checkpointing(case):
    groups = continuations(LENGTHS)
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", r=4, init_lora_weights=False)
    case.model = get_peft_model(case.model, config)
    assert unsupported(case.model) is None
    expected = gradients(case.model, plain_logprobs(case, groups).sum())
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    case.model.enable_input_require_grads()
    case.model.train()
    assert_same_gradients(gradients(case.model, packed_logprobs(case, groups).sum()), expected)
    adapted = 2 if case.model.config.model_type == "qwen3_vl_moe" else 3  # experts are no projections
    assert len(expected) == 3 * adapted * 2, "and only the adapters"


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 60, 100, 10_000])
def test_rows_cut_to_a_budget_give_the_same(case, budget):
    groups = continuations(LENGTHS)
    whole = packed_logprobs(case, groups)
    lengths = [(len(p.ids), [len(c) for c in group]) for p, group in zip(case.prompts, groups, strict=True)]
    parts = []
    for row in budgeted(lengths, budget):
        used = sum(lengths[group][0] + sum(lengths[group][1][m] for m in members) for group, members in row)
        assert used <= budget or [len(members) for _, members in row] == [1]
        some = [[groups[group][m] for m in members] for group, members in row]
        vision = {
            "pixel_values": torch.cat([case.pixels[group] for group, _ in row]),
            "image_grid_thw": torch.cat([case.grids[group] for group, _ in row]),
        }
        parts.append(packed_logprobs(case, some, [case.prompts[group] for group, _ in row], vision))
    assert (torch.cat(parts) - whole).abs().max() < 1e-5
    assert len(parts) == {1: 7, 60: 4, 100: 2, 10_000: 1}[budget]


def watch_attention(monkeypatch) -> list[tuple[bool, bool]]:
    """For each call that follows: whether it has as many query heads as key heads, and whether it has no mask."""
    calls = []

    def watched(query, key, value, **options):
        calls.append((query.shape[1] == key.shape[1], options.get("attn_mask") is None))
        return stock(query, key, value, **options)

    stock = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    return calls


def test_memory_of_the_attention_does_not_grow_with_the_square_of_the_row():
    prompt, groups, length = 400, 8, 50
    layout = Layout([prompt], [length] * groups, [groups], "cpu")
    assert layout._mask(torch.float32, times=2).numel() == 2 * length * (prompt + length)


def test_attention_with_a_mask_has_a_kernel_on_cuda(case, monkeypatch):
    """There fused kernels take a mask only with as many query heads as key heads; else every score is in memory."""
    calls = watch_attention(monkeypatch)
    packed_logprobs(case, continuations(LENGTHS))
    assert len(calls) == 3 * 2, "prompts and continuations in each layer"
    assert all(same_heads or no_mask for same_heads, no_mask in calls)


def test_other_models_are_turned_down_in_words():
    assert unsupported(build("qwen2_5_vl")) is None
    eager = build("qwen2_5_vl")
    eager.set_attn_implementation("eager")
    assert "attn_implementation='eager'" in str(unsupported(eager))
    assert "attention_dropout=0.1" in str(unsupported(build("qwen2_5_vl", attention_dropout=0.1)))


@torch.no_grad()
def test_only_the_model_that_takes_layouts_attends_by_another_entry(case, tmp_path):
    text = case.model.config.get_text_config()
    assert all(layer.self_attn.config is text for layer in case.model.model.language_model.layers)
    packed_logprobs(case, continuations(LENGTHS))
    ours = case.alone(0, torch.tensor([50, 51]))
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    case.model.save_pretrained(tmp_path)
    assert attention.ATTENTION not in (tmp_path / "config.json").read_text()
    stock = type(case.model).from_pretrained(tmp_path).eval()
    assert stock.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(Case(stock, case.prompts, case.pixels, case.grids).alone(0, torch.tensor([50, 51])), ours)


def test_a_model_that_takes_no_layouts_does_not_go_unnoticed(case):
    case.model.set_attn_implementation("sdpa")
    row = pack(case.prompts, continuations(LENGTHS), open_end=True)
    with pytest.raises(RuntimeError, match="attn_mask dtype"):  # a layout's mask is none, and of integers
        case.model(**row.inputs, **case.vision, logits_to_keep=1, use_cache=False)


def test_a_model_that_drops_the_keyword_does_not_go_unnoticed():
    model = build("qwen2_5_vl")
    layout = Layout([4], [2], [1], "cpu")
    assert attention_inputs(layout, torch.zeros(1, 6))["shared_prefix"] is layout
    with pytest.raises(RuntimeError, match="shared_prefix` to 0 of its 3 attention layers"):
        check_used(layout, model)


@torch.no_grad()
def test_flex_attention_gives_the_same(case):
    groups = continuations(LENGTHS)
    expected = packed_logprobs(case, groups)
    found = packed_logprobs(case, groups, kernel="flex")
    assert not torch.equal(found, expected), "it was another kernel"
    assert (found - expected).abs().max() < 1e-5
    assert torch.equal(packed_logprobs(case, groups), expected), "the next row is computed as it says itself"
    with pytest.raises(InputError, match="kernel is 'flash'; choose one of 'sdpa', 'flex'"):
        packed_logprobs(case, groups, kernel="flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on CUDA alone")
@pytest.mark.parametrize("lengths", [LENGTHS, EQUAL])
def test_flex_attention_on_cuda_gives_the_same_gradients(lengths):
    case = make_case(build("qwen2_5_vl").cuda(), same_prompts=lengths is EQUAL)
    case.prompts = [Prompt(prompt.ids.cuda(), prompt.positions.cuda()) for prompt in case.prompts]
    case.pixels, case.grids = [p.cuda() for p in case.pixels], [g.cuda() for g in case.grids]
    groups = [[tokens.cuda() for tokens in group] for group in continuations(lengths)]
    expected = packed_logprobs(case, groups)
    stock = gradients(case.model, expected.sum())
    found = packed_logprobs(case, groups, kernel="flex")
    assert not torch.equal(found, expected), "it was another kernel"
    assert (found - expected).abs().max() < 1e-4
    ours = gradients(case.model, found.sum())
    apart = sum((ours[name] - stock[name]).norm() ** 2 for name in stock) ** 0.5
    assert apart <= 1e-4 * sum(grad.norm() ** 2 for grad in stock.values()) ** 0.5


@torch.no_grad()
def test_other_passes_of_a_model_are_untouched(case):
    tokens = torch.tensor([50, 60, 70])
    before = case.alone(0, tokens)
    packed_logprobs(case, continuations(LENGTHS))
    assert torch.equal(case.alone(0, tokens), before)


@torch.no_grad()
def test_patches_are_embedded_as_the_convolution_does(case):
    embed = case.model.model.visual.patch_embed
    patches = torch.cat(case.pixels)
    expected = embed(patches)
    called = []
    hook = embed.proj.register_forward_hook(lambda *_: called.append(1))
    with patches_by_product(case.model.model.visual):
        found = embed(patches)
    assert not called
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    embed(patches)
    hook.remove()
    assert called, "afterwards the model is as it was"


MAPPED = """
import ctypes, torch
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def mapped():
    before = libc.mallinfo2().hblks
    block = torch.empty(2**23)  # 32 MB
    smaller = torch.empty(2**22)
    return libc.mallinfo2().hblks - before
first = mapped()
from listener_reward.prefix.allocator import keep_freed_memory
keep_freed_memory()
print(first, mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's threshold")
def test_activations_take_memory_that_was_freed_and_not_new_pages():
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1"], "32 MiB are beyond what glibc keeps, 16 are not"


# ---------------------------------------------------------------- rollouts


def stock_sample(case: Case, size: int, **options: Any) -> Tensor:
    """What transformers samples for `size` copies of every prompt."""
    width = max(len(prompt.ids) for prompt in case.prompts)
    ids = torch.stack([torch.nn.functional.pad(p.ids, (width - len(p.ids), 0)) for p in case.prompts])
    ids = ids.repeat_interleave(size, 0)
    # transformers before 5.6 tells placeholders by the tokens themselves, and generates with no word of their kinds.
    taken = "mm_token_type_ids" in inspect.signature(case.model.forward).parameters
    return case.model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        **({"mm_token_type_ids": (ids == IMAGE).int()} if taken else {}),
        pixel_values=torch.cat([p for p in case.pixels for _ in range(size)]),
        image_grid_thw=torch.cat([g for g in case.grids for _ in range(size)]),
        **options,
    )


SAMPLING = {
    "plain": {"do_sample": True, "top_k": 0},
    "warped": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
    "greedy": {"do_sample": False},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_rollouts_are_the_tokens_of_transformers(case, options):
    case.model.eval()
    options = options | {"max_new_tokens": 40, "suppress_tokens": [IMAGE]}
    torch.manual_seed(7)
    expected = stock_sample(case, 6, **options)
    torch.manual_seed(7)
    kept = prefill(case.model, case.prompts, lambda _: case.vision)
    found = sample(case.model, case.prompts, [0] * 6 + [1] * 6, kept, pad_token_id=0, **options)
    assert torch.equal(found, expected)
    if options["do_sample"]:
        width = max(len(prompt.ids) for prompt in case.prompts)
        assert len({int((row != 0).sum()) for row in expected[:, width:]}) > 1, "rows end at different steps"


def test_rows_may_come_in_any_order_and_prefills_in_several_passes(case):
    case.model.eval()
    owner = [1, 0, 0, 1, 1]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}

    def vision(prompts):
        shown = [next(i for i, p in enumerate(case.prompts) if p is prompt) for prompt in prompts]
        return {
            "pixel_values": torch.cat([case.pixels[i] for i in shown]),
            "image_grid_thw": torch.cat([case.grids[i] for i in shown]),
        }

    whole = prefill(case.model, case.prompts, vision)
    parts = prefill(case.model, case.prompts, vision, token_budget=1)
    assert all(
        torch.allclose(whole[0][k][b, :, :45], parts[0][k][b, :, :45], atol=1e-6) for k in (0, 1) for b in (0, 1)
    )
    grouped = sample(case.model, case.prompts, [0, 1], whole, **options)
    mixed = sample(case.model, case.prompts, owner, parts, **options)
    for row, prompt in zip(mixed, owner, strict=True):
        assert torch.equal(row, grouped[prompt])


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 1])
def test_prompts_with_a_beginning_in_common_are_prefilled_as_if_each_were_whole(case, budget):
    """Keys and values of both prompts, with two ends of different lengths for one and a single token for the other."""
    case.model.eval()
    ends = [[torch.tensor([50, 60, 70, 80, 90]), torch.tensor([50, 61, 71])], [torch.tensor([99])]]
    whole = [followed(trunk, end) for trunk, some in zip(case.prompts, ends, strict=True) for end in some]
    grids = [case.grids[0], case.grids[0], case.grids[1]]
    for prompt, grid in zip(whole, grids, strict=True):
        assert torch.equal(prompt.positions, prompt_positions(case.model, prompt.ids, grid))

    def vision(prompts):
        shown = [
            next(i for i, p in enumerate(case.prompts) if torch.equal(p.ids, q.ids[: len(p.ids)])) for q in prompts
        ]
        return {
            "pixel_values": torch.cat([case.pixels[i] for i in shown]),
            "image_grid_thw": torch.cat([case.grids[i] for i in shown]),
        }

    expected = prefill(case.model, whole, vision)
    found = prefill(case.model, case.prompts, vision, ends=ends, token_budget=budget)
    assert found.keys() == expected.keys()
    for layer, parts in expected.items():
        for mine, stock in zip(found[layer], parts, strict=True):
            assert mine.shape == stock.shape
            for row, prompt in enumerate(whole):
                torch.testing.assert_close(mine[row, :, : len(prompt.ids) - 1], stock[row, :, : len(prompt.ids) - 1])


def test_finished_rows_cost_nothing(case):
    case.model.eval()
    widths = []
    hook = case.model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    torch.manual_seed(7)
    kept = prefill(case.model, case.prompts, lambda _: case.vision)
    widths.clear()
    sample(
        case.model, case.prompts, [0] * 6 + [1] * 6, kept, pad_token_id=0, do_sample=True, top_k=0, max_new_tokens=40
    )
    hook.remove()
    assert widths[0] == 12
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 12
