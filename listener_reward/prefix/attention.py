"""Attention for rows that share prompts, and for their rollouts, inside a stock transformers model.

It goes in through transformers' public `AttentionInterface`, under a name of its own. A model attends by it once
`take_layouts` has been called for it; other models of the process are not touched. Such a model does what it always did
unless a forward pass is given the keyword `shared_prefix`, a `Layout` or a `Decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import sdpa_attention

from listener_reward.errors import InputError

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Architectures whose positions and attention this engine is tested with, token by token."""

KERNELS = ("sdpa", "flex")
"""How a row's attention is computed: two calls of `scaled_dot_product_attention`, or one of FlexAttention."""

ATTENTION = "shared_prefix_sdpa"
"""The name of this attention among those of transformers."""

_STOCK_SDPA: Callable[..., tuple[Tensor, None]] = cast("Any", sdpa_attention).sdpa_attention_forward

WORTH_A_CALL = 2**21
"""Least work, in scores times head size, at which a continuation gets its own attention call on a CPU."""


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run `model`, in words that can follow "because"; None if it can."""
    config = base_model(model).config
    text = config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type!r} is not one of the architectures {', '.join(MODEL_TYPES)}"
    if text._attn_implementation not in ("sdpa", ATTENTION):
        return f"the model was loaded with attn_implementation={text._attn_implementation!r}; it has to be 'sdpa'"
    entry = cast("Any", AttentionInterface())["sdpa"]
    if entry is not _STOCK_SDPA:
        return f"{getattr(entry, '__qualname__', entry)} stands in for transformers' 'sdpa' attention"
    places = {str(place) for place in getattr(base_model(model), "hf_device_map", {}).values()}
    if len(places) > 1 or "disk" in places:
        return f"its layers lie on several devices ({', '.join(sorted(places))})"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "the model uses sliding-window attention"
    if getattr(text, "attention_dropout", 0.0):
        return f"the model has attention_dropout={text.attention_dropout}, which copies of a prompt draw differently"
    return None


class Layout:
    """Which tokens of a row belong to which prompt and continuation, and the attention among them.

    A plain object, not a dict or a dataclass: distributed training's wrappers rebuild dicts and dataclasses.
    """

    def __init__(
        self,
        prefixes: Sequence[int],
        segments: Sequence[int],
        groups: Sequence[int],
        device: torch.device | str,
        kernel: str = "sdpa",
    ):
        """
        Args:
            prefixes: tokens of each prompt, (B).
            segments: tokens of each continuation, (N), in the order of their prompts.
            groups: continuations of each prompt, (B), N in all.
            device: where the row is.
            kernel: one of `KERNELS`. "flex" compiles for CUDA on first use, and has no backward pass on CPU.

        Raises:
            InputError: another kernel.
        """
        if kernel not in KERNELS:
            raise InputError(f"kernel is {kernel!r}; choose one of {', '.join(map(repr, KERNELS))}")
        self.kernel = kernel
        self.device = device
        self.prefixes = list(prefixes)
        self.segments = list(segments)
        self.groups = list(groups)
        self.seen = 0
        """Attention layers that have used this layout. A model that drops the keyword must not go unnoticed."""
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = None
        """If a dict, each layer's keys and values are put into it: of the prompts, (B, heads, longest prompt, dim), or
        where continuations follow of each with its prompt before it, (N, heads, longest of both, dim)."""
        self.read: tuple[int, Tensor] | None = None
        """The last layer, and the places in the row (n,) whose output is read; None if all are read."""
        self._masks: dict[torch.dtype, Tensor] = {}
        self._tails: dict[torch.dtype, Tensor] = {}

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest continuation."""
        return max(self.prefixes), max(self.segments, default=0)

    @cached_property
    def owner(self) -> Tensor:
        """The prompt of each continuation, (N,) int64."""
        return torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.groups)).to(self.device)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer: `query` (1, H, S, D), `key` and `value` (1, Hkv, S, D) give (1, S, H, D)."""
        self.seen += 1
        if self.kernel == "flex" and self.kept is None:
            return self._flex(query, key, value, scaling)
        if self.kept is None and query.device.type == "cpu" and self._ragged(query):
            return self._one_by_one(module, query, key, value, scaling)
        long, short = self.longest
        slots = len(self.prefixes) * long
        whole = query
        query, key, value = (self._to_slots(x[0].transpose(0, 1)) for x in (query, key, value))

        def part(x: Tensor, start: int, stop: int | None, width: int) -> Tensor:
            return torch.unflatten(x[start:stop], 0, (-1, width)).transpose(1, 2)

        prefix_key, prefix_value = part(key, 0, slots, long), part(value, 0, slots, long)
        if self.kept is not None:
            own_key, own_value = part(key, slots, None, short or 1), part(value, slots, None, short or 1)
            self.kept[module.layer_idx] = self._joined(prefix_key, own_key), self._joined(prefix_value, own_value)
            if len(self._read_within(module, 0, whole.shape[2])) == 0:
                return torch.zeros_like(whole).transpose(1, 2)
        first = scaled_dot_product_attention(
            part(query, 0, slots, long), prefix_key, prefix_value, is_causal=True, scale=scaling, enable_gqa=True
        )
        parts = [first.transpose(1, 2).flatten(0, 1)]
        if short:
            # Query heads that share keys stand one after the other: CUDA's fused kernels take a mask only with as
            # many query heads as key heads, and others would be computed with every score in memory.
            own = torch.unflatten(part(query, slots, None, short), 1, (key.shape[1], -1))
            second = scaled_dot_product_attention(
                own.flatten(2, 3),
                torch.cat([prefix_key[self.owner], part(key, slots, None, short)], dim=2),
                torch.cat([prefix_value[self.owner], part(value, slots, None, short)], dim=2),
                attn_mask=self._mask(query.dtype, own.shape[2]),
                scale=scaling,
            )
            parts.append(torch.unflatten(second, 2, own.shape[2:4]).flatten(1, 2).transpose(1, 2).flatten(0, 1))
        return self._to_tokens(torch.cat(parts))[None]

    def _joined(self, prompts: Tensor, own: Tensor) -> Tensor:
        """Keys or values of each continuation with its prompt before it, of the padded slots of both."""
        if not self.segments:
            return prompts
        before = torch.tensor(self.prefixes, device=self.device)[self.owner][:, None]  # (N, 1)
        width = int((before[:, 0] + torch.tensor(self.segments, device=self.device)).max())
        places = torch.arange(width, device=self.device)
        places = (places + (places >= before) * (self.longest[0] - before)).clamp(max=sum(self.longest) - 1)
        whole = torch.cat([prompts[self.owner], own], dim=2)
        return whole.gather(2, places[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))

    def _ragged(self, query: Tensor) -> bool:
        """Whether padding every continuation to the longest costs more than a call for each of them."""
        short, written = self.longest[1], sum(self.segments)
        work = written * sum(self.longest) * query.shape[1] * query.shape[3]
        return work > WORTH_A_CALL * len(self.segments) and short * len(self.segments) > 1.1 * written

    def _one_by_one(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`attend` with a call for each prompt and each continuation: nothing is padded."""
        attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=True)
        spans = [*pairwise(accumulate([*self.prefixes, *self.segments], initial=0))]
        owner: list[int] = cast("Any", self.owner).tolist()
        parts: list[Tensor] = []
        for number, (start, stop) in enumerate(spans, -len(self.prefixes)):
            queries, keys, values = (x[:, :, start:stop] for x in (query, key, value))
            read = self._read_within(module, start, stop)
            if len(read) == 0:
                parts.append(torch.zeros_like(queries))
            elif number < 0:
                parts.append(attend(queries, keys, values, is_causal=True))
            else:
                seen = slice(*spans[owner[number]])
                keys, values = (torch.cat([x[:, :, seen], x[:, :, start:stop]], dim=2) for x in (key, value))
                mask = self._tail(query.dtype, seen.stop - seen.start, stop - start)
                if len(read) == stop - start:
                    parts.append(attend(queries, keys, values, attn_mask=mask))
                else:
                    found = attend(queries[:, :, read], keys, values, attn_mask=mask[read])
                    parts.append(torch.zeros_like(queries).index_copy_(2, read, found))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _read_within(self, module: Any, start: int, stop: int) -> Tensor:
        """The tokens from `start` to `stop` whose output of `module` is read, counted from `start`."""
        if self.read is None or self.read[0] != module.layer_idx:
            return torch.arange(stop - start)
        places = self.read[1]
        return places[(places >= start) & (places < stop)] - start

    def _tail(self, dtype: torch.dtype, prompt: int, length: int) -> Tensor:
        """The mask (C, P + C) of one continuation: what follows a prompt of P tokens."""
        long, short = self.longest
        if dtype not in self._tails:
            hidden = torch.ones(short, long + short, dtype=torch.bool, device=self.device).triu(long + 1)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._tails[dtype] = mask.masked_fill_(hidden, float("-inf"))
        return self._tails[dtype][:length, long - prompt : long + length]

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        attention = _compiled(flex_attention) if query.is_cuda else flex_attention
        out: Any = attention(query, key, value, block_mask=self._blocks, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    @cached_property
    def _blocks(self) -> Any:
        """FlexAttention's mask: which blocks of the row are all seen, in part, or not at all."""
        lengths = torch.tensor(self.prefixes + self.segments)
        group = torch.cat([torch.arange(len(self.prefixes)), self.owner.cpu()])
        number = torch.arange(len(lengths)).repeat_interleave(lengths).to(self.device)  # prompt or continuation
        group = group.repeat_interleave(lengths).to(self.device)
        prompt = number < len(self.prefixes)

        def seen(_: Any, __: Any, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & ((number[q] == number[k]) | (prompt[k] & (group[q] == group[k])))

        total = int(lengths.sum())
        # Uncompiled, it writes the whole row's mask, S times S, before it looks at the blocks.
        create: Any = _compiled(create_block_mask) if number.is_cuda else create_block_mask
        return create(seen, None, None, total, total, device=self.device)

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor] | None:
        """For each padded slot its token (or S), and for each token its slot; None where nothing is padded."""
        widths = [self.longest[0]] * len(self.prefixes) + [self.longest[1]] * len(self.segments)
        lengths = self.prefixes + self.segments
        if lengths == widths:
            return None
        total = sum(lengths)
        tokens = torch.full((sum(widths),), total)
        slots = torch.empty(total, dtype=torch.long)
        token = slot = 0
        for length, width in zip(lengths, widths, strict=True):
            tokens[slot : slot + length] = torch.arange(token, token + length)
            slots[token : token + length] = torch.arange(slot, slot + length)
            token, slot = token + length, slot + width
        return tokens.to(self.device), slots.to(self.device)

    def _to_slots(self, tokens: Tensor) -> Tensor:
        """(S, ...) tokens to (slots, ...); padding holds arbitrary values."""
        return tokens if self._index is None else cast("Any", _Place).apply(tokens, *self._index)

    def _to_tokens(self, slots: Tensor) -> Tensor:
        """(slots, ...) to (S, ...) tokens."""
        return slots if self._index is None else cast("Any", _Pick).apply(slots, *self._index)

    def _mask(self, dtype: torch.dtype, times: int) -> Tensor:
        """What continuations may see of [prompt | themselves]: additive, (N or 1, 1, times * C, P + C)."""
        if dtype not in self._masks:
            long, short = self.longest
            mask = self._tail(dtype, long, short)[None, None]
            if min(self.prefixes) < long:
                lengths = torch.tensor(self.prefixes, device=self.device)[self.owner]
                hidden = torch.arange(long, device=self.device) >= lengths[:, None, None, None]
                mask = mask.masked_fill(pad(hidden, (0, short)), float("-inf"))
            self._masks[dtype] = mask.repeat(1, 1, times, 1)
        return self._masks[dtype]


@cache
def _compiled(function: Any) -> Any:
    return cast("Any", torch).compile(function, dynamic=True)


class _Place(torch.autograd.Function):
    """Tokens (S, ...) to padded slots; plain indexing would do, but its backward pass adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x[tokens.clamp(max=len(x) - 1)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None


class _Pick(torch.autograd.Function):
    """Padded slots to tokens (S, ...); the padding's gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return x[slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return pad(grads[0], (0, 0) * (grads[0].ndim - 1) + (0, 1))[ctx.saved_tensors[0]], None, None


class Decoding:
    """The keys and values of a rollout: each prompt's once, and a growing cache for every row.

    One decoding step is a row of one token for each row still going; `attend` scores it against its prompt, all rows of
    a group in one matrix product, and against its own past.
    """

    def __init__(
        self,
        prefixes: Sequence[int],
        kept: dict[int, tuple[Tensor, Tensor]],
        owner: Sequence[int],
        device: torch.device | str,
    ):
        """
        Args:
            prefixes: tokens of each prompt that `kept` holds, (B).
            kept: each layer's keys and values of the prompts, (B, heads, longest prompt, dim), as `Layout.kept`.
            owner: the prompt of each row, (rows).
            device: where the rows are.
        """
        self.kept = kept
        self.device = device
        self.lengths = torch.tensor(prefixes)
        self.owner = torch.tensor(owner)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        """Each layer's keys and values of what the rows have written, (rows, heads, room, dim)."""
        self.step = 0
        self.seen = 0
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Goes on with `rows` (a bool for each) alone."""
        self.owner = self.owner[rows.cpu()]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}
        self._arrange()

    def _arrange(self) -> None:
        counts = self.owner.bincount(minlength=len(self.lengths))
        self.width = int(counts.max()) if len(self.owner) else 0
        place = torch.empty_like(self.owner)  # of each row among those of its prompt
        place[self.owner.argsort(stable=True)] = torch.cat([torch.arange(int(count)) for count in counts])
        slots = self.owner * self.width + place
        self.uniform = torch.equal(slots, torch.arange(len(self.lengths) * self.width))
        self.slots = slots.to(self.device)
        longest = int(self.lengths.max())
        self.hidden = None
        if int(self.lengths.min()) < longest:
            hidden = torch.arange(longest) >= self.lengths[:, None]
            self.hidden = hidden[:, None, None].to(self.device)  # (B, 1, 1, P)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`query` (1, H, n, D) and `key`, `value` (1, Hkv, n, D) of one token per row give (1, n, H, D)."""
        self.seen += 1
        past, own = self.kept[module.layer_idx], self._append(module.layer_idx, key[0], value[0])
        heads, n, dim = query.shape[1:]
        kv = key.shape[1]
        rows = torch.unflatten(query[0].transpose(0, 1), 1, (kv, heads // kv))  # (n, Hkv, H / Hkv, D)
        scores = torch.cat([self._prompt_scores(rows, past[0]), _product(rows, own[0].transpose(-1, -2))], dim=-1)
        weights = (scores * scaling).softmax(-1).to(value.dtype)
        long = past[0].shape[2]
        seen = _product(self._grouped(weights[..., :long]), past[1])
        out = self._ungrouped(seen, heads // kv) + _product(weights[..., long:], own[1])
        return out.to(query.dtype).reshape(1, n, heads, dim)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes this step's (Hkv, n, D) and gives all steps' (n, Hkv, step + 1, D); room doubles when it runs out."""
        new = key.transpose(0, 1), value.transpose(0, 1)
        if layer not in self.own:
            keys, values = (x.new_zeros(*x.shape[:2], 32, x.shape[2]) for x in new)
            self.own[layer] = keys, values
        if self.step == self.own[layer][0].shape[2]:
            keys, values = (pad(x, (0, 0, 0, self.step)) for x in self.own[layer])
            self.own[layer] = keys, values
        for buffer, x in zip(self.own[layer], new, strict=True):
            buffer[:, :, self.step] = x
        keys, values = self.own[layer]
        return keys[:, :, : self.step + 1], values[:, :, : self.step + 1]

    def _prompt_scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        scores = _product(self._grouped(rows), keys.transpose(-1, -2))
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, float("-inf"))
        return self._ungrouped(scores, rows.shape[2])

    def _grouped(self, rows: Tensor) -> Tensor:
        """(n, Hkv, r, ...) to (B, Hkv, rows of the group * r, ...), padded."""
        if not self.uniform:
            room = rows.new_zeros(len(self.lengths) * self.width, *rows.shape[1:])
            rows = room.index_copy(0, self.slots, rows)
        return torch.unflatten(rows, 0, (len(self.lengths), self.width)).transpose(1, 2).flatten(2, 3)

    def _ungrouped(self, grouped: Tensor, per_row: int) -> Tensor:
        rows = torch.unflatten(grouped, 2, (self.width, per_row)).transpose(1, 2).flatten(0, 1)
        return rows if self.uniform else rows[self.slots]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left` (B, H, m, k) times `right` (B, H, k, n), (B, H, m, n), in float32 at the least.

    Qwen2.5's keys have large constant biases. The softmax cancels what all scores of a query have in common, but
    scores rounded to bfloat16 have lost their differences by then (transformers issue 33317), and those in float16
    overflow. SDPA, which everything else here attends with, keeps its scores in float32.
    """
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        product = torch.matmul
    elif left.is_cuda and left.dtype == right.dtype and _HALVES_TO_FLOAT32:
        product = _product_of_halves
    else:
        left, right, product = left.float(), right.float(), torch.matmul
    with torch.autocast(left.device.type, enabled=False):  # which would round the factors, and then the product
        return product(left, right)


_HALVES_TO_FLOAT32 = torch.version.hip is None and hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this torch multiplies half-precision matrices into float32, which spares a copy of the keys at each step."""


def _product_of_halves(left: Tensor, right: Tensor) -> Tensor:
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
    return torch.unflatten(product, 0, left.shape[:2])


def attention_inputs(layout: Layout | Decoding, like: Tensor) -> dict[str, Any]:
    """The arguments of a forward pass that put `layout` in place of causal attention.

    transformers takes a mask of four dimensions as finished and makes none of its own. The model has to take layouts,
    see `take_layouts`.
    """
    return {"shared_prefix": layout, "attention_mask": like.new_zeros(1, 1, 1, 1)}


def check_used(layout: Layout | Decoding, model: Any) -> None:
    """Raises RuntimeError unless every attention layer of `model` has used `layout`: the result would be wrong.

    It cannot happen with the architectures in `MODEL_TYPES` after `take_layouts`; a subclass that drops keywords, or a
    model whose attention was chosen anew since, would read nonsense.
    """
    layers = base_model(model).config.get_text_config().num_hidden_layers
    if layout.seen < layers:
        raise RuntimeError(
            f"{type(base_model(model)).__name__} hands `shared_prefix` to {layout.seen} of its {layers} attention "
            "layers; turn the shared prefix off: share_rollout, share_logprobs and share_listener are the training "
            "configuration's fields for it, shared_prefix=False is that of a judge or a TransformersVLM"
        )


def take_layouts(model: Any) -> None:
    """Has the language model of `model`, which `unsupported` has nothing against, take layouts in its forward passes.

    It stays so for the model's life, because a layer whose activations are computed again in a backward pass has to
    find what it found before. Passes without a layout give what they gave; nothing of it is saved with the model.
    """
    base_model(model).config.get_text_config()._attn_implementation = ATTENTION


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    layout = kwargs.pop("shared_prefix", None)
    if layout is None:
        return _STOCK_SDPA(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(module, query, key, value, scaling), None


cast("Any", AttentionInterface).register(ATTENTION, _attention)
cast("Any", AttentionMaskInterface).register(ATTENTION, cast("Any", masking_utils).sdpa_mask)


def base_model(model: Any) -> Any:
    """The plain transformers model inside wrappers of PEFT and of distributed training."""
    while hasattr(model, "module"):  # DeepSpeed's wrapper has the model's other attributes too, and its own `config`
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
