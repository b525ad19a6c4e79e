"""The transformers backend of `VLM`: Qwen-VLs with shared prefixes, and other families by the plain path."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError, JudgeError
from listener_reward.media.clips import Clip
from listener_reward.models.adapters import base_of, options_of_base, put_on
from listener_reward.models.families import family_of
from listener_reward.models.head import next_token_logprobs, token_logprobs
from listener_reward.models.hub import cannot_load, hub_options, loading
from listener_reward.models.memory import Footprint, out_of_memory, patch_bytes, tokens_of
from listener_reward.models.older_transformers import video_texts
from listener_reward.models.options import MEMORY, Quantization, as_bytes
from listener_reward.models.placement import attention_of, chosen_device, limit_pixels, placement
from listener_reward.models.plain import PlainBatches
from listener_reward.models.processing import decoded, load_processor
from listener_reward.models.turns import Turns
from listener_reward.models.video_processing import metadata, seconds_per_patch
from listener_reward.models.vision import Encoded, ImageFeatures, as_encoder_output
from listener_reward.models.vlm import BROKEN, LEAST_LOGPROB
from listener_reward.prefix.allocator import keep_freed_memory
from listener_reward.prefix.attention import base_model, check_used, take_layouts, unsupported
from listener_reward.prefix.rows import IGNORED, Prompt, budgeted, followed, fork, pack, prompt_positions, read_only_at
from listener_reward.prefix.sampling import prefill, sample

logger = logging.getLogger(__name__)

_SMALLER = (
    "load it in fewer bits (quantization: 4bit or 8bit, or dtype: bfloat16), or on several GPUs (device_map: auto)"
)
_TOLD: set[str] = set()
"""Reasons for the plain path that were given in this process."""

_Sampler = Callable[[Sequence[int], dict[str, Any]], Tensor]
"""Token ids (n, longest completion) of one completion for each of n places in a batch, under `generate`'s options."""


class _Written(NamedTuple):
    """A chat as tokens, and where it is asked."""

    ids: Tensor
    """(P,) int64, image placeholders expanded."""
    media: list[Encoded]
    clips: Sequence[Clip]
    rows: list[int]


