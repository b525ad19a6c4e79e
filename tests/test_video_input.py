"""The model's own video input: patches, times and positions as transformers has them, through the whole judge."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.integrations.video import VideoReward
from listener_reward.judge import Judge
from listener_reward.media.clips import Clip
from listener_reward.media.images import to_picture
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil, video_texts
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor, ImageOnlyQwen3VLProcessor, load_processor
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.models.video_processing import ClipProcessor, metadata
from listener_reward.tiny.models import CHAT_TEMPLATE, QUESTION, build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def clip(seed: int, rate: float | None = 2.0, frames: int = 5, size: tuple[int, int] = (96, 64)) -> Clip:
    seconds = None if rate is None else tuple(k / rate for k in range(frames))
    return Clip(tuple(to_picture(noise(1000 * seed + k, size)) for k in range(frames)), seconds)


def film_of(clip: Clip) -> list[Image.Image]:
    return [frame.image for frame in clip.frames]


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request, tmp_path_factory) -> Judge:
    """Random weights, saved and loaded again; it is its own listener."""
    tokenizer = build_tokenizer()
    token = tokenizer.get_vocab()
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids: dict[str, Any] = {f"{name}_id": token[word] for name, word in zip(names, words, strict=True)}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    torch.manual_seed(0)
    model: Any
    if request.param == "qwen3_vl":
        vision |= {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
        config: Any = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        model, kind = Qwen3VLForConditionalGeneration(config), ImageOnlyQwen3VLProcessor
    else:
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        model, kind = Qwen2_5_VLForConditionalGeneration(config), ImageOnlyQwen2_5_VLProcessor
    patch = vision["patch_size"]
    size = {"shortest_edge": 4 * patch**2, "longest_edge": 1000 * patch**2}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=patch, merge_size=2, temporal_patch_size=2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    kind(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION), listener=".", max_new_tokens=6).save(folder)
    return Judge.from_pretrained(folder, device="cpu", batch_size=8)


def asked(judge: Judge, *pairs: tuple[Clip, Clip], prompt: str = "two red circles") -> list[Any]:
    return [judge.card.format.chat(prompt, *pair, judge.reasoner.reserved) for pair in pairs]


# ---------------------------------------------------------------- patches


def patches_by_hand(frames: list[np.ndarray], patch: int, mean: Any, std: Any) -> np.ndarray:
    """Every value by its index: groups of 2 x 2 patches in reading order, within a patch channel, time, row, column."""
    video = np.stack([(frame / 255 - mean) / std for frame in frames])
    rows = []
    height, width = video.shape[1] // patch, video.shape[2] // patch
    for t in range(0, len(video), 2):
        for group_y in range(0, height, 2):
            for group_x in range(0, width, 2):
                for y, x in ((group_y + dy, group_x + dx) for dy in (0, 1) for dx in (0, 1)):
                    cell = video[t : t + 2, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                    rows.append(cell.transpose(3, 0, 1, 2).ravel())
    return np.stack(rows)


def test_patches_are_those_worked_by_hand(judge):
    """Of 5 frames the last stands twice. Sizes of whole patches, so that nothing is resized."""
    processor = judge.reasoner.processor.video_processor
    side = 2 * processor.patch_size
    shown = [clip(1, size=(3 * side, 2 * side)), clip(2, frames=2, size=(side, side))]
    found = processor([film_of(each) for each in shown])
    assert found["video_grid_thw"].tolist() == [[3, 4, 6], [1, 2, 2]]
    frames = [[*film_of(each), *film_of(each)[-1:] * (len(each.frames) % 2)] for each in shown]
    mean, std = processor.config["image_mean"], processor.config["image_std"]
    expected = [patches_by_hand([np.asarray(f) for f in some], side // 2, mean, std) for some in frames]
    np.testing.assert_allclose(found["pixel_values_videos"].numpy(), np.concatenate(expected), atol=1e-5)


def test_a_video_of_one_picture_has_the_patches_of_the_image(judge):
    """Both processors resize the 96 x 64 pixels; the video's limits are the image's in this checkpoint."""
    processor = judge.reasoner.processor
    image = noise(3)
    still = processor.image_processor(images=[image], return_tensors="pt")
    moving = processor.video_processor([[image, image]])
    assert torch.equal(moving["pixel_values_videos"], still["pixel_values"])


@pytest.mark.parametrize(
    ("stock", "options", "expected"),
    [
        # 28 * 28 * 768 pixels a frame: sqrt(1280 * 720 / 602112) = 1.2372; / 28: 36.95 and 20.78
        ("Qwen2VLVideoProcessor", {}, (36 * 28, 20 * 28)),
        ("Qwen2VLVideoProcessor", {"max_pixels": 10**7}, (46 * 28, 26 * 28)),
        # 1000 tokens for the whole: 705600 * 2 // 8 = 176400 a frame, beta = 2.2857; 20.0 and 11.25
        ("Qwen2VLVideoProcessor", {"cap_pixels_per_frame": True, "max_video_tokens": 1000}, (20 * 28, 11 * 28)),
        # 32 * 32 * 768 pixels the whole: sqrt(8 * 921600 / 786432) = 3.0619; 1280 / 3.0619 / 32 = 13.06, 7.35
        ("Qwen3VLVideoProcessor", {}, (13 * 32, 7 * 32)),
        ("Qwen3VLVideoProcessor", {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}, (40 * 32, 22 * 32)),
        # 100 tokens a frame: 102400, but not under 1.05 * 131072 = 137625 a frame; beta = 2.5878; 15.46 and 8.69
        ("Qwen3VLVideoProcessor", {"cap_pixels_per_frame": True, "max_video_tokens": 100}, (15 * 32, 8 * 32)),
    ],
)
def test_frames_become_as_large_as_in_transformers(stock, options, expected):
    patch = 16 if stock.startswith("Qwen3") else 14
    images = Qwen2VLImageProcessorPil(patch_size=patch)
    assert ClipProcessor(stock, images, options).frame_size(8, 1280, 720) == expected


def test_a_checkpoints_own_limits_are_read_and_saved(judge, tmp_path):
    processor = judge.reasoner.processor
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    assert saved["video_processor"]["video_processor_type"] == processor.stock_video_processor
    assert saved["video_processor"]["size"] == processor.video_processor.config["size"]
    saved["video_processor"]["size"] = {"shortest_edge": 1, "longest_edge": 12345}
    path.write_text(json.dumps(saved))
    assert load_processor_of(judge, tmp_path).video_processor.config["size"]["longest_edge"] == 12345
    del saved["video_processor"]  # as released Qwen2.5-VL checkpoints: the image processor's file is the video's too
    path.write_text(json.dumps(saved))
    legacy = saved["image_processor"] | {"min_pixels": 3136, "max_pixels": 54321}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(legacy))
    found = load_processor_of(judge, tmp_path).video_processor.config["size"]["longest_edge"]
    # Qwen3-VL's stock processor does not know the older names.
    expected = {"qwen2_5_vl": 54321, "qwen3_vl": legacy["size"]["longest_edge"]}
    assert found == expected[judge.reasoner.model.config.model_type]


def load_processor_of(judge: Any, folder: Any) -> Any:
    judge.reasoner.model.config.save_pretrained(folder)
    return load_processor(folder)


def test_patches_are_those_of_transformers_own_code(judge):
    """Its video processor cannot be made without torchvision, but what cuts patches there is torch alone."""
    processor = judge.reasoner.processor.video_processor
    side = 2 * processor.patch_size
    frames = film_of(clip(1, size=(2 * side, 3 * side)))
    pixels = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])[None] / 255
    mean, std = (torch.tensor(processor.config[name])[:, None, None] for name in ("image_mean", "image_std"))
    cut: Any = getattr(Qwen3VLVideoProcessor, "patchify", None)
    if cut is None:
        pytest.skip("this transformers cuts a video's patches only where torchvision is")
    expected, *grid = cut(None, (pixels - mean) / std, processor.patch_size, 2, 2)
    found = processor([frames])
    torch.testing.assert_close(found["pixel_values_videos"], expected[0], atol=1e-5, rtol=0)
    assert found["video_grid_thw"].tolist() == [grid]


# ---------------------------------------------------------------- times


def test_times_are_those_that_transformers_would_have_of_the_whole_video():
    whole = VideoMetadata(total_num_frames=6, fps=10.0, frames_indices=[0, 1, 2, 3, 4, 5])
    ours = metadata(clip(1, rate=10.0, frames=6))
    assert ours.timestamps == whole.timestamps and ours.sampled_fps == pytest.approx(whole.sampled_fps)


def test_unknown_times_are_two_frames_a_second():
    assert clip(1, rate=None).times == (0, 0.5, 1, 1.5, 2) and clip(1, rate=None).spacing == 0.5
    still = Clip(clip(1).frames, (0.0,) * 5)  # a video of one frame, looked at five times
    assert still.times == clip(1, rate=None).times
    assert Clip(clip(1).frames, (0.0, 0.1, 0.1, 0.4, 2.0)).spacing == 0.5


@torch.no_grad()
def test_times_reach_the_model(judge):
    """Qwen2.5-VL spaces positions by `tokens_per_second` (4) times the seconds of a patch of two frames; Qwen3-VL
    writes the middle of each patch's times before it."""
    vlm = judge.reasoner
    slow, fast = asked(judge, (clip(1, rate=1.0), clip(2)), (clip(1, rate=4.0), clip(2)))
    texts = vlm._texts([slow, fast])
    prompts, groups = vlm._prompts([slow, fast], texts)
    assert len(groups) == 2, "equal frames at other times are another question"
    start = vlm.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    if vlm.model.config.model_type == "qwen3_vl":
        stamped = [
            video_texts(vlm.processor, grid_of(vlm, each), texts[0])[1][0] for each in (slow.videos[0], fast.videos[0])
        ]
        for text, times in zip(stamped, (("0.5", "2.5", "4.0"), ("0.1", "0.6", "1.0")), strict=True):
            assert [part.split("<")[-1] for part in text.split(" seconds>")[:-1]] == list(times)
        return
    # Up to 5.18 transformers drops what is not a whole second.
    whole_seconds = "* next(second_per_grid_ts)" not in inspect.getsource(type(vlm.model.model).get_rope_index)
    for prompt, step in zip(prompts, (8, 0 if whole_seconds else 2), strict=True):
        first = int((prompt.ids == start).nonzero()[0])
        patches = prompt.images[0].grid.prod().item() // 4
        per_time = patches // 3
        time = prompt.positions[0, first : first + patches] - first
        assert time.tolist() == [k * step for k in range(3) for _ in range(per_time)]


