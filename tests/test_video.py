"""Videos: every form they come in, the moments that are looked at, the strategies, and the command."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import random
import struct
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import edits
import numpy as np
import pytest
import torch
from PIL import Image, features
from typer.testing import CliRunner

from listener_reward.calibration.maps import Calibration
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.cli import app
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.evaluate.run import margins_by_order
from listener_reward.integrations.contract import as_reward, score
from listener_reward.integrations.video import ClipJudge, VideoReward, rank_videos, read_clips
from listener_reward.judge import Judge
from listener_reward.listener import Listener
from listener_reward.media.clips import Clip
from listener_reward.media.images import Picture, to_picture
from listener_reward.media.storyboards import as_picture, as_pictures, storyboard, to_visual
from listener_reward.media.videos import is_video, read_clip
from listener_reward.tiny.motion import draw_clip
from listener_reward.tiny.world import Scene

VIDEOALIGN = Path(__file__).resolve().parents[2] / "shared" / "data" / "videoalign"
SIZE = (48, 32)


def shades(reds, size=SIZE) -> list[Image.Image]:
    return [Image.new("RGB", size, (red, 0, 0)) for red in reds]


def reds(clip) -> list[int]:
    return [frame.image.getpixel((5, 5))[0] for frame in clip.frames]


def clip_of(frames: list[Image.Image]) -> Clip:
    return Clip(tuple(map(to_picture, frames)))


def written(path: Path, frames: list[Image.Image], fps: int = 10, codec: str | None = None) -> Path:
    av = pytest.importorskip("av")
    codec = (
        codec or {".mp4": "mpeg4", ".webm": "libvpx", ".mkv": "mpeg4", ".mov": "mpeg4", ".avi": "mpeg4"}[path.suffix]
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

RAMP = [20, 60, 100, 140, 180, 220]
ARRAY = np.stack([np.asarray(frame) for frame in shades(RAMP)])


@pytest.mark.parametrize(
    "video",
    [
        shades(RAMP),
        tuple(shades(RAMP)),
        list(ARRAY),
        ARRAY,
        ARRAY.astype(np.float32) / 255,
        ARRAY.transpose(0, 3, 1, 2).astype(np.float32) / 255,
        torch.tensor(ARRAY).permute(0, 3, 1, 2),
        (torch.tensor(ARRAY).permute(0, 3, 1, 2) / 255).half(),
    ],
    ids=["PIL", "tuple", "arrays", "THWC uint8", "THWC float", "TCHW float", "TCHW uint8", "TCHW half"],
)
def test_frames_in_memory(video):
    clip = read_clip(video, frames=6)
    assert reds(clip) == RAMP and clip.seconds is None and {frame.image.size for frame in clip.frames} == {SIZE}


def test_frames_are_spread_from_the_first_to_the_last():
    assert reds(read_clip(shades(RAMP), frames=2)) == [20, 220]
    assert reds(read_clip(shades(RAMP), frames=3)) == [20, 100, 220]
    assert reds(read_clip(shades(RAMP), frames=1)) == [20]
    assert reds(read_clip(shades([20, 60]), frames=4)) == [20, 20, 60, 60]


def test_rate_looks_at_moments_and_needs_the_videos_own():
    """Ten frames per second, looked at five times a second: every second frame; the end of a short video stays."""
    clip = read_clip(shades(RAMP), frames=4, fps=10, rate=5)
    assert reds(clip) == [20, 100, 180, 220] and clip.seconds == pytest.approx((0, 0.2, 0.4, 0.5))
    slow = read_clip(shades(RAMP), frames=4, fps=2.5, rate=5)  # each frame is shown for two looks
    assert reds(slow) == [20, 20, 60, 60]
    with pytest.raises(InputError, match="fps="):
        read_clip(shades(RAMP), rate=5)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".mov", ".avi"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_files(tmp_path, suffix, as_bytes):
    path = written(tmp_path / f"a{suffix}", shades(range(10, 250, 12)), fps=10)
    clip = read_clip(path.read_bytes() if as_bytes else path, frames=5)
    assert reds(clip) == pytest.approx([10, 70, 130, 178, 238], abs=8)
    assert clip.seconds == pytest.approx([0, 0.5, 1.0, 1.4, 1.9], abs=0.011)


def test_a_files_own_rate_may_be_overridden(tmp_path):
    path = written(tmp_path / "a.mp4", shades(range(10, 250, 12)), fps=10)
    assert read_clip(path, frames=2, rate=10).seconds == pytest.approx((0, 0.1), abs=1e-3)
    assert reds(read_clip(path, frames=2, rate=10, fps=5)) == pytest.approx([10, 10], abs=8)


def test_videos_of_different_rates_are_compared_at_the_same_moments(tmp_path):
    """The same second of motion, once at 10 and once at 20 frames per second."""
    slow = read_clip(written(tmp_path / "slow.mp4", shades(range(0, 240, 24)), fps=10), frames=4, rate=4)
    fast = read_clip(written(tmp_path / "fast.mp4", shades(range(0, 240, 12)), fps=20), frames=4, rate=4)
    assert reds(slow) == pytest.approx(reds(fast), abs=24)
    assert slow.seconds == pytest.approx(fast.seconds, abs=0.11)


def test_gif_with_frames_of_different_durations(tmp_path):
    frames = shades([20, 100, 220])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 400, 100])
    assert read_clip(tmp_path / "a.gif", frames=3).seconds == pytest.approx((0, 0.1, 0.5))
    assert reds(read_clip(tmp_path / "a.gif", frames=4, rate=5)) == [20, 100, 100, 220]
    frames[0].save(tmp_path / "still.gif")
    assert reds(read_clip(tmp_path / "still.gif", frames=2)) == [20, 20]


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_other_animations(kind):
    file, frames = io.BytesIO(), shades([20, 100, 220])
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=200, lossless=True)
    assert reds(read_clip(file.getvalue(), frames=3)) == [20, 100, 220]


def test_a_file_that_was_cut_short_keeps_its_last_frame(tmp_path):
    path = written(tmp_path / "a.mkv", shades(range(10, 250, 12)))
    data = path.read_bytes()
    clip = read_clip(data[: len(data) * 2 // 3], frames=4)
    assert len(clip.frames) == 4 and reds(clip)[0] == pytest.approx(10, abs=8)


UNREADABLE = {
    "missing file": "no/such.mp4",
    "URL": "https://example.org/a.mp4",
    "folder": ".",
    "empty bytes": b"",
    "text": b"a video of a fox, in words",
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "concat script": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "mp4 header only": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "webm header only": b"\x1a\x45\xdf\xa3" + b"\0" * 40,
    "one image": Image.new("RGB", (4, 4)),
    "rank 3": np.zeros((4, 4, 3), np.uint8),
    "rank 5": np.zeros((1, 2, 4, 4, 3), np.uint8),
    "no frames": [],
    "no frames, array": np.zeros((0, 4, 4, 3), np.uint8),
    "NaN": np.full((2, 4, 4, 3), np.nan, np.float32),
    "wrong range": np.full((2, 4, 4, 3), 255.0),
    "frames of nothing": [None, None],
    "a number": 7,
    "None": None,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_video_is_named(name):
    with pytest.raises(InputError, match=r"^clip"):
        read_clip(UNREADABLE[name], field="clip")


def test_no_codec_is_asked_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"listener-reward\[video\]"):
        read_clip(b"\0\0\0\x18ftypmp42" + b"\0" * 40)


@pytest.mark.parametrize(
    "options", [{"frames": 0}, {"frames": 2.0}, {"frames": 1000}, {"fps": 0}, {"rate": -1}, {"fps": math.nan}]
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        read_clip(shades(RAMP), **options)


# ---------------------------------------------------------------------------------------------------------------------
# What a file says of how it is shown
# ---------------------------------------------------------------------------------------------------------------------


def mp4_of(path: Path, frames: list[Image.Image], fps: int = 10) -> bytearray:
    """An mp4 with one key frame, at the start."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"g": "100", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("as_bytes", [False, True])
