"""The judge: exact symmetry, what it makes of two models' answers, and runs on real architectures and pictures."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from typer.testing import CliRunner

from listener_reward.calibration.maps import Calibration, Platt
from listener_reward.card import Card
from listener_reward.chat import Chat, ChatFormat
from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate import evaluate
from listener_reward.judge import Judge
from listener_reward.listener import Listener, load_listener
from listener_reward.media.images import ImageLike, to_pil
from listener_reward.models.older_transformers import Qwen2VLImageProcessorPil
from listener_reward.models.processing import ImageOnlyQwen2_5_VLProcessor, ImageOnlyQwen3VLProcessor
from listener_reward.models.transformers_vlm import TransformersVLM
from listener_reward.reward import ListenerReward
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.models import CHAT_TEMPLATE, QUESTION, build_tokenizer
from listener_reward.tiny.world import split_pairs
from listener_reward.verdict import Verdict

# That words are unknown is tested with the backend.
pytestmark = pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")

GALLERY = Path(__file__).resolve().parents[2] / "shared" / "data" / "hpdv2"
RED, DARK, BLACK = (Image.new("RGB", (8, 8), (level, 0, 0)) for level in (255, 100, 0))


@pytest.fixture(scope="module")
def judge(random_judge) -> Judge:
    return Judge.from_pretrained(random_judge, device="cpu", thoughts=2)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[Image.Image], list[Image.Image]]:
    pairs = list(split_pairs("id", 6))
    firsts, seconds = zip(*map(draw_pair, pairs), strict=True)
    return [pair.wording for pair in pairs], list(firsts), list(seconds)


def red(image: ImageLike) -> int:
    pixel: Any = to_pil(image).getpixel((0, 0))
    return pixel[0]


class RedVLM:
    """Prefers the redder image, and the one shown first by `bias`; completes with what `says` makes of the two reds.

    Every thought has the mean log-probability `likelihood`.
    """

    def __init__(
        self,
        says: Callable[[int, int], str] = lambda first, second: "<think>red</think><answer>1</answer>",
        *,
        slope: float = 2.0,
        bias: float = 0.0,
        reserved: frozenset[str] = frozenset(),
        likelihood: float = -1.0,
    ):
        self.says, self.slope, self.bias, self.reserved, self.likelihood = says, slope, bias, reserved, likelihood
        self.asked: list[tuple[Chat, str]] = []
        self.labels: set[tuple[str, ...]] = set()

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        assert len(set(seeds)) == len(seeds)
        return [self.says(*map(red, chat.images)) for chat in chats]

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        self.asked += zip(chats, prefixes, strict=True)
        self.labels.add(tuple(labels))
        gaps = [(red(chat.images[0]) - red(chat.images[1])) / 255 for chat in chats]
        return torch.tensor([[self.slope * gap + self.bias, 0.0] for gap in gaps]).reshape(-1, 2).log_softmax(-1)

    def read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.label_logprobs(chats, prefixes, labels), torch.full((len(chats),), self.likelihood)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- symmetry


@pytest.mark.parametrize("think", [True, False])
def test_swapping_the_images_gives_exactly_one_minus_p(judge, pairs, think):
    prompts, firsts, seconds = pairs
    straight = judge.compare_many(prompts, firsts, seconds, think=think)
    swapped = judge.compare_many(prompts, seconds, firsts, think=think)
    for one, other in zip(straight, swapped, strict=True):
        assert_mirrored(one, other)
        assert len(one.thoughts) == (4 if think else 0)
    assert len({verdict.p_first for verdict in straight}) == len(straight)


def assert_mirrored(one: Verdict, other: Verdict) -> None:
    """Equality to the last bit, in both directions."""
    assert other.p_first == 1 - one.p_first
    assert one.p_first == 1 - other.p_first
    assert {one.preferred, other.preferred} in ({1, 2}, {None})
    assert one.listener_p_first is not None and other.listener_p_first == 1 - one.listener_p_first
    assert (other.contradicted, other.position_gap, other.malformed) == (
        one.contradicted,
        one.position_gap,
        one.malformed,
    )
    for mine, yours in zip(one.thoughts, other.thoughts, strict=True):
        assert yours.text == mine.text
        assert {yours.order, mine.order} == {"as given", "swapped"}
        assert (yours.answer, mine.answer) in ((1, 2), (2, 1), (None, None))
        assert yours.p_first == 1 - mine.p_first
        assert mine.p_first == 1 - yours.p_first
        assert mine.listener_p_first is not None and yours.listener_p_first == 1 - mine.listener_p_first
        assert yours.contradicted == mine.contradicted


@pytest.mark.parametrize("slope", [0.3, 2.0, 30.0, 200.0])
@pytest.mark.parametrize("bias", [-5.0, 0.0, 0.1, 20.0])
def test_symmetry_holds_however_sure_or_biased_the_models_are(slope, bias):
    vlm = RedVLM(slope=slope, bias=bias)
    judge = Judge(vlm, Listener(RedVLM(slope=slope / 3, bias=-bias), ChatFormat()), Card(thoughts=3))
    one, other = judge.compare("x", RED, DARK), judge.compare("x", DARK, RED)
    assert_mirrored(one, other)
    assert 0 < one.p_first < 1
    assert all(0 < thought.p_first < 1 for thought in one.thoughts)


def test_equal_images_are_an_exact_tie(judge, pairs):
    prompts, firsts, _ = pairs
    for verdict in judge.compare_many(prompts, firsts, [image.copy() for image in firsts]):
        assert verdict.p_first == 0.5
        assert verdict.listener_p_first == 0.5
        assert verdict.preferred is None
        assert verdict.contradicted is None
        assert [thought.order for thought in verdict.thoughts] == ["as given"] * 2 + ["swapped"] * 2 or [
            thought.order for thought in verdict.thoughts
        ] == ["as given", "swapped"] * 2


def test_a_verdict_does_not_depend_on_its_batch(judge, pairs):
    prompts, firsts, seconds = pairs
    together = judge.compare_many(prompts, firsts, seconds)
    for prompt, first, second, expected in zip(prompts, firsts, seconds, together, strict=True):
        alone = judge.compare(prompt, first, second)
        assert [thought.text for thought in alone.thoughts] == [thought.text for thought in expected.thoughts]
        assert alone.p_first == pytest.approx(expected.p_first, abs=1e-6)


def test_seed_changes_the_thoughts_and_calls_do_not(random_judge, pairs):
    prompts, firsts, seconds = pairs
    texts = []
    for seed in (0, 0, 1):
        judge = Judge.from_pretrained(random_judge, seed=seed)
        texts.append([t.text for t in judge.compare(prompts[0], firsts[0], seconds[0]).thoughts])
    assert texts[0] == texts[1] != texts[2]


# ---------------------------------------------------------------- arithmetic, on models that are one line


def test_both_orders_are_averaged_and_their_gap_reported():
    judge = Judge(RedVLM(slope=2.0, bias=0.5))
    gap = 2.0 * (255 - 100) / 255
    shown_first, shown_second = sigmoid(gap + 0.5), 1 - sigmoid(-gap + 0.5)
    verdict = judge.compare("x", RED, DARK)
    assert verdict.p_first == pytest.approx((shown_first + shown_second) / 2, abs=1e-6)
    assert verdict.position_gap == pytest.approx(shown_first - shown_second, abs=1e-6)
    by_order = {thought.order: thought.p_first for thought in verdict.thoughts}
    assert by_order == pytest.approx({"as given": shown_first, "swapped": shown_second}, abs=1e-6)
    assert verdict.preferred == 1
    assert verdict.listener_p_first is None and verdict.contradicted is None


def test_answers_are_in_the_callers_numbering():
    says = lambda first, second: f"<think>t</think><answer>{1 if first > second else 2}</answer>"  # noqa: E731
    for first, second, expected in ((RED, DARK, 1), (DARK, RED, 2)):
        verdict = Judge(RedVLM(says)).compare("x", first, second)
        assert [thought.answer for thought in verdict.thoughts] == [expected, expected]
        assert verdict.malformed == 0


def test_a_listener_that_disagrees_contradicts():
    says = lambda first, second: f"<think>t</think><answer>{1 if first > second else 2}</answer>"  # noqa: E731
    judge = Judge(RedVLM(says), Listener(RedVLM(slope=-1.0), ChatFormat()))
    verdict = judge.compare("x", RED, DARK)
    assert verdict.p_first > 0.5
    assert verdict.listener_p_first == pytest.approx(sigmoid(-155 / 255), abs=1e-6)
    assert verdict.contradicted is True
    assert [thought.contradicted for thought in verdict.thoughts] == [True, True]
    assert judge.compare("x", RED, DARK, think=False).thoughts == ()


def test_malformed_thoughts_are_counted_and_have_no_answer():
    says = lambda first, second: "<think>cut sh" if first > second else "<think>t</think><answer>2</answer>"  # noqa: E731
    verdict = Judge(RedVLM(says)).compare("x", RED, DARK)
    assert verdict.malformed == 1
    assert {thought.text: thought.answer for thought in verdict.thoughts} == {"cut sh": None, "t": 1}
    assert 0.5 < verdict.p_first < 1


def test_temperatures_divide_the_log_odds():
    for card in (Card(calibration=Calibration(Platt(2.0))), Card.from_dict({"temperature": 2.0})):
        judge = Judge(RedVLM(slope=2.0), card=card)
        assert judge.compare("x", RED, BLACK).p_first == pytest.approx(sigmoid(1.0), abs=1e-6)
    fast = Judge(RedVLM(slope=2.0), card=Card.from_dict({"temperature": 2.0}), think=False)
    assert fast.compare("x", RED, BLACK).p_first == pytest.approx(sigmoid(1.0), abs=1e-6)
    listener = Listener(RedVLM(slope=2.0), ChatFormat(), temperature=4.0)
    heard = Judge(RedVLM(), listener).compare("x", RED, BLACK).listener_p_first
    assert heard == pytest.approx(sigmoid(0.5), abs=1e-6)


def test_grounding_shrinks_a_listeners_confidence_in_unlikely_thoughts():
    """p = 1/2 + (p_raw - 1/2) exp(g l): with l = -0.5 and g = 2 the confidence is divided by e."""
    listener = Listener(RedVLM(slope=2.0, likelihood=-0.5), ChatFormat(), grounding=2.0)
    heard = Judge(RedVLM(), listener).compare("x", RED, BLACK).listener_p_first
    assert heard == pytest.approx(0.5 + (sigmoid(2.0) - 0.5) / math.e, abs=1e-6)
    with pytest.raises(JudgeError, match="the listener"):
        broken = Listener(RedVLM(likelihood=float("nan")), ChatFormat(), grounding=2.0)
        Judge(RedVLM(), broken).compare("x", RED, BLACK)


def test_reasoner_and_listener_read_the_thought_and_the_listener_not_the_verdict():
    told = "Image 1 is red. So image 1 is better."
    reasoner, hears = RedVLM(lambda first, second: f"<think>{told}</think><answer>1</answer>"), RedVLM()
    Judge(reasoner, Listener(hears, ChatFormat(), masking="verdict")).compare("x", RED, DARK)
    assert {prefix for _, prefix in reasoner.asked} == {f"<think>{told}</think><answer>"}
    assert {prefix for _, prefix in hears.asked} == {"<think>Image 1 is red.</think><answer>"}


def test_a_listener_is_asked_in_its_own_words():
    """Its question, its labels, and with its own tokens made harmless."""
    own = ChatFormat(question="{prompt}: {first} or {second}?", labels=("A", "B"), think=("[t]", "[/t]"))
    hears = RedVLM(reserved=frozenset({"[CLS]"}))
    reasoner = RedVLM(lambda first, second: "<think>a [CLS] thought</think><answer>1</answer>")
    Judge(reasoner, Listener(hears, own)).compare("a [CLS] fox", RED, DARK)
    chat, prefix = hears.asked[0]
    assert chat.messages[0]["content"][0]["text"] == "a [ CLS] fox: "
    assert prefix == "[t]a [ CLS] thought[/t]<answer>"
    assert hears.labels == {("A", "B")}
    assert reasoner.asked[0][0].prompt == "a [CLS] fox"


def test_pairs_are_judged_in_one_batch():
    vlm = RedVLM()
    prompts = ["x", "y", "z"]
    verdicts = Judge(vlm).compare_many(prompts, [RED, DARK, BLACK], [DARK, RED, BLACK])
    assert [verdict.preferred for verdict in verdicts] == [1, 2, None]
    assert len(vlm.asked) == 5  # both orders, and the pair of equal pictures once
    assert Judge(vlm).compare_many([], [], []) == []


def test_rank_orders_by_redness():
    ranking = Judge(RedVLM()).rank("x", [DARK, RED, BLACK])
    assert ranking.order == [1, 0, 2]
    assert ranking.comparisons == 3


# ---------------------------------------------------------------- what goes wrong


class NaNVLM(RedVLM):
    def label_logprobs(self, chats, prefixes, labels):
        return super().label_logprobs(chats, prefixes, labels) * float("nan")


def poison(vlm: Any) -> None:
    with torch.no_grad():
        vlm.model.lm_head.weight[3] = float("nan")


@pytest.mark.parametrize("think", [True, False])
def test_a_broken_reasoner_is_no_score(random_judge, pairs, think):
    judge = Judge.from_pretrained(random_judge)
    poison(judge.reasoner)
    with pytest.raises(JudgeError, match=r"the reasoner gave NaN.*dtype='float32'"):
        judge.compare(pairs[0][0], pairs[1][0], pairs[2][0], think=think)


def test_a_broken_listener_is_no_score(random_judge, pairs, tmp_path):
    listener = shutil.copytree(random_judge, tmp_path / "listener")  # the same checkpoint would share weights
    judge: Any = Judge.from_pretrained(random_judge, listener=listener)
    poison(judge.listener.vlm)
    with pytest.raises(JudgeError, match="the listener gave NaN"):
        judge.compare(pairs[0][0], pairs[1][0], pairs[2][0])


def test_a_listener_of_ones_own_that_gives_nan_is_no_score():
    class Mute(Listener):
        def p_first(self, chats, traces):
            return torch.full((len(chats),), float("nan"))

    with pytest.raises(JudgeError, match="the listener"):
        Judge(RedVLM(), Mute(RedVLM(), ChatFormat())).compare("x", RED, DARK)
    with pytest.raises(JudgeError, match="the listener"):
        Judge(RedVLM(), Listener(NaNVLM(), ChatFormat())).rank("x", [RED, DARK])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda judge: judge.compare("x", "nowhere.png", RED), "^first is 'nowhere.png'"),
        (lambda judge: judge.compare("x", RED, "nowhere.png"), "^second is 'nowhere.png'"),
        (lambda judge: judge.compare(None, RED, DARK), r"prompts\[0\] is a NoneType"),
        (lambda judge: judge.compare_many(["x"], [RED], ["nowhere.png"]), r"^seconds\[0\]"),
        (lambda judge: judge.compare_many(["x", "y"], [RED], [DARK]), "lengths 2, 1 and 1"),
        (lambda judge: judge.compare_many("xy", [RED, RED], [DARK, DARK]), "single text 'xy'"),
        (lambda judge: judge.rank("x", []), "images"),
        (lambda judge: judge.rank("x", "a.png"), "one image and not a batch"),
        (lambda judge: judge.rank("x", [RED, b""]), r"^images\[1\]"),
    ],
)
def test_unusable_input_names_its_field(call, named):
    with pytest.raises(InputError, match=named):
        call(Judge(RedVLM()))


@pytest.mark.parametrize("options", [{"thoughts": 0}, {"max_new_tokens": 0}, {"thoughts": "two"}])
def test_unusable_options_name_their_field(random_judge, options):
    with pytest.raises(InputError, match=next(iter(options))):
        Judge.from_pretrained(random_judge, **options)


# ---------------------------------------------------------------- loading and pickling


def test_listener_choices(random_judge):
    assert Judge.from_pretrained(random_judge, listener="none").listener is None
    listener = load_listener(random_judge, Card())
    assert Judge.from_pretrained(random_judge, listener=listener).listener is listener
    assert Judge.from_pretrained(random_judge, listener=str(random_judge)).listener is not None
    assert listener.chat_format.question == QUESTION


def test_pickles_by_configuration(random_judge, pairs):
    thinks = Judge.from_pretrained(random_judge, thoughts=2, seed=5, max_new_tokens=6, batch_size=3)
    hasty = Judge.from_pretrained(random_judge, seed=5, max_new_tokens=6, think=False, batch_size=3)
    thinks.think, hasty.think = False, True
    prompt, first, second = (column[0] for column in pairs)
    for judge in (thinks, hasty):
        pickled = pickle.dumps(judge)
        assert len(pickled) < 2000
        twins: list[Any] = [pickle.loads(pickled), copy.deepcopy(judge)]
        for twin in twins:
            assert (twin.seed, twin.think, twin.card, twin.reasoner.batch_size) == (5, judge.think, judge.card, 3)
            assert twin.compare(prompt, first, second) == judge.compare(prompt, first, second)


def test_no_thoughts_are_counted_where_none_are_asked_for(random_judge, tmp_path):
    """However they are asked for; a card may have its number all the same."""
    said = r"thoughts is 4 \(--thoughts\), and think is False \(--no-think\)"
    with pytest.raises(InputError, match=said):
        Judge.from_pretrained(random_judge, think=False, thoughts=4)
    with pytest.raises(InputError, match=said):
        ListenerReward(random_judge, think=False, thoughts=4).rank("x", [Image.new("RGB", (32, 32))] * 2)
    options = ["--judge", str(random_judge), "--no-think", "--thoughts", "4"]
    for command in (["serve", "--port", "1"], ["eval", "--data", "tiny:id", "--limit", "2"]):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 2 and re.search(said, result.stderr), result.output
        assert result.stderr.count("\n") == 1
    folder = shutil.copytree(random_judge, tmp_path / "judge")
    Card.amend(folder, thoughts=4)
    judge = Judge.from_pretrained(folder, think=False)
    assert judge.card.thoughts == 4 and judge.card.mode(judge.think).thoughts == 1


def test_a_judge_put_together_by_hand_does_not_pickle(random_judge):
    with pytest.raises(TypeError, match="'by hand' was put together from loaded models"):
        pickle.dumps(Judge(RedVLM(), name="by hand"))
    listener = load_listener(random_judge, Card())
    with pytest.raises(TypeError, match="put together"):
        pickle.dumps(Judge.from_pretrained(random_judge, listener=listener))


def test_a_reward_with_a_judge_pickles_without_its_weights(random_judge, pairs):
    judge = Judge.from_pretrained(random_judge)
    reward = ListenerReward(judge)
    pickled = pickle.dumps(reward)
    assert len(pickled) < 2000
    _, firsts, seconds = pairs
    scores, _ = pickle.loads(pickled)([firsts[0], seconds[0]], ["x", "x"])
    assert scores.tolist() == reward([firsts[0], seconds[0]], ["x", "x"])[0].tolist()


# ---------------------------------------------------------------- real architectures


def small_vlm(kind: str) -> TransformersVLM:
    """Random weights at the real patch and image sizes, and the tiny tokenizer's words."""
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    ids: dict[str, Any] = {
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    if kind == "qwen3_vl":
        vision |= {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        )
        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16, merge_size=2, temporal_patch_size=2
        )
        processor = ImageOnlyQwen3VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
    else:
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
        )
        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 3136, "longest_edge": 1003520}, patch_size=14, merge_size=2, temporal_patch_size=2
        )
        processor = ImageOnlyQwen2_5_VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return TransformersVLM(model.eval().requires_grad_(False), processor, batch_size=8)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def small_judge(request, tmp_path_factory) -> Judge:
    """Saved and loaded again, as any checkpoint of that architecture would be."""
    folder = tmp_path_factory.mktemp(request.param)
    vlm = small_vlm(request.param)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    Card(format=ChatFormat(question=QUESTION), listener=".", max_new_tokens=6).save(folder)
    judge: Any = Judge.from_pretrained(folder, device="cpu", batch_size=8)
    assert judge.reasoner.model.config.model_type == request.param
    return judge


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def test_real_architectures_judge(small_judge):
    first, second = noise(0, 128, 96), noise(1, 96, 160)
    one, other = (small_judge.compare("two red circles", *shown) for shown in ((first, second), (second, first)))
    assert_mirrored(one, other)
    assert 0 < one.p_first < 1 and one.p_first != 0.5
    assert len(one.thoughts) == 2
    # On these models too a row must not depend on the padding of its batch.
    together = small_judge.compare_many(["two red circles", "one"], [first, second], [second, second])
    assert together[0].p_first == pytest.approx(one.p_first, abs=1e-5)
    assert together[1].p_first == 0.5


