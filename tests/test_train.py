"""Listener-shaped GRPO on a tiny model: what trl would do, what we add, and the configuration in front of it."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer
from trl import GRPOTrainer
from typer.testing import CliRunner

import listener_reward.train
from listener_reward.card import Card
from listener_reward.chat import reserved_tokens
from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError, MissingExtraError
from listener_reward.judge import Judge
from listener_reward.listener import load_listener
from listener_reward.models.adapters import base_of
from listener_reward.models.processing import load_processor
from listener_reward.train.chats import as_chats
from listener_reward.train.config import ALL_OFF, ListenerGRPOConfig
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.rewards import ShapedReward
from listener_reward.train.run import main, parse
from listener_reward.train.trainer import ListenerGRPOTrainer

Config = Callable[..., ListenerGRPOConfig]


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    model: Any = trainer.model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    """What was logged at each step, without the clock."""
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    return [{name: value for name, value in entry.items() if name != "step_time"} for entry in steps]


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def start(formed_judge: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(formed_judge, dtype="float32").state_dict()


@pytest.fixture
def full_run(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config) -> ListenerGRPOTrainer:
    trainer = ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs)
    trainer.train()
    return trainer


# --- a run


def test_a_run_moves_the_weights_and_logs_every_part(
    full_run: ListenerGRPOTrainer, start: dict[str, torch.Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert not equal(weights(full_run), start)
    for entry in metrics(full_run):
        parts = [entry[f"rewards/{name}/mean"] for name in ("format", "accuracy", "listener")]
        assert entry["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.5 * parts[2], abs=1e-6)
        assert entry["malformed_rate"] == pytest.approx(1 - parts[0])
        for name in ("contradiction_rate", "listener_confidence", "accuracy"):
            assert 0 <= entry[name] <= 1
        assert entry["listener_failures"] == 0


def test_completions_are_kept_with_ids_and_not_printed(
    full_run: ListenerGRPOTrainer, tiny_pairs: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert "Advantage" not in capfd.readouterr().out
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "completions_00002.parquet")
    assert {"completion", "format", "accuracy", "listener", "advantage"} <= set(table)
    labels = dict(zip(tiny_pairs["id"], tiny_pairs["p_first"], strict=True))
    assert [labels[pair] for pair in table["id"]] == list(table["p_first"])
    assert len(table) == 8 and set(table["id"].value_counts()) == {4}
    heard: Any = table[table["format"] == 1]
    confidence = 1 - (heard["listener_p_first"] - heard["p_first"]).abs()
    assert confidence.to_numpy() == pytest.approx(heard["listener"].to_numpy(), abs=1e-6)


def test_the_saved_folder_is_a_judge_and_plain_transformers_loads_it(full_run: ListenerGRPOTrainer, tmp_path: Path):
    folder = tmp_path / "judge"
    full_run.save_judge(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").state_dict()
    assert equal(plain, weights(full_run))
    saved = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    judge = Judge.from_pretrained(folder)
    assert judge.card == full_run.card
    pair = load_pairs("tiny:id", limit=1)[0]
    assert 0 <= judge.compare(pair["prompt"], *pair["images"]).p_first <= 1


def test_with_the_overrides_off_it_is_stock_trl(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    ours = ListenerGRPOTrainer(formed_judge, grpo_config(**ALL_OFF), tiny_pairs)
    ours.train()
    card, processor = Card.load(formed_judge), load_processor(formed_judge)
    assert card.listener is not None
    rewards = ShapedReward(card.format, load_listener(card.listener, card, device="cpu", shared_prefix=False))
    chats = as_chats(tiny_pairs, card, reserved_tokens(processor.tokenizer)).cast_column("images", List(Image()))
    stock = GRPOTrainer(
        str(formed_judge),
        rewards.functions,  # pyright: ignore[reportArgumentType]
        grpo_config(),
        chats,
        processing_class=processor,
    )
    stock.train()
    assert equal(weights(ours), weights(stock))
    assert metrics(ours) == metrics(stock)


def test_decoding_images_once_changes_nothing(
    full_run: ListenerGRPOTrainer,
    formed_judge: Path,
    tiny_pairs: Dataset,
    grpo_config: Config,
    monkeypatch: pytest.MonkeyPatch,
):
    decoded = count_decoding(monkeypatch)
    again = ListenerGRPOTrainer(formed_judge, grpo_config(decode_images_once=False, exact_resume=False), tiny_pairs)
    again.train()
    assert decoded == [2 + 2 * 8 * 2]  # the first pair for the listener's probe, then two steps of eight rows
    assert equal(weights(again), weights(full_run))
    assert metrics(again) == metrics(full_run)


def test_images_are_decoded_once(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, monkeypatch: pytest.MonkeyPatch
):
    decoded = count_decoding(monkeypatch)
    ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=1), tiny_pairs).train()
    assert decoded == [2 + 2 * 2]


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from listener_reward.train import trainer

    count, to_pil = [0], trainer.to_pil

    def counted(image: Any, *, field: str) -> Any:
        count[0] += 1
        return to_pil(image, field=field)

    monkeypatch.setattr(trainer, "to_pil", counted)
    return count


def test_hostile_pairs_do_not_stop_a_run(formed_judge: Path, hostile_pairs: Dataset, grpo_config: Config):
    rows = 2 * len(hostile_pairs)
    config = grpo_config(per_device_train_batch_size=rows, num_generations=2, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = ListenerGRPOTrainer(formed_judge, config, hostile_pairs)
        trainer.train()
    ours = [str(warning.message) for warning in caught if "listener_reward" in warning.filename]
    assert ours and all("is cut to" in message or "does not know" in message for message in ours)
    assert metrics(trainer)[0]["listener_failures"] == 0


# --- whom it listens to


def test_lora_with_its_own_base_as_the_listener(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, start: dict[str, torch.Tensor], tmp_path: Path
):
    torch.manual_seed(0)  # which trl before 1.14 leaves to the caller
    own = ListenerGRPOTrainer(formed_judge, grpo_config(listener="base"), tiny_pairs, peft_config=lora())
    own.train()
    torch.manual_seed(0)
    loaded = ListenerGRPOTrainer(formed_judge, grpo_config(listener=str(formed_judge)), tiny_pairs, peft_config=lora())
    loaded.train()
    trained = [tensor for name, tensor in weights(own).items() if "lora_B" in name]
    assert trained and all(tensor.any() for tensor in trained)
    assert not any("visual" in name for name in weights(own) if "lora_" in name)
    assert equal(weights(own), weights(loaded))
    assert metrics(own) == metrics(loaded)

    own.save_judge(tmp_path / "judge")
    base = AutoModelForImageTextToText.from_pretrained(formed_judge, dtype="float32")
    merged = PeftModel.from_pretrained(base, tmp_path / "judge").merge_and_unload().state_dict()
    assert merged.keys() == start.keys()
    moved = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert moved and all("language_model" in name and "_proj" in name for name in moved)
    judge = Judge.from_pretrained(tmp_path / "judge")
    assert judge.card.listener == str(formed_judge.resolve())
    assert (tmp_path / "judge" / "adapter_config.json").exists()


def test_what_a_lora_run_writes_is_an_adapter_that_judges_unmerged(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, tmp_path: Path
):
    config = grpo_config(listener="base", learning_rate=0.01, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = ListenerGRPOTrainer(formed_judge, config, tiny_pairs, peft_config=lora())
    trainer.train()
    finished, checkpoint = tmp_path / "judge", tmp_path / "run" / "checkpoint-1"
    trainer.save_judge(finished)
    trained = {name: tensor for name, tensor in weights(trainer).items() if "lora_" in name}
    for folder in (finished, checkpoint):
        assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
        assert base_of(folder) == str(formed_judge.resolve())
        assert Card.load(folder) == trainer.card
        judge: Any = Judge.from_pretrained(folder)
        found = {name: tensor for name, tensor in judge.reasoner.model.state_dict().items() if "lora_" in name}
        assert equal(found, trained)
        assert judge.listener is not None and judge.listener.vlm.model is judge.reasoner.model, (
            "one copy of the weights"
        )
        assert not any(weight.requires_grad for weight in judge.reasoner.model.parameters())

    base = AutoModelForImageTextToText.from_pretrained(formed_judge, dtype="float32")
    tokens = AutoTokenizer.from_pretrained(finished)("image 1 : two clean red circles .", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        untrained = base(input_ids=tokens).logits
        ours = judge.reasoner.model(input_ids=tokens).logits
        with_peft = PeftModel.from_pretrained(base, str(finished))(input_ids=tokens).logits
        alone = AutoModelForImageTextToText.from_pretrained(finished, dtype="float32")(input_ids=tokens).logits
    assert (ours - untrained).abs().max() > 1e-3
    for logits in (with_peft, alone):
        torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)

    with pytest.raises(InputError, match=r"is an adapter on .* merge it first: listener-reward merge"):
        ListenerGRPOTrainer(finished, grpo_config(), tiny_pairs, peft_config=lora())


def test_own_base_needs_adapters(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    with pytest.raises(InputError, match="full fine-tuning has no adapters; give use_peft: true"):
        ListenerGRPOTrainer(formed_judge, grpo_config(listener="base"), tiny_pairs)


@pytest.fixture
def deaf(formed_judge: Path, tmp_path: Path) -> Path:
    """The policy, with a card that names no listener."""
    folder = tmp_path / "deaf"
    shutil.copytree(formed_judge, folder)
    replace(Card.load(formed_judge), listener=None).save(folder)
    return folder


def test_accuracy_only_needs_no_listener(deaf: Path, tiny_pairs: Dataset, grpo_config: Config, tmp_path: Path):
    trainer = ListenerGRPOTrainer(deaf, grpo_config(reward_weights=[1, 1, 0]), tiny_pairs)
    assert trainer.listener is None
    trainer.train()
    for entry in metrics(trainer):
        assert entry["reward"] == pytest.approx(entry["rewards/format/mean"] + entry["rewards/accuracy/mean"], abs=1e-6)
        assert "contradiction_rate" not in entry
    trainer.save_judge(tmp_path / "judge")
    assert Judge.from_pretrained(tmp_path / "judge").listener is None


def test_a_listener_can_be_refused(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    config = grpo_config(reward_weights=[1, 1, 0], listener="none")
    trainer = ListenerGRPOTrainer(formed_judge, config, tiny_pairs)
    assert trainer.listener is None
    assert trainer.card.listener == Card.load(formed_judge).listener


@pytest.mark.parametrize("listener", [None, "none"])
def test_a_listener_with_a_weight_must_be_named(
    deaf: Path, tiny_pairs: Dataset, grpo_config: Config, listener: str | None
):
    with pytest.raises(InputError, match=r"listener is .* give a checkpoint, or 'base' with LoRA"):
        ListenerGRPOTrainer(deaf, grpo_config(listener=listener), tiny_pairs)


# --- a listener that breaks


class BreaksOn:
    """A listener's model that gives NaN for the chats in which `breaks` finds something."""

    def __init__(self, vlm: Any):
        self.vlm = vlm
        self.reserved = vlm.reserved
        self.breaks: Callable[[str], bool] = lambda text: False
        self.broken = 0

    def label_logprobs(self, chats: Any, prefixes: Any, labels: Any) -> torch.Tensor:
        values = self.vlm.label_logprobs(chats, prefixes, labels).clone()
        for row, chat in enumerate(chats):
            if self.breaks(str(chat.messages)):
                values[row] = torch.nan
                self.broken += 1
        return values


