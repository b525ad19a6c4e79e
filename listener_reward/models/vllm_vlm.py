"""The backend of `VLM` that runs weights by vLLM in this process: many requests at once, prompts computed once.

The engine is given tokens and pictures, never text, so that it reads what transformers would. Pictures are resized by
the checkpoint's own processor, see `resizing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, cast

from listener_reward.errors import missing

if fault := missing("vllm", "a model in vLLM"):
    raise fault

import torch
from torch import Tensor

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError, JudgeError
from listener_reward.models.adapters import base_of, lora_rank, options_of_base, weights_of
from listener_reward.models.hub import hub_options, loading
from listener_reward.models.placement import limit_pixels
from listener_reward.models.processing import decoded, load_processor
from listener_reward.models.resizing import resized, resizes
from listener_reward.models.turns import Turns
from listener_reward.models.vlm import LEAST_LOGPROB

vllm: Any = import_module("vllm")  # not in the environment of whoever checks types

_AS_SENT = {"do_resize": False}
"""What the engine's processor is told of pictures: they have their size."""


class VllmVLM:
    """A checkpoint in a vLLM engine of this process."""

    backend = "vllm"
    limits: tuple[str, ...] = ()

    def __init__(self, engine: Any, processor: Any, *, think_tag: str | None, adapter: Any = None):
        """
        Args:
            engine: a `vllm.LLM`. Several models may share it; one call runs at a time.
            processor: the checkpoint's, as `load_processor` gives it.
            think_tag: the tag that opens a thought; None where thoughts have no tag.
            adapter: the `LoRARequest` of an adapter that is on; None for the weights as they are.
        """
        self.engine = engine
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.turns = Turns(processor, think_tag=think_tag)
        self.reserved = self.turns.reserved
        self.adapter = adapter
        self.checkpoint: str | None = None
        """Where the weights were loaded from; None for an engine that was given."""
        self.base: str | None = None
        """The checkpoint under the adapter, where `checkpoint` is one."""
        self.revision: str | None = None
        """The weights' revision on the Hub; None for the newest."""
        self._lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        chat_format: ChatFormat,
        *,
        dtype: str | torch.dtype | None = None,
        engine: Mapping[str, Any] | None = None,
        revision: str | None = None,
        max_pixels: int | None = None,
    ) -> VllmVLM:
        """Loads a checkpoint, or an adapter beside its base.

        Args:
            name: a folder or a Hub name.
            chat_format: how the model is asked.
            dtype: of the weights; None is bfloat16 on a GPU and float32 on a CPU.
            engine: further arguments of `vllm.LLM`: `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`,
                `enable_sleep_mode`, `limit_mm_per_prompt`, ...
            revision, max_pixels: as of `ModelOptions`.

        Raises:
            InputError: the checkpoint cannot be found, reached or read, or vLLM refuses an argument.
        """
        given = hub_options(name, revision)
        base = base_of(name, **given)
        processor = load_processor(name, **given)
        limit_pixels(processor, max_pixels)
        on_cpu = not torch.cuda.is_available()
        if dtype is None:
            dtype = "float32" if on_cpu else "bfloat16"
        options: dict[str, Any] = {
            "model": str(base or name),
            "dtype": str(dtype).removeprefix("torch."),
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"image": 2, "video": 0},
            "trust_remote_code": False,
        }
        if on_cpu:  # where a part of a seeded request's prompt ends vLLM 0.32: "CPU Generator does not use offset"
            options["enable_chunked_prefill"] = False
        whole = given if base is None else options_of_base(base, given, name)
        if (of_whole := whole.get("revision")) is not None:
            options["revision"] = of_whole
        adapter = None
        if base is not None:
            request = import_module("vllm.lora.request").LoRARequest
            adapter = request("judge", 1, str(weights_of(name, **given)))
            options |= {"enable_lora": True, "max_lora_rank": lora_rank(name, **given)}
        with loading(base or name):
            llm: Any = vllm.LLM(**options | dict(engine or {}))
        vlm = cls(llm, processor, think_tag=chat_format.think[0], adapter=adapter)
        vlm.checkpoint, vlm.base, vlm.revision = str(name), base, of_whole
        return vlm

    def without_adapters(self, chat_format: ChatFormat) -> VllmVLM:
        base = VllmVLM(self.engine, self.processor, think_tag=chat_format.think[0])
        base.checkpoint, base.revision = self.base, self.revision
        base._lock = self._lock
        return base

    def can_ground(self, grounding: float) -> float:
        return grounding

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        if not chats:
            return []
        texts = self._texts(chats)
        unseen = {token: -100.0 for token in self.turns.vision_tokens()}
        asked = [
            vllm.SamplingParams(
                temperature=temperature,
                seed=seed % 2**63,
                max_tokens=max_new_tokens,
                logit_bias=unseen,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._run(self._prompts(chats, map(self._ids, texts)), asked)
        said = decoded(self.tokenizer, [list(output.outputs[0].token_ids) for output in outputs])
        return [self.turns.opened(text) + completion for text, completion in zip(texts, said, strict=True)]

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> Tensor:
        return self._read(chats, prefixes, labels, likelihood=False)[0]

    def read(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._read(chats, prefixes, labels, likelihood=True)

    def sleep(self, level: int = 1) -> None:
        """Frees the memory of the keys and values, and moves the weights to the CPU; level 2 drops them.

        For a host that needs the GPU for something else in between: the engine has to be loaded with
        `enable_sleep_mode`, and answers again after `wake`.

        Raises:
            InputError: the engine was not loaded so, or cannot on this device.
        """
        with self._lock:
            try:
                self.engine.sleep(level=level)
            except (ValueError, NotImplementedError, AssertionError) as error:
                raise InputError(
                    f"vLLM cannot sleep here ({error}); give engine={{'enable_sleep_mode': True}}"
                ) from error

    def wake(self) -> None:
        """Brings back what `sleep` moved away."""
        with self._lock:
            self.engine.wake_up()

    def _read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str], *, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        turns = [self.turns.continued(*turn) for turn in zip(self._texts(chats), prefixes, strict=True)]
        slots, ids = self.turns.at_slots([prefix for _, prefix in turns], labels)
        wanted: list[list[int]] = cast("Any", ids).tolist()
        begun = ([*self._ids(text), *slot] for (text, _), slot in zip(turns, slots, strict=True))
        prompts = self._prompts(chats, begun)
        asked = [
            vllm.SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=tokens,
                prompt_logprobs=0 if likelihood else None,
                detokenize=False,
            )
            for tokens in wanted
        ]
        log_probs, means = torch.empty(ids.shape), torch.zeros(len(chats))
        for row, (output, slot) in enumerate(zip(self._run(prompts, asked), slots, strict=True)):
            listed = output.outputs[0].logprobs[0]
            log_probs[row] = torch.tensor([listed[token].logprob for token in wanted[row]])
            if likelihood:
                written = output.prompt_logprobs[-len(slot) :]
                values = [entry[token].logprob for entry, token in zip(written, slot, strict=True)]
                means[row] = torch.tensor(values, dtype=torch.float64).clamp(min=LEAST_LOGPROB).mean()
        return log_probs, means

    def _texts(self, chats: Sequence[Chat]) -> list[str]:
        if any(chat.videos for chat in chats):
            raise InputError(
                "clips='video' needs backend='transformers'; in vLLM choose 'storyboard', 'frames' or 'clip'"
            )
        self.turns.warn_of_unknown_words(chat.prompt for chat in chats)
        return self.turns.texts(chats)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _prompts(self, chats: Sequence[Chat], ids: Iterable[list[int]]) -> list[dict[str, Any]]:
        """Each request's tokens, one placeholder for each picture, and the pictures, which the engine knows by digest.

        A picture that several chats show is resized once.
        """
        processor = self.processor.image_processor
        sizes_stay = {"mm_processor_kwargs": _AS_SENT} if resizes(processor) else {}
        pictures = {picture.digest: picture.image for chat in chats for picture in chat.images}
        sent = {digest: resized(image, processor) for digest, image in pictures.items()}
        return [
            {
                "prompt_token_ids": tokens,
                "multi_modal_data": {"image": [sent[picture.digest] for picture in chat.images]},
                "multi_modal_uuids": {"image": [picture.digest.hex() for picture in chat.images]},
            }
            | sizes_stay
            for chat, tokens in zip(chats, ids, strict=True)
        ]

    def _run(self, prompts: list[dict[str, Any]], asked: list[Any]) -> list[Any]:
        if not prompts:
            return []
        dead: Any = import_module("vllm.v1.engine.exceptions").EngineDeadError
        with self._lock:
            try:
                return self.engine.generate(prompts, asked, use_tqdm=False, lora_request=self.adapter)
            except dead as error:
                raise JudgeError(f"the vLLM engine has died ({error}); its own log says why") from error
            except _refusals() as error:  # a prompt that is too long, or more pictures than the engine takes
                raise InputError(f"vLLM refuses a question: {error}") from error


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises of a question that it cannot take: a ValueError, or in later releases an error of its own."""
    if find_spec("vllm.exceptions") is None:
        return (ValueError,)
    return ValueError, getattr(import_module("vllm.exceptions"), "VLLMClientError", ValueError)
