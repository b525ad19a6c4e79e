"""Formats of models that exist, in Qwen's real vocabulary: written by checkpoints, through everything that judges.

The checkpoints have the vocabulary, added tokens, chat templates and file layout of Qwen's own, narrow layers, and
weights that write given completions. They are made by a tool that lies beside the repository, of a vocabulary that
`pip download --no-deps dashscope` brings.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from listener_reward.card import CARD, Card
from listener_reward.chat import ChatFormat
from listener_reward.errors import FormatWarning
from listener_reward.evaluate import evaluate
from listener_reward.formats import best_of, try_formats
from listener_reward.integrations.serving.server import make_server
from listener_reward.judge import Judge
from listener_reward.models import transformers_vlm
from listener_reward.models.processing import load_processor
from listener_reward.pairs import PreferencePair
from listener_reward.remote import RemoteReward
from listener_reward.reward import ListenerReward
from listener_reward.trace import parse
from listener_reward.train import policy
from listener_reward.train import trainer as training

TOOL = Path(__file__).resolve().parents[2] / "shared" / "tools" / "real_vocabulary.py"
VOCABULARY = os.environ.get("QWEN_VOCABULARY")
"""The wheel of dashscope, or the qwen.tiktoken in it; without one, an installed dashscope."""

pytestmark = pytest.mark.skipif(
    not TOOL.exists() or not (VOCABULARY or importlib.util.find_spec("dashscope")),
    reason="Qwen's vocabulary is not here: QWEN_VOCABULARY names no wheel of dashscope",
)

WIDTH = 256
LOUDER = 2048 / WIDTH
"""How much larger embeddings have to be for the same logits as of Qwen's width."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SURE = 5.0
"""Log-odds of the label that a completion gives, so that next to none is drawn with the other one."""


@dataclass(frozen=True)
class Spoken:
    """A format, and two completions in it: one that answers 1 and one that answers 2."""

    kind: str
    chat_format: ChatFormat
    says: tuple[str, str]
    lenient: bool = False

    @property
    def card(self) -> Card:
        return Card(format=self.chat_format, listener=".", max_new_tokens=24)

    @property
    def canonical(self) -> bool:
        """Whether the model writes what a listener reads: an n-gram model knows no other white space than its own."""
        form = self.chat_format
        traces = [parse(said, form, lenient=self.lenient) for said in self.says]
        return all(trace.slot == form.answer_slot(trace.thought) for trace in traces)

    @property
    def thoughts(self) -> dict[str, int]:
        """The answer of each thought."""
        return {parse(said, self.chat_format, lenient=self.lenient).thought: n for n, said in enumerate(self.says, 1)}


PLAIN = ChatFormat()
FORMATS = {
    "tags": Spoken(
        "qwen2_5_vl",
        PLAIN,
        ("<think>A fox, sharp.</think><answer>1</answer>", "<think>The light is warm!</think><answer>2</answer>"),
    ),
    "letters": Spoken(
        "qwen2_5_vl",
        replace(PLAIN, labels=("A", "B")),
        ("<think>A fox, sharp.</think><answer>A</answer>", "<think>The light is warm!</think><answer>B</answer>"),
    ),
    "a phrase": Spoken(
        "qwen2_5_vl",
        replace(PLAIN, answer=("<answer>Image ", " is better</answer>")),
        (
            "<think>A fox, sharp.</think><answer>Image 1 is better</answer>",
            "<think>The light is warm!</think><answer>Image 2 is better</answer>",
        ),
    ),
    "lines": Spoken(
        "qwen3_vl",
        PLAIN,
        (
            "<think>\nA fox, sharp.\n</think>\n\n<answer>\n1\n</answer>",
            "<think>\nThe light is warm!\n</think>\n\n<answer>\n2\n</answer>",
        ),
    ),
    "special tags": Spoken(
        "qwen3_vl_special",
        PLAIN,
        ("<think>A fox, sharp.</think><answer>1</answer>", "<think>The light is warm!</think><answer>2</answer>"),
    ),
    "an opened thought": Spoken(
        "qwen3_vl_thinking",
        PLAIN,
        (
            "<think>\nA fox, sharp.\n</think>\n\n<answer>1</answer>",
            "<think>\nThe light is warm!\n</think>\n\n<answer>2</answer>",
        ),
    ),
    "JSON": Spoken(
        "qwen3_vl",
        replace(PLAIN, think=('{"reasoning": "', '", '), answer=('"preferred": "', '"}')),
        ('{"reasoning": "A fox, sharp.", "preferred": "1"}', '{"reasoning": "The light is warm!", "preferred": "2"}'),
    ),
    "no thought": Spoken(
        "qwen3_vl", replace(PLAIN, think=("", "")), ("A fox, sharp.\n<answer>1</answer>", "Warm!\n<answer>2</answer>")
    ),
    "bold": Spoken("qwen3_vl", PLAIN, ("A fox, sharp.\n\n**1**", "The light is warm!\n\n**2**"), lenient=True),
}

