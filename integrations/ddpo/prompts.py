"""The prompts of a run: each a text with what the pipeline's call gets beside it, such as an editor's source image.

An image is decoded when its prompt is drawn, and let go when the epoch is over.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from listener_reward.errors import InputError
from listener_reward.pairs import Prompt, PromptLike, check_prompts, prompt_with, read_sources

from .rollout import RESERVED

IMAGE = "image"
"""The argument of an editing pipeline's call that holds what is edited, and the ending of the names of its like."""

ONE_FOR_EACH = (
    "StableDiffusionInstructPix2PixPipeline",
    "FluxKontextPipeline",
    "LTXImageToVideoPipeline",
    "CogVideoXImageToVideoPipeline",
)
"""Pipelines that take a list of images as one for each prompt. To others a list is several images of every prompt, or
nothing that they take."""

ALONE = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
"""Pipelines that do right by an image only in a call with one prompt: their text encoder is to see it."""

ONE_PROMPT = "take a batch_size that divides images_per_prompt, so that a call has one prompt"


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt of the run."""

    prompt: PromptLike
    """What the reward is asked: the text, with its criterion if it has one. The sources are in `metadata`."""
    arguments: dict[str, Any]
    """What the pipeline's call gets for it, by the argument's name; images undecoded unless this is `opened`."""
    metadata: dict[str, Any]
    """What reaches the reward beside the prompt."""
    place: str
    """For messages, such as "prompts[3]"."""

    @property
    def text(self) -> str:
        return self.prompt.text if isinstance(self.prompt, Prompt) else self.prompt

    def opened(self) -> TrainingPrompt:
        """With decoded images, lists of PIL images: those of `arguments`, and in `metadata["sources"]` what the prompt
        has there, or else all of `arguments`.

        Raises:
            InputError: an image cannot be read.
        """
        images = {name: self._decoded(name, value) for name, value in self.arguments.items() if is_image(name)}
        sources = [image for several in images.values() for image in several]
        if "sources" in self.metadata:
            sources = self._decoded("sources", self.metadata["sources"])
        told = {"sources": sources} if sources else {}
        return replace(self, arguments=self.arguments | images, metadata=self.metadata | told)

    def _decoded(self, name: str, images: Any) -> list[Image.Image]:
        return [picture.image for picture in read_sources(images, field=f"{self.place}.{name}")]


def is_image(name: str) -> bool:
    """Whether an argument of this name holds images: `image`, `last_image`, `mask_image`."""
    return name == IMAGE or name.endswith(f"_{IMAGE}")


def read_prompts(prompts: Sequence[PromptLike | Mapping[str, Any]], pipeline: Any) -> list[TrainingPrompt]:
    """The prompts as `DDPOTrainer` is given them.

    Raises:
        InputError: no list of prompts, an entry that cannot be given to the pipeline, or a file that is not there.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"prompts is {prompts!r:.80}; give a list of strings, or of mappings with a 'prompt'")
    taken = call_arguments(pipeline)
    read = [_read(entry, f"prompts[{k}]", taken, type(pipeline).__name__) for k, entry in enumerate(prompts)]
    check_prompts([each.text for each in read], len(read))
    return read


def call_arguments(pipeline: Any) -> set[str]:
    """The names of what the pipeline's call takes."""
    return set(inspect.signature(type(pipeline).__call__).parameters) - {"self", "args", "kwargs"}


def _read(entry: Any, place: str, taken: set[str], kind: str) -> TrainingPrompt:
    others = dict(entry) if isinstance(entry, Mapping) else {"prompt": entry}
    asked = others.pop("prompt", None)
    if not isinstance(asked, str | Prompt):
        raise InputError(f"{place} is {entry!r:.80}; it has to be a string, or a mapping with a 'prompt'")
    if not _is_there(others, "sources"):
        others.pop("sources", None)
    if isinstance(asked, Prompt) and asked.sources:
        if clash := [name for name in (IMAGE, "sources") if _is_there(others, name)]:
            raise InputError(f"{place} has {clash[0]}, and its prompt has sources of its own; leave one of them out")
        others[IMAGE if IMAGE in taken else "sources"] = asked.sources
        asked = prompt_with(asked.text, (), asked.criterion)
    if reserved := [name for name in others if name in RESERVED and name in taken]:
        raise InputError(f"{place} has {', '.join(reserved)}, which the trainer sets; leave it out")
    if _is_there(others, IMAGE) and IMAGE not in taken:
        raise InputError(
            f"{place} has an image, and the call of a {kind} takes none; load an editing pipeline, or give the image "
            "as 'sources', which only the reward sees"
        )
    arguments = {name: others[name] for name in others if name in taken and _is_there(others, name)}
    for name in [*filter(is_image, arguments), *({"sources"} & others.keys())]:
        _check_files(others[name], f"{place}.{name}")
    return TrainingPrompt(asked, arguments, others, place)


