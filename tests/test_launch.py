"""What `accelerate launch` is given, where the listener goes under ZeRO-3, and what vLLM is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_worker
import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.integrations import deepspeed
from trl.import_utils import is_vllm_available
from typer.testing import CliRunner

from listener_reward.card import Card
from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.listener import load_listener
from listener_reward.models.hub import resolve
from listener_reward.models.processing import load_processor
from listener_reward.train.config import ListenerGRPOConfig, without_image_token
from listener_reward.train.sharing import unsharded
from listener_reward.train.trainer import ListenerGRPOTrainer

LAUNCH = distributed_worker.LAUNCH
TYPES = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "multi_node": DistributedType.FSDP,
}


def parsed(name: str) -> Any:
    """A configuration read as `accelerate launch` reads it: an unknown field would raise."""
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    return config


# --- the files


def test_there_is_one_for_each_set_up_and_accelerate_reads_them():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == TYPES.keys()
    for name, kind in TYPES.items():
        config = parsed(name)
        assert config.distributed_type == kind
        assert config.num_machines == (2 if name == "multi_node" else 1)
        assert config.mixed_precision is None  # the training configuration's bf16 decides, in one place


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_fsdp_is_version_2_with_the_models_own_layers_and_checkpoints_that_load(name: str):
    fsdp = parsed(name).fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in fsdp  # so accelerate takes the model's _no_split_modules
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    text = (LAUNCH / "fsdp2.yaml").read_text(encoding="utf-8")
    for model in (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration):
        layers = list(model._no_split_modules or ())
        assert len(layers) == 2 and all(layer in text for layer in layers)


def test_several_machines_are_told_where_the_first_is():
    config = parsed("multi_node")
    assert config.num_processes % config.num_machines == 0
    assert config.main_process_ip and config.main_process_port and config.same_network
    assert config.fsdp_config == parsed("fsdp2").fsdp_config


def test_zero_stages():
    assert parsed("zero2").deepspeed_config["zero_stage"] == 2
    zero3 = parsed("zero3").deepspeed_config
    assert zero3["zero_stage"] == 3
    assert zero3["zero3_init_flag"] and zero3["zero3_save_16bit_model"]


def test_what_the_launched_processes_are_told():
    told = distributed_worker.launched_with("fsdp2")
    assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
    assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    told = distributed_worker.launched_with("zero3")
    assert told["ACCELERATE_USE_DEEPSPEED"] == "true" and told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert told["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_the_command_prints_the_file():
    for name in TYPES:
        result = CliRunner().invoke(app, ["launch-config", name])
        assert result.exit_code == 0
        assert result.stdout == (LAUNCH / f"{name}.yaml").read_text(encoding="utf-8")


def test_an_unknown_name_is_named_with_those_there_are():
    result = CliRunner().invoke(app, ["launch-config", "zero1"])
    assert result.exit_code == 2
    assert "name is 'zero1'; choose one of ddp, fsdp2, multi_node, one_gpu, zero2, zero3" in result.stderr


# --- ZeRO-3


@pytest.fixture
def zero3() -> Any:
    """transformers' own switch for ZeRO-3, as TrainingArguments turns it."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    deepspeed.set_hf_deepspeed_config(config)
    yield config
    deepspeed.unset_hf_deepspeed_config()


def test_the_listener_is_loaded_whole_under_zero_3(zero3: Any):
    assert deepspeed.is_deepspeed_zero3_enabled()
    folder = resolve("tiny-listener")
    with unsharded():
        assert not deepspeed.is_deepspeed_zero3_enabled()
        listener: Any = load_listener(folder, Card.load(folder), device="cpu", dtype="float32")
    assert deepspeed.is_deepspeed_zero3_enabled()
    alive: Any = deepspeed._hf_deepspeed_config_weak_ref
    assert alive() is zero3
    weights = list(listener.vlm.model.parameters())
    assert weights and all(weight.numel() > 0 and not hasattr(weight, "ds_id") for weight in weights)


def test_zero_3_is_on_again_after_a_listener_that_could_not_be_loaded(zero3: Any):
    with pytest.raises(RuntimeError, match="broken"), unsharded():
        raise RuntimeError("broken")
    assert deepspeed.is_deepspeed_zero3_enabled()


# --- vLLM


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"logit_bias": {7: -100.0}}),
        ({}, {"logit_bias": {7: -100.0}}),
        ({"seed": 3}, {"seed": 3, "logit_bias": {7: -100.0}}),
        ({"logit_bias": None}, {"logit_bias": {7: -100.0}}),
        ({"logit_bias": {"5": 2.0}}, {"logit_bias": {7: -100.0, 5: 2.0}}),
        ({"logit_bias": {"7": -1.0}}, {"logit_bias": {7: -1.0}}),
    ],
    ids=["nothing", "empty", "beside others", "null", "beside another token", "what the user says wins"],
)
def test_vllm_never_writes_an_image_placeholder(given: dict[str, Any] | None, expected: dict[str, Any]):
    before = None if given is None else dict(given)
    assert without_image_token(given, 7) == expected
    assert given == before


@pytest.mark.skipif(is_vllm_available(), reason="with vLLM installed the trainer would start an engine")
@pytest.mark.parametrize("use_vllm", [True, False])
def test_the_trainer_tells_vllm_and_only_vllm(use_vllm: bool, tmp_path: Path):
    args = ListenerGRPOConfig(
        output_dir=str(tmp_path),
        reward_weights=[1, 1, 0],
        listener="none",
        per_device_train_batch_size=4,
        num_generations=4,
        generation_kwargs={"repetition_penalty": 1.1},
        use_vllm=use_vllm,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    pairs = load_pairs("tiny:train", limit=4)
    if use_vllm:
        with pytest.raises(ImportError, match="vLLM is not available"):
            ListenerGRPOTrainer("tiny-base", args, pairs)
    else:
        ListenerGRPOTrainer("tiny-base", args, pairs)
    image = load_processor(resolve("tiny-base")).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    told = {"logit_bias": {image: -100.0}} if use_vllm else {}
    assert args.generation_kwargs == {"repetition_penalty": 1.1} | told
