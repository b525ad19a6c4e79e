"""The one conversion of images: whatever holds a picture becomes a plain RGB image of sane size, or an `InputError`.

`to_picture` is called once, at the border of a judge, a reward, an evaluation or a server. What comes out, a `Picture`,
is decoded and knows its own digest, so that nothing behind the border decodes, copies or hashes it again.

What counts as the same picture is fixed here for the whole package: transparency shows white, an animation is its
first frame, EXIF orientation is applied, colours are sRGB's whatever profile the file has, floats are in [0, 1] and
never rescaled by guesswork.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from listener_reward.errors import InputError
from listener_reward.media.containers import head_of, unread_image

if TYPE_CHECKING:
    import torch

ImageLike: TypeAlias = (
    "Picture | Image.Image | str | os.PathLike[str] | bytes | np.ndarray | torch.Tensor | Mapping[str, Any]"
)
"""A PIL image, a path, the bytes of an image file, an array or tensor, `{"bytes": ..., "path": ...}` (what the
`datasets` library gives for an image it has not decoded), or a `Picture` made of one of these."""

MAX_SIDE = 2048
"""Longest side of what comes out; larger pictures are reduced. No vision tower here resolves more."""

MAX_PIXELS = 2**26
"""A file that claims more than 8192 x 8192 pixels is refused before it is decoded, as a decompression bomb."""

MAX_ASPECT = 50
"""Thinner pictures are padded to this with white: vision processors refuse extreme ratios."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are only data. PIL also knows some that start an interpreter (EPS runs Ghostscript)."""

_SLACK = 0.01
"""How far floats may leave [0, 1]: one bfloat16 step above 1 is 0.0078."""

_OVERSHOOT = 0.25
"""How far a decoder's floats overshoot at most: less is clamped, more is another range."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image and its digest. Two of equal pixels are equal, whatever objects hold them."""

    image: Image.Image = field(compare=False, repr=False)
    """RGB, as `to_pil` makes it. It is shared: change a copy of it."""
    digest: bytes
    """SHA-256 of size and pixels, 32 bytes: seeds, caches and groups know the picture by it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded pixels, as Pillow holds them."""
        return 4 * self.image.width * self.image.height


def to_picture(image: ImageLike, *, field: str = "image") -> Picture:
    """`image` decoded by `to_pil` and named by its content; a `Picture` is handed back as it is."""
    if isinstance(image, Picture):
        return image
    pixels = _decoded(image, field)
    content = hashlib.sha256(repr(pixels.size).encode())
    for top in range(0, pixels.height, _HASHED_ROWS):  # a copy of a few rows at a time, not of the whole
        content.update(pixels.crop((0, top, pixels.width, min(top + _HASHED_ROWS, pixels.height))).tobytes())
    return Picture(pixels, content.digest())


_HASHED_ROWS = 64


def identity(image: ImageLike) -> str:
    """What an image is told from others by: as the `datasets` library gives it, undecoded, its path, or SHA-256 of its
    bytes where it has those; anything else its digest as a `Picture`. Hexadecimal, but for the path. Nothing of a file
    is read.

    Raises:
        InputError: as `to_picture`, which only what is not undecoded needs.
    """
    if isinstance(image, Mapping):
        content = _content(image)
        if isinstance(content, bytes | bytearray | memoryview):
            return hashlib.sha256(cast("bytes", content)).hexdigest()
        return str(content)
    return to_picture(image).digest.hex()


def to_pil(image: ImageLike, *, field: str = "image") -> Image.Image:
    """`image` as an RGB PIL image, its longest side at most `MAX_SIDE`, its aspect at most 1:`MAX_ASPECT`.

    It is the caller's to change: whatever was given keeps its pixels.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with C in {1, 3, 4}, uint8 in [0, 255] or any float in
    [0, 1]. Where both ends could be C, 3 beats 4 beats 1; where both are equal, uint8 is (H, W, C) and a float is
    (C, H, W).

    Raises:
        InputError: nothing readable is there, or an array's rank, dtype or range is not one of the above. The message
            begins with `field`.
    """
    pixels = image.image if isinstance(image, Picture) else _decoded(image, field)
    return pixels.copy() if pixels is image or isinstance(image, Picture) else pixels


def _decoded(image: Any, field: str) -> Image.Image:
    """As `to_pil`, but a PIL image that needs no change is handed back itself."""
    array = _as_array(image, field)
    if array is not None:
        return _bounded(_from_array(array, field))
    try:
        return _bounded(_to_rgb(image, field) if isinstance(image, Image.Image) else _read(image, field))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        source: Any = _content(cast("Mapping[str, Any]", image)) if isinstance(image, Mapping) else image
        if name := unread_image(head_of(source)):
            raise InputError(
                f"{field} is {_brief(image)}, and {name} is not read; save it as PNG, JPEG or WebP"
            ) from error
        raise InputError(f"{field} is {_brief(image)}, in no format read here; give a PNG, JPEG or WebP") from error
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        reason = "the file is cut short" if cut else f"{type(error).__name__}: {error}"
        raise InputError(f"{field} is {_brief(image)}, which does not decode ({reason}); save it anew") from error