class TransformersVLM:
    """A vision-language model in transformers, on one device; `families` says which, and what each can use.

    Where the family allows it, chats that are equal (several thoughts about one question) share their prompt's
    computation, and each image goes through the vision tower once, however many chats it is in: see `prefix` and
    `vision`. For that the model takes layouts from now on (`take_layouts`). Without one it gives what it gave, and
    other models are not touched. Elsewhere every chat is run for itself: see `plain`.
    """

    backend = "transformers"
    limits: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int = 32,
        adapters_off: bool = False,
        shared_prefix: bool = True,
        token_budget: int = 16384,
        attention: str = "sdpa",
        vision_bytes: int = 2**29,
        memory: int | str | None = None,
        keep_memory: bool = True,
        think_tag: str | None = "<think>",
    ):
        """
        Args:
            model: a frozen transformers model, inside PEFT's wrapper or not.
            processor: its processor, as `load_processor` gives it.
            batch_size: completions sampled, or thoughts read, in one forward pass. With a shared prefix, the thoughts
                of one chat are read together however many they are, and `token_budget` bounds the pass.
            adapters_off: whether a PEFT model's adapters are off while this VLM runs: the base as its own listener.
            shared_prefix: off runs every chat for itself, as plain transformers does.
            token_budget: most tokens of the language model in one forward pass; larger groups are split over several
                passes.
            attention: one of `attention.KERNELS`, for rows that are read with a shared prefix.
            vision_bytes: how much of the images' features to keep between calls, in bytes.
            memory: what a batch may take beside the weights; see `ModelOptions`.
            keep_memory: with a shared prefix on a CPU, ask glibc to keep memory that was freed, up to 32 MiB a block,
                see `keep_freed_memory`. That is a setting of the whole process; False leaves it alone.
            think_tag: the tag that opens a thought. Some chat templates write it themselves at the end of the
                generation prompt (Qwen3-VL-Thinking); completions begin with it all the same, and a prefix that begins
                with it continues the prompt. None where thoughts have no tag.
        """
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.adapters_off = adapters_off
        self.memory = MEMORY if memory is None else as_bytes(memory, "memory")
        self.footprint = Footprint.of(model)
        self.token_budget = min(token_budget, self.footprint.tokens(self.memory // 2))
        self.attention = attention
        self.tokenizer = processor.tokenizer
        if self.tokenizer.padding_side != "left":
            raise InputError(
                f"padding_side is {self.tokenizer.padding_side!r}; batches of a decoder are read from their last "
                "token: set processor.tokenizer.padding_side = 'left'"
            )
        self.turns = Turns(processor, think_tag=think_tag)
        self.reserved = self.turns.reserved
        self.checkpoint: str | None = None
        """Where the weights were loaded from; None for a model that was given."""
        self.base: str | None = None
        """The checkpoint under the adapter, where `checkpoint` is one."""
        self.revision: str | None = None
        """The weights' revision on the Hub; None for the newest."""
        self.family = family_of(base_model(model).config.model_type)
        self._plain = PlainBatches(model, processor)
        self.shared_prefix = shared_prefix
        if shared_prefix and (reason := unsupported(model)):
            self.shared_prefix = False
            if reason not in _TOLD:
                _TOLD.add(reason)
                logger.warning("every chat pays for its own prompt, because %s. Said once", reason)
        if self.shared_prefix:
            take_layouts(model)
            if keep_memory and base_model(model).device.type == "cpu":
                keep_freed_memory()
        if self.family.processor is None:
            self._plain.check_two_images()
        videos = processor.video_processor if self.family.clips else None
        self.features = ImageFeatures(
            base_model(model).model, processor.image_processor, videos, max_bytes=vision_bytes
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
        max_pixels: int | None = None,
        batch_size: int = 32,
        shared_prefix: bool = True,
        token_budget: int = 16384,
        attention: str = "sdpa",
        vision_bytes: int = 2**29,
        memory: int | str | None = None,
        keep_memory: bool = True,
        think_tag: str | None = "<think>",
        **kwargs: Any,
    ) -> TransformersVLM:
        """Loads a checkpoint, or an adapter on its base; bfloat16 on a GPU and float32 on a CPU unless `dtype` says.

        An adapter, marked by PEFT's `adapter_config.json`, is float32 and is not merged: the steps of the base's dtype
        are larger than most of a small update. `device` None and "cuda" are this process's own GPU (`default_device`).
        `device_map`, `quantization` and `max_pixels` are those of `ModelOptions`. The other arguments are those of the
        class, and transformers' own.

        Raises:
            InputError: the checkpoint cannot be found, reached or read; a dtype that is none.
            MissingExtraError: a package that `device_map` or `quantization` needs is not installed.
        """
        device = chosen_device(device) if device and str(device) != "cuda" else default_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"dtype is {dtype!r}; give the name of a torch dtype, such as 'bfloat16', or 'auto'")
        placed = placement(device, dtype, device_map, quantization)
        given = {option: value for option, value in kwargs.items() if value is not None}
        kwargs = hub_options(name, given.get("revision")) | given
        processor = load_processor(name, **kwargs)
        limit_pixels(processor, max_pixels)
        base = base_of(name, **kwargs)
        whole, given = (name, kwargs) if base is None else (base, options_of_base(base, kwargs, name))
        attends = kwargs.get("attn_implementation")
        with loading(whole), attention_of(attends), out_of_memory(f"{whole!r} was loaded", _SMALLER):
            # Weights of another shape are in the report, where they can be told from any other RuntimeError.
            loaded: Any = AutoModelForImageTextToText.from_pretrained(  # pyright: ignore[reportUnknownMemberType]
                whole,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **placed,
                **given,
            )
        model, report = loaded
        # transformers gives what is missing and what does not fit random values, and the judge would judge.
        misfits = {weight for weight, *_ in report["mismatched_keys"]}
        for weights, what in ((report["missing_keys"], "are missing"), (misfits, "have another shape than its config")):
            if weights:
                reason = f"{len(weights)} of its weights {what}, among them {', '.join(sorted(weights)[:3])}"
                raise InputError(cannot_load(whole, reason))
        if base is not None:
            model = put_on(model, name, **kwargs)
        if not placed and getattr(model, "hf_quantizer", None) is None:  # what is saved quantised lies where it is
            with out_of_memory(f"{whole!r} was moved to {device}", _SMALLER):
                model = model.to(device)
        vlm = cls(
            model.eval().requires_grad_(False),
            processor,
            batch_size=batch_size,
            shared_prefix=shared_prefix,
            token_budget=token_budget,
            attention=attention,
            vision_bytes=vision_bytes,
            memory=memory,
            keep_memory=keep_memory,
            think_tag=think_tag,
        )
        vlm.checkpoint, vlm.base, vlm.revision = str(name), base, given.get("revision")
        return vlm

    def without_adapters(self, chat_format: ChatFormat) -> TransformersVLM:
        base = TransformersVLM(
            self.model,
            self.processor,
            batch_size=self.batch_size,
            adapters_off=True,
            shared_prefix=self.shared_prefix,
            token_budget=self.token_budget,
            attention=self.attention,
            vision_bytes=self.features.max_bytes,
            memory=self.memory,
            keep_memory=False,  # if it is to be kept, glibc has been asked
            think_tag=chat_format.think[0],
        )
        base.checkpoint, base.revision = self.base, self.revision
        return base

    def can_ground(self, grounding: float) -> float:
        return grounding

    @out_of_memory("thoughts were sampled", "lower memory, batch_size, max_new_tokens or max_pixels")
    @torch.inference_mode()
    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        texts = self._texts(chats)
        completions = [""] * len(chats)

        def options(rows: Sequence[int]) -> dict[str, Any]:
            return {
                "do_sample": False,
                "num_beams": 1,
                "repetition_penalty": 1.0,  # a released checkpoint may ask for one, which is not its own softmax
                "logits_processor": LogitsProcessorList([SeededSampling([seeds[row] for row in rows], temperature)]),
                "max_new_tokens": max_new_tokens,
                "suppress_tokens": self.vision_tokens(),
            }

        together = max(1, min(self.batch_size, self.memory // 2 // self.footprint.chat(0, 1, max_new_tokens)))
        for batch in self._batches(chats, texts, max_new_tokens):
            some = [chats[row] for row in batch], [texts[row] for row in batch]
            with self._adapters():
                sampler = self._sampler(*some) if self.shared_prefix else self._plain_sampler(*some)
                for start in range(0, len(batch), together):
                    places = range(start, min(start + together, len(batch)))
                    rows = [batch[place] for place in places]
                    new = sampler(places, options(rows))
                    for row, text in zip(rows, decoded(self.tokenizer, new), strict=True):
                        completions[row] = self.turns.opened(texts[row]) + text
        return completions

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> Tensor:
        return self._read(chats, prefixes, labels, likelihood=False)[0]

    def read(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._read(chats, prefixes, labels, likelihood=True)

    @out_of_memory("answers were read", "lower token_budget, memory or max_pixels")
    @torch.inference_mode()
    def _read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str], *, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the labels (B, labels), and of the prefixes (B,) if `likelihood`, else zeros."""
        turns = [self.turns.continued(*turn) for turn in zip(self._texts(chats), prefixes, strict=True)]
        texts, prefixes = [text for text, _ in turns], [prefix for _, prefix in turns]
        slots, ids = self.turns.at_slots(prefixes, labels)
        last, means = torch.empty(len(chats), len(labels)), torch.zeros(len(chats))
        read = self._read_groups if self.shared_prefix else self._read_copies
        for rows in self._batches(chats, texts):
            some = [chats[row] for row in rows], [texts[row] for row in rows], [slots[row] for row in rows]
            with self._adapters():
                last[rows], means[rows] = read(*some, ids[rows], likelihood)
        return last, means

    # ------------------------------------------------------------------------------------------- with a shared prefix
    def _sampler(self, chats: list[Chat], texts: list[str]) -> _Sampler:
        """Prefills the chats' prompts, for completions of any of them. What criteria have in common is read once."""
        prompts: list[Prompt] = []
        groups: list[list[int]] = []
        trunks: list[tuple[Prompt, list[Tensor]]] = []
        for some in self._kin(chats, texts):
            groups += [one.rows for one in some]
            common = fork(self.model, [one.ids for one in some], [1] * len(some))
            if common is None:
                alone = [self._prompt(one.ids, one.media, one.clips) for one in some]
                prompts += alone
                trunks += [(Prompt(p.ids[:-1], p.positions[:, :-1], p.images), [p.ids[-1:]]) for p in alone]
            else:
                trunk, ends = self._prompt(some[0].ids[:common], *some[0][1:3]), [one.ids[common:] for one in some]
                prompts += [followed(trunk, end) for end in ends]
                trunks.append((trunk, ends))
        if len(trunks) == len(prompts):
            kept = prefill(self.model, prompts, _images, token_budget=self.token_budget)
        else:
            beginnings, ends = zip(*trunks, strict=True)
            kept = prefill(self.model, beginnings, _images, ends=ends, token_budget=self.token_budget)
        width = max(len(prompt.ids) for prompt in prompts)
        owner = [0] * len(chats)
        for number, rows in enumerate(groups):
            for row in rows:
                owner[row] = number
        pad_id = self.tokenizer.pad_token_id

        def draw(places: Sequence[int], options: dict[str, Any]) -> Tensor:
            rows = [owner[place] for place in places]
            return sample(self.model, prompts, rows, kept, pad_token_id=pad_id, **options)[:, width:]

        return draw

    def _read_groups(
        self, chats: list[Chat], texts: list[str], slots: list[list[int]], ids: Tensor, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        prompts, groups, ends = self._forked(chats, texts)
        answers = [torch.tensor(slot, dtype=torch.long, device=self.model.device) for slot in slots]
        tokens = [
            answer if end is None else torch.cat([end, answer]) for end, answer in zip(ends, answers, strict=True)
        ]
        lengths = [(len(p.ids), [len(tokens[row]) for row in rows]) for p, rows in zip(prompts, groups, strict=True)]
        log_probs, means = torch.empty(ids.shape), torch.zeros(len(chats))
        core = base_model(self.model)
        for row in budgeted(lengths, self.token_budget):
            asked = [prompts[group] for group, _ in row]
            members = [[groups[group][member] for member in some] for group, some in row]
            written = [[tokens[m] for m in some] for some in members]
            packed = pack(asked, written, open_end=True, kernel=self.attention)
            flat = [m for some in members for m in some]
            own = packed.labels[0] != IGNORED
            if likelihood and any(ends[m] is not None for m in flat):
                lasts: list[int] = cast("Any", packed.ends).tolist()
                for m, last in zip(flat, lasts, strict=True):
                    own[last - len(tokens[m]) : last - len(answers[m])] = False  # the end of the chat is no answer
            wanted = own.index_fill(0, packed.ends, True).nonzero()[:, 0] if likelihood else packed.ends
            with read_only_at(core, packed, wanted):
                hidden = core.model(**packed.inputs, **_images(asked), use_cache=False).last_hidden_state[0]
            check_used(packed.inputs["shared_prefix"], core)
            log_probs[flat] = next_token_logprobs(core.lm_head, hidden[packed.ends], ids[flat]).cpu()
            if likelihood:
                chosen = token_logprobs(core.lm_head, hidden[own], packed.labels[0, own]).clamp(min=LEAST_LOGPROB)
                parts = torch.split(chosen, [len(answers[m]) for m in flat])
                means[flat] = torch.stack([part.mean() for part in parts]).cpu()
        return log_probs, means

    def _prompts(self, chats: Sequence[Chat], texts: Sequence[str]) -> tuple[list[Prompt], list[list[int]]]:
        """The distinct prompts of `chats`, and which rows ask each."""
        written = self._written(chats, texts)
        return [self._prompt(one.ids, one.media, one.clips) for one in written], [one.rows for one in written]

    def _forked(
        self, chats: Sequence[Chat], texts: Sequence[str]
    ) -> tuple[list[Prompt], list[list[int]], list[Tensor | None]]:
        """`_prompts`, those of one pair in one order as one: their common beginning, such as all criteria have.

        Also gives what follows the beginning in each row, (B); None where the row's prompt stands alone.
        """
        prompts: list[Prompt] = []
        groups: list[list[int]] = []
        ends: list[Tensor | None] = [None] * len(chats)
        for some in self._kin(chats, texts):
            common = fork(self.model, [one.ids for one in some], [len(one.rows) for one in some])
            if common is None:
                prompts += [self._prompt(one.ids, one.media, one.clips) for one in some]
                groups += [one.rows for one in some]
                continue
            prompts.append(self._prompt(some[0].ids[:common], some[0].media, some[0].clips))
            groups.append([row for one in some for row in one.rows])
            for one in some:
                for row in one.rows:
                    ends[row] = one.ids[common:]
        return prompts, groups, ends

    def _kin(self, chats: Sequence[Chat], texts: Sequence[str]) -> list[list[_Written]]:
        """The distinct chats, those of one prompt and its images together."""
        kin: dict[Any, list[_Written]] = {}
        for one in self._written(chats, texts):
            times = (clip.times for clip in one.clips)
            kin.setdefault((chats[one.rows[0]].prompt, *map(id, one.media), *times), []).append(one)
        return list(kin.values())

    def _written(self, chats: Sequence[Chat], texts: Sequence[str]) -> list[_Written]:
        """The distinct chats as tokens."""
        encoded = iter(self.features([visual for chat in chats for visual in chat.visuals]))
        found = [[next(encoded) for _ in chat.visuals] for chat in chats]
        groups: dict[Any, list[int]] = {}
        for row, (chat, text, some) in enumerate(zip(chats, texts, found, strict=True)):
            groups.setdefault((text, *map(id, some), *(clip.times for clip in chat.videos)), []).append(row)
        firsts = [rows[0] for rows in groups.values()]
        self.turns.warn_of_unknown_words(chats[row].prompt for row in firsts)
        return [
            _Written(self._ids(texts[row], found[row], chats[row].videos), found[row], chats[row].videos, rows)
            for row, rows in zip(firsts, groups.values(), strict=True)
        ]

    def _ids(self, text: str, media: list[Encoded], clips: Sequence[Clip]) -> Tensor:
        """The tokens of the chat `text` with its placeholders written out; `media` are its images and then `clips`."""
        processor = self.processor
        images, videos = _by_kind(media)
        text = _filled(text, processor.image_token, [processor.image_token * len(image.features) for image in images])
        inputs = {"video_grid_thw": _grids(videos), "video_metadata": [metadata(clip) for clip in clips]}
        text = _filled(text, *video_texts(processor, inputs, text))
        return torch.tensor(self.tokenizer(text)["input_ids"], device=self.model.device)

    def _prompt(self, ids: Tensor, media: list[Encoded], clips: Sequence[Clip]) -> Prompt:
        grids = [None if (each := _grids(some)) is None else each.to(ids.device) for some in _by_kind(media)]
        spacing = seconds_per_patch(clips, self.processor).to(ids.device) if clips else None
        return Prompt(ids, prompt_positions(self.model, ids, grids[0], grids[1], spacing), media)

    def _texts(self, chats: Sequence[Chat]) -> list[str]:
        if not self.family.clips and any(chat.videos for chat in chats):
            raise InputError(
                f"a {self.family.name!r} checkpoint is not shown clips as videos here; show their frames as images, "
                "with clips='storyboard', 'frames' or 'clip'"
            )
        return self.turns.texts(chats)

    def _batches(self, chats: Sequence[Chat], texts: Sequence[str], new: int = 0) -> Iterator[list[int]]:
        """The chats' places in batches of at most `batch_size`, those of one prompt and its images next to one another.

        With a shared prefix they are never parted, since what they share would be paid for again. What a batch
        keeps while completions of at most `new` tokens are sampled fits half of the memory, if one chat does.
        """
        groups: dict[Any, list[int]] = {}
        for row, chat in enumerate(chats):
            groups.setdefault((chat.prompt, *(visual.digest for visual in chat.visuals)), []).append(row)
        whole = groups.values() if self.shared_prefix else ([row] for rows in groups.values() for row in rows)
        batch: list[int] = []
        used = 0
        for rows in whole:
            drawn = min(len(rows), self.batch_size) if new else 0
            size = self._kept_for(chats[rows[0]], {texts[row] for row in rows}, drawn, new)
            if batch and (len(batch) + len(rows) > self.batch_size or used + size > self.memory // 2):
                yield batch
                batch, used = [], 0
            batch, used = batch + rows, used + size
        if batch:
            yield batch

    def _kept_for(self, chat: Chat, texts: Collection[str], rows: int, new: int) -> int:
        """About how many bytes a batch keeps for `chat`, written as `texts`, and for its completions.

        A character counts as one token.
        """
        visuals = sum(tokens_of(self.processor, visual) for visual in chat.visuals)
        prompt = sum(map(len, texts)) + len(texts) * visuals
        kept = self.footprint.chat(prompt, rows, new)
        if self.shared_prefix:
            return kept
        return kept + prompt * (self.footprint.computed + patch_bytes(self.processor))

    # ------------------------------------------------------------------------------------------------ plain batches
    def _plain_sampler(self, chats: list[Chat], texts: list[str]) -> _Sampler:
        def draw(places: Sequence[int], options: dict[str, Any]) -> Tensor:
            some = [chats[place] for place in places]
            self.turns.warn_of_unknown_words(chat.prompt for chat in some)
            return self._plain.sample(some, [texts[place] for place in places], options)

        return draw

    def _read_copies(
        self, chats: list[Chat], texts: list[str], slots: list[list[int]], ids: Tensor, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        self.turns.warn_of_unknown_words(chat.prompt for chat in chats)
        return self._plain.read(chats, texts, slots, ids, likelihood=likelihood)

    def vision_tokens(self) -> list[int]:
        """Tokens that must not be sampled: without an image behind them they crash the next forward pass."""
        return self._plain.placeholders() if self.family.processor is None else self.turns.vision_tokens()

    def _adapters(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.disable_adapter() if self.adapters_off else contextlib.nullcontext()


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling at a temperature, with a random stream of its own for every row.

    The largest of logits / temperature + Gumbel noise is a draw from the softmax (the Gumbel-max trick). With a
    generator per row, what a row draws does not depend on its neighbours in the batch. Temperature 0 leaves the logits
    as they are.
    """

    def __init__(self, seeds: Sequence[int], temperature: float):
        self.seeds = seeds
        self.temperature = temperature
        self.generators: list[torch.Generator] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isnan(scores).any():
            raise JudgeError(BROKEN.format("the reasoner", "NaN logits while it thought"))
        if self.temperature == 0:
            return scores
        if self.generators is None:
            self.generators = [torch.Generator(scores.device).manual_seed(seed % 2**63) for seed in self.seeds]
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=stream, device=scores.device) for stream in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + gumbel


def _filled(text: str, placeholder: str, written: Sequence[str]) -> str:
    """`text` with its placeholders replaced in order.

    Raises:
        ValueError: it has more or fewer, so that images would stand in one another's place.
    """
    first, *rest = text.split(placeholder)
    return first + "".join(new + part for new, part in zip(written, rest, strict=True))


def _by_kind(media: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Images, and clips."""
    return [each for each in media if not each.moving], [each for each in media if each.moving]


def _grids(media: Sequence[Encoded]) -> Tensor | None:
    return torch.stack([each.grid for each in media]) if media else None


def default_device() -> torch.device:
    """This process's GPU, or the CPU where there is none.

    The current GPU is a setting of each thread and 0 in a new one, so that in a worker thread every process of a
    machine would take the first. Where it is 0, LOCAL_RANK tells the processes of a launcher apart, unless each of them
    is shown a single GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK", "")
    index = torch.cuda.current_device() or (int(rank) if rank.isdecimal() else 0)
    return torch.device("cuda", index if index < torch.cuda.device_count() else 0)


def _images(prompts: Sequence[Prompt]) -> dict[str, Any]:
    return as_encoder_output(image for prompt in prompts for image in prompt.images)