def test_what_an_edit_list_cuts_away_is_no_frame_of_the_video(tmp_path, as_bytes):
    """Trimmed without encoding anew: 16 packets, of which the list shows the last eight."""
    data = mp4_of(tmp_path / "whole.mp4", shades(range(20, 180, 10)))
    entries = data.index(b"elst") + 12  # after the name, the version and the count: duration, start
    units = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]  # a second of the track
    struct.pack_into(">Ii", data, entries, 800, units * 8 // 10)
    (tmp_path / "trimmed.mp4").write_bytes(data)
    clip = read_clip(bytes(data) if as_bytes else tmp_path / "trimmed.mp4", frames=2)
    assert reds(clip) == pytest.approx([100, 170], abs=6)  # frames 8 and 15
    assert clip.seconds == pytest.approx([0, 0.7], abs=0.001)
    assert reds(read_clip(bytes(data), frames=8)) == pytest.approx(list(range(100, 180, 10)), abs=6)
    assert reds(read_clip(bytes(data), frames=3, rate=5)) == pytest.approx([100, 120, 140], abs=6)


def turned(matrix, size=(64, 32)) -> Image.Image:
    """The frame of a video with a red corner at the top left and a green one at the top right, by a display matrix."""
    av = pytest.importorskip("av")
    frame = Image.new("RGB", size, "white")
    frame.paste("red", (0, 0, 16, 16))
    frame.paste((0, 160, 0), (size[0] - 16, 0, size[0], 16))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    data = bytearray(buffer.getvalue())
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return read_clip(bytes(data), frames=1).frames[0].image


def corners(picture: Image.Image) -> str:
    """Its four corners, from the top left on with the clock: r, g or w."""
    width, height = picture.size
    found = ""
    for place in ((4, 4), (width - 5, 4), (width - 5, height - 5), (4, height - 5)):
        pixel: Any = picture.getpixel(place)
        red, green, blue = pixel
        found += "w" if blue > 160 else "r" if red > green else "g"
    return found


@pytest.mark.parametrize(
    ("matrix", "size", "shown"),
    [
        ((1, 0, 0, 1), (64, 32), "rgww"),
        ((0, 1, -1, 0), (32, 64), "wrgw"),  # a quarter turn with the clock, as phones held upright write it
        ((-1, 0, 0, -1), (64, 32), "wwrg"),
        ((0, -1, 1, 0), (32, 64), "gwwr"),
        ((-1, 0, 0, 1), (64, 32), "grww"),
        ((1, 0, 0, -1), (64, 32), "wwgr"),
        ((0, 1, 1, 0), (32, 64), "rwwg"),
        ((0, -1, -1, 0), (32, 64), "wgrw"),
        ((0, 0, 0, 0), (64, 32), "rgww"),
    ],
)
def test_a_display_matrix_is_followed(matrix, size, shown):
    picture = turned(matrix)
    assert (picture.size, corners(picture)) == (size, shown)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux(stream.encode(av.VideoFrame.from_image(shades([90])[0])))
        container.mux(stream.encode(None))
    assert read_clip(buffer.getvalue(), frames=1).frames[0].image.size == (64, 32)


@pytest.mark.parametrize(
    ("codec", "kind", "pixels"),
    [
        ("png", "mov", "rgba"),
        ("qtrle", "mov", "argb"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("libvpx", "webm", "yuva420p"),
    ],
)
def test_transparent_videos_are_on_white(codec, kind, pixels):
    av = pytest.importorskip("av")
    layer = np.zeros((32, 48, 4), np.uint8)
    layer[:, :24] = 200, 20, 20, 255
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        options = {"auto-alt-ref": "0"} if kind == "webm" else {}
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, pixels, 2_000_000
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(layer, format="rgba").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_clip(buffer.getvalue(), frames=2)
    for frame in clip.frames:
        assert frame.image.getpixel((5, 5)) == pytest.approx((200, 20, 20), abs=6)
        assert frame.image.getpixel((44, 5)) == pytest.approx((255, 255, 255), abs=2)
    assert clip.seconds == pytest.approx((0, 0.2), abs=0.002)


def test_sound_alone_is_no_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for k in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"^second has no video in it, only sound; give a file with a video$"):
        read_clip(path, field="second")


def test_a_broken_file_is_refused_without_words_of_python(tmp_path):
    whole = bytes(mp4_of(tmp_path / "a.mp4", shades([20, 60])))
    for broken in (whole[:40], whole[: len(whole) // 2], whole[:200] + bytes(400)):
        with pytest.raises(InputError, match=r"^video ") as caught:
            read_clip(broken)
        assert "Error" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bytes", "path", "clip of the picture"])
def test_an_avif_picture_is_no_video(tmp_path, kind):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / "a.avif").write_bytes(b"")
    shades([120])[0].save(tmp_path / "a.avif", quality=100)
    media = (tmp_path / "a.avif").read_bytes() if kind == "bytes" else tmp_path / "a.avif"
    assert not is_video(media)
    pixel: Any = as_picture(media).getpixel((5, 5))
    assert isinstance(to_visual(media), Picture) and pixel[0] == pytest.approx(120, abs=3)


# ---------------------------------------------------------------------------------------------------------------------
# Storyboards
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("size", [(48, 32), (1280, 720), (720, 1280), (3, 3000)])
def test_a_storyboard_holds_its_frames_in_reading_order(n, size):
    values = [10 + 12 * k for k in range(n)]
    board: Any = storyboard(shades(values, size))
    assert max(board.size) <= 2048
    rows = math.isqrt(n)
    columns = math.ceil(n / rows)
    width, height = (board.width + 4) // columns, (board.height + 4) // rows
    corners = [(k % columns * width, k // columns * height) for k in range(n)]
    assert [board.getpixel(corner)[0] for corner in corners] == values
    ends = [(left + width - 5, top + height - 5) for left, top in corners]
    assert [board.getpixel(corner)[0] for corner in ends] == values


def test_frames_that_fit_are_kept_to_the_pixel():
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)) for _ in range(8)]
    board = storyboard(frames)
    corners = [(k % 4 * (48 + 4), k // 4 * (32 + 4)) for k in range(8)]
    cells = [board.crop((left, top, left + 48, top + 32)) for left, top in corners]
    assert [cell.tobytes() for cell in cells] == [frame.tobytes() for frame in frames]


def test_a_storyboard_of_nothing_is_refused():
    with pytest.raises(InputError, match="empty"):
        storyboard([])


def test_images_pass_and_videos_become_storyboards(tmp_path):
    assert as_picture(shades([9])[0]).size == SIZE
    assert as_picture(ARRAY[0]).size == SIZE
    assert as_picture(ARRAY).width > 4 * SIZE[0]
    assert as_picture(str(written(tmp_path / "a.mp4", shades(RAMP)))).width > 4 * SIZE[0]
    for one in (ARRAY, "a.mp4", shades([9])[0]):
        with pytest.raises(InputError, match="wrap it in a list"):
            as_pictures(one)
    with pytest.raises(InputError, match=r"videos\[1\]"):
        as_pictures([ARRAY, "no/such.mp4"])


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------

OUTPUT = np.stack([np.stack([np.asarray(f) for f in shades([red, red + 10])]) for red in (100, 200, 20)])


@pytest.mark.parametrize("strategy", ["storyboard", "frames"])
@pytest.mark.parametrize(
    "videos",
    [
        [shades([red, red + 10]) for red in (100, 200, 20)],
        OUTPUT.astype(np.float32) / 255,
        torch.tensor(OUTPUT).permute(0, 1, 4, 2, 3) / 255,
    ],
    ids=["pil", "np", "pt"],
)
def test_the_frames_of_a_pipeline_are_ranked_in_any_output_type(FakeJudge, videos, strategy):
    ranking = rank_videos(FakeJudge(), "a", videos, strategy=strategy, frames=2)
    assert ranking.order == [1, 0, 2] and ranking.comparisons == 3


def test_frames_are_averaged_worked_by_hand(FakeJudge):
    """Frame by frame the fake judge says sigmoid(4 * 51 / 255) and sigmoid(-4 * 102 / 255): 0.690 and 0.168."""
    judge = FakeJudge(listener_slope=4.0)
    clips = [clip_of(shades([151, 50]))], [clip_of(shades([100, 152]))]
    (verdict,) = ClipJudge(judge, "frames").compare_many(["a"], *clips)
    expected = (1 / (1 + math.exp(-0.8)) + 1 / (1 + math.exp(1.6))) / 2
    assert verdict.p_first == pytest.approx(expected, abs=1e-9) and verdict.preferred == 2
    assert verdict.listener_p_first == pytest.approx(expected, abs=1e-9) and verdict.contradicted is False
    assert judge.calls == [[("a", 151, 100), ("a", 50, 152)]] and len(verdict.thoughts) == 2


@pytest.mark.parametrize("strategy", ["storyboard", "frames", "clip", "video"])
def test_swapping_gives_exactly_the_rest(random_judge, strategy):
    judge = Judge.from_pretrained(random_judge, device="cpu", max_new_tokens=4, clips=strategy)
    rng = random.Random(3)
    clips = [clip_of(draw_clip(Scene("red", "circle", count), rng, 3)) for count in (1, 2, 3)]
    for i, j in ((0, 1), (1, 2)):
        there, back = (
            judge.compare("two red circles", clips[i], clips[j]),
            judge.compare("two red circles", clips[j], clips[i]),
        )
        assert there.p_first == 1 - back.p_first and 0 < there.p_first < 1
    same = judge.compare("two red circles", clips[0], clip_of([frame.image for frame in clips[0].frames]))
    assert same.p_first == 0.5 and same.preferred is None


class RedWords:
    """A model that says what `p` makes of the red values of the first pictures of both sides; it thinks nothing."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, p):
        self.p, self.chats = p, []

    def generate(self, chats, *, seeds, max_new_tokens, temperature):
        return ["<think>red</think><answer>1</answer>"] * len(chats)

    def label_logprobs(self, chats, prefixes, labels):
        self.chats += chats
        sides = [(chat.images[0].image, chat.images[len(chat.images) // 2].image) for chat in chats]
        values = [self.p(first.getpixel((0, 0))[0], second.getpixel((0, 0))[0]) for first, second in sides]
        return torch.tensor([[p, 1 - p] for p in values], dtype=torch.float64).log()

    def read(self, chats, prefixes, labels):
        return self.label_logprobs(chats, prefixes, labels), torch.zeros(len(chats))


def judge_of(reasoner, listener=None, **card) -> Judge:
    heard = listener and Listener(RedWords(listener), ChatFormat())
    return Judge(RedWords(reasoner), heard, Card(**card), clips="frames")


def test_frames_are_judged_with_the_tie_band_of_the_card():
    """0.6 on the one frame and 0.44 on the other are 0.52 together, which is within 0.05 of a tie."""
    p = {(9, 5): 0.6, (5, 9): 0.4, (1, 2): 0.44, (2, 1): 0.56}
    first, second = clip_of(shades([9, 1])), clip_of(shades([5, 2]))
    for band, preferred in ((0.0, 1), (0.05, None)):
        judge = judge_of(lambda *reds: p[reds], calibration=Calibration(tie_band=band))
        verdict = judge.compare("a", first, second)
        assert verdict.p_first == pytest.approx(0.52, abs=1e-6) and verdict.preferred == preferred
        assert len(verdict.thoughts) == 4 and verdict.by_order == pytest.approx((0.52, 0.52), abs=1e-6)


@pytest.mark.parametrize("clips", ["frames", "clip", "storyboard"])
def test_clips_are_judged_by_whom_the_card_says(clips):
    """The reasoner gives the first clip 0.7 and the listener 0.2: with its own word it would win, and it loses."""
    reasoner, listener = lambda one, other: 0.7 if one > other else 0.3, lambda one, other: 0.2 if one > other else 0.8
    judge = judge_of(reasoner, listener, aggregate="listener").with_clips(clips)
    first, second = clip_of(shades([9, 8])), clip_of(shades([5, 4]))
    verdict = judge.compare("a", first, second)
    assert verdict.p_first == pytest.approx(0.2, abs=1e-6) and verdict.preferred == 2
    assert verdict.contradicted is True, "the listener prefers the other clip than the one who thought"
    assert margins_by_order(verdict) == pytest.approx((-0.6, -0.6), abs=1e-6), "the margins are the listener's"
    both = judge_of(reasoner, listener, aggregate="both").with_clips(clips).compare("a", first, second)
    assert margins_by_order(both) == pytest.approx((-0.1, -0.1), abs=1e-6)


def test_clip_puts_all_frames_of_a_side_into_the_chat():
    judge: Any = judge_of(lambda one, other: 0.5, lambda one, other: 0.5).with_clips("clip")
    judge.compare("a", clip_of(shades([10, 20, 30])), clip_of(shades([40, 50, 60])))
    for chat in (judge.reasoner.chats[0], judge.listener.vlm.chats[0]):
        blocks = [block["type"] for turn in chat.messages if turn["role"] == "user" for block in turn["content"]]
        assert blocks.count("image") == 6 and blocks[blocks.index("image") :][:3] == ["image"] * 3
        assert sorted(frame.image.getpixel((5, 5))[0] for frame in chat.images) == [10, 20, 30, 40, 50, 60]


def test_files_and_clips_are_compared_as_images_are(tmp_path, random_judge):
    paths = [written(tmp_path / f"{red}.mp4", shades([red] * 3)) for red in (40, 200)]
    judge = Judge.from_pretrained(random_judge, device="cpu", think=False)
    by_file = judge.compare("a", *paths)
    assert by_file == judge.compare("a", *map(read_clip, paths)) == judge.compare("a", *[p.read_bytes() for p in paths])
    assert judge.rank("a", paths).comparisons == 1
    with pytest.raises(InputError, match=r"firsts\[0\] is a clip, and the other side an image"):
        judge.compare_many(["a"], [paths[0]], shades([9]))
    with pytest.raises(InputError, match=r"seconds\[0\] is a clip"):
        judge.compare_many(["a"], shades([9]), [paths[0]])
    with pytest.raises(InputError, match=r"8 frames and seconds\[0\] 3"):
        judge.with_clips("frames").compare("a", paths[0], read_clip(paths[1], frames=3))
    with pytest.raises(InputError, match="single frame"):
        judge.with_clips("video").compare("a", *(read_clip(path, frames=1) for path in paths))
    with pytest.raises(InputError, match="choose one of 'storyboard'"):
        judge.with_clips("film")  # pyright: ignore[reportArgumentType]


def test_clip_needs_a_judge_that_writes_chats(FakeJudge):
    with pytest.raises(InputError, match="'frames'"):
        rank_videos(FakeJudge(), "a", [ARRAY, ARRAY], strategy="clip")


def test_video_reward_has_the_contract_of_the_reward(FakeJudge):
    reward = VideoReward(FakeJudge(), strategy="frames", frames=2, scheme="group")
    scores, info = reward(torch.tensor(OUTPUT).permute(0, 1, 4, 2, 3) / 255, ["a"] * 3, ({},) * 3)
    assert scores.shape == (3,) and scores.dtype == np.float32 and np.argsort(-scores).tolist() == [1, 0, 2]
    assert info["comparisons"].tolist() == [2, 2, 2]


def test_video_reward_keeps_a_clip_as_reference_and_pickles(FakeJudge, random_judge):
    reward = VideoReward(FakeJudge(), strategy="frames", frames=2, scheme="reference")
    assert reward([shades([100, 110])], ["a"])[0].tolist() == [0.0]
    assert reward([shades([200, 210])], ["a"])[0][0] == pytest.approx(4 * 100 / 255, abs=1e-4)
    resumed = VideoReward(FakeJudge(), strategy="frames", frames=2, scheme="reference")
    resumed.load_state_dict(reward.state_dict())
    assert resumed([shades([200, 210])], ["a"])[0][0] == pytest.approx(4 * 100 / 255, abs=1e-4)
    by_name = VideoReward(str(random_judge), strategy="clip", frames=2, device="cpu", max_new_tokens=4)
    videos = [shades([10, 20]), shades([200, 210])]
    scores = by_name(videos, ["a", "a"])[0]
    assert pickle.loads(pickle.dumps(by_name))(videos, ["a", "a"])[0].tolist() == scores.tolist()


def test_video_reward_fails_like_the_reward(FakeJudge):
    broken = FakeJudge(breaks_on=lambda *_: True)
    with pytest.raises(JudgeError):
        VideoReward(broken, frames=2)(OUTPUT, ["a"] * 3)
    assert np.isnan(VideoReward(broken, frames=2, on_failure="nan")(OUTPUT, ["a"] * 3)[0]).all()


@pytest.mark.parametrize("options", [{"strategy": "first frame"}, {"frames": 0}])
def test_unknown_options_are_named(FakeJudge, options):
    with pytest.raises(InputError, match=next(iter(options))):
        VideoReward(FakeJudge(), **options)
    with pytest.raises(InputError, match="no effect"):
        VideoReward(FakeJudge(), device="cpu")
    with pytest.raises(InputError, match="judge is a int"):
        rank_videos(5, "a", [ARRAY])


def test_videos_of_an_image_are_judged_with_their_first_frame():
    judge = edits.EditJudge()
    videos = [[image] * 4 for image in (edits.HALF, edits.GOOD, edits.WRONG)]
    assert rank_videos(judge, edits.INSTRUCTION, videos, sources=edits.DARK, strategy="frames").order == [1, 0, 2]
    reward = VideoReward(judge, frames=2, strategy="frames", scheme="group")
    by_keyword, _ = reward(videos, [edits.INSTRUCTION] * 3, sources=[edits.DARK] * 3)
    by_metadata, _ = reward(videos, [edits.INSTRUCTION] * 3, [{"sources": edits.DARK}] * 3)
    assert by_keyword.argsort().tolist() == [2, 0, 1] and by_keyword.tolist() == by_metadata.tolist()
    both = [[image] * 4 for image in (edits.GOOD, edits.BRIGHT_GOOD)] * 2
    sources = [edits.DARK, edits.DARK, edits.BRIGHT, edits.BRIGHT]
    first, second, third, fourth = reward(both, [edits.INSTRUCTION] * 4, sources=sources)[0]
    assert first > second and third < fourth


def test_a_reward_of_videos_is_to_a_host_what_a_reward_of_images_is(FakeJudge):
    reward = VideoReward(FakeJudge(), frames=2, scheme="group", on_failure="nan")
    assert (reward.scheme, reward.on_failure) == ("group", "nan")
    with pytest.raises(InputError, match="1 of the prompts have one image in this call"):
        score(reward, [[edits.GOOD] * 2], ["a"])
    with pytest.raises(InputError, match="on_failure is 'group-mean' with scheme='auto'"):
        as_reward(VideoReward(FakeJudge(), on_failure="group-mean"), {}, scheme="reference")
    as_reward(reward, {}, scheme="group", device="cuda:3")
    assert reward.reward._device == "cuda:3"


def test_the_tiny_judge_puts_the_right_clip_first():
    """tests/benchmarks/videos.py measures how often; here four prompts, one right clip of four each."""
    judge = Judge.from_pretrained("tiny", device="cpu", clips="frames")
    rng, hits = random.Random(0), 0
    for prompt, right in (
        ("two red circles", Scene("red", "circle", 2)),
        ("a blue star", Scene("blue", "star", 1)),
        ("three green squares", Scene("green", "square", 3)),
        ("a yellow triangle", Scene("yellow", "triangle", 1)),
    ):
        scenes = [
            replace(right, color="purple", count=right.count % 3 + 1),
            replace(right, shape="square" if right.shape != "square" else "star", color="orange"),
            right,
            replace(right, count=(right.count + 1) % 3 + 1, shape="circle" if right.shape != "circle" else "star"),
        ]
        ranking = rank_videos_of(judge, prompt, [draw_clip(scene, rng) for scene in scenes])
        hits += ranking.order[0] == 2
    assert hits >= 3


def rank_videos_of(judge, prompt, videos):
    return judge.rank(prompt, read_clips(videos, frames=2))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["frames", "video"])
def test_rank_videos_command(tmp_path, random_judge, strategy):
    rng = random.Random(1)
    names = [
        str(written(tmp_path / f"{k}.mp4", [f.resize((64, 64)) for f in draw_clip(Scene("red", "star", k), rng)]))
        for k in (1, 2)
    ]
    command = [
        "rank-videos",
        "--judge",
        str(random_judge),
        "--strategy",
        strategy,
        "--frames",
        "2",
        "--prompt",
        "a red star",
    ]
    done = CliRunner().invoke(app, [*command, "--json", *names])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert sorted(answer["files"]) == sorted(names) and answer["comparisons"] == 1
    assert answer["files"][0] == names[answer["order"][0]]
    table = CliRunner().invoke(app, [*command, *names])
    assert table.exit_code == 0 and "log-odds" in table.stdout and "video" in table.stdout


def test_rank_videos_command_names_what_is_wrong(random_judge, tmp_path):
    for arguments, word in (
        (["no/such.mp4"], "no file"),
        (["no/such.mp4", "--strategy", "best"], "strategy"),
        (["no/such.mp4", "--frames", "500"], "frames"),
    ):
        done = CliRunner().invoke(app, ["rank-videos", "--judge", str(random_judge), "--prompt", "a", *arguments])
        assert done.exit_code == 2 and word in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Real clips
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_random_judge(tmp_path_factory) -> Path:
    """Random weights with a real Qwen2.5-VL's patches: a frame keeps 250,880 pixels, which are 320 visual tokens."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from listener_reward.tiny.models import QUESTION, build_model, build_processor

    folder = tmp_path_factory.mktemp("large-judge")
    processor = build_processor()
    images = processor.image_processor
    images.patch_size, images.size = 14, {"shortest_edge": 56 * 56, "longest_edge": 320 * 28 * 28}
    torch.manual_seed(0)
    configuration: Any = build_model(processor.tokenizer).config
    configuration.vision_config.patch_size = 14
    Qwen2_5_VLForConditionalGeneration(configuration).save_pretrained(folder)
    processor.save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION), listener=".").save(folder)
    return folder


@pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")
@pytest.mark.skipif(not VIDEOALIGN.exists(), reason="the clips of VideoAlign are not here")
@pytest.mark.parametrize("strategy", ["storyboard", "frames", "clip", "video"])
def test_three_labelled_pairs_of_real_clips_go_the_whole_way(large_random_judge, strategy):
    pytest.importorskip("av")
    with (VIDEOALIGN / "example.csv").open() as file:
        rows = {row["path_A"]: row for row in csv.DictReader(file)}.values()
    assert len(rows) == 3
    judge = Judge.from_pretrained(large_random_judge, device="cpu", think=False, batch_size=1)
    for row in rows:
        paths = [VIDEOALIGN / row[side] for side in ("path_A", "path_B")]
        clips = [read_clip(path, frames=2, rate=1) for path in paths]
        for clip, side in zip(clips, "AB", strict=True):
            assert min(clip.frames[0].image.size) >= 300 and clip.seconds == pytest.approx(
                (0, 1), abs=2 / float(row[f"fps_{side}"])
            )
        ranking = rank_videos(judge, row["prompt"], paths, strategy=strategy, frames=2, rate=1)
        assert sorted(ranking.order) == [0, 1] and ranking.scores[0] == pytest.approx(-ranking.scores[1])
        assert all(map(math.isfinite, ranking.scores))