def _is_there(entry: Mapping[str, Any], name: str) -> bool:
    """Whether an entry is more than the hole of a table: None, or no image in a list."""
    value = entry.get(name)
    return not (value is None or (isinstance(value, list | tuple) and not value))


def _check_files(images: Any, field: str) -> None:
    for image in images if isinstance(images, list | tuple) else [images]:
        if isinstance(image, str | os.PathLike) and not os.path.isfile(image):
            raise InputError(f"{field} is {os.fspath(image)!r}, and there is no such file")


def joint_arguments(prompts: Sequence[TrainingPrompt], pipeline: Any) -> dict[str, Any]:
    """The arguments of one call of the pipeline for opened prompts.

    Raises:
        InputError: the prompts differ in what a call has once only; the message says which `batch_size` helps.
    """
    names = dict.fromkeys(name for prompt in prompts for name in prompt.arguments)
    return {name: _joint(name, prompts, {cls.__name__ for cls in type(pipeline).__mro__}) for name in names}


def _joint(name: str, prompts: Sequence[TrainingPrompt], kinds: set[str]) -> Any:
    first = prompts[0]
    for prompt in prompts:
        if (name in prompt.arguments) != (name in first.arguments):
            has, lacks = (prompt, first) if name in prompt.arguments else (first, prompt)
            raise InputError(
                f"{has.place} has {name} and {lacks.place}, in the same call, has none; give it to all, or {ONE_PROMPT}"
            )
    values = [prompt.arguments[name] for prompt in prompts]
    if is_image(name):
        return _joint_images(name, prompts, kinds)
    if "prompt" in name and all(isinstance(value, str) for value in values):
        return values
    for prompt, value in zip(prompts, values, strict=True):
        if value is not values[0] and not (isinstance(value, str | int | float | tuple | list) and value == values[0]):
            raise InputError(
                f"{first.place} and {prompt.place}, in the same call, have different {name}, and a call has one; "
                f"{ONE_PROMPT}"
            )
    return values[0]


def _joint_images(name: str, prompts: Sequence[TrainingPrompt], kinds: set[str]) -> Image.Image | list[Image.Image]:
    images: list[list[Image.Image]] = [prompt.arguments[name] for prompt in prompts]
    if len(prompts) > 1 and not kinds.isdisjoint(ALONE):
        raise InputError(
            f"batch_size is {len(prompts)}, and a {kinds.intersection(ALONE).pop()} edits one image in a call; take "
            "batch_size=1"
        )
    several = max(map(len, images)) > 1
    if kinds.isdisjoint(ONE_FOR_EACH) or len(prompts) == 1:
        other = next((prompt for prompt in prompts if prompt is not prompts[0]), None)
        if other is not None:
            raise InputError(
                f"{prompts[0].place} and {other.place} are in the same call, and this pipeline takes the {name} of one "
                f"prompt in a call; {ONE_PROMPT}"
            )
        return images[0] if several else images[0][0]
    if several:
        raise InputError(
            f"a prompt has several images as its {name}, and the pipeline takes one for each prompt of a call; take "
            "batch_size=1"
        )
    for prompt, (image,) in zip(prompts, images, strict=True):
        if image.size != images[0][0].size:
            (width, height), (other_width, other_height) = images[0][0].size, image.size
            raise InputError(
                f"the {name} of {prompts[0].place} has {width} x {height} pixels and that of {prompt.place}, in the "
                f"same call, {other_width} x {other_height}; {ONE_PROMPT}, or resize the images"
            )
    return [image for (image,) in images]