@pytest.fixture
def fragile(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config) -> ListenerGRPOTrainer:
    """A trainer whose listener is sound when asked first, and can be broken afterwards."""
    card = Card.load(formed_judge)
    listener: Any = load_listener(str(card.listener), card, device="cpu")
    listener.vlm = BreaksOn(listener.vlm)
    return ListenerGRPOTrainer(formed_judge, grpo_config(max_steps=4), tiny_pairs, listener=listener)


def test_a_listener_that_breaks_on_some_pairs_does_not_stop_the_run(
    fragile: ListenerGRPOTrainer, tiny_pairs: Dataset, start: dict[str, torch.Tensor]
):
    listener: Any = fragile.listener
    listener.vlm.breaks = lambda text: tiny_pairs[0]["prompt"] in text
    with pytest.warns(UserWarning, match="left out of their groups"):
        fragile.train()
    log = metrics(fragile)
    assert len(log) == 4
    assert any(entry["listener_failures"] > 0 for entry in log)
    assert all(entry["reward"] > 0 for entry in log)
    assert not equal(weights(fragile), start)


def test_a_listener_that_breaks_for_good_leaves_the_weights_alone(
    fragile: ListenerGRPOTrainer, start: dict[str, torch.Tensor]
):
    """Only malformed completions still have a reward, zero, and so no advantage over one another."""
    listener: Any = fragile.listener
    listener.vlm.breaks = lambda text: True
    with pytest.warns(UserWarning, match="left out of their groups"):
        fragile.train()
    assert fragile.state.global_step == 4
    assert all(entry["listener_failures"] > 0 for entry in metrics(fragile))
    assert equal(weights(fragile), start)


