"""A budget in bytes bounds what a batch keeps, and memory that runs out is one line; no allocation is faked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from listener_reward.errors import InputError, JudgeError
from listener_reward.judge import Judge
from listener_reward.models import transformers_vlm
from listener_reward.models.memory import Footprint, out_of_memory, tokens_of
from listener_reward.models.options import as_bytes
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.reward import ListenerReward
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs

Pairs = tuple[list[str], list[Image.Image], list[Image.Image]]

# The embedded judge was calibrated for one thought.
pytestmark = pytest.mark.filterwarnings("ignore:the judge's confidence was calibrated")

HUGE = 2**50
"""Bytes that no machine has."""


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    pairs = list(split_pairs("id", 6))
    firsts, seconds = zip(*map(draw_pair, pairs), strict=True)
    return [pair.wording for pair in pairs], list(firsts), list(seconds)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained("tiny", device="cpu", listener="none", thoughts=2)


def reasoner(judge: Judge) -> TransformersVLM:
    assert isinstance(judge.reasoner, TransformersVLM)
    return judge.reasoner


# --- the budget


@pytest.mark.parametrize(
    ("given", "size"),
    [
        *[(5, 5), ("8GB", 8 * 10**9), ("8 GiB", 2**33), ("500m", 5 * 10**8), ("1.5G", 15 * 10**8)],
        *[(unread, None) for unread in ("2**9", "", 0, -1, "GB", True, "nan", None)],
    ],
)
def test_sizes_are_read(given: Any, size: int | None):
    if size is not None:
        assert as_bytes(given, "memory") == size
        return
    with pytest.raises(InputError, match=r"^memory is .*such as '8GB'"):
        as_bytes(given, "memory")


def test_a_token_keeps_what_the_shape_says(judge: Judge, pairs: Pairs, monkeypatch: pytest.MonkeyPatch):
    """Keys and values of the prompts, to the byte; the longest prompt is what they are padded to."""
    found: list[tuple[int, int]] = []
    stock = transformers_vlm.prefill

    def measured(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        kept = stock(model, prompts, *args, **kwargs)
        tokens = len(prompts) * (max(len(prompt.ids) for prompt in prompts) - 1)
        found.append((tokens, sum(x.nbytes for layer in kept.values() for x in layer)))
        return kept

    monkeypatch.setattr(transformers_vlm, "prefill", measured)
    judge.compare_many(*pairs)
    vlm = reasoner(judge)
    hidden = vlm.model.config.get_text_config().hidden_size
    assert found and all(size == tokens * (vlm.footprint.kept - 4 * hidden) for tokens, size in found)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_batches_fit_the_budget_and_say_the_same(
    judge: Judge, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, shared_prefix: bool
):
    whole = judge.compare_many(*pairs)
    small = Judge.from_pretrained(
        "tiny", device="cpu", listener="none", thoughts=2, memory="3MB", shared_prefix=shared_prefix
    )
    vlm = reasoner(small)
    sizes: list[int] = []
    stock = vlm._batches

    def watched(chats: Any, texts: Any, new: int = 0) -> Any:
        for batch in stock(chats, texts, new):
            distinct = {texts[row] + str([id(visual) for visual in chats[row].visuals]): row for row in batch}
            sizes.append(len(distinct))
            assert len(distinct) == 1 or vlm.footprint.chat(0, len(batch), new) <= 1_500_000
            yield batch

    monkeypatch.setattr(vlm, "_batches", watched)
    verdicts = small.compare_many(*pairs)
    assert max(sizes) < 12 and vlm.token_budget < 16384
    for verdict, other in zip(verdicts, whole, strict=True):
        assert [thought.text for thought in verdict.thoughts] == [thought.text for thought in other.thoughts]
        assert verdict.p_first == pytest.approx(other.p_first, abs=1e-5)


def test_one_byte_still_judges_one_chat_at_a_time(judge: Judge, pairs: Pairs):
    tight = Judge.from_pretrained("tiny", device="cpu", listener="none", thoughts=2, memory=1)
    assert reasoner(tight).token_budget == 1
    verdict, other = (each.compare(pairs[0][0], pairs[1][0], pairs[2][0]) for each in (tight, judge))
    assert verdict.p_first == pytest.approx(other.p_first, abs=1e-5)


def test_a_picture_has_about_as_many_tokens_as_are_made_of_it(judge: Judge, pairs: Pairs):
    vlm = reasoner(judge)
    chat = judge.card.format.chat(pairs[0][0], pairs[1][0].resize((200, 90)), pairs[2][0], vlm.reserved)
    made = [len(each.features) for each in vlm.features(chat.visuals)]
    assert [tokens_of(vlm.processor, visual) for visual in chat.visuals] == pytest.approx(made, abs=4)


def test_a_7b_reads_as_many_tokens_as_the_token_budget_in_half_of_the_default():
    """Qwen2.5-VL-7B's shape in bfloat16: 28 layers, 4 heads of keys, 128 wide; hidden 3584, MLP 18944."""

    class Config:
        num_hidden_layers, num_attention_heads, num_key_value_heads = 28, 28, 4
        hidden_size, intermediate_size, vocab_size = 3584, 18944, 152064
        vision_config = None

        def get_text_config(self) -> Config:
            return self

    class Model:
        config, dtype = Config(), torch.bfloat16

    footprint = Footprint.of(Model())
    assert footprint.kept == 28 * 2 * 4 * 128 * 2 + 3584 * 2
    assert footprint.computed == 3 * 18944 * 2 + 3584 * 14
    assert 10_000 < footprint.tokens(2**31) < 16384


