"""A revision of a checkpoint on the Hub: every file of it that is asked for is of that revision.

The Hub is a cache on this disk. What it has as `main` is no checkpoint at all: whoever reads it fails.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import constants, file_download
from peft import LoraConfig

from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.models.backends import load_vlm
from listener_reward.models.hub import resolve
from listener_reward.plan.checkpoints import Checkpoint
from listener_reward.train.lora import LORA_TARGETS
from listener_reward.train.resuming import check_revision
from listener_reward.train.run import main
from listener_reward.train.trainer import ListenerGRPOTrainer

Config = Callable[..., Any]

POISON = "this is main"


class Hub:
    """A cache of the Hub, and what is asked of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []
        """Repository, file and revision."""

    def add(self, name: str, files: Path, revision: str = "v2") -> Path:
        """Puts `files` there as a revision of `name`, whose newest has files of the same names and another content."""
        there = self.folder / f"models--{name.replace('/', '--')}"
        (there / "refs").mkdir(parents=True)
        for ref in ("main", revision):
            (there / "refs" / ref).write_text(f"commit-of-{ref}", encoding="utf-8")
        shutil.copytree(files, there / "snapshots" / f"commit-of-{revision}")
        newest = there / "snapshots" / "commit-of-main"
        newest.mkdir()
        for file in files.iterdir():
            (newest / file.name).write_text(POISON, encoding="utf-8")
        return there / "snapshots" / f"commit-of-{revision}"

    def revisions(self, name: str) -> dict[str | None, set[str]]:
        """The files that were asked for, by revision. A commit that a ref stands for counts as the ref."""
        found: dict[str | None, set[str]] = {}
        for repository, file, revision in self.asked:
            if repository == name:
                ref = None if revision is None else revision.removeprefix("commit-of-")
                found.setdefault(ref, set()).add(file)
        return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.folder))
    found, cached = file_download._hf_hub_download_to_cache_dir, file_download.try_to_load_from_cache

    def download(**asked: Any) -> Any:
        hub.asked.append((asked["repo_id"], asked["filename"], asked["revision"]))
        return found(**asked)

    def look(repo_id: str, filename: str, *args: Any, **options: Any) -> Any:
        hub.asked.append((repo_id, filename, options.get("revision")))
        return cached(repo_id, filename, *args, **options)

    monkeypatch.setattr(file_download, "_hf_hub_download_to_cache_dir", download)
    for module in list(sys.modules.values()):
        if getattr(module, "try_to_load_from_cache", None) is cached:
            monkeypatch.setattr(module, "try_to_load_from_cache", look)
    return hub


