"""The prompts of a request with the source images that they speak of: counted before, and decoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from listener_reward.errors import InputError
from listener_reward.media.images import Picture, to_picture
from listener_reward.pairs import PromptLike, prompt_with

from .uploads import Upload, upload


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A prompt as it arrived."""

    text: Any
    """What the client sent as the prompt. Whoever makes a prompt of it checks it."""
    sources: tuple[Upload, ...] = ()
    criterion: Any = None

    @property
    def key(self) -> str:
        """Equal for those whose texts, criteria and `Upload`s are the same."""
        return repr((self.text, [id(source) for source in self.sources], self.criterion))

    def prompt(self, decoded: dict[int, Picture]) -> PromptLike:
        """The prompt, its sources decoded, a video as its storyboard. `decoded` has those that others decoded before.

        Raises:
            InputError: a source cannot be read, or what arrived is no text.
        """
        for source in self.sources:
            if id(source) not in decoded:
                decoded[id(source)] = to_picture(source.picture(), field=source.field)
        return prompt_with(self.text, [decoded[id(source)] for source in self.sources], self.criterion)


def prompts_of(asked: Iterable[Asked]) -> list[PromptLike]:
    """Their prompts; equal sources are decoded once."""
    decoded: dict[int, Picture] = {}
    return [one.prompt(decoded) for one in asked]


def sources_of(asked: Iterable[Asked | None]) -> list[Upload]:
    """Each of their sources once."""
    return [*{id(source): source for one in asked if one is not None for source in one.sources}.values()]


class Uploads:
    """The pictures of one request, each `Upload` once however often it was sent."""

    def __init__(self) -> None:
        self._known: dict[Any, Upload] = {}

    def get(self, item: Any, field: str) -> Upload:
        """As `upload`, and for what came before the `Upload` of the first time."""
        sent = tuple(item) if isinstance(item, list) else item
        if not all(isinstance(text, str) for text in (sent if isinstance(sent, tuple) else (sent,))):
            return upload(item, field)  # which says what is wrong
        if sent not in self._known:
            self._known[sent] = upload(item, field)
        return self._known[sent]


def read_asked(body: Mapping[str, Any], prompts: Sequence[Any]) -> list[Asked]:
    """The prompts of `POST /compute`, with the sources and criteria that its body has for them.

    `condition_images` is a list with a list for each prompt: pictures in base64, or numbers of `pictures`, which are
    sent once and meant often. `condition_videos` has a list of videos for each, which are lists of frames; they follow
    the images. `criterion` has a text or null for each.

    Raises:
        InputError: something else is there.
    """
    uploads = Uploads()
    pictures = [uploads.get(item, f"pictures[{k}]") for k, item in enumerate(_list(body, "pictures"))]
    sources: list[list[Upload]] = [[] for _ in prompts]
    for name in ("condition_images", "condition_videos"):
        for i, items in enumerate(_each(body, name, len(prompts))):
            if not isinstance(items, list | None):
                raise InputError(f"{name}[{i}] is a {type(items).__name__}; send a list for each prompt")
            for k, item in enumerate(items or []):
                sources[i].append(_source(item, f"{name}[{i}][{k}]", pictures, uploads))
    criteria = _each(body, "criterion", len(prompts)) or [None] * len(prompts)
    return [Asked(*one) for one in zip(prompts, map(tuple, sources), criteria, strict=True)]


def _source(item: Any, field: str, pictures: Sequence[Upload], uploads: Uploads) -> Upload:
    if not isinstance(item, int) or isinstance(item, bool):
        return uploads.get(item, field)
    if not 0 <= item < len(pictures):
        raise InputError(f"{field} is {item}, and pictures has {len(pictures)}; their numbers begin with 0")
    return pictures[item]


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    given = body.get(name)
    if not isinstance(given, list | None):
        raise InputError(f"{name} is a {type(given).__name__}; send a list, or leave it out")
    return given or []


def _each(body: Mapping[str, Any], name: str, n: int) -> list[Any]:
    """The list of `n` that `body` has by this name; empty where it has none."""
    given = _list(body, name)
    if given and len(given) != n:
        raise InputError(f"{name} has {len(given)} entries for {n} prompts; send one for each, or leave it out")
    return given


def echo(asked: Sequence[Asked]) -> dict[str, Any]:
    """What an answer says of what was read beside texts, for clients to compare: how many sources, and the criteria."""
    said: dict[str, Any] = {}
    if any(one.sources for one in asked):
        said["sources"] = [len(one.sources) for one in asked]
    if any(one.criterion is not None for one in asked):
        said["criterion"] = [one.criterion for one in asked]
    return said
