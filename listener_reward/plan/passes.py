"""The passes of a run over a checkpoint's architecture without its weights: their peaks, what they keep, operations.

Rows are packed and attended to by the shared-prefix engine itself. Only what depends on values is put in by hand: the
places of images in a prompt, and the head, of which trl's kernels hold a part at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from listener_reward.errors import InputError
from listener_reward.plan.meter import Meter, metered, standing_in
from listener_reward.prefix.attention import Layout, base_model, take_layouts, unsupported
from listener_reward.prefix.rows import Prompt, Row, pack

GRID = tuple[int, int, int]
"""Patches of an image in time, height and width."""

HEAD_TOKENS, HEAD_WORDS = 4096, 32768
"""Tokens and words of the vocabulary in one tile of trl's fused head."""


class Pass(NamedTuple):
    """What one forward pass, or one forward and backward pass, takes."""

    peak: int
    """Most bytes alive at once, beside weights, gradients that were there and the arguments."""
    kept: int
    """Bytes alive when it is done, such as the prompts' keys and values."""
    flops: float


@dataclass
class Architecture:
    """A model of given shapes without weights, as it would be loaded."""

    config: Any
    dtype: torch.dtype
    bits: int = 16
    """Of the weights of linear layers but the head: 4 or 8 where they are quantised."""
    lora: Any = None
    """PEFT's configuration of the adapters that are trained on it; None for none."""
    trained: bool = False
    """Whether there are gradients: of the adapters, or of every weight without them."""
    checkpointing: bool = False
    autocast: torch.dtype | None = None
    on_cpu: bool = False
    """Whether trl's head runs without Triton, which scores the prompt's tokens too and makes more temporaries."""
    model: Any = field(init=False, repr=False)
    _meter: Meter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with torch.device("meta"), no_init_weights():
            model: Any = AutoModelForImageTextToText.from_config(self.config, dtype=self.dtype)
            model.tie_weights()
            if reason := unsupported(model):
                raise InputError(f"no plan can be made for this checkpoint: {reason}")
            take_layouts(model)
            if self.lora is not None:
                import peft

                model = peft.get_peft_model(model, self.lora)
            elif not self.trained:
                model.requires_grad_(False)
        if self.trained:
            model.train()
            if self.checkpointing:
                # transformers hands this on to torch, which would save the state of the device's generator
                options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self._contexts}
                model.gradient_checkpointing_enable(options)
                if self.lora is not None:
                    model.enable_input_require_grads()
        else:
            model.eval()
        self.model = model

    # ------------------------------------------------------------------------------------------------------ weights
    @property
    def parameters(self) -> int:
        """Weights, adapters not among them."""
        return sum(p.numel() for name, p in self.model.named_parameters() if "lora_" not in name)

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they are loaded, adapters not among them."""
        return sum(size for _, size in self._sizes())

    def _sizes(self) -> Iterator[tuple[str, int]]:
        packed = set[str]()
        if self.bits < 16:
            packed = {
                f"{name}.weight"
                for name, module in self.model.named_modules()
                if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "lora_" not in name
            }
        for name, weight in self.model.named_parameters():
            if "lora_" not in name:
                # Four bits come with a scale for each block of 64, itself in eight bits: bitsandbytes' nf4, doubly.
                each = weight.element_size() if name not in packed else {4: 0.516, 8: 1.0}[self.bits]
                yield name, int(weight.numel() * each)

    @property
    def adapter_bytes(self) -> int:
        return sum(p.nbytes for name, p in self.model.named_parameters() if "lora_" in name)

    @property
    def trainable(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad] if self.trained else []

    @property
    def largest_layer(self) -> int:
        """Bytes of the weights that are gathered together where layers are sharded one by one."""
        core = base_model(self.model)
        blocks = [*core.model.language_model.layers, core.lm_head]
        return max(sum(p.nbytes for p in block.parameters()) for block in blocks)

    @property
    def text(self) -> Any:
        return base_model(self.model).config.get_text_config()

    @property
    def computes(self) -> torch.dtype:
        """The dtype of products."""
        return self.autocast or self.dtype

    @property
    def decoding_flops(self) -> float:
        """Operations of one token, its attention left out, which is a few per cent."""
        core = base_model(self.model)
        read = sum(p.numel() for p in core.model.language_model.layers.parameters())
        return 2.0 * (read + core.lm_head.weight.numel())

    @property
    def decoding_bytes(self) -> int:
        """Bytes of weights that one step of decoding reads."""
        return sum(size for name, size in self._sizes() if "visual" not in name and "embed_tokens" not in name)

    def feature_bytes(self, tokens: int) -> int:
        """What a vision tower gives for so many tokens."""
        layers = 1 + len(getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ())
        return tokens * layers * self.text.hidden_size * torch.finfo(self.dtype).bits // 8

    # ------------------------------------------------------------------------------------------------------- passes
    def look(self, grids: Sequence[GRID]) -> Pass:
        """Patches to features, without gradients."""
        with self._reading() as meter:
            kept = self._features(grids, meter)
            return Pass(meter.peak, meter.live, meter.flops) if kept else Pass(0, 0, 0.0)

    def prefill(self, prompts: Sequence[int]) -> Pass:
        """Prompts of so many tokens, of which keys and values are kept."""
        row = self._row(prompts, [() for _ in prompts], open_end=True)
        layout: Layout = row.inputs["shared_prefix"]
        layout.kept = {}
        with self._reading() as meter:
            self._hidden(row)
            return Pass(meter.peak, meter.live, meter.flops)

    def read(self, prompts: Sequence[int], continuations: Sequence[Sequence[int]]) -> Pass:
        """Continuations after their prompts, up to the last hidden states."""
        row = self._row(prompts, continuations, open_end=True)
        with self._reading() as meter:
            self._hidden(row)
            return Pass(meter.peak, 0, meter.flops)

    def learn(
        self, prompts: Sequence[int], continuations: Sequence[Sequence[int]], grids: Sequence[GRID], *, added: bool
    ) -> tuple[Pass, int]:
        """A forward and backward pass, and the bytes of its peak that are the head's.

        With `added` there are gradients already, which are no part of the peak; without, the peak has those that there
        are by then.
        """
        row = self._row(prompts, continuations, open_end=False)
        for weight in self.trainable:
            weight.grad = torch.empty_like(weight) if added else None
        self._meter = meter = Meter()
        head = _Head(self, sum(map(len, continuations)), row.labels.shape[1], continuations)
        looks = contextlib.nullcontext() if self._vision_learns() else torch.no_grad()
        with standing_in(meter, self.autocast), meter:
            with looks:
                features = self._features(grids, meter)
            scores = head(self._hidden(row, features[0] if features else None), meter)
            del features
            scores.sum().backward()
            del scores
            found = Pass(meter.peak, 0, meter.flops)
        for weight in self.trainable:
            weight.grad = None
        return found, head.peak

    # ------------------------------------------------------------------------------------------------------- pieces
    def _contexts(self) -> tuple[Any, Any]:
        """What a checkpointed layer is computed in at first, and again in the backward pass, where no mode is left."""
        return contextlib.nullcontext(), standing_in(self._meter, self.autocast)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Meter]:
        """A meter of passes without gradients, for which layers are not checkpointed."""
        self.model.eval()
        with metered(self.autocast) as meter:
            yield meter
        self.model.train(self.trained)

    def _vision_learns(self) -> bool:
        return any(p.requires_grad for p in base_model(self.model).model.visual.parameters())

    def _features(self, grids: Sequence[GRID], meter: Meter) -> list[Tensor]:
        if not grids:
            return []
        core, config = base_model(self.model).model, self.config.vision_config
        places = torch.tensor(grids)
        merge = config.spatial_merge_size
        given = {"position_ids": get_vision_position_ids(places, merge).to("meta")}
        if (side := getattr(core.visual, "num_grid_per_side", None)) is not None:
            indices, weights = get_vision_interpolation_indices_and_weights(places, side, spatial_merge_size=merge)
            given |= {"interp_indices": indices.to("meta"), "interp_weights": weights.to("meta")}
        if (window := getattr(core.visual, "window_size", None)) is not None:
            # All windows are attended to in one call, and not in hundreds: as many bytes, far fewer operations.
            order, ends = get_vision_window_index(places, merge, window, config.patch_size)
            whole = int(ends[-1])
            meter.seen[whole] = float((ends.diff() ** 2).sum()) / whole**2
            given |= {"window_index": order, "cu_window_seqlens": torch.tensor([0, whole])}
        numbers = 3 * config.temporal_patch_size * config.patch_size**2
        patches = torch.empty(int(places.prod(-1).sum()), numbers, device="meta").to(core.visual.dtype)
        out = core.visual(patches, grid_thw=places, **given)
        return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]

    def _row(self, prompts: Sequence[int], continuations: Sequence[Sequence[int]], *, open_end: bool) -> Row:
        def ids(number: int) -> Tensor:
            return torch.empty(number, dtype=torch.long, device="meta")

        asked = [Prompt(ids(n), torch.empty(3, n, dtype=torch.long, device="meta")) for n in prompts]
        return pack(asked, [[ids(n) for n in some] for some in continuations], open_end=open_end)

    def _hidden(self, row: Row, features: Tensor | None = None) -> Tensor:
        """The last hidden states (1, S, width), with images at their places."""
        core = base_model(self.model).model
        inputs = dict(row.inputs)
        embedded: Tensor = core.get_input_embeddings()(inputs.pop("input_ids"))
        places = torch.empty(*embedded.shape[:2], 1, dtype=torch.bool, device="meta").expand(embedded.shape)
        if features is None:
            features = embedded.new_empty(1, embedded.shape[-1])
        embedded = embedded.masked_scatter(places, features.to(embedded.dtype))
        return core.language_model(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state


class _Head:
    """trl's fused head: tiles of logits, which are computed again in the backward pass."""

    def __init__(self, owner: Architecture, rows: int, row: int, continuations: Sequence[Sequence[int]]):
        written = sum(sum(some) for some in continuations)
        self.tokens = row if owner.on_cpu else written
        self.weight: Tensor = base_model(owner.model).lm_head.weight
        self.dtype = owner.computes
        self.temporaries = 7 if owner.on_cpu else 0
        """Float32 copies of a tile that torch makes where Triton's kernel makes none."""
        self.peak = 0

    def __call__(self, hidden: Tensor, meter: Meter) -> Tensor:
        read = hidden[0] if self.tokens == hidden.shape[1] else hidden[0].index_select(0, _places(self.tokens))
        return cast("Any", _HeadFunction).apply(read, self.weight, self, meter)

    def tile(self, meter: Meter, flops: float) -> None:
        rows, words = min(self.tokens, HEAD_TOKENS), min(HEAD_WORDS, self.weight.shape[0])
        before = meter.live
        made = [torch.empty(rows, HEAD_WORDS, dtype=self.dtype, device="meta")]  # whatever the vocabulary
        made += [torch.empty(rows, words, device="meta") for _ in range(self.temporaries)]
        self.peak = max(self.peak, meter.live - before)
        meter.flops += flops


class _HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: _Head, meter: Meter) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.head, ctx.meter = head, meter
        head.tile(meter, 2.0 * weight.numel() * len(hidden))
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        sums = [
            torch.empty(x.shape, device="meta") if need else None
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        ctx.head.tile(ctx.meter, 2.0 * weight.numel() * len(hidden) * (1 + sum(needed)))
        gradients = [None if s is None else s.to(x.dtype) for s, x in zip(sums, (hidden, weight), strict=True)]
        return (*gradients, None, None)


def _places(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.long, device="meta")
