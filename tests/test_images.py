"""The one conversion to PIL: every kind of image comes out right, every broken one is refused by name."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, features

from listener_reward.errors import InputError
from listener_reward.media.containers import demuxer, unread_image
from listener_reward.media.images import MAX_ASPECT, MAX_SIDE, identity, to_picture, to_pil, to_pil_batch

ORANGE = (255, 128, 0)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    """A 6 x 4 orange picture with a blue left half, to tell height from width and left from right."""
    picture = Image.new("RGB", (6, 4), ORANGE)
    picture.paste((0, 0, 255), (0, 0, 3, 4))
    return picture.convert(mode)


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


HWC = pixels(scene())
CHW = np.moveaxis(HWC, -1, 0)


# ---------------------------------------------------------------- what has one right answer


@pytest.mark.parametrize(
    "image",
    [
        scene(),
        encoded(scene()),
        bytearray(encoded(scene())),
        memoryview(encoded(scene())),
        encoded(scene(), "BMP"),
        encoded(scene(), "TIFF"),
        encoded(scene(), "WEBP", lossless=True),
        encoded(scene().quantize(2), "GIF"),
        encoded(scene("RGBA")),
        {"bytes": encoded(scene()), "path": None},
        {"bytes": encoded(scene()), "path": "elsewhere.png"},
        {"bytes": encoded(scene())},
        HWC,
        np.asfortranarray(HWC),
        HWC[:, ::-1][:, ::-1],
        CHW,
        HWC / 255,
        (CHW / 255).astype(np.float32),
        torch.tensor(CHW.copy()),
        torch.tensor(CHW / 255),
        torch.tensor(HWC / 255, requires_grad=True),
        np.dstack([HWC, np.full((4, 6), 255, np.uint8)]),
    ],
)
def test_the_same_picture_in_every_wrapping(image):
    np.testing.assert_array_equal(pixels(to_pil(image)), HWC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_right_to_their_own_precision(dtype):
    found = pixels(to_pil(torch.tensor(CHW / 255).to(dtype))).astype(int)
    assert np.abs(found - HWC).max() <= 1


def test_every_level_survives_the_way_through_floats():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(pixels(to_pil((levels / 255).astype(np.float32)))[..., 0], levels)


@pytest.mark.parametrize(
    "modes", ["P", "YCbCr", "HSV", "CMYK", "RGBX", "RGBA RGBa", "P PA", "L", "1", "L I", "LA", "LA La"]
)
def test_opaque_pictures_of_every_mode(modes):
    picture = scene()
    for mode in modes.split():
        picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    gray = np.repeat(np.asarray(scene("1" if modes == "1" else "L"), dtype=int)[..., None], 3, axis=2)
    expected = gray * 255 if modes == "1" else gray if modes[0] == "L" else HWC
    assert np.abs(pixels(to_pil(picture)).astype(int) - expected).max() <= 6


def test_cmyk_jpeg_keeps_its_colours():
    picture = to_pil(encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels(picture).astype(int) - (200, 30, 30)).max() < 8


def test_sixteen_bits_are_scaled_and_not_cut():
    gray = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    expected = [[0, 100], [200, 255]]
    for image in (Image.fromarray(gray), encoded(Image.fromarray(gray)), encoded(Image.fromarray(gray), "TIFF")):
        np.testing.assert_array_equal(pixels(to_pil(image))[..., 0], expected)
    np.testing.assert_array_equal(pixels(to_pil(Image.fromarray(gray.astype(np.int32))))[..., 0], expected)


def test_mode_f_follows_the_rule_for_floats():
    np.testing.assert_array_equal(
        pixels(to_pil(Image.fromarray(np.array([[0, 0.2, 1]], np.float32))))[0, :, 0], [0, 51, 255]
    )
    with pytest.raises(InputError, match="divide by 255"):
        to_pil(Image.fromarray(np.array([[0, 51, 255]], np.float32)))


def transparent(mode: str) -> Image.Image:
    """Black that shows nothing on the left and everything on the right."""
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 0, 255))
    return layer.convert(mode)


def palette_with_transparency() -> bytes:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0] * 2)
    picture.putpixel((1, 0), 1)
    return encoded(picture, "PNG", transparency=0)


@pytest.mark.parametrize(
    "image",
    [
        transparent("RGBA"),
        transparent("LA"),
        encoded(transparent("RGBA")),
        encoded(transparent("RGBA"), "WEBP", lossless=True),
        encoded(transparent("LA")),
        palette_with_transparency(),
        np.asarray(transparent("RGBA")),
        np.asarray(transparent("RGBA")) / 255,
    ],
)
def test_transparency_shows_white(image):
    np.testing.assert_array_equal(pixels(to_pil(image)), [[[255] * 3, [0] * 3]])


def test_half_transparent_black_on_white_is_mid_gray():
    assert abs(int(pixels(to_pil(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    picture = to_pil(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels(picture).astype(int) - (255, 0, 0)).max() < 8


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    picture = to_pil(encoded(scene(), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels(picture), np.rot90(HWC, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_spoil_the_picture():
    data = encoded(scene(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff garbage")
    assert to_pil(data).size == (6, 4)


@pytest.mark.parametrize(
    "image",
    [
        np.array([[[9, 8, 7]]], np.uint8),
        np.array([9, 8, 7], np.uint8).reshape(3, 1, 1),
        encoded(Image.new("RGB", (1, 1), (9, 8, 7))),
    ],
)
def test_one_pixel(image):
    assert pixels(to_pil(image)).tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_gray_arrays(shape, dtype):
    picture = to_pil(np.full(shape, 204 if dtype is np.uint8 else 0.8, dtype))
    assert picture.size == (7, 5)
    assert (pixels(picture) == 204).all()


def test_a_shape_that_fits_both_layouts_goes_by_dtype():
    both = np.zeros((3, 9, 3))
    assert to_pil(both).size == (3, 9)
    assert to_pil(both.astype(np.uint8)).size == (9, 3)


def test_large_pictures_are_reduced_with_their_aspect():
    assert to_pil(Image.new("RGB", (6000, 3000))).size == (MAX_SIDE, MAX_SIDE // 2)
    assert to_pil(np.zeros((MAX_SIDE, MAX_SIDE), np.uint8)).size == (MAX_SIDE, MAX_SIDE)


@pytest.mark.parametrize("size", [(500, 1), (1, 500), (30000, 2)])
def test_thin_pictures_are_padded_with_white(size):
    picture = to_pil(Image.new("RGB", size, "black"))
    assert max(picture.size) / min(picture.size) <= MAX_ASPECT
    found = pixels(picture)
    assert found.min() == 0 and found[0, 0].min() == 255 and found[-1, -1].min() == 255


def test_the_callers_image_is_left_alone_and_the_result_is_a_fixed_point():
    for given in (scene(), scene("RGBA"), Image.new("RGB", (500, 1))):
        mode, size = given.mode, given.size
        once = to_pil(given)
        assert once is not given and (given.mode, given.size) == (mode, size)
        assert pixels(to_pil(once)).tolist() == pixels(once).tolist()


def test_paths(tmp_path):
    file = tmp_path / "bild ä.png"
    scene().save(file)
    for image in (file, str(file), np.str_(file), {"bytes": None, "path": str(file)}):
        np.testing.assert_array_equal(pixels(to_pil(image)), HWC)
    file.unlink()  # no handle was left open


# ---------------------------------------------------------------- what is refused


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose text chunk unpacks to 100 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 100_000_000, zip=True)
    return encoded(scene(), "PNG", pnginfo=info)


def closed() -> Image.Image:
    picture = Image.open(io.BytesIO(encoded(scene())))
    picture.close()
    return picture


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
JPEG = encoded(Image.fromarray(NOISE), "JPEG")
PNG = encoded(Image.fromarray(NOISE))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "0 bytes"),
        (b"not an image", "12 bytes, in no format"),
        (b"\xff\xd8\xff", "no format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "give a PNG"),
        (EPS, "no format"),
        (JPEG[:50], "bytes"),
        (JPEG[: len(JPEG) // 2], "does not decode"),
        (PNG[:20], "bytes"),
        (PNG[: len(PNG) // 2], "does not decode"),
        (PNG[:60] + b"\x00" * 40 + PNG[100:], "does not decode"),
        (bomb(), "DecompressionBomb"),
        (encoded(Image.new("1", (9000, 9000))), "9000 x 9000 pixels, more than"),
        (text_bomb(), "does not decode"),
        (closed(), "does not decode"),
        (Image.open(io.BytesIO(JPEG[: len(JPEG) // 2])), "PIL image of mode RGB, which does not decode"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        ("", "no file"),
        ("no/such/file.png", "'no/such/file.png', where there is no file; check the path"),
        ("nul\0byte.png", "no file"),
        ("x" * 100_000, r"\.\.\.', where there is no file"),
        (Path("."), "no file"),
        ("https://example.org/cat.png", "URL .* download it"),
        ("data:image/png;base64,iVBORw0KGgo=", "no file"),
        ({}, "neither bytes nor a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": b"", "path": None}, "0 bytes"),
        ({"bytes": None, "path": "gone.png"}, "'gone.png'"),
        ({"bytes": np.zeros(3), "path": None}, "of type ndarray"),
        (None, "of type NoneType; give a PIL image"),
        (7, "of type int"),
        ([[0, 1], [1, 0]], "of type list"),
        ([scene()], "of type list"),
        (io.BytesIO(PNG), "of type BytesIO"),
        (object(), "of type object"),
    ],
)
def test_unreadable_images_are_refused_by_name(image, says):
    with pytest.raises(InputError, match=rf"^second .*{says}"):
        to_pil(image, field="second")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((8, 8, 3), np.nan), "NaN"),
        (np.where(np.arange(64).reshape(8, 8) == 9, np.nan, 0.5), "NaN"),
        (np.full((8, 8), np.inf), "infinity"),
        (HWC.astype(np.float32), "float32 from 0 to 255, outside .*divide by 255"),
        (HWC / 127.5 - 1, r"from -1 to 1, outside .*\(x \+ 1\) / 2"),
        (HWC - 128.0, "rescale"),
        (np.full((8, 8), 1.02), r"1\.02"),
        (HWC.astype(np.int64), "int64; convert it to uint8"),
        (HWC.astype(np.uint16), "uint16"),
        (HWC.astype(np.int8), "int8"),
        (HWC > 128, "bool"),
        (HWC + 1j, "complex"),
        (HWC.astype(object), "object"),
        (np.array([["a", "b"], ["c", "d"]]), "dtype <U1"),
        (np.float64(0.5), r"shape \(\)"),
        (np.zeros(9), r"shape \(9,\)"),
        (np.zeros((0, 8, 3)), r"shape \(0, 8, 3\)"),
        (np.zeros((8, 8, 0), np.uint8), r"shape \(8, 8, 0\)"),
        (np.zeros((8, 8, 2)), r"\(8, 8, 2\); its first or last axis"),
        (np.zeros((5, 8, 8)), "1, 3 or 4 channels"),
        (np.zeros((1, 3, 8, 8)), r"shape \(1, 3, 8, 8\); one image is"),
        (np.zeros((1, 1, 3, 8, 8)), "one image is"),
        (torch.full((3, 8, 8), torch.nan, dtype=torch.bfloat16), "NaN"),
        (torch.full((3, 8, 8), -1.0), "from -1 to -1"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 8, device="meta"), "tensor that numpy cannot hold"),
        (torch.zeros(3, 8, 8).to_sparse(), "tensor that numpy cannot hold"),
        (Image.fromarray(np.array([[-5, 9]], np.int32)), "from -5 to 9"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "to 70000; scale it to 16 bits"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused_by_name(array, says):
    with pytest.raises(InputError, match=rf"^first .*{says}"):
        to_pil(array, field="first")


def test_floats_are_rounded_and_not_cut_off():
    assert pixels(to_pil(np.array([[0.999, 0.0021]])))[0, :, 0].tolist() == [255, 1]


def test_a_rounding_step_outside_the_range_is_forgiven():
    assert pixels(to_pil(np.array([[-0.005, 1.0078]])))[0, :, 0].tolist() == [0, 255]


def test_floats_cast_to_uint8_do_not_pass_in_silence():
    with pytest.warns(UserWarning, match="image is all but black.*multiply by 255"):
        to_pil((HWC / 255).astype(np.uint8))


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no file"):
        to_pil(tmp_path / "pipe.png")


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor(np.stack([CHW, CHW]) / 255),
        np.stack([HWC, HWC]),
        np.stack([CHW, CHW]) / 255,
        torch.tensor(np.stack([CHW, CHW])),
        [scene(), encoded(scene())],
        (HWC, torch.tensor(CHW / 255)),
        (image for image in (HWC, HWC)),
        np.array([scene(), None], dtype=object)[[0, 0]],
    ],
)
def test_batches(batch):
    found = to_pil_batch(batch)
    assert len(found) == 2
    for picture in found:
        np.testing.assert_array_equal(pixels(picture), HWC)


@pytest.mark.parametrize("batch", [[], (), np.zeros((0, 3, 8, 8)), torch.zeros(0, 3, 8, 8)])
def test_an_empty_batch_is_an_empty_list(batch):
    assert to_pil_batch(batch) == []


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (HWC, r"shape \(4, 6, 3\), rank 3 where a batch has rank 4; add a leading axis"),
        (torch.zeros(2, 4, 3, 8, 8), "rank 5 .* video"),
        (np.zeros((8, 8)), "rank 2"),
        (np.zeros(8), "rank 1"),
        (np.zeros((1,) * 6), "rank 6"),
        (scene(), "one image and not a batch"),
        ("a.png", "'a.png', one image"),
        (Path("a.png"), "one image"),
        (PNG, "bytes, one image"),
        ({"bytes": PNG, "path": None}, "one image"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_what_is_no_batch_is_refused(batch, says):
    with pytest.raises(InputError, match=rf"^images .*{says}"):
        to_pil_batch(batch)


def test_the_broken_entry_of_a_batch_is_named():
    with pytest.raises(InputError, match=r"^images\[1\] .*no format"):
        to_pil_batch([scene(), b"broken"])
    spoilt = np.stack([CHW, CHW, CHW]) / 255
    spoilt[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^images\[2\] holds NaN"):
        to_pil_batch(spoilt)


# ---------------------------------------------------------------- what it is told from others by


def test_an_undecoded_image_is_told_by_its_bytes_or_its_path_and_not_decoded():
    assert identity({"bytes": None, "path": "no such file.png"}) == "no such file.png"
    digest = hashlib.sha256(b"no picture").hexdigest()
    assert (
        identity({"bytes": b"no picture", "path": "0.png"}) == identity({"bytes": bytearray(b"no picture")}) == digest
    )


def test_a_decoded_image_is_told_by_the_digest_of_its_picture():
    assert identity(scene()) == identity(HWC) == identity(to_picture(encoded(scene()))) == to_picture(HWC).digest.hex()
    assert identity(scene("L")) != identity(scene())


# ---------------------------------------------------------------- colours


def icc_profile(primaries, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A version 2 profile of three primaries (XYZ under D50, one row each) or of gray, with a pure gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH2x", 1, round(gamma * 256))

    def xyz(values):
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))

    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if space == b"RGB ":
        tags |= {name + b"XYZ": xyz(row) for name, row in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    return assembled(tags, b"mntr" + space + b"XYZ ")


def assembled(tags, kind: bytes) -> bytes:
    """A version 2 profile with these tags and a name; `kind` is class, colours, and what these are turned into."""
    text = b"a test"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    } | tags
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = bytearray(128)
    struct.pack_into(">I4sI12s", head, 0, start + len(body), bytes(4), 0x02100000, kind)
    head[36:40] = b"acsp"
    struct.pack_into(">3i", head, 68, 63190, 65536, 54061)
    return bytes(head) + table + body


def press_profile(inks) -> bytes:
    """A profile of a press, as a table: `inks` gives the Lab of paper, and of paper with C, M or Y alone. Two inks are
    as dark as both together, and all with black is black."""
    nodes = []
    for cyan, magenta, yellow, black in itertools.product((0, 1), repeat=4):  # the first ink varies slowest
        on = [name for name, there in (("C", cyan), ("M", magenta), ("Y", yellow)) if there] or [""]
        light, red_green, blue_yellow = np.sum([inks[name] for name in on], axis=0) - [100 * (len(on) - 1), 0, 0]
        nodes.append((0, 0, 0) if black else (max(light, 0), red_green, blue_yellow))
    values = [(light * 652.8, (a + 128) * 256, (b + 128) * 256) for light, a, b in nodes]
    numbers = [0, 65535] * 4 + [round(value) for node in values for value in node] + [0, 65535] * 3
    matrix = struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + struct.pack(f">2H{len(numbers)}H", 2, 2, *numbers)
    return assembled({b"A2B0": table}, b"prtrCMYKLab ")


ADOBE_RGB = icc_profile(
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 563 / 256
)
SRGB_PRIMARIES = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
GREEN, AS_SRGB = (60, 200, 60), (0, 201, 37)
"""A colour, and what it is in sRGB where its numbers are Adobe RGB's: (60 / 255) ** 2.2 is light of 0.0416, 200 is
0.586. Through XYZ they are -0.176, 0.586 and 0.0181 of sRGB's primaries: 0, 201.3 and 36.5 of 255 by its curve."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_colours_of_a_profile_become_those_of_srgb(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    data = encoded(Image.new("RGB", (16, 16), GREEN), kind, icc_profile=ADOBE_RGB, **options.get(kind, {}))
    picture = to_pil(data)
    assert np.abs(pixels(picture).astype(int) - AS_SRGB).max() <= 3, pixels(picture)[0, 0]
    assert "icc_profile" not in picture.info
    np.testing.assert_array_equal(pixels(to_pil(encoded(picture))), pixels(picture))  # it is converted once