@pytest.fixture
def adapter(hub: Hub, formed_judge: Path, tmp_path: Path) -> Path:
    """An adapter as org/adapter, revision v2, to revision v1 of org/base, whose newest is none."""
    from transformers import AutoModelForImageTextToText

    base = hub.add("org/base", formed_judge, "v1")
    trained = LoraConfig(r=2, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    model: Any = AutoModelForImageTextToText.from_pretrained(base)
    model.add_adapter(trained)
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(config.read_text(encoding="utf-8"))
    saved |= {"base_model_name_or_path": "org/base", "revision": "v1"}
    config.write_text(json.dumps(saved), encoding="utf-8")
    return hub.add("org/adapter", tmp_path / "adapter")


def test_training_reads_the_policy_at_its_revision(
    hub: Hub, formed_judge: Path, tiny_pairs: Dataset, tmp_path: Path, grpo_config: Config
):
    hub.add("org/policy", formed_judge)
    (tmp_path / "train.yaml").write_text(
        json.dumps(
            {
                "data": "tiny:train",
                "data_limit": 4,
                "model_name_or_path": "org/policy",
                "model_revision": "v2",
                "output_dir": str(tmp_path / "run"),
                "use_peft": True,
                "lora_r": 4,
                "listener": "base",
                "per_device_train_batch_size": 4,
                "num_generations": 4,
                "max_completion_length": 4,
                "max_steps": 1,
                "save_steps": 1,
                "report_to": "none",
                "use_cpu": True,
                "bf16": False,
            }
        ),
        encoding="utf-8",
    )
    main(["--config", str(tmp_path / "train.yaml")])
    asked = hub.revisions("org/policy")
    assert set(asked) == {"v2"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "listener_reward.json"} <= (
        asked["v2"]
    )
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/policy", "v2")

    hub.asked.clear()
    judge = Judge.from_pretrained(tmp_path / "run", device="cpu")
    apart = Judge.from_pretrained(tmp_path / "run", device="cpu", listener_options={"batch_size": 3})
    assert judge.card.listener == "org/policy"
    assert judge.listener is not None and apart.listener is not None
    assert set(hub.revisions("org/policy")) == {"v2"}

    said = r"adapter to revision 'v2' of its base.* loaded 'main'; set model_revision: v2"
    with pytest.raises(InputError, match=said):
        check_revision(tmp_path / "run" / "checkpoint-1", None)
    check_revision(tmp_path / "run" / "checkpoint-1", "v2")
    again = tmp_path / "run" / "checkpoint-1"
    config = grpo_config(listener="none", reward_weights=[1.0, 1.0, 0.0])
    other = ListenerGRPOTrainer(
        formed_judge, config, tiny_pairs, peft_config=LoraConfig(r=4, target_modules=LORA_TARGETS)
    )
    with pytest.raises(InputError, match="and this run has loaded 'main'"):
        other.train(resume_from_checkpoint=str(again))


def test_all_weights_are_trained_from_the_revision_too(
    hub: Hub, formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config, caplog: pytest.LogCaptureFixture
):
    """With a reference model, which trl loads a second time, and with the checkpoint itself as the listener."""
    policy = hub.add("org/policy", formed_judge)
    Card.amend(policy, listener=".")
    config = grpo_config(model_init_kwargs={"revision": "v2", "dtype": "float32"}, beta=0.1, max_steps=1)
    trainer = ListenerGRPOTrainer("org/policy", config, tiny_pairs)
    trainer.train()
    assert trainer.ref_model is not None and trainer.listener is not None
    assert "give listener_options={'revision': 'v2'} where it is loaded" in caplog.text
    assert set(hub.revisions("org/policy")) == {"v2"}


def test_a_folder_has_no_revisions(tiny_pairs: Dataset, grpo_config: Config, tmp_path: Path):
    said = "revision is 'v2', and .* is a folder; only a checkpoint on the Hub has revisions"
    with pytest.raises(InputError, match=said):
        ListenerGRPOTrainer("tiny-base", grpo_config(model_init_kwargs={"revision": "v2"}), tiny_pairs)
    with pytest.raises(InputError, match=said):
        Checkpoint.of("tiny", revision="v2")
    for backend in ("transformers", "http://127.0.0.1:9/v1"):
        with pytest.raises(InputError, match=said):
            load_vlm(resolve("tiny"), ChatFormat(), backend=backend, revision="v2")


def test_vllm_in_the_trainer_knows_of_no_revision(
    hub: Hub, formed_judge: Path, tiny_pairs: Dataset, grpo_config: Config
):
    hub.add("org/policy", formed_judge)
    config = grpo_config(model_init_kwargs={"revision": "v2"}, use_vllm=True)
    with pytest.raises(InputError, match=r"revision 'v2' of the policy .* give its folder, or set use_vllm: false"):
        ListenerGRPOTrainer("org/policy", config, tiny_pairs)


def test_an_adapter_and_its_base_have_a_revision_each(hub: Hub, adapter: Path):
    judge = Judge.from_pretrained("org/adapter", revision="v2", listener="base", device="cpu")
    assert Card.load("org/adapter", revision="v2") == Card.load(resolve("org/base"), revision="v1")
    assert Checkpoint.of("org/adapter", revision="v2").adapter.r == 2
    assert judge.listener is not None
    assert set(hub.revisions("org/adapter")) == {"v2"}
    assert set(hub.revisions("org/base")) == {"v1"}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a vLLM that is not here is asked for."""
    made: list[dict[str, Any]] = []
    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM = lambda **options: made.append(options)  # pyright: ignore[reportAttributeAccessIssue]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(path=path)  # pyright: ignore[reportAttributeAccessIssue]
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "listener_reward.models.vllm_vlm", raising=False)
    return made


def test_vllm_is_given_the_adapters_folder_and_the_bases_revision(
    hub: Hub, adapter: Path, engines: list[dict[str, Any]]
):
    vlm: Any = load_vlm("org/adapter", ChatFormat(), backend="vllm", revision="v2")
    assert vlm.adapter.path == str(adapter)
    assert (engines[0]["model"], engines[0]["revision"]) == ("org/base", "v1")
    assert set(hub.revisions("org/adapter")) == {"v2"}
    load_vlm("org/base", ChatFormat(), backend="vllm", revision="v1")
    assert engines[1]["revision"] == "v1"
    with pytest.raises(InputError, match="is a folder; only a checkpoint on the Hub has revisions"):
        load_vlm(resolve("tiny"), ChatFormat(), backend="vllm", revision="v2")
