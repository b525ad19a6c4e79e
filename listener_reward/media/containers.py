"""What a file is by its first bytes: a video that is read here, or an image in a video's container."""

from __future__ import annotations

import os

HEAD = 256
"""How many first bytes are asked for: a list of brands is longer in no file that is known."""

_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_IMAGES = {*_AVIF, *_HEIC, b"heif", b"mif1", b"mif2", b"msf1", b"miaf", b"crx "}
"""Brands of images in the container of mp4: AVIF, HEIC, what else MIAF and HEIF allow, and Canon's raw files."""


def head_of(file: str | os.PathLike[str] | bytes | bytearray | memoryview) -> bytes:
    """The first `HEAD` bytes of a file or of its content; none where it cannot be opened."""
    if isinstance(file, bytes | bytearray | memoryview):
        return bytes(file[:HEAD])
    try:
        with open(file, "rb") as opened:
            return opened.read(HEAD)
    except (OSError, ValueError):  # a ValueError for a name with a null byte
        return b""


def demuxer(head: bytes) -> str | None:
    """FFmpeg's name of a video's container: mp4 and mov, webm and mkv, avi. None for any other, and for images.

    No other is ever opened: some, such as playlists, make FFmpeg read further files, or the network.
    """
    if head[4:8] == b"ftyp":
        return None if _image_brands(head) else "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    return "avi" if head.startswith(b"RIFF") and head[8:12] == b"AVI " else None


def unread_image(head: bytes) -> str | None:
    """The name of an image format that is known and not read here, such as HEIC; None for any other file."""
    brands = _image_brands(head)
    if not brands or brands & _AVIF:
        return None
    return "HEIC" if brands & _HEIC else "Canon raw" if b"crx " in brands else "HEIF"


def _image_brands(head: bytes) -> set[bytes]:
    """The image brands of an mp4-like file that is an image; empty for videos.

    The first brand decides where it is an image's. A file with a brand of its maker's first is an image if all that it
    says to be compatible with besides is images and the box structure that they are built on.
    """
    if head[4:8] != b"ftyp":
        return set()
    size = int.from_bytes(head[:4], "big")
    major, listed = head[8:12], head[16 : max(16, size)]
    compatible = {listed[at : at + 4] for at in range(0, len(listed) - 3, 4)}
    if major in _IMAGES or (compatible & _IMAGES and not any(brand in _VIDEOS for brand in (major, *compatible))):
        return (compatible | {major}) & _IMAGES
    return set()


_VIDEOS = {b"isom", b"mp41", b"mp42", b"avc1", b"av01", b"qt  ", b"M4V ", b"M4VP", b"M4VH", b"dash", b"3gp4", b"3gp5"}
