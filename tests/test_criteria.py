"""A reward by several criteria: what is asked, the weighted sum, its parts, failures, and who is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import FakeJudge, shade_image, sigmoid

from listener_reward import Judge, ListenerReward, Mixture, Prompt
from listener_reward.card import Card
from listener_reward.chat import ChatFormat
from listener_reward.criteria import check_weight, read_criteria, summed
from listener_reward.errors import InputError, JudgeError
from listener_reward.integrations.contract import logged, score
from listener_reward.listener import Listener, _with_criteria, load_listener
from listener_reward.meetings import INFO
from listener_reward.models.hub import resolve
from listener_reward.pairs import as_prompt
from listener_reward.ranking import PRIOR_STD, Ranking
from listener_reward.tiny.models import QUESTION

pytestmark = pytest.mark.filterwarnings("ignore::listener_reward.errors.UnknownWordsWarning")

WEIGHTS = {"alignment": 1.0, "quality": 0.5}
SLOPES = {"alignment": 4.0, "quality": -2.0, None: 1.0}
DARK, MIDDLE, RED = shade_image(0), shade_image(51), shade_image(102)  # a fifth apart


class ByCriterion(FakeJudge):
    """Likes red images for their alignment, dark ones for their quality."""

    criteria = ("alignment", "quality")

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.asked: list[list[tuple[str, str | None]]] = []

    def compare_many(self, prompts: Any, firsts: Any, seconds: Any, **options: Any) -> Any:
        asked = [as_prompt(prompt) for prompt in prompts]
        self.asked.append([(prompt.text, prompt.criterion) for prompt in asked])
        verdicts: list[Any] = []
        for prompt, first, second in zip(asked, firsts, seconds, strict=True):
            self.slope = SLOPES[prompt.criterion]
            verdicts += super().compare_many([f"{prompt.text} {prompt.criterion}"], [first], [second], **options)
        return verdicts

    def rank(self, prompt: Any, images: Any, *, budget: int | None = None) -> Ranking:
        return super().rank(prompt, images, budget=budget)


def error_of(p: float) -> float:
    return (p * (1 - p) + PRIOR_STD**-2) ** -0.5


def test_the_score_is_the_weighted_sum_and_each_criterion_is_told():
    """Red against a reference two fifths darker: log-odds 1.6 for alignment, -0.8 for quality, 1.6 - 0.4 together."""
    judge = ByCriterion(bias=0.0, malformed=True)
    reward = ListenerReward(judge, scheme="reference", reference=lambda _: DARK, criteria=WEIGHTS)
    scores, info = reward([RED, DARK], ["a", "b"])
    assert scores.dtype == np.float32 and scores == pytest.approx([1.2, 0.0], abs=1e-6)
    assert info["alignment/score"] == pytest.approx([1.6, 0], abs=1e-6)
    assert info["quality/score"] == pytest.approx([-0.8, 0], abs=1e-6)
    errors = [error_of(sigmoid(1.6)), error_of(sigmoid(0.8))]
    assert info["alignment/standard_error"][0] == pytest.approx(errors[0])
    assert info["standard_error"][0] == pytest.approx((errors[0] ** 2 + (0.5 * errors[1]) ** 2) ** 0.5)
    assert info["comparisons"].tolist() == [2, 2] and info["alignment/comparisons"].tolist() == [1, 1]
    assert info["malformed"].tolist() == [0.5, 0.5] and info["failed"].tolist() == [0, 0]
    own = {f"{name}/{entry}" for name in WEIGHTS for entry in ("score", "missing", *INFO)} - {
        f"{name}/failed" for name in WEIGHTS
    }
    assert set(info) == {*INFO, *own} and all(values.dtype == np.float32 for values in info.values())
    assert judge.asked == [[("a", "alignment"), ("a", "quality"), ("b", "alignment"), ("b", "quality")]]


def test_within_a_group_the_criteria_of_a_pair_are_asked_one_after_the_other():
    judge = ByCriterion()
    scores, info = ListenerReward(judge, scheme="group", criteria=WEIGHTS)([DARK, MIDDLE, RED], ["a"] * 3)
    assert judge.asked == [[("a", "alignment"), ("a", "quality")] * 3]
    alone = [
        ListenerReward(ByCriterion(), scheme="group")([DARK, MIDDLE, RED], [Prompt("a", (), name)] * 3)[0]
        for name in WEIGHTS
    ]
    assert info["alignment/score"].tolist() == alone[0].tolist() and info["quality/score"].tolist() == alone[1].tolist()
    assert scores == pytest.approx(alone[0] + 0.5 * alone[1], abs=1e-6)
    assert info["comparisons"].tolist() == [4, 4, 4]


def test_the_first_image_seen_is_the_reference_of_all_criteria():
    reward = ListenerReward(ByCriterion(), scheme="reference", criteria=WEIGHTS)
    scores, info = reward([DARK], ["a"])
    assert scores.tolist() == [0] and info["comparisons"].tolist() == [0] and np.isnan(info["position_gap"][0])
    assert reward([RED], ["a"])[0] == pytest.approx([1.2], abs=1e-6)
    assert list(reward.state_dict()["references"]) == ["a"]


def breaks(prompt: str, first: int, second: int) -> bool:
    return prompt == "a quality" and 102 in (first, second)


def test_a_criterion_that_failed_is_missing_and_its_weight_goes_nowhere():
    options: Any = {"scheme": "reference", "reference": lambda _: DARK, "criteria": WEIGHTS}
    scores, info = ListenerReward(ByCriterion(breaks_on=breaks), on_failure="nan", **options)([RED, MIDDLE], ["a"] * 2)
    assert np.isnan(scores).tolist() == [True, False] and scores[1] == pytest.approx(0.6, abs=1e-6)
    assert info["failed"].tolist() == [1, 0] and info["quality/missing"].tolist() == [1, 0]
    assert info["alignment/missing"].tolist() == [0, 0]
    assert info["alignment/score"] == pytest.approx([1.6, 0.8], abs=1e-6)
    scores, info = ListenerReward(ByCriterion(breaks_on=breaks), on_failure="group-mean", **options)(
        [RED, MIDDLE], ["a"] * 2
    )
    assert scores == pytest.approx([1.6 - 0.2, 0.6], abs=1e-6), "the quality of the other image of the prompt"
    assert info["quality/missing"].tolist() == [1, 0] and info["failed"].tolist() == [1, 0]
    with pytest.raises(JudgeError):
        ListenerReward(ByCriterion(breaks_on=breaks), **options)([RED], ["a"])


def test_hosts_log_the_criteria_as_the_components_of_a_mixture():
    reward = ListenerReward(ByCriterion(), scheme="group", criteria=WEIGHTS)
    _, info = score(reward, [DARK, RED], ["a", "a"])
    assert set(logged(info)) == {"standard_error", "comparisons", "failed", "alignment/score", "quality/score"}
    _, outer = Mixture({"listener": (reward, 1.0)})([DARK, RED], ["a", "a"])
    assert outer["listener/alignment/score"].tolist() == info["alignment/score"].tolist()


def test_ranking_goes_by_the_weighted_sum():
    reward = ListenerReward(ByCriterion(), criteria=WEIGHTS)
    by_alignment, by_quality = (reward.rank("a", [DARK, MIDDLE, RED], criterion=name) for name in WEIGHTS)
    assert by_alignment.order == [2, 1, 0] and by_quality.order == [0, 1, 2]
    ranking = reward.rank("a", [DARK, MIDDLE, RED])
    assert ranking == summed({"alignment": by_alignment, "quality": by_quality}, WEIGHTS)
    assert ranking.order == [2, 1, 0] and ranking.comparisons == 6
    assert ranking.scores == pytest.approx(np.add(by_alignment.scores, np.multiply(by_quality.scores, 0.5)))
    assert reward.compare("a", RED, DARK).p_first == pytest.approx(sigmoid(0.4)), "the general question"


def test_a_prompt_with_a_criterion_of_its_own_is_refused_beside_others():
    with pytest.raises(InputError, match="criterion is given, and the prompt 'a' has its own"):
        ListenerReward(ByCriterion(), criteria=WEIGHTS)([RED, DARK], [Prompt("a", (), "quality")] * 2)


def test_criteria_come_as_a_text_too():
    assert read_criteria("alignment=1, quality=0.5") == WEIGHTS
    assert ListenerReward("tiny", criteria="quality=-1").criteria == {"quality": -1.0}
    assert "criteria={'quality': -1.0}" in repr(ListenerReward("tiny", criteria="quality=-1"))
    assert pickle.loads(pickle.dumps(ListenerReward("tiny", criteria=WEIGHTS))).criteria == WEIGHTS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "criteria is {}"),
        ("alignment", "give 'alignment=1,quality=0.5'"),
        ("alignment=much", "give 'alignment=1,quality=0.5'"),
        ("a=1,a=2", "criteria names one twice"),
        ({"a": 0}, "the weight of 'a' is 0; give a finite number"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a/b": 1.0}, "a criterion is named 'a/b'"),
        (["a"], r"criteria is \['a'\]"),
    ],
)
def test_criteria_that_are_none_are_refused(given: Any, said: str):
    with pytest.raises(InputError, match=said):
        ListenerReward("tiny", criteria=given)
    with pytest.raises(InputError, match="the weight of 'x' is True"):
        check_weight("x", True)


def test_an_unknown_criterion_is_told_as_soon_as_the_judge_is_there(random_judge):
    with pytest.raises(InputError, match="criteria has 'beauty', and the judge has 'alignment', 'quality'"):
        ListenerReward(ByCriterion(), criteria={"beauty": 1.0})
    by_name = ListenerReward(str(random_judge), criteria={"beauty": 1.0}, device="cpu")
    with pytest.raises(InputError, match="criteria has 'beauty', and the judge has none"):
        by_name([RED, DARK], ["a", "a"])
    card = {"format": {"question": QUESTION, "criteria": {"color": "red ?"}}, "listener": "."}
    judge = Judge.from_pretrained(random_judge, card=card, device="cpu")
    assert judge.criteria == ("color",)
    listener = Listener(judge.reasoner, ChatFormat(question=QUESTION))
    assert Judge(judge.reasoner, listener, judge.card).criteria == (), "the listener could not be asked"


def test_a_listener_without_criteria_is_asked_by_those_of_the_judges_card():
    card = {"format": {"question": QUESTION, "criteria": {"color": "which color is right ?"}}}
    listener = load_listener("tiny-listener", Card.read(card), device="cpu")
    assert listener.chat_format.question == QUESTION
    assert dict(listener.chat_format.known_criteria) == card["format"]["criteria"]
    other = replace(Card.load(resolve("tiny-listener")).format, criteria={"color": "red ?"})
    assert _with_criteria(other, Card.read(card).format) == other, "its own come first"
    assert (
        load_listener("tiny-listener", Card(format=ChatFormat(question=QUESTION)), device="cpu").chat_format.criteria
        is None
    )


def test_a_judge_by_criteria_scores_as_one_criterion_at_a_time(random_judge):
    criteria = {"color": "red or blue ?", "count": "how many ?"}
    card = {"format": {"question": QUESTION, "criteria": criteria}, "listener": "."}
    judge = Judge.from_pretrained(random_judge, card=card, device="cpu", think=False)
    images, prompts = [shade_image(red, 56) for red in (0, 120, 255)], ["a red circle"] * 3
    _, info = ListenerReward(judge, scheme="group", criteria={"color": 1.0, "count": 2.0})(images, prompts)
    for name in criteria:
        alone, _ = ListenerReward(judge, scheme="group", criteria={name: 1.0})(images, prompts)
        assert info[f"{name}/score"] == pytest.approx(alone, abs=1e-4)