def claimed_pixels(file: bytes) -> int:
    """How many pixels the content of an image file says to have, with nothing decoded; 0 where it cannot be read."""
    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # PIL's readers raise nearly everything on broken files
        return 0


def png_of(image: Image.Image) -> bytes:
    """The image's file, lossless, and packed for speed: most of it is read again at once."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def to_pil_batch(images: Any, *, field: str = "images") -> list[Image.Image]:
    """A batch as RGB PIL images; see `entries_of` for what a batch is."""
    return [to_pil(image, field=name) for name, image in entries_of(images, field=field)]


def to_pictures(images: Any, *, field: str = "images") -> list[Picture]:
    """A batch as pictures; see `entries_of` for what a batch is."""
    return [to_picture(image, field=name) for name, image in entries_of(images, field=field)]


def entries_of(images: Any, *, field: str = "images") -> Iterator[tuple[str, Any]]:
    """The entries of a batch with their names: (N, C, H, W) floats, (N, H, W, C) uint8, or a sequence of `ImageLike`.

    Raises:
        InputError: this is one image, or an array that is not of rank 4.
    """
    array = _as_array(images, field)
    if isinstance(images, Picture | Image.Image | str | bytes | os.PathLike | Mapping):
        raise InputError(f"{field} is {_brief(images)}, one image and not a batch; wrap it in a list")
    if array is None and not isinstance(images, Iterable):
        raise InputError(f"{field} is {_brief(images)}; give a list of images or an array of rank 4")
    if array is not None and array.ndim != 4 and not (array.ndim == 1 and array.dtype == object):
        hint = {3: "add a leading axis to one image", 5: "a video's frames are judged one by one: give them as rank 4"}
        fix = hint.get(array.ndim, "give (N, C, H, W) floats or (N, H, W, C) uint8")
        raise InputError(f"{field} has shape {array.shape}, rank {array.ndim} where a batch has rank 4; {fix}")
    entries = cast("Iterable[Any]", images) if array is None else array
    return ((f"{field}[{i}]", image) for i, image in enumerate(entries))


# ---------------------------------------------------------------- files


def _read(source: Any, field: str) -> Image.Image:
    file: Any
    if isinstance(source, Mapping):
        source = _content(cast("Mapping[str, Any]", source))
        if source is None:
            raise InputError(f"{field} is a mapping with neither bytes nor a path; fill in one of the two")
    if isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(cast("bytes", source))
    elif isinstance(source, str | os.PathLike):
        source = cast("str | os.PathLike[str]", source)
        if "://" in str(source):
            raise InputError(f"{field} is the URL {_brief(source)}; download it and give the file")
        if not os.path.isfile(source):
            raise InputError(f"{field} is {_brief(source)}, where there is no file; check the path")
        file = source
    else:
        raise InputError(
            f"{field} is {_brief(source)}; give a PIL image, a path, the bytes of an image file, an array or a tensor"
        )
    with Image.open(file, formats=_FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise InputError(
                f"{field} is {_brief(source)} of {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}; "
                f"reduce it to {MAX_SIDE} pixels a side"
            )
        return _to_rgb(picture, field)


def _content(undecoded: Mapping[str, Any]) -> Any:
    data = undecoded.get("bytes")
    return undecoded.get("path") if data is None else data


def _to_rgb(picture: Image.Image, field: str) -> Image.Image:
    """A PIL image of any mode on white. The caller's own is never changed, and not copied where it is plain RGB."""
    if 0 in picture.size:
        raise InputError(f"{field} is a PIL image of {picture.width} x {picture.height} pixels; give one with pixels")
    picture.load()
    if type(picture) is Image.Image and picture.mode == "RGB" and not picture.info and not picture.getexif():
        return picture
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile")
    if picture.mode[0] in "IF":
        picture = Image.fromarray(_to_bytes(_deep_gray(picture, field), field))
    if picture.mode == "La":  # premultiplied gray, which PIL turns into nothing but LA
        picture = picture.convert("LA")
    if picture.mode == "P" or (picture.has_transparency_data and picture.mode not in ("LA", "RGBA")):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    alpha = picture.getchannel("A") if picture.has_transparency_data else None
    colours = (_in_srgb(picture, profile) if profile else picture).convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    colours.info.pop("icc_profile", None)  # whoever saves these pixels must not say that they are of other colours
    return colours


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """`picture` in sRGB's colours, without its transparency; as it is where its profile is broken, or sRGB itself."""
    mode = {"LA": "L", "1": "L", "L": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    plain = picture if picture.mode == mode else picture.convert(mode)
    transform = _transform(bytes(profile), mode)
    if transform is None and mode == "L":  # a gray picture may come with the profile of the colour one it was made from
        plain, transform = plain.convert("RGB"), _transform(bytes(profile), "RGB")
    return plain if transform is None else ImageCms.applyTransform(plain, transform)  # pyright: ignore


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of an ICC profile to sRGB's; None where there is nothing to do, or no way to do it."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        relative = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", relative, flags)
        if mode not in ("L", "RGB"):
            return transform
        # Every camera and program has an sRGB profile of its own, which rounds differently: such pixels are kept.
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        cube = np.stack(np.meshgrid(*[steps] * (1 if mode == "L" else 3)), axis=-1).reshape(1, -1, len(mode))
        before = Image.fromarray(cube.squeeze(-1) if mode == "L" else cube)
        after = np.asarray(ImageCms.applyTransform(before, transform), dtype=int)
        return None if np.abs(after - np.asarray(before.convert("RGB"), dtype=int)).max() <= 2 else transform
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):  # an import where Pillow lacks LittleCMS
        return None


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(cast("Any", ImageCms).createProfile("sRGB"))