def grid_of(vlm: TransformersVLM, shown: Clip) -> dict[str, Any]:
    grid = vlm.processor.video_processor([film_of(shown)])["video_grid_thw"]
    return {"video_grid_thw": grid, "video_metadata": [metadata(shown)]}


# ---------------------------------------------------------------- the whole path


@torch.no_grad()
def test_prompts_are_those_of_the_stock_processor_and_positions_those_of_the_model(judge):
    vlm = judge.reasoner
    chats = asked(judge, (clip(1, rate=1.0), clip(2, rate=8.0)), prompt="<|video_pad|> red <|vision_start|>")
    texts = vlm._texts(chats)
    assert texts[0].count("<|video_pad|>") == 2, "the prompt's own is no placeholder"
    (prompt,), _ = vlm._prompts(chats, texts)
    inputs = vlm._plain.encode(chats, texts)
    assert torch.equal(prompt.ids, inputs["input_ids"][0])
    keys = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    expected, _ = vlm.model.model.get_rope_index(**{key: inputs[key] for key in keys if key in inputs})
    assert torch.equal(prompt.positions, expected[:, 0])
    if vlm.model.config.model_type == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [2.0, 0.25]


@pytest.mark.parametrize("token_budget", [1, 16384], ids=["a row for each", "one row"])
def test_a_shared_prefix_reads_and_writes_as_plain_passes_do(judge, token_budget):
    model, processor = judge.reasoner.model, judge.reasoner.processor
    one, two = clip(1), clip(2)
    chats = asked(judge, (one, two), (one, two), (clip(1, rate=0.5), two), (two, one))
    chats += [ChatFormat(question=QUESTION).chat("one", noise(5), noise(6))]  # images beside videos in one row
    prefixes = ["<think></think><answer>", "<think>a blue star</think><answer>", *["<think>no</think><answer>"] * 3]
    shared = TransformersVLM(model, processor, token_budget=token_budget)
    plain = TransformersVLM(model, processor, shared_prefix=False)
    expected = plain.read(chats, prefixes, ("1", "2"))
    for found, wanted in zip(shared.read(chats, prefixes, ("1", "2")), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-5
    assert len(set(expected[0][:, 0].tolist())) == 5, "frames, order, times and thought all matter"
    assert shared.features.encoded == 4, "two clips and two images"
    written = [each.generate(chats, seeds=range(5), max_new_tokens=8, temperature=1.0) for each in (shared, plain)]
    assert written[0] == written[1] and all(written[0])


@pytest.mark.parametrize("think", [True, False])
def test_swapping_gives_exactly_the_rest(judge, think):
    clips = judge.with_clips("video")
    one, two, slow = clip(1), clip(2), clip(1, rate=0.25)
    for first, second in ((one, two), (one, slow)):
        there, back = (clips.compare("a", *pair, think=think) for pair in ((first, second), (second, first)))
        assert there.p_first == 1 - back.p_first and 0 < there.p_first < 1
        assert there.p_first != 0.5 and there.listener_p_first == 1 - back.listener_p_first
        assert len(there.thoughts) == 2 * think
    assert clips.compare("a", one, one, think=think).p_first == 0.5


def test_a_template_without_videos_is_named(judge, monkeypatch):
    template = CHAT_TEMPLATE.replace("'video'", "'film'")
    monkeypatch.setattr(judge.reasoner.processor, "chat_template", template)
    with pytest.raises(InputError, match="chat template leaves"):
        judge.reasoner.label_logprobs(asked(judge, (clip(1), clip(2))), ["<answer>"], ("1", "2"))


def test_one_frame_is_no_video(judge):
    with pytest.raises(InputError, match="frames is 1"):
        VideoReward(judge, strategy="video", frames=1)


def test_a_reference_keeps_its_times(judge):
    """Kept as PNGs between calls: the same frames at another speed are not the reference, those at its own are."""
    reward = VideoReward(judge, strategy="video", frames=3, scheme="reference", fps=1.0)
    video = [noise(k) for k in range(3)]
    assert reward([video], ["a"])[0].tolist() == [0.0]
    assert reward([video], ["a"])[0].tolist() == [0.0]
    reward.reading["fps"] = 8.0
    assert reward([video], ["a"])[0][0] != 0
