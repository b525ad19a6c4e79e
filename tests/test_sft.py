"""The supervised baseline, on trl's own trainer."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from listener_reward.card import Card
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.train.policy import load_policy_processor
from listener_reward.train.sft import as_examples, train_sft


def test_loss_falls(sft_run: tuple[Path, list[float]]):
    losses = sft_run[1]
    assert sum(losses[-4:]) < 0.25 * sum(losses[:4])


def test_the_folder_is_a_judge(formed_judge: Path, random_judge: Path):
    assert Card.load(formed_judge) == Card.load(random_judge)
    judge = Judge.from_pretrained(formed_judge, listener="none")
    pairs = load_pairs("tiny:id", limit=4)
    verdicts = judge.compare_many(pairs["prompt"], *zip(*pairs["images"], strict=True))
    assert sum(verdict.malformed for verdict in verdicts) < 4  # of eight; the random judge has eight
    assert all(verdict.contradicted is None for verdict in verdicts)


def test_examples_answer_as_most_people_do_and_leave_ties_out(random_judge: Path):
    card = Card.load(random_judge)
    pairs = load_pairs("tiny:train", limit=4).remove_columns(["p_first", "dataset"])
    pairs = pairs.add_column("p_first", [1.0, 0.5, 0.49, 0.51])
    examples: Any = as_examples(pairs, card, frozenset())
    said = [row["completion"][0]["content"][0]["text"] for row in examples]
    assert said == [f"<think></think><answer>{answer}</answer>" for answer in (1, 2, 1)]
    assert [image.mode for row in examples for image in row["images"]] == ["RGB"] * 6
    text = "".join(block.get("text") or "" for block in examples[1]["prompt"][0]["content"])
    assert pairs[2]["prompt"] in text


def test_only_ties_is_an_error(random_judge: Path):
    pairs = load_pairs("tiny:train", limit=2).remove_columns("p_first").add_column("p_first", [0.5, 0.5])
    with pytest.raises(InputError, match=r"no pair with a majority; p_first is 0\.5"):
        as_examples(pairs, Card.load(random_judge), frozenset())


def test_hostile_pairs_are_trained_on_with_no_word_but_of_the_long_prompt(
    random_judge: Path, hostile_pairs: Dataset, tmp_path: Path
):
    from trl import SFTConfig

    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(hostile_pairs),
        max_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_sft(random_judge, hostile_pairs, args)
    ours = [str(warning.message) for warning in caught if "listener_reward" in warning.filename]
    assert ours and all("is cut to max_prompt_chars" in message for message in ours)


def test_a_checkpoint_of_another_architecture_is_refused(random_judge: Path, tmp_path: Path):
    with pytest.raises(InputError, match="could not be fetched"):
        load_policy_processor(str(tmp_path / "missing"))
    folder = tmp_path / "other"
    shutil.copytree(random_judge, folder)
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"qwen2_5_vl"', '"qwen2"'), encoding="utf-8")
    with pytest.raises(InputError, match="'qwen2' model, which is no vision-language model"):
        load_policy_processor(str(folder))