def _deep_gray(picture: Image.Image, field: str) -> np.ndarray:
    """Modes beyond 8 bits as (H, W) floats in [0, 1]; PIL's own conversion would cut everything above 255 to white."""
    values = np.asarray(picture)
    if picture.mode == "F":
        return values
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"{field} is a PIL image of mode I with values from {low} to {high}; scale it to 16 bits")
    # Mode I does not say its depth: it is 8 bits widened by PIL unless a value says otherwise.
    return values / (255 if picture.mode == "I" and high <= 255 else 65535)


# ---------------------------------------------------------------- arrays


def _as_array(image: Any, field: str) -> np.ndarray | None:
    """A numpy view of an array or tensor, None for anything else. Looks torch up; a caller with tensors imported it."""
    if isinstance(image, np.ndarray):
        return cast("np.ndarray", image)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        try:
            return (image.detach().float() if image.is_floating_point() else image.detach()).cpu().numpy()
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{field} is a tensor that numpy cannot hold ({error}); give a dense tensor") from error
    if hasattr(image, "__array__") and not isinstance(image, str | bytes | Image.Image):
        return np.asarray(image)
    return None


def _from_array(array: np.ndarray, field: str) -> Image.Image:
    if array.ndim not in (2, 3) or array.size == 0:
        raise InputError(f"{field} has shape {array.shape}; one image is (H, W), (H, W, C) or (C, H, W)")
    pixels = _to_bytes(array if array.ndim == 2 else _channels_last(array, field), field)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture if picture.mode == "RGB" else _to_rgb(picture, field)


def _channels_last(array: np.ndarray, field: str) -> np.ndarray:
    """(H, W, C), or (H, W) for one channel. An axis of 3 is likelier to be colour than one of 4, and that than of 1."""
    for channels in (3, 4, 1):
        axes = [axis for axis in (0, 2) if array.shape[axis] == channels]
        if axes:
            axis = axes[0] if array.dtype.kind == "f" else axes[-1]
            return array.squeeze(axis) if channels == 1 else np.moveaxis(array, axis, -1)
    raise InputError(f"{field} has shape {array.shape}; its first or last axis has to be 1, 3 or 4 channels")


def _to_bytes(array: np.ndarray, field: str) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] rounded to it."""
    if array.dtype == np.uint8:
        pixels = array
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{field} holds NaN or infinity; look at what made it")
        if low < -_SLACK or high > 1 + _SLACK:
            raise InputError(
                f"{field} is {array.dtype} from {low:.4g} to {high:.4g}, outside [0, 1]; {_remedy(low, high)}"
            )
        pixels = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    else:
        raise InputError(f"{field} has dtype {array.dtype}; convert it to uint8 in [0, 255] or to float in [0, 1]")
    if pixels.max() == 1:
        warnings.warn(
            f"{field} is all but black: its largest value is 1 of 255. If it holds floats in [0, 1] that were cast to "
            "uint8, multiply by 255 before the cast",
            stacklevel=2,
        )
    return pixels


def _remedy(low: float, high: float) -> str:
    """What brings floats of this range into [0, 1], going by the ranges that generators and loaders have."""
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return "clamp it to [0, 1]"
    if -1 - _OVERSHOOT <= low < 0 and high <= 1 + _OVERSHOOT:
        return "map [-1, 1] to [0, 1] by (x + 1) / 2, and clamp what overshoots"
    if low >= 0 and 2 < high <= 256:
        return "divide by 255"
    return "rescale it"


# ---------------------------------------------------------------- size


def _bounded(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest > MAX_SIDE:
        width, height = (max(1, round(side * MAX_SIDE / longest)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    shortest = math.ceil(max(picture.size) / MAX_ASPECT)
    if min(picture.size) >= shortest:
        return picture
    canvas = Image.new("RGB", (max(picture.width, shortest), max(picture.height, shortest)), "white")
    canvas.paste(picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2))
    return canvas


def _brief(image: Any) -> str:
    """How a message names what it was given: short, and never the pixels."""
    if isinstance(image, Mapping):
        image = _content(cast("Mapping[str, Any]", image))
    if isinstance(image, Image.Image):
        return f"a PIL image of mode {image.mode}"
    if isinstance(image, bytes | bytearray | memoryview):
        return f"{len(cast('bytes', image))} bytes"
    if isinstance(image, str | os.PathLike):
        text = str(cast("str | os.PathLike[str]", image))
        return repr(text if len(text) <= 200 else text[:197] + "...")
    return f"of type {type(image).__name__}"
