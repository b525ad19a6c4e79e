"""The tiny editor: it sees its source, reads every instruction, and its script trains, resumes and measures."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from listener_reward.tiny.diffusion import CALL, LATENT_STD, build_pipeline, set_encoder
from listener_reward.tiny.editing import (
    WEIGHTS,
    build_editor,
    draw_edits,
    draw_work,
    evaluate_edits,
    load_editor,
    main,
    make_edits,
    sample_work,
)
from listener_reward.tiny.edits import HELD_PARTS
from listener_reward.tiny.read import read_framed
from listener_reward.tiny.world import held_out


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


def test_held_out_edits_are_those_that_training_never_has() -> None:
    for k in range(100):
        trained, held = (sample_work(random.Random(k), 0.0, held) for held in (False, True))
        assert held_out(held.goal.color, held.goal.shape) and (len(held.asked) == 1 or held.asked in HELD_PARTS)
        assert trained.asked not in HELD_PARTS
        assert not any(held_out(scene.color, scene.shape) for scene in (trained.source, trained.goal))


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


# ------------------------------------------------------------------------------------------------ the embedded editor


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_editor()


def test_the_embedded_editor_is_half_precision_on_disk_and_float32_in_memory(embedded: Any) -> None:
    stored = load_file(WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for part in (embedded.unet, embedded.vae, embedded.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_its_results_are_equal_for_equal_seeds(embedded: Any) -> None:
    edits = [sample_work(random.Random(k), 0.0) for k in range(4)]
    first, again, other = ([p.tobytes() for p in make_edits(embedded, edits, seed)] for seed in (0, 0, 1))
    assert first == again and not {*first} & {*other}


def test_it_is_better_than_to_do_nothing_and_far_from_perfect(embedded: Any) -> None:
    found = evaluate_edits(embedded, 60)
    assert found["utility of the source"] + 0.3 < found["utility"] < found["utility of the goal"] - 0.5
    assert found["a scene"] > 0.5
