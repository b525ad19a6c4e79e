"""Pictures and videos as they arrive: base64 in JSON, counted before they are decoded. Paths and URLs are not read."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from PIL import Image

from listener_reward.errors import InputError, MissingExtraError
from listener_reward.media.clips import Visual
from listener_reward.media.images import claimed_pixels
from listener_reward.media.storyboards import as_picture, to_visual
from listener_reward.media.videos import claimed_video_pixels, is_video

E = TypeVar("E", bound=Exception)
T = TypeVar("T")


def decode(text: Any, field: str) -> bytes:
    """The bytes that `text` holds in base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(f"{field} is not base64; encode the bytes of an image file") from error


@dataclass(frozen=True)
class Upload:
    """A picture, a video's file, or a video as a list of frames, none of them decoded."""

    files: bytes | list[bytes]
    field: str
    """What the client calls it."""

    @property
    def count(self) -> int:
        return len(self.files) if isinstance(self.files, list) else 1

    @cached_property
    def pixels(self) -> int:
        """As the files claim; 0 for what cannot be read."""
        files = self.files if isinstance(self.files, list) else [self.files]
        return sum(claimed_video_pixels(file) if is_video(file) else claimed_pixels(file) for file in files)

    def picture(self) -> Image.Image:
        """Decoded; a video as its storyboard.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return as_picture(self.files, field=self.field)
        except MissingExtraError as error:  # the server's lack, which the client can do without
            raise InputError(f"{self.field} is a video file; send its frames, or on the server: {error}") from error

    def visual(self) -> Visual:
        """Decoded; a video as a clip, which the judge looks at in its own way."""
        try:
            return to_visual(self.files, field=self.field)
        except MissingExtraError as error:
            raise InputError(f"{self.field} is a video file; send images, or on the server: {error}") from error

    def kept(self) -> bytes | Image.Image:
        """What may wait for long: a picture's file, which is a tenth of its pixels; a video as its storyboard."""
        return self.picture() if isinstance(self.files, list) or is_video(self.files) else self.files


def upload(item: Any, field: str) -> Upload:
    """What a client sent as a picture, or as a list of frames.

    Raises:
        InputError: it is not base64.
    """
    if isinstance(item, list):
        return Upload([decode(frame, f"{field}[{k}]") for k, frame in enumerate(item)], field)
    return Upload(decode(item, field), field)


def bare(error: E) -> E:
    """`error` without its traceback and cause, which hold the pictures that it was about for as long as it lives."""
    return type(error)(*error.args)


def tried(make: Callable[[], T]) -> T | InputError:
    """What `make` gives, or the `InputError` that it raises, bare."""
    try:
        return make()
    except InputError as error:
        return bare(error)


def readable(uploads: Sequence[Upload | InputError]) -> list[Upload]:
    """Those that are there."""
    return [one for one in uploads if isinstance(one, Upload)]


def largest(uploads: Sequence[Upload | InputError]) -> list[Upload]:
    """The one of most pixels, for those who decode one after the other; none where none is there."""
    return sorted(readable(uploads), key=lambda one: one.pixels)[-1:]
