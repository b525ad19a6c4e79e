"""What other people's code and configurations rest on: names, signatures, and the paths that hosts are given.

A name may be added, and an option with a default. Whoever takes one away, renames it or changes its default finds this
test in the way, and says so in the changelog.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import MISSING, fields
from types import ModuleType
from typing import Any

import pytest

import listener_reward
from listener_reward import Judge, ListenerReward, Mixture
from listener_reward.integrations.best_of_n import best_of_n
from listener_reward.integrations.ddpo import DDPOConfig, DDPOTrainer

PAPER = "alexgambashidze/qwen2.5vl_image_preference_reasoner"

SIGNATURES = {
    Judge.from_pretrained: """
        name, *, listener=None, device=None, dtype=None, batch_size=32, shared_prefix=True, token_budget=16384,
        vision_bytes=2**29, thoughts=None, aggregate=None, orders=None, early_stop=None, think=True,
        max_new_tokens=None, seed=0
    """,
    Judge.compare: "self, prompt, first, second, *, think=None",
    Judge.compare_many: "self, prompts, firsts, seconds, *, think=None",
    Judge.rank: "self, prompt, images, *, budget=None",
    ListenerReward: 'judge=PAPER, *, scheme="auto", reference=None, on_failure="raise", **judge_options',
    ListenerReward.__call__: "self, images, prompts, metadata=None",
    Mixture: 'rewards, *, combine="sum", on_failure="raise"',
    Mixture.__call__: "self, images, prompts, metadata=None",
    ListenerReward.rank: "self, prompt, images, *, budget=None",
    best_of_n: """
        pipeline, prompt, n=8, *, reward=PAPER, keep=1, seed=0, batch_size=4, preview_steps=None, **call
    """,
    DDPOTrainer: "pipeline, reward, prompts, config=None, *, second_reward=None, accelerator=None",
    DDPOTrainer.train: "self, resume=False",
}

DDPO = {
    "output_dir": "ddpo",
    "epochs": 100,
    "seed": 0,
    "num_inference_steps": 20,
    "call": {},
    "prompts_per_epoch": 8,
    "images_per_prompt": 8,
    "batch_size": 8,
    "noise_level": None,
    "dynamics": "cps",
    "window": (0.0, 0.6),
    "loss": "ppo",
    "train_fraction": 1.0,
    "updates_per_epoch": 1,
    "inner_epochs": 1,
    "advantage": "group",
    "advantage_std": "batch",
    "advantage_noise": None,
    "prompt_buffer": 32,
    "prompt_min_count": 16,
    "advantage_clip": 5.0,
    "clip_range": 1e-4,
    "nft_beta": 1.0,
    "kl": 0.03,
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "train": "lora",
    "lora_rank": 16,
    "lora_alpha": None,
    "lora_targets": ("to_q", "to_k", "to_v", "to_out.0"),
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    "replay_tolerance": 1e-4,
    "log_with": None,
    "sample_every": 10,
    "sample_prompts": 8,
    "win_rate": True,
    "save_every": 10,
    "keep_checkpoints": 2,
    "on_hacking": "warn",
}

HOSTS = {
    "trl": ("ddpo_reward",),
    "ddpo_pytorch": ("listener_reward",),
    "flow_grpo": ("listener_score", "listener_multi_score"),
    "pref_grpo": ("ListenerDispatcher",),
    "dance_grpo": ("ListenerScorer",),
    "flow_factory": ("ListenerGroupwise", "ListenerPointwise"),
    "verl_omni": ("compute_score",),
    "unirl": ("answer",),
    "miles_diffusion": ("listener_rm",),
    "best_of_n": ("best_of_n", "BestOfN"),
    "video": ("rank_videos", "VideoReward", "ClipJudge"),
    "ddpo": ("DDPOTrainer", "DDPOConfig", "ReplayError"),
    "contract": ("as_reward", "score"),
}
"""Modules below `listener_reward.integrations` and what their hosts, or the hosts' YAML files, take from them."""


def broken_promises(promised: str, function: Any) -> list[str]:
    """The parameters of `promised` that calls can no longer rely on, and new ones that calls would have to give."""
    namespace: dict[str, Any] = {"PAPER": PAPER}
    exec(f"def expected({promised.strip()}): ...", namespace)
    wanted = inspect.signature(namespace["expected"]).parameters
    found = inspect.signature(function).parameters
    broken = [
        name
        for name, parameter in wanted.items()
        if name not in found
        or found[name].kind != parameter.kind
        or found[name].default != parameter.default
        or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and [*wanted].index(name) != [*found].index(name))
    ]
    required = [parameter for name, parameter in found.items() if name not in wanted and _is_required(parameter)]
    return broken + [parameter.name for parameter in required]


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )


def test_the_package_has_its_names():
    names = {"InputError", "Judge", "JudgeError", "ListenerReward", "Mixture", "PreferencePair", "Ranking", "Verdict"}
    assert names <= set(listener_reward.__all__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures_keep_their_promises(function: Any):
    assert broken_promises(SIGNATURES[function], function) == []


@pytest.mark.parametrize(
    ("promised", "broken"),
    [
        ("prompt, images, *, budget=None", []),
        ("prompt, *, budget=None", ["images"]),
        ("images, prompt, *, budget=None", ["images", "prompt"]),
        ("prompt, images, *, budget=5", ["budget"]),
        ("prompt, images, budget=None", ["budget"]),
        ("prompt, images, *, limit=None", ["limit"]),
        ("prompt, images", []),
    ],
)
def test_a_broken_promise_is_found(promised: str, broken: list[str]):
    def rank(prompt: str, images: list, *, budget: int | None = None) -> None: ...

    assert sorted(broken_promises(promised, rank)) == broken


def test_ddpo_settings_keep_their_names_and_defaults():
    found = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(DDPOConfig)
    }
    assert {name: found.get(name, MISSING) for name in DDPO} == DDPO


@pytest.fixture
def flow_factory(monkeypatch: pytest.MonkeyPatch):
    """Flow-Factory's base classes, without which its adapter does not import; the adapter is forgotten afterwards."""
    names = ("flow_factory", "flow_factory.rewards", "flow_factory.rewards.abc")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for base in ("RewardModelOutput", "PointwiseRewardModel", "GroupwiseRewardModel"):
        setattr(sys.modules[names[-1]], base, type(base, (), {}))
    monkeypatch.delitem(sys.modules, "listener_reward.integrations.flow_factory", raising=False)
    yield
    sys.modules.pop("listener_reward.integrations.flow_factory", None)


@pytest.mark.parametrize("host", HOSTS)
def test_the_paths_that_hosts_are_given_lead_somewhere(host: str, flow_factory: None):
    module = importlib.import_module(f"listener_reward.integrations.{host}")
    for name in HOSTS[host]:
        assert callable(getattr(module, name))
