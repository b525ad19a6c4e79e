"""The tiny editor: it sees its source, reads every instruction, and its script trains, resumes and measures."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from listener_reward.tiny.diffusion import CALL, LATENT_STD, build_pipeline, set_encoder
from listener_reward.tiny.editing import build_editor, draw_edits, draw_work, load_editor, main, sample_work
from listener_reward.tiny.read import read_framed


@pytest.fixture(scope="module")
def editor() -> Any:
    editor: Any = build_editor()
    set_encoder(editor.vae, draw_edits(40, 0)[1])
    editor.set_progress_bar_config(disable=True)
    return editor


def test_every_word_of_an_instruction_is_known_and_none_is_cut(editor: Any) -> None:
    tokenizer = editor.tokenizer
    for k in range(300):
        text = sample_work(random.Random(k), 0.0).wording
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= tokenizer.model_max_length, text


def test_the_denoiser_sees_the_sources_latents(editor: Any) -> None:
    """The pipeline gives it what it learnt from: the encoder's latents, which are not scaled."""
    _, before, _ = draw_edits(40, 0)
    latents = set_encoder(editor.vae, before)
    seen: list[torch.Tensor] = []
    editor.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    editor("add a frame", image=Image.fromarray(before[3].permute(1, 2, 0).numpy()), **CALL)
    assert len(seen) == CALL["num_inference_steps"] and seen[0].shape == (1, 24, 8, 8)
    assert torch.allclose(seen[0][0, 12:], LATENT_STD * latents[3], atol=1e-4)


def test_the_result_depends_on_source_instruction_and_seed(editor: Any) -> None:
    sources = [draw_work(sample_work(random.Random(k), 0.0))[0] for k in range(2)]

    def edited(text: str, source: Image.Image, seed: int = 0) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        return editor(text, image=source, generator=generator, **CALL | {"num_inference_steps": 2}).images[0].tobytes()

    one = edited("add a frame", sources[0])
    assert edited("add a frame", sources[0]) == one
    others = edited("add a frame", sources[1]), edited("make it two", sources[0]), edited("add a frame", sources[0], 1)
    assert len({one, *others}) == 4


def test_it_learns_from_edits_of_which_some_lie() -> None:
    right = lies = 0
    for k in range(150):
        honest, other = (sample_work(random.Random(k), share) for share in (0.0, 1.0))
        assert honest.first == honest.goal and "glitched" not in (other.source.quality, other.first.quality)
        lies += other.first != other.goal
    assert 50 < lies < 130
    for k in range(25):
        edit = sample_work(random.Random(k), 0.0)
        source, result = draw_work(edit)
        assert source.size == result.size == (64, 64)
        right += (read_framed(source).scene(), read_framed(result).scene()) == (edit.source, edit.goal)
    assert right >= 23


def test_a_generator_without_sources_has_the_parts_it_had() -> None:
    torch.manual_seed(0)
    pipeline: Any = build_pipeline()
    assert pipeline.unet.config.in_channels == 12 and len(pipeline.tokenizer) == 28
    assert pipeline.tokenizer.model_max_length == 12


def test_the_script_trains_resumes_and_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "editor"
    command = ["editing", "--out", str(out), "--scratch", str(tmp_path / "kept"), "--steps", "2", "--edits", "30"]
    monkeypatch.setattr(sys, "argv", [*command, "--samples", "4"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    main()
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    main()  # both stages are done: it only saves and measures
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
    assert "| utility of the goal | " in (out / "README.md").read_text()
    assert load_editor(out).unet.config.in_channels == 24