def test_colours_of_a_profile_under_transparency_and_in_a_palette():
    layer = Image.new("RGBA", (16, 16), (*GREEN, 255))
    layer.putalpha(Image.linear_gradient("L").resize((16, 16)).point([0] * 128 + [255] * 128))
    shown = pixels(to_pil(encoded(layer, icc_profile=ADOBE_RGB)))
    assert shown[0, 0].tolist() == [255, 255, 255] and np.abs(shown[-1, 0].astype(int) - AS_SRGB).max() <= 1
    palette = Image.new("RGB", (16, 16), GREEN).quantize(4)
    assert np.abs(pixels(to_pil(encoded(palette, icc_profile=ADOBE_RGB))).astype(int) - AS_SRGB).max() <= 1


def test_a_profile_of_gray_is_followed_and_one_of_colour_too():
    """128 of 255 by gamma 1 is light of 0.502, and that is 188 in sRGB. Sixteen bits have profiles as eight have."""
    linear = icc_profile((), 1.0, b"GRAY")
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    for image in (Image.new("L", (8, 8), 128), Image.new("LA", (8, 8), (128, 255)), deep):
        assert np.abs(pixels(to_pil(encoded(image, icc_profile=linear))).astype(int) - 188).max() <= 1
    coloured = icc_profile(SRGB_PRIMARIES, 1.0)
    assert (
        np.abs(pixels(to_pil(encoded(Image.new("L", (8, 8), 128), icc_profile=coloured))).astype(int) - 188).max() <= 1
    )