def test_a_broken_listener_is_found_before_training(
    formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, tmp_path: Path
):
    folder = tmp_path / "broken"
    shutil.copytree(formed_judge, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(JudgeError, match="the listener gave NaN"):
        ListenerGRPOTrainer(formed_judge, grpo_config(listener=str(folder)), tiny_pairs)


# --- what is refused


def test_too_few_pairs_for_one_step_are_refused(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    with pytest.raises(InputError, match="train_dataset has 1 pairs and one generation round takes 2"):
        ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs.select([0]))
    with pytest.raises(InputError, match="train_dataset has 0 pairs"):
        ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs.select([]))


def test_missing_columns_are_named(formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config):
    with pytest.raises(InputError, match=r"lacks the columns \['id', 'p_first'\]"):
        ListenerGRPOTrainer(formed_judge, grpo_config(), tiny_pairs.remove_columns(["id", "p_first"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_weights": [1, 1]}, r"reward_weights is \[1, 1\]; it needs three numbers"),
        ({"reward_weights": None}, "reward_weights is None"),
        ({"reward_weights": [1, "x", 0]}, "three numbers"),
        ({"masking": "all"}, "masking is 'all'; it must be one of 'answer', 'verdict'"),
        ({"listener_on_failure": "zero"}, "listener_on_failure is 'zero'"),
        ({"listener_dtype": "int4"}, "listener_dtype is 'int4'"),
        ({"listener_batch_size": 0}, "listener_batch_size is 0"),
        (
            {"save_strategy": "steps", "save_steps": 3, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
            "save_steps=3 .* make save_steps a multiple of 2",
        ),
        (
            {"save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2, "num_iterations": 3},
            "make save_steps a multiple of 6",
        ),
    ],
)
def test_fields_out_of_range_are_refused(grpo_config: Config, fields: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        grpo_config(**fields)


@pytest.mark.parametrize("fields", [{"save_steps": 4, "steps_per_generation": 4}, {"save_steps": 0.5}])
def test_fields_in_range_are_not(grpo_config: Config, fields: dict[str, Any]):
    assert grpo_config(save_strategy="steps", **fields).save_steps == fields["save_steps"]


def test_a_missing_extra_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch):
    for missing in ("trl", "peft"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(MissingExtraError, match=rf'{missing}.*pip install "listener-reward\[train\]"'):
                importlib.reload(listener_reward.train)
    importlib.reload(listener_reward.train)


# --- the YAML file


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], list[str]]:
    def write(text: str) -> list[str]:
        path = tmp_path / f"train-{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\n{text}", encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_yaml_and_the_command_line_which_wins(yaml: Callable[[str], list[str]]):
    text = "data: tiny:train\nmax_steps: 3\nlearning_rate: 1e-5\nreward_weights: [1, 1, 0]\nuse_peft: true\n"
    data, args, model = parse([*yaml(text + "resume_from_checkpoint: true"), "--max_steps", "7", "--seed=3"])
    assert (data.data, args.max_steps, args.learning_rate, args.seed) == ("tiny:train", 7, 1e-5, 3)
    assert args.reward_weights == [1, 1, 0]
    assert model.use_peft is True
    assert args.loss_type == "grpo"


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("num_generation: 4", [], "unknown field 'num_generation'; is 'num_generations' meant"),
        ("", ["--num_generation_s", "4"], "not used.*--num_generation_s"),
        ("max_steps: many", [], "max_steps.*invalid int value: 'many'"),
        ("max_steps: 2.5", [], "max_steps.*invalid int value: '2.5'"),
        ("max_steps: [1, 2]", [], r"max_steps is \[1, 2\]; it takes one int"),
        ("max_steps: true", [], "max_steps is True; it takes one int"),
        ("reward_weights: 1", [], r"reward_weights is 1\.0; it needs three numbers"),
        ("masking: all", [], "masking is 'all'"),
        ("num_generations: 3", [], r"must be divisible by num_generations \(3\)"),
        ("data: [", [], "cannot be used"),
        ("", ["--use_peft", "perhaps"], "use_peft.*perhaps"),
        ("", ["--config"], "--config needs a file"),
    ],
)
def test_a_bad_configuration_is_one_clear_error(
    yaml: Callable[[str], list[str]], text: str, more: list[str], message: str
):
    with pytest.raises(InputError, match=message):
        parse([*yaml(text), *more])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: x", "data is not set"),
        ("data: tiny:train", "model_name_or_path is not set"),
        ("data: tiny:train\nmodel_name_or_path: x\nload_in_4bit: true", "load_in_4bit is set, and rounded weights"),
        ("listener_options: {bits: 4}", "listener_options: bits: no option of a model, which has backend"),
        ("listener_options: 4bit", "listener_options is '4bit'; give a mapping"),
        ("listener_options: {dtype: float16}\nlistener_dtype: float16", "both name a dtype"),
        ("data: tiny:train\nmodel_name_or_path: x\noutput_dir: tiny", "the name of an embedded checkpoint"),
        ("data: tiny:train\nmodel_name_or_path: x\nuse_vllm: true", "vllm is not installed: pip install vllm"),
        ("data: tiny:train\nmodel_name_or_path: x\nreport_to: wandb", "report_to is wandb, and wandb is not installed"),
        (
            "data: tiny:train\nmodel_name_or_path: x\nattn_implementation: flash_attention_2",
            "flash_attn is not installed: pip install flash-attn",
        ),
        (
            "data: tiny:train\ndata_limit: 2\nmodel_name_or_path: tiny-base\nmodel_revision: v2",
            "revision is 'v2', and .* is a folder; only a checkpoint on the Hub has revisions",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    yaml: Callable[[str], list[str]], text: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    from listener_reward.train import run

    found = run.find_spec
    absent = ("vllm", "wandb", "flash_attn", "kernels")
    monkeypatch.setattr(run, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(InputError, match=message):
        main(yaml(text))


def test_the_command_says_it_in_one_line(yaml: Callable[[str], list[str]], tmp_path: Path):
    runner = CliRunner()
    for argv, message in (
        (yaml("num_generation: 4"), "unknown field 'num_generation'"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (yaml(f"data: tiny:train\ndata_limit: 2\nmodel_name_or_path: {tmp_path}/gone"), "gone"),
    ):
        result = runner.invoke(app, ["train", *argv])
        assert result.exit_code == 2, result.output
        assert message in result.output and "Traceback" not in result.output


def test_the_command_trains_lora_with_its_own_base(
    formed_judge: Path, yaml: Callable[[str], list[str]], tmp_path: Path
):
    text = f"""
model_name_or_path: {formed_judge}
dtype: float32
data: tiny:train
data_limit: 8
listener: base
use_peft: true
lora_r: 4
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 8
max_steps: 9
disable_tqdm: true
"""
    main([*yaml(text), "--max_steps", "1"])
    state = tmp_path / "out" / "checkpoint-1"
    assert Card.load(state).listener == str(formed_judge.resolve())
    assert Judge.from_pretrained(state).card == Judge.from_pretrained(tmp_path / "out").card
    assert Judge.from_pretrained(tmp_path / "out").card.listener == str(formed_judge.resolve())
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["target_modules"]) == (4, LORA_TARGETS)
