"""Vision-language models of many families, tiny and random: right answers at the slot, and refusals for the reason."""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.media.clips import Clip
from listener_reward.models import auto_processing, plain, transformers_vlm
from listener_reward.models.families import FAMILIES, family_of
from listener_reward.models.processing import decoded, load_processor
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.prefix.attention import MODEL_TYPES

FORMAT = ChatFormat(question=tiny_families.QUESTION)


@pytest.fixture(scope="module", params=tiny_families.TINY)
def folder(request, once) -> Path:
    return once(f"tiny-{request.param}", lambda path: tiny_families.build(request.param, path))


@pytest.fixture(scope="module", autouse=True)
def without_num2words():
    """SmolVLM's processor asks for this package, which writes the number of a video's frames in words."""
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def vlm(folder) -> TransformersVLM:
    return TransformersVLM.from_pretrained(folder, device="cpu", batch_size=3)


def noise(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def asked(vlm: TransformersVLM) -> list[Chat]:
    """Both orders of two pictures of different shapes, and a longer question."""
    one, other = noise(0), noise(1, 40, 90)
    asked = (("two red circles", one, other), ("two red circles", other, one), ("one blue star and one", one, one))
    return [FORMAT.chat(prompt, first, second, vlm.reserved) for prompt, first, second in asked]


def stock_inputs(vlm: TransformersVLM, chat: Chat, written: str = "") -> dict[str, Any]:
    """One chat with a beginning of the answer, unpadded, as a user of transformers writes it."""
    messages, shown = chat.messages, [picture.image for picture in chat.images]
    text = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = vlm.tokenizer.bos_token
    given = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    inputs = dict(vlm.processor(text=[text], images=[shown], return_tensors="pt", **given))
    more = torch.tensor([vlm.tokenizer(written, add_special_tokens=False)["input_ids"]], dtype=torch.long)
    width = inputs["input_ids"].shape[1]
    for name, values in inputs.items():
        if values.shape[:2] == (1, width):
            added = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))
            inputs[name] = torch.cat([values, added], dim=1)
    return inputs


