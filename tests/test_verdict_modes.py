"""How a verdict is made: means and majorities, one order or both, and when thinking stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student

from listener_reward.calibration.maps import Calibration, Curve, Platt
from listener_reward.card import Card
from listener_reward.chat import Chat, ChatFormat
from listener_reward.conclude import Judgement, is_sure, settled
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.listener import Listener
from listener_reward.trace import Trace
from listener_reward.verdict import Aggregate, Mode

RED, DARK, BLUE = (Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (100, 0, 0), (0, 0, 255)))


class Thinker:
    """Its n-th thought on a chat is `script[n]`, over and over: "1" for the redder image, "2", or "?".

    At the answer slot it gives `p` to the image that the thought chose.
    """

    reserved: frozenset[str] = frozenset()

    def __init__(self, script: str, p: float = 0.9):
        self.script, self.p = script, p
        self.batches: list[int] = []
        self.told: dict[str, int] = {}

    def generate(
        self, chats: Sequence[Chat], *, seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        self.batches.append(len(chats))
        return [self._think(chat) for chat in chats]

    def _think(self, chat: Chat) -> str:
        first, second = (picture.image.getpixel((0, 0)) for picture in chat.images)
        key = f"{chat.prompt}{first}{second}"
        word = self.script[self.told.get(key, 0) % len(self.script)]
        self.told[key] = self.told.get(key, 0) + 1
        if word == "?":
            return "Hm"
        redder = 1 if first[0] > second[0] else 2  # pyright: ignore
        answer = redder if word == "1" else 3 - redder
        return f"<think>{answer}</think><answer>{answer}</answer>"

    def label_logprobs(self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        chosen = [self.p if "1" in prefix else 1 - self.p if "2" in prefix else 0.5 for prefix in prefixes]
        return torch.tensor([[p, 1 - p] for p in chosen]).log()

    def read(
        self, chats: Sequence[Chat], prefixes: Sequence[str], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.label_logprobs(chats, prefixes, labels), torch.zeros(len(chats))


def judge(script: str, p: float = 0.9, **card) -> Judge:
    return Judge(Thinker(script, p), card=Card(thoughts=len(script), **card))


# ---------------------------------------------------------------- mean and majority


def test_a_mean_weighs_how_sure_and_a_majority_counts():
    # Both orders think "1 1 2": (0.9 + 0.9 + 0.1) / 3, and 4 votes of 6 by the rule of succession.
    assert judge("112").compare("x", RED, DARK).p_first == pytest.approx(1.9 / 3)
    assert judge("112", aggregate="majority").compare("x", RED, DARK).p_first == pytest.approx(5 / 8)
    assert judge("112", aggregate="majority").compare("x", DARK, RED).p_first == pytest.approx(3 / 8)


def test_a_malformed_thought_votes_by_its_answer_slot():
    # "?" leaves the slot at one half, which is half a vote for each.
    verdict = judge("1?", aggregate="majority").compare("x", RED, DARK)
    assert verdict.p_first == pytest.approx((3 + 1) / (4 + 2))
    assert verdict.malformed == 2


def test_a_majority_of_none_is_a_tie():
    verdict = judge("12", aggregate="majority").compare("x", RED, DARK)
    assert (verdict.p_first, verdict.preferred) == (0.5, None)


def test_the_verdict_is_calibrated_after_all_and_ties_inside_the_band():
    half = Curve(((1.0, 0.5),))
    expected = 1 / (1 + math.sqrt(3 / 5))  # the odds 5 : 3 under a temperature of 2
    calibrated = judge("112", aggregate="majority", calibration=Calibration(reasoner_curve=half))
    assert calibrated.compare("x", RED, DARK).p_first == pytest.approx(expected)
    banded = judge("112", aggregate="majority", calibration=Calibration(reasoner_curve=half, tie_band=0.07))
    assert banded.compare("x", RED, DARK).preferred is None
    assert banded.compare("x", RED, DARK, think=False).p_first == 0.5  # which has a calibration of its own


# ---------------------------------------------------------------- one order


def test_one_order_costs_half_and_is_still_a_mirror_image():
    colors = [Image.new("RGB", (8, 8), (level, 0, 255 - level)) for level in range(0, 250, 12)]
    once = judge("1", p=0.8, orders="one")
    straight = once.compare_many(["x"] * 20, colors[1:], colors[:-1])
    assert once.reasoner.batches == [20]  # pyright: ignore
    swapped = once.compare_many(["x"] * 20, colors[:-1], colors[1:])
    for one, other in zip(straight, swapped, strict=True):
        assert other.p_first == 1 - one.p_first and one.p_first == 1 - other.p_first
        assert len(one.thoughts) == 1 and math.isnan(one.position_gap)
        assert {one.thoughts[0].order, other.thoughts[0].order} == {"as given", "swapped"}
    drawn = [verdict.thoughts[0].order for verdict in straight]
    assert 3 < drawn.count("swapped") < 17  # a coin for each pair


def test_equal_images_tie_in_one_order_too():
    assert judge("11", orders="one").compare("x", RED, RED.copy()).p_first == 0.5


# ---------------------------------------------------------------- early stop


def test_sure_by_hand():
    # Two votes of two, six to come: mean 1/2, variance (0 + 1/4) / 2; the standard error of the mean of all eight is
    # sqrt(1/8 * 6 / (2 * 8)) = 0.2165, t = 2.309 with 2 degrees of freedom.
    sure = student.cdf(0.5 / math.sqrt(1 / 8 * 6 / 16), 2)
    assert sure == pytest.approx(0.926, abs=1e-3)
    for votes in ([1, 1], [0, 0]):
        assert is_sure(votes, 6, sure - 1e-6) and not is_sure(votes, 6, sure + 1e-6)
    assert not is_sure([1, 0], 6, 0.51)


def test_sureness_is_how_often_the_side_stays():
    """Thoughts of a judge that is for the first image 7 times in 10: having stopped, it is right about the rest."""
    rng, stayed = np.random.default_rng(0), []
    for _ in range(1500):
        votes = (rng.random(16) < 0.7).astype(float).tolist()
        for n in range(2, 16, 2):
            if is_sure(votes[:n], 16 - n, 0.9):
                stayed.append((np.mean(votes[:n]) > 0.5) == (np.mean(votes) > 0.5) or np.mean(votes) == 0.5)
                break
    assert len(stayed) > 1000 and np.mean(stayed) >= 0.9


def said(*supports: float, flipped: bool = False) -> list[Judgement]:
    """Thoughts of one order that give the image shown first so much; their answer is the likelier image."""
    return [Judgement(flipped, n, Trace("", 1 if p > 0.5 else 2), p, None) for n, p in enumerate(supports)]


def test_certain_by_hand():
    def certain(judgements, remaining, aggregate: Aggregate = "mean", **calibration):
        mode = Mode(thoughts=len(judgements) + remaining, aggregate=aggregate, orders="one", early_stop=1.0)
        return settled(judgements, mode, Calibration(**calibration))

    assert certain(said(0.9, 0.9, 0.9), 2) and not certain(said(0.9, 0.9), 2)  # 1.2 ahead, 1 can be lost
    assert certain(said(1.0, 1.0), 1, "majority") and not certain(said(1.0, 1.0), 2, "majority")
    # Three votes of five can end at 3 : 2, which is (3 + 1) / (5 + 2) = 0.571 by the rule of succession.
    assert certain(said(1, 1, 1), 2, "majority", tie_band=0.07)
    assert not certain(said(1, 1, 1), 2, "majority", tie_band=0.08)
    # With 1 to come, 0.5 and 0.5 end at a mean between 1/3 and 2/3: within 0.17 of a half, whatever it says.
    assert certain(said(0.5, 0.5), 1, tie_band=0.17) and not certain(said(0.5, 0.5), 1, tie_band=0.16)
    assert not certain([], 3)


def test_sure_of_a_side_of_the_band_by_hand():
    # As below, with the mean 1/2 above even odds, and an edge at 0.2 above them: t = 0.3 / 0.2165.
    sure = student.cdf(0.3 / math.sqrt(1 / 8 * 6 / 16), 2)
    assert is_sure([1, 1], 6, sure - 1e-6, edge=0.2) and not is_sure([1, 1], 6, sure + 1e-6, edge=0.2)
    # Even odds so far, and an edge 0.3 to both sides: the chance of both.
    inside = 2 * student.cdf(0.3 / math.sqrt((0.25 + 0.5) / 2 * 6 / 16), 2) - 1
    assert is_sure([1, 0], 6, inside - 1e-6, edge=0.3) and not is_sure([1, 0], 6, inside + 1e-6, edge=0.3)


@pytest.mark.parametrize("aggregate", ["mean", "majority", "listener", "both"])
@pytest.mark.parametrize("band", [0.0, 0.08, 0.2])
def test_stopping_at_certainty_changes_no_verdict_with_a_band(aggregate, band):
    """On scripted thoughts of both orders: the preference of all is the preference of those that were needed."""
    rng = np.random.default_rng(0)
    calibration = Calibration(
        Platt(2.0, 0.1), Curve(((0.5, 0.8), (2.0, 1.6))), Platt(1.5), Curve(((1.0, 1.4),)), Curve(((1.0, 1.2),)), band
    )
    card = Card(thoughts=6, aggregate=aggregate, calibration=calibration)
    whole = Judge(Thinker("1"), Listener(Thinker("1"), ChatFormat()), card)
    short = Judge(Thinker("1"), whole.listener, replace(card, early_stop=1.0, calibration=replace(calibration)))
    saved = ties = 0
    for _ in range(150):
        lean = rng.choice([0.35, 0.6, 0.85])
        judgements = []
        for flipped in (False, True):
            votes = rng.random(6) < (1 - lean if flipped else lean)
            reasoner = np.where(votes, *rng.uniform([[0.55], [0.02]], [[0.98], [0.45]], (2, 6)))
            listener = np.clip(reasoner + rng.normal(0, 0.2, 6), 0.02, 0.98)
            thoughts = zip(said(*reasoner, flipped=flipped), listener, strict=True)
            judgements += [replace(one, p_listener=float(h)) for one, h in thoughts]
        needed = short._needed(judgements, short.card.mode(), short.card.calibration)
        saved += len(judgements) - len(needed)
        everything, stopped = (one.conclude(judgements, calibration=calibration) for one in (whole, short))
        assert stopped.preferred == everything.preferred
        ties += stopped.preferred is None
    assert saved > 10 and (ties > 10 or band == 0)


# ---------------------------------------------------------------- listener, and both


def judgements_of_two(reasoner=(0.8, 0.3), listener=(0.9, 0.4)) -> list[Judgement]:
    """One thought in each order; `reasoner` and `listener` are of the image shown first in the order given, then
    swapped."""
    views = zip((False, True), reasoner, listener, strict=True)
    return [Judgement(flipped, 0, Trace("t", 1 if p > 0.5 else 2), p, h) for flipped, p, h in views]


def listening(**card) -> Judge:
    return Judge(Thinker("1"), Listener(Thinker("1"), ChatFormat()), Card(**card))


def test_the_listener_and_both_by_hand():
    # The listener gives the caller's first 0.9 and 0.6.
    listener = listening(aggregate="listener").conclude(judgements_of_two(listener=(0.9, 0.4)))
    assert listener.p_first == listener.listener_p_first == pytest.approx(0.75)
    assert listener.position_gap == pytest.approx(0.3)
    # Reasoner: 0.75, odds 3. Listener: mean 0.6, odds 1.5. Together sqrt(4.5).
    together = listening(aggregate="both").conclude(judgements_of_two(listener=(0.7, 0.5)))
    assert together.p_first == pytest.approx(4.5**0.5 / (1 + 4.5**0.5))
    assert together.position_gap == pytest.approx((0.1 + 0.2) / 2)
    # Each has a curve of its own, and the sum a third: odds 3 ** 2 and 1.5 ** 0.5, the mean's log-odds tripled.
    double, half, triple = (Curve(((1.0, slope),)) for slope in (2.0, 0.5, 3.0))
    calibration = Calibration(reasoner_curve=double, listener_curve=half, both_curve=triple)
    odds = (3.0**2 * 1.5**0.5) ** (3 / 2)
    bent = listening(aggregate="both", calibration=calibration).conclude(judgements_of_two(listener=(0.7, 0.5)))
    assert bent.p_first == pytest.approx(odds / (1 + odds))


@pytest.mark.parametrize("aggregate", ["listener", "both"])
def test_a_verdict_that_listens_is_a_mirror_image_to_the_last_bit(aggregate):
    rng = np.random.default_rng(1)
    calibration = Calibration(
        Platt(0.7, 0.3), Curve(((0.3, 0.7), (2.0, 0.9))), Platt(3.0, -1.0), Curve(((1.0, 1.7),)), Curve(((1.0, 1.3),))
    )
    judges = listening(aggregate=aggregate, calibration=calibration)
    for _ in range(300):
        judgements = judgements_of_two(tuple(rng.random(2)), tuple(rng.random(2)))
        mirrored = [replace(judgement, flipped=not judgement.flipped) for judgement in judgements]
        one, other = judges.conclude(judgements), judges.conclude(mirrored)
        assert other.p_first == 1 - one.p_first and one.p_first == 1 - other.p_first
        assert (other.contradicted, other.position_gap) == (one.contradicted, one.position_gap)
    assert judges.compare("x", RED, RED.copy()).p_first == 0.5


def test_a_listener_that_decides_still_contradicts_the_reasoner():
    verdict = listening(aggregate="listener").conclude(judgements_of_two(listener=(0.2, 0.9)))
    assert (verdict.preferred, verdict.contradicted) == (2, True)
    assert listening(aggregate="both").conclude(judgements_of_two()).contradicted is False


def test_listening_without_a_listener_is_refused(random_judge):
    with pytest.raises(InputError, match="aggregate is 'both', and the judge has no listener"):
        judge("1", aggregate="both")
    with pytest.raises(InputError, match="aggregate is 'listener'"):
        Judge.from_pretrained(random_judge, listener="none", aggregate="listener")
    with pytest.raises(InputError, match="aggregate is 'listener'"):
        judge("1").conclude(said(0.9), aggregate="listener")


def test_a_judge_that_listens_by_its_card_can_be_told_to_do_without(random_judge, tmp_path):
    import shutil

    folder = shutil.copytree(random_judge, tmp_path / "judge")
    Card.amend(folder, aggregate="both")
    assert Judge.from_pretrained(folder).card.aggregate == "both"
    assert Judge.from_pretrained(folder, listener="none").card.aggregate == "mean"


@pytest.mark.parametrize("aggregate", ["mean", "majority"])
def test_stopping_at_certainty_prefers_what_all_thoughts_would(aggregate):
    rng = np.random.default_rng(0)
    saved = 0
    for _ in range(40):
        script = "".join(rng.choice(["1", "2", "?"], 6, p=[0.6, 0.3, 0.1]))
        whole = judge(script, aggregate=aggregate).compare("x", RED, DARK)
        short = judge(script, aggregate=aggregate, early_stop=1.0).compare("x", RED, DARK)
        assert short.preferred == whole.preferred, script
        assert [t.text for t in short.thoughts if t.order == "as given"] == [
            t.text for t in whole.thoughts if t.order == "as given"
        ][: len(short.thoughts) // 2]
        saved += len(whole.thoughts) - len(short.thoughts)
    assert saved > 40


def test_only_open_pairs_think_on_in_one_batch_a_round():
    thinker = Thinker("1121", p=0.999)
    asked = Judge(thinker, card=Card(thoughts=4, early_stop=0.95))
    # Two pairs agree with themselves twice in both orders, and 2 of 2 is not sure enough. Equal images think once.
    verdicts = asked.compare_many(["x", "y", "z"], [RED, RED, BLUE], [DARK, BLUE, BLUE.copy()])
    assert [len(verdict.thoughts) for verdict in verdicts] == [4, 4, 2]
    assert thinker.batches == [5, 4]
    split = Thinker("1211", p=0.999)
    Judge(split, card=Card(thoughts=4, early_stop=0.999)).compare("x", RED, DARK)
    assert split.batches == [2, 2, 2, 2]


def test_replaying_a_stop_on_all_thoughts_gives_the_verdict_that_stopped():
    for script in ("1111", "1211", "12?1", "2211"):
        stopping = judge(script, early_stop=0.9)
        stopped = stopping.compare("x", RED, DARK)
        everything = judge(script).judgements(["x"], [RED], [DARK])[0]
        assert len(everything) == 8
        assert stopping.conclude(everything) == stopped


@pytest.mark.parametrize(
    ("field", "value"),
    [("aggregate", "median"), ("orders", "three"), ("early_stop", 0.5), ("early_stop", 1.1), ("early_stop", "soon")],
)
def test_an_unknown_mode_names_its_field(field, value):
    with pytest.raises(InputError, match=field):
        replace(Card(), **{field: value})


def test_modes_reach_a_real_judge_and_its_copies(random_judge):
    import pickle

    loaded = Judge.from_pretrained(
        random_judge, thoughts=3, aggregate="majority", orders="one", early_stop=0.9, max_new_tokens=4
    )
    twin = pickle.loads(pickle.dumps(loaded))
    assert twin.card == loaded.card
    assert (twin.card.aggregate, twin.card.orders, twin.card.early_stop) == ("majority", "one", 0.9)
    one, other = loaded.compare("two red circles", RED, DARK), loaded.compare("two red circles", DARK, RED)
    assert other.p_first == 1 - one.p_first
