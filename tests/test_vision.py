"""Vision features: once for each picture, and those of the model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from PIL import Image

from listener_reward.chat import Chat
from listener_reward.judge import Judge
from listener_reward.media.images import Picture, to_picture
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.models.vision import ImageFeatures, as_encoder_output


@pytest.fixture(scope="module")
def vlm(random_judge) -> TransformersVLM:
    return TransformersVLM.from_pretrained(random_judge, device="cpu")


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Picture:
    rng = random.Random(seed)
    return to_picture(Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)))


def store(vlm: TransformersVLM, **options) -> ImageFeatures:
    return ImageFeatures(vlm.model.model, vlm.processor.image_processor, **options)


@torch.no_grad()
def test_features_are_those_of_the_model(vlm):
    images = [picture(0), picture(1, (64, 32)), picture(2)]
    batch = vlm.processor.image_processor(images=[each.image for each in images], return_tensors="pt")
    expected = vlm.model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    for entry, features, grid in zip(store(vlm)(images), expected, batch["image_grid_thw"], strict=True):
        torch.testing.assert_close(entry.features, features, atol=1e-6, rtol=1e-5)
        assert torch.equal(entry.grid, grid)


@torch.no_grad()
def test_equal_pictures_are_encoded_once_whatever_object_holds_them(vlm):
    features = store(vlm)
    entries = features([picture(0), picture(1), picture(0)])
    assert features.encoded == 2
    assert entries[0] is entries[2]
    features([picture(1), picture(3)])
    assert features.encoded == 3
    features.clear()
    features([picture(1)])
    assert features.encoded == 4


@torch.no_grad()
def test_what_is_kept_is_bounded_and_the_oldest_goes_first(vlm):
    one = store(vlm)([picture(0)])[0].nbytes
    features = store(vlm, max_bytes=2 * one)
    features([picture(0), picture(1)])
    features([picture(0)])  # now picture 1 is the oldest
    features([picture(2)])
    features([picture(0)])
    assert features.encoded == 3
    features([picture(1)])
    assert features.encoded == 4
    nothing = store(vlm, max_bytes=0)
    assert len(nothing([picture(0), picture(1), picture(0)])) == 3, "a call larger than the store is answered whole"


@torch.no_grad()
def test_many_patches_go_through_in_several_passes(vlm, monkeypatch):
    images = [picture(seed) for seed in range(5)]
    whole = store(vlm)(images)
    monkeypatch.setattr("listener_reward.models.vision.MAX_PATCHES", 80)  # 36 patches an image
    monkeypatch.setattr("listener_reward.models.vision.PREPARED", 30_000)  # three pictures
    for entry, expected in zip(store(vlm)(images), whole, strict=True):
        torch.testing.assert_close(entry.features, expected.features, atol=1e-6, rtol=1e-5)


def test_a_digest_tells_size_from_content():
    assert picture(0).digest == to_picture(picture(0).image.copy()).digest
    assert picture(0).digest != picture(1).digest
    assert to_picture(Image.new("RGB", (4, 8))).digest != to_picture(Image.new("RGB", (8, 4))).digest


def test_ranking_n_images_encodes_n_images(random_judge):
    judge: Any = Judge.from_pretrained(random_judge, device="cpu")
    judge.rank("two red circles", [picture(seed) for seed in range(5)])
    assert judge.reasoner.features.encoded == 5, "in ten pairs, both orders, to think and to answer"
    assert judge.listener.vlm.features.encoded == 5


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_chats_without_images_are_read_too(vlm, shared_prefix):
    words = [{"role": "user", "content": [{"type": "text", "text": "two red circles"}]}]
    reader = TransformersVLM(vlm.model, vlm.processor, shared_prefix=shared_prefix)
    found = reader.label_logprobs([Chat(words, ())] * 2, ["one ", "a red star "], ("1", "2"))
    for prefix, row in zip(("one ", "a red star "), found, strict=True):
        text = vlm.processor.apply_chat_template(words, tokenize=False, add_generation_prompt=True) + prefix
        inputs = vlm.processor(text=[text], return_tensors="pt")
        with torch.no_grad():
            expected = vlm.model(**inputs).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(row, expected[vlm.tokenizer.convert_tokens_to_ids(["1", "2"])], atol=1e-5, rtol=1e-5)
    assert len(reader.generate([Chat(words, ())], seeds=[0], max_new_tokens=3, temperature=1.0)) == 1
    assert as_encoder_output([]) == {}
