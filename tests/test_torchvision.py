"""transformers' own processors, which want torchvision, against what stands for them without it, on the same pictures.

They resize by different code: a value of a resized picture may be rounded the other way, 1/255 of the whole range.
Where nothing is resized they agree to the last digits of a float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available

from listener_reward.judge import Judge
from listener_reward.models.hub import resolve
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import load_processor
from listener_reward.models.video_processing import ClipProcessor, StockClipProcessor

if not is_torchvision_available():
    pytestmark = pytest.mark.skip("torchvision is not installed")

FAMILIES = {"Qwen2VLVideoProcessor": 14, "Qwen3VLVideoProcessor": 16}
"""Each stock video processor with the patch size of its family."""

STEP = 1 / 255 / 0.26
"""What one of 256 levels is after normalisation, in the channel with the smallest deviation."""


def pictures(width: int, height: int, count: int = 4) -> list[Image.Image]:
    """A smooth scene that moves, with an edge, as a photograph has and noise has not."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        waves = [np.sin((x + 9 * number) / 17), np.cos(y / 11 - number), np.sin((x - y) / 23)]
        scene = np.stack([127.5 * (1 + wave) for wave in waves], -1)
        scene[height // 4 : height // 2, width // 4 + number : width // 2] = (230, 20, 60)
        frames.append(Image.fromarray(scene.astype(np.uint8)))
    return frames


def compare(ours: Any, stock: Any, *, resized: bool) -> None:
    difference = (ours - stock).abs()
    assert difference.max() <= (2.1 * STEP if resized else 1e-5)
    assert difference.mean() <= (0.2 * STEP if resized else 1e-6)


@pytest.mark.parametrize("size", [(224, 224), (300, 200)], ids=["as they are", "resized"])
def test_images(size):
    limits = {"size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}, "patch_size": 14, "merge_size": 2}
    fast = getattr(transformers, "Qwen2VLImageProcessorFast", None) or transformers.Qwen2VLImageProcessor
    stock: Any = fast(**limits)(images=pictures(*size), return_tensors="pt")
    ours = Qwen2VLImageProcessorPil(**limits)(images=pictures(*size), return_tensors="pt")
    assert ours["image_grid_thw"].tolist() == stock["image_grid_thw"].tolist()
    compare(ours["pixel_values"], stock["pixel_values"], resized=size != (224, 224))


@pytest.mark.parametrize("stock", FAMILIES)
@pytest.mark.parametrize("sides", [(8, 8), (9.6, 7.1)], ids=["as they are", "resized"])
def test_clips(stock, sides):
    """`sides` in placeholder tokens."""
    patch = FAMILIES[stock]
    width, height = (int(side * 2 * patch) for side in sides)
    images = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2)
    saved = {"size": {"shortest_edge": 16 * patch**2, "longest_edge": 4096 * patch**2}, "patch_size": patch}
    film = [pictures(width, height, 4), pictures(height, width, 5)]
    ours = ClipProcessor(stock, images, saved)(film)
    processor = StockClipProcessor(getattr(transformers, stock).from_dict(saved))
    theirs = processor(film)
    for frames, (_, high, wide) in zip(film, theirs["video_grid_thw"].tolist(), strict=True):
        assert processor.frame_size(len(frames), *frames[0].size) == (wide * patch, high * patch)
    assert ours["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
    assert ours["video_metadata"] == theirs["video_metadata"]
    compare(ours["pixel_values_videos"], theirs["pixel_values_videos"], resized=sides != (8, 8))


def test_a_judge_has_them(monkeypatch):
    stock = load_processor(resolve("tiny"))
    assert isinstance(stock.video_processor, StockClipProcessor)
    assert type(stock.image_processor) is not Qwen2VLImageProcessorPil
    judge: Any = Judge.from_pretrained("tiny", device="cpu", think=False)
    first, second = pictures(96, 64, 2)
    found = judge.compare("two red circles", first, second)
    for vlm in {id(vlm): vlm for vlm in (judge.reasoner, judge.listener.vlm)}.values():
        slow = Qwen2VLImageProcessorPil.from_dict(vlm.processor.image_processor.to_dict())
        vlm.features.clear()
        vlm.features.image_processor = slow
    assert judge.compare("two red circles", first, second).p_first == pytest.approx(found.p_first, abs=0.02)
