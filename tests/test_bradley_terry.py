"""The Bradley-Terry baseline: its loss by hand, a model that learns votes, and one score as judge and as reward."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from listener_reward.absolute import AbsoluteReward
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate
from listener_reward.models.bradley_terry import CARD, BradleyTerryModel, messages
from listener_reward.pairs import Prompt
from listener_reward.peers import load_peer
from listener_reward.peers.scorers import ScoreJudge
from listener_reward.train.bradley_terry import bradley_terry_loss, collated, train_bradley_terry

PAIRS = 12


def test_the_loss_is_that_of_the_votes():
    first, second, p_first = (
        torch.tensor([2.0, 0.0, 1.0]),
        torch.tensor([1.0, 0.0, 3.0]),
        torch.tensor([1.0, 0.5, 0.25]),
    )
    # -log sigmoid(1); log 2; -(log sigmoid(-2)) / 4 - 3 (log sigmoid(2)) / 4
    by_hand = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2)) / 4 + 3 * math.log1p(math.exp(-2)) / 4]
    assert bradley_terry_loss(first, second, p_first).item() == pytest.approx(sum(by_hand) / 3)
    assert bradley_terry_loss(second, first, 1 - p_first).item() == pytest.approx(sum(by_hand) / 3)


@pytest.fixture(scope="module")
def trained(random_judge: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A random checkpoint after 40 steps on twelve pairs, and its losses."""
    folder = tmp_path_factory.mktemp("bradley-terry")
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=40,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = train_bradley_terry(random_judge, load_pairs("tiny:train", limit=PAIRS), args)
    return folder, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def judge(trained: tuple[Path, list[float]]) -> ScoreJudge:
    return load_peer(f"bradley-terry:{trained[0]}")  # pyright: ignore[reportReturnType]


def test_it_begins_at_even_odds_and_learns(trained: tuple[Path, list[float]]):
    losses = trained[1]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-5:]) / 5 < 0.2


def test_the_folder_is_a_judge_that_position_means_nothing_to(judge: ScoreJudge):
    result = evaluate(judge, load_pairs("tiny:train", limit=PAIRS), progress=False)
    assert result.accuracy == 1
    assert result.swap_consistency == 1
    assert result.verdicts is None or all(verdict.position_gap == 0 for verdict in result.verdicts)


def test_a_verdict_is_the_sigmoid_of_the_scores(judge: ScoreJudge, trained: tuple[Path, list[float]]):
    row = load_pairs("tiny:train", limit=1)[0]
    scores, info = AbsoluteReward(f"bradley-terry:{trained[0]}")(row["images"], [row["prompt"]] * 2)
    (verdict,) = judge.compare_many([row["prompt"]], [row["images"][0]], [row["images"][1]])
    assert scores.dtype == np.float32 and scores.shape == (2,) and info == {}
    assert verdict.p_first == pytest.approx(1 / (1 + math.exp(float(scores[1] - scores[0]))), abs=1e-5)


def test_a_score_depends_on_its_image_and_prompt_alone(trained: tuple[Path, list[float]]):
    model = BradleyTerryModel.from_pretrained(trained[0])
    images = [Image.new("RGB", size, color) for size, color in (((64, 64), "red"), ((128, 96), "blue"))]
    prompts = ["a red circle", "a picture of three yellow stars"]
    together = model.score(prompts, images)
    alone = [model.score([prompt], [image])[0] for prompt, image in zip(prompts, images, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[0] != pytest.approx(together[1], abs=1e-3)
    assert model.score(prompts[::-1], images) != pytest.approx(together, abs=1e-3)


def test_both_images_of_a_pair_stand_in_one_batch(random_judge: Path):
    model = BradleyTerryModel.from_base(random_judge)
    rows = [load_pairs("tiny:train", limit=3)[number] for number in (0, 2)]
    made = collated(model, rows)
    assert made["p_first"].tolist() == [row["p_first"] for row in rows]
    text = model.processor.tokenizer.batch_decode(made["input_ids"])
    assert len(text) == 4 and text[0].count("<|vision_start|>") == 1
    assert [rows[0]["prompt"] in text[0], rows[1]["prompt"] in text[1], rows[0]["prompt"] in text[2]] == [True] * 3


def test_sources_are_read_and_a_criterion_is_refused(judge: ScoreJudge):
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    asked = [Prompt("a red circle", images[2]), Prompt("a red circle", images[0]), "a red circle"]
    scores = judge.score_many(asked, [images[1]] * 3)
    assert len({round(score, 3) for score in scores}) == 3
    with pytest.raises(InputError, match="criterion is 'quality', and a Bradley-Terry model has one score"):
        judge.score_many([Prompt("a red circle", criterion="quality")], images[:1])


def test_a_prompt_cannot_speak_for_the_chat():
    (turn,) = messages("a <|im_end|> circle", 1, frozenset({"<|im_end|>"}))
    assert [block["type"] for block in turn["content"]] == ["image", "image", "text"]
    assert "<|im_end|>" not in turn["content"][-1]["text"]


def test_a_reward_pickles_by_name(trained: tuple[Path, list[float]]):
    reward = AbsoluteReward(f"bradley-terry:{trained[0]}")
    images = [Image.new("RGB", (64, 64), "red")]
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(images, ["a red circle"])[0].tolist() == reward(images, ["a red circle"])[0].tolist()
    assert repr(copy) == f"AbsoluteReward('bradley-terry:{trained[0]}')"
    with pytest.raises(InputError, match="give a peer that scores single images"):
        AbsoluteReward("openai:gpt@http://x")
    with pytest.raises(InputError, match="prompts has 2 entries for 1 images"):
        reward(images, ["a", "b"])


def test_a_folder_that_holds_none_is_refused(trained: tuple[Path, list[float]], random_judge: Path, tmp_path: Path):
    for name, said in (
        ("bradley-terry:", "needs a folder"),
        (f"bradley-terry:{random_judge}", r"holds no bradley_terry.json"),
    ):
        with pytest.raises(InputError, match=said):
            load_peer(name)
    later = tmp_path / "later"
    shutil.copytree(trained[0], later)
    (later / CARD).write_text(json.dumps({"kind": "bradley-terry", "version": 2}), encoding="utf-8")
    with pytest.raises(InputError, match="is of version 2, and this release reads version 1"):
        load_peer(f"bradley-terry:{later}")


def test_pairs_that_cannot_be_used_are_refused(random_judge: Path, tmp_path: Path):
    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    pairs = load_pairs("tiny:train", limit=2)
    with pytest.raises(InputError, match=r"lacks the columns \['p_first'\]"):
        train_bradley_terry(random_judge, pairs.remove_columns("p_first"), args)
    with pytest.raises(InputError, match="no rows"):
        train_bradley_terry(random_judge, pairs.select([]), args)
