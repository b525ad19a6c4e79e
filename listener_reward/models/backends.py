"""Who runs a checkpoint's weights: transformers or vLLM in this process, or a server at an address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

from listener_reward.chat import ChatFormat
from listener_reward.models.options import TRANSFORMERS, VLLM
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.models.vlm import LoadedVLM


def load_vlm(
    name: str | Path,
    chat_format: ChatFormat,
    *,
    backend: str | None = None,
    accept_less: bool = False,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadedVLM:
    """The checkpoint `name` in a backend, one of `BACKENDS` or an address.

    Args:
        name: the checkpoint's folder or Hub name. Behind an address only its tokenizer, template and sizes are read.
        chat_format: how the model is asked.
        backend, accept_less, engine: see `ModelOptions`.
        options: those of `TransformersVLM.from_pretrained`. Of them vLLM takes `dtype`, `revision` and `max_pixels`; a
            server has its own dtype.

    Raises:
        InputError: a checkpoint that cannot be had.
        MissingExtraError: the backend's packages are not installed.
        JudgeError: the server does not answer.
    """
    if backend is None or backend == TRANSFORMERS:
        return TransformersVLM.from_pretrained(name, think_tag=chat_format.think[0], **options)
    given = {option: options[option] for option in ("revision", "max_pixels") if options.get(option) is not None}
    if backend == VLLM:
        from listener_reward.models.vllm_vlm import VllmVLM

        return VllmVLM.from_pretrained(name, chat_format, dtype=options.get("dtype"), engine=engine, **given)
    from listener_reward.models.endpoint_vlm import EndpointVLM

    return EndpointVLM.from_pretrained(name, backend, chat_format, accept_less=accept_less, **given)