def test_labels_are_those_of_the_models_own_generate(vlm, folder):
    """Rows of several lengths in one padded batch, against stock transformers with one unpadded row at a time."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    chats = asked(vlm)
    prefixes = [FORMAT.answer_slot(thought) for thought in ("", "image 1 : two clean red circles .", "no")]
    found, likelihoods = vlm.read(chats, prefixes, FORMAT.labels)
    torch.testing.assert_close(vlm.label_logprobs(chats, prefixes, FORMAT.labels), found, atol=1e-5, rtol=1e-5)
    labels = vlm.tokenizer.convert_tokens_to_ids(list(FORMAT.labels))
    for chat, prefix, row, likelihood in zip(chats, prefixes, found, likelihoods, strict=True):
        inputs = stock_inputs(vlm, chat, prefix)
        written = len(vlm.tokenizer(prefix, add_special_tokens=False)["input_ids"])
        drawn = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        expected = drawn.logits[0][0].log_softmax(-1)[labels]
        torch.testing.assert_close(row, expected, atol=5e-5, rtol=1e-4)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        torch.testing.assert_close(logits[-1].log_softmax(-1)[labels], expected, atol=5e-5, rtol=1e-4)
        tokens = inputs["input_ids"][0, -written:, None]
        own = logits[-written - 1 : -1].log_softmax(-1).gather(-1, tokens).clamp(min=-5.0).mean()
        torch.testing.assert_close(likelihood, own, atol=5e-5, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-4, "the order of the pictures must count"


def test_completions_are_those_of_the_models_own_generate(vlm, folder):
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    chats = asked(vlm)
    found = vlm.generate(chats, seeds=[0, 1, 2], max_new_tokens=5, temperature=0.0)
    for chat, completion in zip(chats, found, strict=True):
        inputs = stock_inputs(vlm, chat)
        drawn = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, suppress_tokens=vlm.vision_tokens(), pad_token_id=0
        )[0, inputs["input_ids"].shape[1] :]
        assert completion == decoded(vlm.tokenizer, drawn[None])[0]
    assert any(found)
    sampled = vlm.generate(chats, seeds=[3, 4, 5], max_new_tokens=5, temperature=1.0)
    for chat, seed, completion in zip(chats, (3, 4, 5), sampled, strict=True):
        alone = vlm.generate([chat], seeds=[seed], max_new_tokens=5, temperature=1.0)
        assert alone == [completion], "a batch is only a batch"


def test_a_judge_of_any_family_mirrors_its_verdict(folder):
    """Two thoughts in each order, read by a listener."""
    judge: Any = Judge.from_pretrained(folder, device="cpu", thoughts=2)
    one, other = noise(0), noise(1, 40, 90)
    verdict, mirrored = judge.compare_many(["two red circles"] * 2, [one, other], [other, one])
    assert verdict.p_first == 1 - mirrored.p_first
    assert 0 < verdict.p_first < 1 and verdict.p_first != 0.5
    assert verdict.listener_p_first == 1 - mirrored.listener_p_first
    assert len(verdict.thoughts) == 4
    assert judge.compare("two red circles", one, one).p_first == 0.5
    kind = judge.reasoner.model.config.model_type
    assert judge.reasoner.shared_prefix is (kind in MODEL_TYPES)


def test_a_processor_saved_here_is_the_one_that_was_loaded(vlm, tmp_path):
    vlm.processor.save_pretrained(tmp_path)
    shutil.copyfile(Path(vlm.checkpoint) / "config.json", tmp_path / "config.json")
    chat = asked(vlm)[0]
    again = load_processor(tmp_path)
    assert type(again).__name__ == type(vlm.processor).__name__
    text = again.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
    shown = [[picture.image for picture in chat.images]]
    for name, values in again(text=[text], images=shown, return_tensors="pt").items():
        assert torch.equal(values, vlm.processor(text=[text], images=shown, return_tensors="pt")[name]), name


# ---------------------------------------------------------------- the plain path


def built(once, kind: str) -> Path:
    return once(f"tiny-{kind}", lambda path: tiny_families.build(kind, path))


def test_the_plain_path_is_said_once(once, caplog, monkeypatch):
    monkeypatch.setattr(transformers_vlm, "_TOLD", set())
    with caplog.at_level(logging.WARNING, "listener_reward"):
        Judge.from_pretrained(built(once, "gemma3"), device="cpu", listener=built(once, "gemma3"))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("listener_reward")]
    assert said.startswith("every chat pays for its own prompt, because 'gemma3' is not one of the architectures")


def test_a_cap_on_logits_is_part_of_the_answer(once):
    """Gemma 2 and 3n squash what their head gives; the labels' probabilities are those after it."""
    vlm = TransformersVLM.from_pretrained(built(once, "llava"), device="cpu")
    head, stock = vlm.model.lm_head, vlm.model.forward

    def capped(**given: Any) -> Any:
        output = stock(**given)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    chats = asked(vlm)[:1]
    uncapped = vlm.label_logprobs(chats, [FORMAT.answer_slot("")], FORMAT.labels)
    vlm.model.forward = functools.wraps(stock)(capped)
    with plain.watched(head) as passes:
        found = vlm.label_logprobs(chats, [FORMAT.answer_slot("")], FORMAT.labels)
    expected = (2.0 * torch.tanh(passes[-1][1][:, -1] / 2.0)).log_softmax(-1)
    labels = vlm.tokenizer.convert_tokens_to_ids(list(FORMAT.labels))
    torch.testing.assert_close(found, expected[:, labels], atol=1e-5, rtol=1e-5)
    assert (found - uncapped).abs().max() > 0.01


def test_logits_are_made_for_a_few_rows_at_a_time(once, monkeypatch):
    vlm = TransformersVLM.from_pretrained(built(once, "llava"), device="cpu")
    chats = asked(vlm)
    prefixes = [FORMAT.answer_slot("so")] * 3
    whole = vlm.read(chats, prefixes, FORMAT.labels)
    monkeypatch.setattr(plain, "LOGITS_BYTES", 1)
    with plain.watched(vlm.model.lm_head) as passes:
        split = vlm.read(chats, prefixes, FORMAT.labels)
    assert [states.shape[0] for states, _ in passes] == [1, 1, 1]
    for one, other in zip(split, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_ends_a_turn_is_no_word_of_the_completion(once):
    """Idefics3's turns end with a token that its tokenizer does not know as an end."""
    vlm = TransformersVLM.from_pretrained(built(once, "llava"), device="cpu")
    chats = asked(vlm)[:1]
    word = vlm.generate(chats, seeds=[1], max_new_tokens=5, temperature=1.0)[0].split()[1]
    vlm.model.generation_config.eos_token_id = [vlm.tokenizer.convert_tokens_to_ids(word)]
    assert word not in vlm.generate(chats, seeds=[1], max_new_tokens=5, temperature=1.0)[0]


def test_a_video_processor_that_torchvision_would_run_is_saved_again(once, tmp_path):
    folder = shutil.copytree(built(once, "internvl"), tmp_path / "internvl")
    settings = {"video_processor_type": "InternVLVideoProcessor", "num_frames": 4}
    for file, saved in (("video_preprocessor_config.json", settings), ("processor_config.json", {})):
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(known | saved))
    load_processor(folder).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"]
    assert settings.items() <= saved.items()  # torchvision's own processor has more
    if not find_spec("torchvision"):
        assert saved == settings