@pytest.mark.parametrize("token_budget", [1, 16384], ids=["a row for each", "one row"])
def test_real_architectures_read_a_group_as_they_read_copies(small_judge, token_budget):
    """Image features and prompts once, against plain batches. Qwen3-VL adds features to its first layers too."""
    model, processor = small_judge.reasoner.model, small_judge.reasoner.processor
    chat_format = ChatFormat(question=QUESTION)
    first, second = noise(0, 128, 96), noise(1, 96, 160)
    chats = [chat_format.chat("two red circles", first, second)] * 3 + [chat_format.chat("one", second, first)]
    prefixes = [chat_format.answer_slot(thought) for thought in ("", "image 1 : red", "no", "image 2 : a blue star")]
    shared = TransformersVLM(model, processor, token_budget=token_budget)
    plain = TransformersVLM(model, processor, shared_prefix=False)
    expected = plain.read(chats, prefixes, ("1", "2"))
    for found, wanted in zip(shared.read(chats, prefixes, ("1", "2")), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-5
    assert len(set(expected[0][:, 0].tolist())) == 4
    assert shared.features.encoded == 2


def test_real_architectures_see_the_whole_picture(small_judge):
    """512 pixels are not reduced: a change of one corner is seen."""
    image = noise(0, 512, 512)
    marked = image.copy()
    marked.paste((255, 255, 255), (480, 480, 512, 512))
    inputs = small_judge.reasoner.processor.image_processor(images=[image], return_tensors="pt")
    _, height, width = inputs["image_grid_thw"][0].tolist()
    patch = small_judge.reasoner.processor.image_processor.patch_size
    assert (height * patch, width * patch) == ((504, 504) if patch == 14 else (512, 512))
    plain, changed = (
        small_judge.compare("x", shown, noise(2, 512, 512), think=False).p_first for shown in (image, marked)
    )
    assert plain != changed


@pytest.mark.skipif(not GALLERY.is_dir(), reason="HPDv2's gallery is not there")
def test_evaluates_real_pictures_at_their_resolution(small_judge):
    evaluation = evaluate(small_judge, load_pairs(f"hpdv2:{GALLERY}", limit=8), progress=False, swap_check=4)
    assert evaluation.n == 8
    assert evaluation.swap_consistency == 1.0
    assert evaluation.swap_checked == 4
    assert evaluation.malformed_rate is not None and evaluation.malformed_rate > 0.5  # random weights
    assert evaluation.accuracy is not None and 0 <= evaluation.accuracy <= 1
    assert evaluation.nll is not None and 0 < evaluation.nll < 3
    assert evaluation.listener_accuracy is not None


@pytest.mark.skipif(not GALLERY.is_dir(), reason="HPDv2's gallery is not there")
def test_ranks_picture_files(small_judge):
    files = sorted((GALLERY / "images").iterdir())[:3]
    ranking = small_judge.rank("A cat with two horns on its head.", files)
    assert sorted(ranking.order) == [0, 1, 2]
    assert ranking.comparisons == 3
    assert len(set(ranking.scores)) == 3
    again = small_judge.rank("A cat with two horns on its head.", files[::-1])
    assert [2 - place for place in again.order] == ranking.order


def test_adapters_off_is_the_base(random_judge, pairs):
    peft = pytest.importorskip("peft")
    vlm = TransformersVLM.from_pretrained(random_judge, device="cpu")
    chat_format = ChatFormat(question=QUESTION)
    base = Judge(vlm, card=Card(format=chat_format)).compare("x", pairs[1][0], pairs[2][0], think=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(vlm.model, config).eval()
    on, off = (TransformersVLM(adapted, vlm.processor, adapters_off=off) for off in (False, True))
    card = replace(Card(), format=chat_format)
    verdict = Judge(on, Listener(off, chat_format), card).compare("x", pairs[1][0], pairs[2][0], think=False)
    assert verdict.listener_p_first == pytest.approx(base.p_first, abs=1e-6)
    assert abs(verdict.p_first - base.p_first) > 1e-4