PICTURES = [Image.new("RGB", (56, 56), color) for color in ("red", "blue")]


# ---------------------------------------------------------------- the checkpoints


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of the same vocabulary with narrow layers; logits are as large as with wide ones."""
    text = config.get("text_config", config)
    text |= {"hidden_size": WIDTH, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    text |= {"initializer_range": LOUDER * 0.02}
    if text is config:  # Qwen2.5's heads are as wide as the hidden size lets them be
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [WIDTH // 64, 3 * WIDTH // 128, 3 * WIDTH // 128]}
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": WIDTH}
    return config


def _look_back(stock: Callable[[Any], None], text: Any) -> None:
    stock(text)
    text.layers[0].self_attn.o_proj.weight.data.mul_(LOUDER)  # what it copies stands beside those embeddings


class Speakers:
    """Makes checkpoints that write given completions; those of a kind share all files but the weights."""

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("real_vocabulary", TOOL)
        assert spec is not None and spec.loader is not None
        self.tool: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.tool)
        self.folder = folder
        self.ranks = self.tool.read_ranks(VOCABULARY)
        self.plain = self.tool.build_tokenizer(self.ranks, self.tool.PLAIN).to_str()
        self.speak, self.save, self.tool.SURE = self.tool.speak, self.tool.save_weights, SURE
        self.tool.build_tokenizer, self.tool.look_back = self._tokenizer, partial(_look_back, self.tool.look_back)
        self.tool.save_weights = lambda *_: None
        self.made: dict[str, Any] = {}
        for kind, (plain, turns, config_of, *rest) in [*self.tool.KINDS.items()]:
            narrow = lambda *sizes, config_of=config_of: _narrow(config_of(*sizes))  # noqa: E731
            self.tool.KINDS[kind] = (plain, turns, narrow, *rest)
        self.tool.KINDS["qwen3_vl_special"] = ("special", *self.tool.KINDS["qwen3_vl"][1:])

    def __call__(self, spoken: Spoken) -> Path:
        """The folder of a checkpoint of this kind that says this, without a card."""
        folder = self.folder / spoken.kind
        if spoken.kind not in self.made:
            self.tool.speak = lambda *made: self.made.__setitem__(spoken.kind, made)
            options = {"layers": 2, "vision_layers": 2, "untied": False, "seed": 0, "random": False, "key_bias": 0.0}
            self.tool.build(spoken.kind, self.ranks, folder, Namespace(**options, sayings=[], shard_mb=4000.0))
        model, tokenizer, _, template = self.made[spoken.kind]
        opens = "<think>\n" if template.endswith("<think>\n") else ""
        self.speak(model, tokenizer, [said.removeprefix(opens) for said in spoken.says], template)
        self.save(model, folder, 2**32)
        (folder / CARD).unlink(missing_ok=True)
        return folder

    def _tokenizer(self, _: Any, plain: str) -> Tokenizer:
        tokenizer: Any = Tokenizer.from_str(self.plain)
        if plain == "special":
            tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
        else:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain.split()])
        return tokenizer


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Speakers:
    return Speakers(tmp_path_factory.mktemp("speakers"))


@pytest.fixture(scope="module", autouse=True)
def processors_once() -> Iterator[None]:
    """A processor of 150,000 tokens takes a second to load, and is the same for all formats of a kind."""
    loaded: Callable[[Path], Any] = cache(load_processor)
    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers_vlm, policy):
            patch.setattr(module, "load_processor", lambda name, **_: loaded(Path(name)))
        yield


# ---------------------------------------------------------------- through everything


@pytest.fixture
def spoken(request: pytest.FixtureRequest, speakers: Speakers) -> tuple[Spoken, Path, Judge]:
    """A format, a checkpoint that writes it, and a strict judge with its card, which listens to itself."""
    given = FORMATS[request.param]
    folder = speakers(given)
    judge = Judge.from_pretrained(folder, card=given.card, device="cpu", strict=True, lenient=given.lenient)
    return given, folder, judge


@pytest.mark.parametrize("spoken", FORMATS, indirect=True)
def test_a_format_goes_through_everything(spoken, grpo_config, tiny_pairs):
    given, folder, judge = spoken
    verdict = judge.compare("a fox", *PICTURES)
    assert verdict.malformed == 0 and verdict.label_mass > 0.99
    for thought in verdict.thoughts:
        label = given.thoughts[thought.text]
        assert thought.answer == (label if thought.order == "as given" else 3 - label)
        assert (thought.p_first > 0.5) == (thought.answer == 1), "read where the model chose"
        if given.canonical:
            assert (thought.listener_p_first > 0.5) == (thought.answer == 1)

    ranking = judge.rank("a fox", PICTURES)
    assert ranking.comparisons == 1 and (ranking.order == [0, 1]) == (verdict.p_first >= 0.5)

    record = evaluate(judge, tiny_pairs.select(range(2)), progress=False, swap_check=0)
    assert record.malformed_rate == 0 and record.label_mass is not None and record.label_mass > 0.99

    scores, info = _served(ListenerReward(judge, scheme="group"))
    assert info["malformed"].tolist() == [0, 0] and info["label_mass"] == pytest.approx([1, 1], abs=0.01)
    assert (scores[0] >= scores[1]) == (verdict.p_first >= 0.5)

    pair = PreferencePair("a fox", PICTURES[0], PICTURES[1], 1.0, "x", "x")
    found = best_of(try_formats(judge.reasoner, [pair], max_new_tokens=24))
    assert found is not None and found.lenient == given.lenient
    assert (found.chat_format.tags, found.chat_format.labels) == (given.chat_format.tags, given.chat_format.labels)

    if not given.lenient:  # training never is
        given.card.save(folder)
        config = grpo_config(
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=24,
            learning_rate=1e-5,
            listener="none",
            reward_weights=[1.0, 1.0, 0.0],
        )
        adapter = LoraConfig(r=2, target_modules=["q_proj"])  # an embedding of 150,000 tokens has large gradients
        trainer = training.ListenerGRPOTrainer(folder, config, tiny_pairs, peft_config=adapter)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "malformed_rate" in entry]
        assert trainer.state.global_step == len(logged) == 2
        assert [(entry["malformed_rate"], entry["rewards/format/mean"]) for entry in logged] == [(0.0, 1.0)] * 2


@pytest.mark.parametrize("spoken", ["a phrase", "an opened thought", "JSON"], indirect=True)
def test_a_wrong_card_is_said(spoken):
    given, _, judge = spoken
    wrong = FORMATS["tags" if given.chat_format != PLAIN or given.lenient else "JSON"].card
    pictures = [Image.new("RGB", (56, 56), (30 * n, 0, 0)) for n in range(9)]
    mistaken = Judge(judge.reasoner, card=wrong)
    with pytest.warns(FormatWarning, match="16 of the judge's first 16 thoughts are malformed, such as .*(fox|warm)"):
        assert mistaken.compare_many(["a fox"] * 8, pictures[:8], pictures[1:])[0].malformed == 2


def _served(reward: ListenerReward) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    server = make_server(reward, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        return RemoteReward(address, scheme="group")(PICTURES, ["a fox"] * 2)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