# --- memory that runs out


def hungry(judge: Judge, pairs: Pairs, **options: Any) -> str:
    """What is said where a layer asks for more than there is."""
    layer = reasoner(judge).model.model.language_model.layers[-1]
    hook = layer.register_forward_pre_hook(lambda *_: torch.empty(HUGE, dtype=torch.uint8))
    try:
        with pytest.raises(JudgeError) as raised:
            judge.compare(pairs[0][0], pairs[1][0], pairs[2][0], **options)
    finally:
        hook.remove()
    assert "\n" not in str(raised.value) and raised.value.__cause__ is None
    return str(raised.value)


def test_running_out_names_what_to_lower(judge: Judge, pairs: Pairs):
    asked = f", which asked for {HUGE} bytes more; lower "
    assert hungry(judge, pairs) == (
        f"memory ran out while thoughts were sampled{asked}memory, batch_size, max_new_tokens or max_pixels"
    )
    said = hungry(judge, pairs, think=False)
    assert said == f"memory ran out while answers were read{asked}token_budget, memory or max_pixels"
    assert judge.compare(pairs[0][0], pairs[1][0], pairs[2][0]), "and the judge goes on"


def test_it_is_never_a_score(pairs: Pairs):
    """A batch that does not fit is halved, as for any failure; alone, a pair that does not fit has no score."""
    judge = Judge.from_pretrained("tiny", device="cpu", listener="none", think=False)
    rows: list[int] = []

    def greedy(_: Any, args: Any) -> None:
        rows.append(args[0].shape[1])
        torch.empty(HUGE if rows[-1] > limit else 1, dtype=torch.uint8)

    reasoner(judge).model.model.language_model.layers[-1].register_forward_pre_hook(greedy)
    reward = ListenerReward(judge, scheme="reference", reference=dict(zip(pairs[0], pairs[2], strict=True)))
    limit = 10**9
    plain, _ = reward(pairs[1], pairs[0])
    limit = max(rows) // 2
    with pytest.raises(JudgeError, match="memory ran out"):
        reward(pairs[1], pairs[0])
    reward.on_failure = "nan"
    halved, info = reward(pairs[1], pairs[0])
    assert halved == pytest.approx(plain, abs=1e-4) and not info["failed"].any()
    limit = 1
    none, info = reward(pairs[1], pairs[0])
    assert all(score != score for score in none) and info["failed"].all()


def test_other_faults_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^a bug$"), out_of_memory("it ran", "lower it"):
        raise RuntimeError("a bug")
    with (
        pytest.raises(JudgeError, match=r"^memory ran out while it ran; lower it$"),
        out_of_memory("it ran", "lower it"),
    ):
        bytearray(HUGE)


LIMITED = """
import resource, sys
from PIL import Image
from listener_reward import Judge, JudgeError

judge = Judge.from_pretrained("tiny", device="cpu", listener="none", think=False, max_pixels=2**23)
small, large = (Image.effect_noise((edge, edge), 50).convert("RGB") for edge in (48, 2000))
print(judge.compare("two red circles", small, small.rotate(90)).p_first)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
try:
    judge.compare("two red circles", large, large.rotate(90))
except JudgeError as error:
    print(error)
print(judge.compare("two red circles", small, small.rotate(90)).p_first)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process has")
def test_a_process_that_is_full_says_so_and_goes_on():
    """64 MiB beside what the process has, and a picture whose patches are more than that."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    before, said, after = done.stdout.splitlines()
    assert said.startswith("memory ran out while answers were read") and "max_pixels" in said
    assert before == after