# ---------------------------------------------------------------- refusals


def test_clips_as_videos_are_refused_and_frames_are_not(once):
    vlm = TransformersVLM.from_pretrained(built(once, "internvl"), device="cpu")
    frames = tuple(FORMAT.chat("", noise(0), noise(1)).images)
    clip = Clip(frames, (0.0, 1.0))
    with pytest.raises(InputError, match="'internvl' checkpoint is not shown clips as videos here; show their frames"):
        vlm.label_logprobs([FORMAT.chat("one", clip, clip)], [FORMAT.answer_slot("")], FORMAT.labels)
    shown = FORMAT.chat("one", frames, frames, vlm.reserved)
    assert torch.isfinite(vlm.label_logprobs([shown], [FORMAT.answer_slot("")], FORMAT.labels)).all()


@pytest.mark.skipif("qwen3_5" not in tiny_families.TINY, reason="this transformers has no Qwen3.5")
def test_qwen3_5_watches_clips_by_the_plain_path(once):
    vlm = TransformersVLM.from_pretrained(built(once, "qwen3_5"), device="cpu")
    one, other = (Clip(FORMAT.chat("", noise(seed), noise(seed + 1)).images, (0.0, 1.0)) for seed in (0, 2))
    chats = [FORMAT.chat("one", *shown, reserved=vlm.reserved) for shown in ((one, other), (other, one))]
    found = vlm.label_logprobs(chats, [FORMAT.answer_slot("")] * 2, FORMAT.labels)
    alone = vlm.label_logprobs(chats[:1], [FORMAT.answer_slot("")], FORMAT.labels)
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4, "the order of the clips must count"


def test_a_template_that_leaves_images_out_is_refused(once, tmp_path):
    folder = shutil.copytree(built(once, "llava"), tmp_path / "llava")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("block.type == 'image'", "block.type == 'picture'"))
    template.write_text(template.read_text().replace("block.text }}", "block.text or '' }}"))
    with pytest.raises(InputError, match=r"leaves \{'type': 'image'\} blocks out, so that it would judge images which"):
        TransformersVLM.from_pretrained(folder)


def test_a_template_that_fails_is_refused_in_one_line(once, tmp_path):
    folder = shutil.copytree(built(once, "llava"), tmp_path / "llava")
    (folder / "chat_template.jinja").write_text(
        "{{ raise_exception('one turn of text only') if messages[0].content is not string }}"
    )
    with pytest.raises(InputError, match="'llava' checkpoint cannot write a question: one turn of text only"):
        TransformersVLM.from_pretrained(folder)


def test_a_model_of_one_image_is_refused(once, monkeypatch):
    stock = plain.PlainBatches.encode

    def one_only(self: Any, chats: Any, texts: Any) -> Any:
        if any(len(chat.images) > 1 for chat in chats):
            raise ValueError("one image a text")
        return stock(self, chats, texts)

    monkeypatch.setattr(plain.PlainBatches, "encode", one_only)
    with pytest.raises(InputError, match="'llava' checkpoint cannot be shown two images in one chat: one image a text"):
        TransformersVLM.from_pretrained(built(once, "llava"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "'bert' model, which is no vision-language model: it reads text alone"),
        ("qwen3", "'qwen3' model, which is no vision-language model: it reads text alone"),
        ("clip", "'clip' model, which is no vision-language model: it does not write about images"),
        ("qwen99", "'qwen99' model, which transformers .* does not know"),
        (None, "its config.json names no model_type"),
    ],
)
def test_other_models_are_refused_for_the_right_reason(kind, reason):
    with pytest.raises(InputError, match=reason) as caught:
        family_of(kind, where="org/model")
    assert "'org/model' cannot be loaded" in str(caught.value)
    assert "connection" not in str(caught.value)


def test_code_in_a_checkpoint_is_named_as_the_reason():
    with pytest.raises(InputError, match="does not know; the model's code is in the checkpoint, and code from a "):
        family_of("internvl_chat", where="org/model", config={"auto_map": {"AutoModel": "modeling.Model"}})


def test_a_missing_package_of_a_processor_is_named(once, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(InputError, match=r"`num2words` is required to run SmolVLM processor\. Install it with `pip"):
        load_processor(built(once, "smolvlm"))


def test_a_family_without_a_processor_is_refused(once, monkeypatch):
    folder = built(once, "llava")
    monkeypatch.setattr(auto_processing, "_load", lambda *_, **__: object())
    with pytest.raises(InputError, match="transformers has no processor of images and text for 'llava' models"):
        load_processor(folder)


def test_the_table_knows_which_families_share_prefixes():
    assert {kind for kind, family in FAMILIES.items() if family.shares_prefix} == set(MODEL_TYPES)
    assert family_of("internvl") == ("internvl", None, False, False)