def test_srgb_by_any_profile_keeps_every_pixel():
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(pixels(to_pil(encoded(noise, icc_profile=profile))), pixels(noise))
    assert "icc_profile" not in to_pil(encoded(noise, icc_profile=profile)).info


@pytest.mark.parametrize(
    "profile", [b"x", ADOBE_RGB[:150], ADOBE_RGB[:200] + bytes(100), icc_profile((), 1.0, b"GRAY")]
)
def test_a_broken_profile_says_nothing_of_the_pixels(profile):
    """Nor does one for pictures of another kind."""
    picture = to_pil(encoded(Image.new("RGB", (16, 16), GREEN), icc_profile=profile))
    assert pixels(picture)[0, 0].tolist() == list(GREEN) and "icc_profile" not in picture.info


def test_a_cmyk_jpeg_with_a_profile_of_colour_screens_decodes_as_one_without():
    image = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    with_profile = to_pil(encoded(image, "JPEG", quality=95, icc_profile=ADOBE_RGB))
    np.testing.assert_array_equal(pixels(with_profile), pixels(to_pil(encoded(image, "JPEG", quality=95))))


INKS = {"": (100, 0, 0), "C": (62, -31, -48), "M": (52, 81, -7), "Y": (95, -6, 95)}


def lab_in_srgb(lab):
    """An independent way: Lab under D50 to XYZ, to sRGB's primaries, to its curve, in [0, 255]."""
    light, a, b = lab
    y = (light + 16) / 116
    ratios = np.array([y + a / 500, y, y - b / 200])
    light_of = np.where(ratios > 6 / 29, ratios**3, 3 * (6 / 29) ** 2 * (ratios - 4 / 29)) * [0.9642, 1.0, 0.8249]
    linear = np.clip(np.linalg.solve(np.transpose(SRGB_PRIMARIES), light_of), 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
@pytest.mark.parametrize(
    ("amounts", "lab"),
    [
        ((0, 0, 0, 0), INKS[""]),
        ((255, 0, 0, 0), INKS["C"]),
        ((0, 255, 0, 0), INKS["M"]),
        ((0, 0, 255, 0), INKS["Y"]),
        ((102, 0, 0, 0), (100 - 38 * 0.4, -31 * 0.4, -48 * 0.4)),
        ((0, 0, 0, 153), (40, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_inks_are_shown_as_the_profile_of_their_press_has_them(kind, amounts, lab):
    """Without the profile pure cyan is (0, 255, 255), which no press prints."""
    image = Image.new("CMYK", (16, 16), amounts)
    data = encoded(image, kind, icc_profile=press_profile(INKS), **({"quality": 100} if kind == "JPEG" else {}))
    picture = to_pil(data)
    assert np.abs(pixels(picture).astype(int) - lab_in_srgb(lab)).max() <= 2, (pixels(picture)[0, 0], lab_in_srgb(lab))
    assert "icc_profile" not in picture.info


def test_a_press_profile_that_is_cut_says_nothing_of_the_inks():
    image, profile = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), press_profile(INKS)
    for cut in (profile[:300], profile[:-40], profile[:128]):
        assert pixels(to_pil(encoded(image, "TIFF", icc_profile=cut)))[0, 0].tolist() == [0, 255, 255]


# ---------------------------------------------------------------- images in a video's container


def branded(major: bytes, *compatible: bytes) -> bytes:
    return struct.pack(">I4s4sI", 16 + 4 * len(compatible), b"ftyp", major, 0) + b"".join(compatible) + bytes(64)


@pytest.mark.parametrize(
    ("head", "container", "unread"),
    [
        (branded(b"avif", b"avif", b"mif1", b"miaf"), None, None),
        (branded(b"avis", b"avis", b"msf1", b"iso8"), None, None),
        (branded(b"mif1", b"avif", b"miaf"), None, None),
        (branded(b"heic", b"mif1", b"heic"), None, "HEIC"),
        (branded(b"msf1", b"hevc", b"iso8"), None, "HEIC"),
        (branded(b"mif1", b"heix"), None, "HEIC"),
        (branded(b"mif1"), None, "HEIF"),
        (branded(b"MiHB", b"mif1", b"heic"), None, "HEIC"),
        (branded(b"crx ", b"isom"), None, "Canon raw"),
        (branded(b"isom", b"isom", b"iso2", b"avc1", b"mp41"), "mov", None),
        (branded(b"qt  ", b"qt  "), "mov", None),
        (branded(b"mp42", b"mp42", b"mif1"), "mov", None),
        (branded(b"M4V ", b"mp42"), "mov", None),
        (branded(b"XAVC", b"XAVC", b"mp42"), "mov", None),
        (b"\x1a\x45\xdf\xa3" + bytes(60), "matroska", None),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "avi", None),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", None, None),
        (b"12345678AVI LIST", None, None),
        (b"", None, None),
    ],
)
def test_a_container_is_told_by_its_list_of_brands(head, container, unread):
    assert (demuxer(head), unread_image(head)) == (container, unread)


@pytest.mark.parametrize("brand", [b"heic", b"hevc"])
def test_heic_is_refused_by_name(tmp_path, brand):
    data = branded(brand, b"mif1")
    (tmp_path / "a.heic").write_bytes(data)
    forms: list[Any] = [data, bytearray(data), tmp_path / "a.heic", {"bytes": data, "path": None}]
    for image in forms:
        with pytest.raises(InputError, match=r"^second .*HEIC is not read; save it as PNG, JPEG or WebP"):
            to_pil(image, field="second")


def test_a_file_cut_short_says_so():
    with pytest.raises(InputError, match=r"^image .*does not decode \(the file is cut short\); save it anew"):
        to_pil(JPEG[: len(JPEG) // 2])


@pytest.mark.parametrize(
    ("low", "high", "fix"),
    [
        (-0.04, 1.04, r"clamp it to \[0, 1\]"),
        (0.0, 1.04, r"clamp it to \[0, 1\]"),
        (-0.04, 0.9, r"clamp it to \[0, 1\]"),
        (-0.6, 0.9, r"by \(x \+ 1\) / 2"),
        (-1.04, 1.04, r"by \(x \+ 1\) / 2, and clamp"),
        (0.0, 254.0, "divide by 255"),
        (0.0, 1.8, "rescale"),
        (-2.0, 2.0, "rescale"),
        (0.0, 65535.0, "rescale"),
    ],
)
def test_what_to_do_with_floats_goes_by_their_range(low, high, fix):
    with pytest.raises(InputError, match=rf"outside \[0, 1\]; .*{fix}"):
        to_pil(np.linspace(low, high, 192, dtype=np.float32).reshape(3, 8, 8))
