"""The measures, each against a case worked by hand, and the evaluation on pairs whose answers are known."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import datasets
import numpy as np
import pytest
from PIL import Image

from listener_reward.calibration.maps import Calibration
from listener_reward.conclude import Judgement, verdict_of
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.confidence import brier_score, expected_calibration_error, negative_log_likelihood
from listener_reward.evaluate.intervals import wilson
from listener_reward.evaluate.run import count_right, is_mirrored, margins_by_order, side
from listener_reward.media.clips import Clip
from listener_reward.media.storyboards import to_still
from listener_reward.trace import Trace
from listener_reward.verdict import Aggregate, Mode, Verdict

# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def test_sides():
    assert side(np.array([0.0, 0.49, 0.5, 0.51, 1.0])).tolist() == [2, 2, 0, 1, 1]


def test_ties_of_people_do_not_count_and_ties_of_the_judge_are_wrong():
    labels = np.array([1.0, 0.2, 0.5, 0.5, 0.9])
    preferred = np.array([1, 2, 1, 0, 0])  # right, right, no majority, no majority, a tie where people have a side
    assert count_right(labels, preferred) == (2, 3)


def test_wilson_worked_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.71674,
    # half-width z sqrt(0.8 * 0.2 / 10 + z^2/400) / (1 + z^2/10) = 0.22659.
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson(0, 0) is None


def test_calibration_error_worked_by_hand():
    # Confidences 0.9, 0.9, 0.6, 0.6; agreements 1, 0.5 (label 0.5), 0.4 (1 - 0.6), 1.
    # Bins of width 1/30: the 0.9s share one, |1.8 - 1.5| = 0.3; the 0.6s share one, |1.2 - 1.4| = 0.2; 0.5 / 4 pairs.
    labels, p_first = np.array([1.0, 0.5, 0.6, 0.0]), np.array([0.9, 0.9, 0.4, 0.4])
    assert expected_calibration_error(labels, p_first) == pytest.approx(0.125)


def test_calibration_error_of_the_ends():
    # 1 falls into the last bin and not beyond it; 0.5 agrees with half of the people whatever the label.
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(0.5)
    assert expected_calibration_error(np.array([1.0, 0.2]), np.array([0.5, 0.5])) == 0


def test_calibration_error_of_a_calibrated_judge_is_zero_and_does_not_care_for_order():
    p_first = np.random.default_rng(0).random(100)
    assert expected_calibration_error(p_first, p_first) == pytest.approx(0, abs=1e-12)
    labels = np.round(p_first)
    swapped = expected_calibration_error(1 - labels, 1 - p_first)
    assert swapped == pytest.approx(expected_calibration_error(labels, p_first)) and swapped > 0.1


def test_brier_worked_by_hand():
    # (0.8 - 1)^2 = 0.04 and (0.3 - 0.6)^2 = 0.09
    assert brier_score(np.array([1.0, 0.6]), np.array([0.8, 0.3])) == pytest.approx(0.065)


def test_likelihood_worked_by_hand():
    # -ln 0.8, and -(0.5 ln 0.25 + 0.5 ln 0.75)
    expected = (-math.log(0.8) - 0.5 * math.log(0.25 * 0.75)) / 2
    assert negative_log_likelihood(np.array([1.0, 0.5]), np.array([0.8, 0.25])) == pytest.approx(expected)


def test_likelihood_of_a_wrong_certainty_is_finite():
    assert negative_log_likelihood(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-6))
    assert negative_log_likelihood(np.array([1.0]), np.array([1.0])) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("p_first", "swapped", "mirrored"), [(0.7, 0.3, True), (0.7, 0.30001, False), (0.5, 0.5, True), (0.7, 0.7, False)]
)
def test_mirror_images(p_first, swapped, mirrored):
    assert is_mirrored(_verdict(p_first), _verdict(swapped)) is mirrored


def test_a_preference_that_does_not_flip_is_no_mirror_image():
    torn = Verdict(0.5, 1, (), None, None, 0.0, 0)
    assert not is_mirrored(torn, torn)


def _verdict(p_first: float) -> Verdict:
    return Verdict(p_first, None if p_first == 0.5 else 1 if p_first > 0.5 else 2, (), None, None, 0.0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_pairs(shade):
    """Builds pairs from (red of the first, red of the second, p_first), as `load_pairs` would give them."""

    def png(red: int) -> dict:
        file = io.BytesIO()
        shade(red).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    def build(rows: list[tuple[int, int, float]], source: str = "shades") -> datasets.Dataset:
        features = datasets.Features(
            prompt=datasets.Value("string"),
            images=datasets.List(datasets.Image(decode=False), length=2),
            p_first=datasets.Value("float64"),
            id=datasets.Value("string"),
            dataset=datasets.Value("string"),
        )
        columns = {
            "prompt": [f"prompt {k}" for k in range(len(rows))],
            "images": [[png(first), png(second)] for first, second, _ in rows],
            "p_first": [p for _, _, p in rows],
            "id": [str(k) for k in range(len(rows))],
            "dataset": [source] * len(rows),
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return build


ROWS = [(255, 0, 1.0), (0, 255, 0.2), (200, 100, 0.0), (9, 9, 1.0), (50, 9, 0.5)]
"""The judge, who prefers red, is right, right, wrong, undecided (so wrong); and people are undecided."""


def test_an_evaluation_worked_by_hand(FakeJudge, make_pairs):
    # Slope ln 4 over red 255: the judge says 0.8 and 0.2 on the first two, 4^(100/255) / (1 + ..) on the third, 0.5.
    record = evaluate(FakeJudge(slope=math.log(4)), make_pairs(ROWS), batch_size=2, progress=False, swap_check=3)
    third, fifth = (4**x / (1 + 4**x) for x in (100 / 255, 41 / 255))
    assert (record.judge, record.data, record.n, record.n_ties) == ("fake", "shades", 5, 1)
    assert record.accuracy == 2 / 4 and record.accuracy_interval == wilson(2, 4)
    assert record.always_first == 2 / 4
    assert record.brier == pytest.approx((0.2**2 + 0 + third**2 + 0.5**2 + (fifth - 0.5) ** 2) / 5)
    likelihoods = [math.log(0.8), 0.2 * math.log(0.2) + 0.8 * math.log(0.8), math.log(1 - third), math.log(0.5)]
    assert record.nll == pytest.approx(-(sum(likelihoods) + 0.5 * math.log(fifth * (1 - fifth))) / 5)
    assert (record.swap_consistency, record.swap_checked, record.position_gap) == (1.0, 3, 0.0)
    assert record.malformed_rate == 0 and record.seconds > 0
    assert record.contradiction_rate is record.contradiction_interval is record.listener_accuracy is None
    assert record.verdicts is None


def test_the_batch_size_changes_nothing(FakeJudge, make_pairs):
    pairs, records = make_pairs(ROWS * 5), []
    for batch_size in (1, 4, 64):
        judge = FakeJudge(noise=0.5, listener_slope=1.0, malformed=True)
        record = evaluate(judge, pairs, batch_size=batch_size, progress=False, swap_check=7).to_dict()
        assert max(map(len, judge.calls)) <= batch_size
        assert sum(map(len, judge.calls)) == 25 + 7
        records.append(record | {"seconds": 0})
    assert records[0] == records[1] == records[2]


def test_the_swapped_pairs_are_the_first_ones_with_their_images_swapped(FakeJudge, make_pairs):
    judge = FakeJudge()
    evaluate(judge, make_pairs(ROWS), batch_size=2, progress=False, swap_check=3)
    assert judge.calls == [
        [("prompt 0", 255, 0), ("prompt 1", 0, 255)],
        [("prompt 0", 0, 255), ("prompt 1", 255, 0)],
        [("prompt 2", 200, 100), ("prompt 3", 9, 9)],
        [("prompt 2", 100, 200)],
        [("prompt 4", 50, 9)],
    ]


def test_a_judge_with_a_position_bias_is_found_out(FakeJudge, make_pairs):
    record = evaluate(FakeJudge(slope=1.0, bias=0.01), make_pairs(ROWS), progress=False)
    assert record.swap_consistency == 0 and record.swap_checked == 5
    assert record.position_gap == pytest.approx(0.01)


def test_no_swap_check_gives_no_rate(FakeJudge, make_pairs):
    record = evaluate(FakeJudge(), make_pairs(ROWS), progress=False, swap_check=0)
    assert (record.swap_consistency, record.swap_checked) == (None, 0)


def test_contradictions_are_taken_over_the_well_formed_thoughts(FakeJudge, make_pairs):
    # Each pair has one well-formed and one malformed thought. The listener is against the judge on all but the tie,
    # whose thought has no answer and so cannot be contradicted.
    judge = FakeJudge(listener_slope=-1.0, malformed=True)
    record = evaluate(judge, make_pairs(ROWS), progress=False)
    assert record.contradiction_rate == 1 and record.contradiction_interval == wilson(4, 4)
    assert record.malformed_rate == 0.5
    assert record.listener_accuracy == 1 / 4  # it prefers what is less red: right on the third alone


def test_all_ties_have_no_accuracy(FakeJudge, make_pairs):
    record = evaluate(FakeJudge(), make_pairs([(9, 1, 0.5), (1, 9, 0.5)]), progress=False)
    assert record.accuracy is record.accuracy_interval is record.always_first is None
    assert record.n_ties == 2 and record.brier is not None and record.brier > 0


def test_verdicts_are_kept_on_demand_and_the_record_is_json_without_them(FakeJudge, make_pairs):
    record = evaluate(FakeJudge(), make_pairs(ROWS), batch_size=2, progress=False, keep=True)
    assert record.verdicts is not None and [v.preferred for v in record.verdicts] == [1, 2, 1, None, 1]
    saved = json.loads(json.dumps(record.to_dict()))
    assert saved == record.to_dict() and "verdicts" not in saved and saved["accuracy"] == 0.5
    verdict = record.verdicts[0].to_dict()
    assert json.loads(json.dumps(verdict)) == verdict and verdict["thoughts"][0]["order"] == "as given"


def test_think_is_passed_on(FakeJudge, make_pairs):
    judge = FakeJudge()
    evaluate(judge, make_pairs(ROWS), progress=False, think=False)
    assert set(judge.think) == {False}


def test_progress_goes_to_standard_error(FakeJudge, make_pairs, capsys):
    evaluate(FakeJudge(), make_pairs(ROWS), progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "50.0% right" in shown.err
    evaluate(FakeJudge(), make_pairs(ROWS), progress=False)
    assert capsys.readouterr().err == ""


def test_many_sources_are_named_in_short(FakeJudge, make_pairs):
    parts = [make_pairs([(9, 1, 1.0)], source=f"source {k}") for k in range(5)]
    record = evaluate(FakeJudge(), datasets.concatenate_datasets(parts), progress=False)
    assert record.data == "source 0, source 1, source 2 and 2 more"


@pytest.mark.parametrize("answers_nan", [False, True])
def test_a_judge_that_breaks_has_no_record(FakeJudge, make_pairs, answers_nan):
    judge = FakeJudge(breaks_on=lambda prompt, first, second: prompt == "prompt 3", answers_nan=answers_nan)
    with pytest.raises(JudgeError):
        evaluate(judge, make_pairs(ROWS), batch_size=2, progress=False)


def test_refuses_what_cannot_be_evaluated(FakeJudge, make_pairs):
    pairs = make_pairs(ROWS)
    for unusable, options, words in [
        (pairs.select([]), {}, "0 rows"),
        (pairs.remove_columns("p_first"), {}, "no column p_first"),
        (make_pairs([(1, 2, 1.0), (1, 2, 1.5)]), {}, "row 1 is 1.5"),
        (make_pairs([(1, 2, math.nan)]), {}, "row 0 is nan"),
        (pairs, {"batch_size": 0}, "batch_size is 0"),
        (pairs, {"swap_check": -1}, "swap_check is -1"),
    ]:
        with pytest.raises(InputError, match=words):
            evaluate(FakeJudge(), unusable, progress=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Protocols, clusters, streams
# ---------------------------------------------------------------------------------------------------------------------


def test_protocols_stand_beside_the_accuracy(FakeJudge, make_pairs):
    record = evaluate(FakeJudge(slope=math.log(4)), make_pairs(ROWS), progress=False)
    (result,) = record.protocols
    assert (result.protocol, result.value, result.pairs, result.always_first) == ("imagereward", 0.5, 4, 0.5)
    assert record.to_dict()["protocols"] == {"imagereward": result.to_dict()}
    named = evaluate(FakeJudge(), make_pairs(ROWS), progress=False, protocols=["videogen-with-ties", "tau-b"])
    assert [result.protocol for result in named.protocols] == ["videogen-with-ties", "tau-b"]
    assert named.protocols[0].value == 3 / 5  # people's tie cannot be had without losing a right pair


def test_an_unknown_protocol_is_refused_before_the_judge_is_asked(FakeJudge, make_pairs):
    judge = FakeJudge()
    with pytest.raises(InputError, match="protocol is 'hpsv9'"):
        evaluate(judge, make_pairs(ROWS), progress=False, protocols=["hpsv9"])
    assert judge.calls == []


def test_the_interval_draws_prompts(FakeJudge, make_pairs):
    """Forty pairs of four prompts: all pairs of a prompt are right, or all are wrong."""
    pairs = make_pairs([(9, 1, 1.0), (9, 1, 1.0), (9, 1, 0.0), (9, 1, 1.0)] * 10)
    pairs = pairs.map(lambda row: {"prompt": f"prompt {int(row['id']) % 4}"})
    record = evaluate(FakeJudge(), pairs, progress=False)
    alone = wilson(30, 40)
    assert record.accuracy == 0.75 and record.accuracy_interval is not None and alone is not None
    assert record.accuracy_interval[0] <= 0.25 < alone[0] and record.accuracy_interval[1] == 1


def said(flipped: bool, number: int, p_first: float, listener_p_first: float | None = None) -> Judgement:
    """A thought and what both models say of the caller's first image, which is shown second where `flipped`."""
    p, heard = (None if x is None else 1 - x if flipped else x for x in (p_first, listener_p_first))
    return Judgement(flipped, number, Trace("", 2 if flipped else 1), p, heard)  # pyright: ignore[reportArgumentType]


def test_each_order_of_a_verdict():
    def margins(judgements: list[Judgement], aggregate: Aggregate = "mean") -> tuple[float, float]:
        return margins_by_order(verdict_of(judgements, Mode(aggregate=aggregate), Calibration()))

    both = Verdict(0.7, 1, (), None, None, 0.2, 0)  # p(first) 0.8 in order, 0.6 swapped
    assert margins_by_order(both) == pytest.approx((0.6, 0.2))
    thoughts = [said(False, 0, 0.9), said(False, 1, 0.7), said(True, 0, 0.4)]
    assert margins(thoughts) == pytest.approx((0.6, -0.2))
    assert margins(thoughts[:1]) == pytest.approx((0.8, math.nan), nan_ok=True)
    assert margins_by_order(Verdict(0.9, 1, (), None, None, math.nan, 0)) == pytest.approx((0.8, 0.8))
    heard = [said(False, 0, 0.9, 0.7), said(True, 0, 0.4, 0.3)]
    assert margins(heard) == pytest.approx((0.8, -0.2)), "of the reasoner, who decides"
    assert margins(heard, "listener") == pytest.approx((0.4, -0.4))
    assert margins(heard, "both") == pytest.approx((0.6, -0.3))
    assert margins(heard, "majority") == pytest.approx((1.0, 1.0)), "of the votes"


def test_a_judge_that_is_shown_one_order_has_no_gap(FakeJudge, make_pairs):
    judge = FakeJudge()
    ask = judge.compare_many
    judge.compare_many = lambda *pairs, **options: [
        dataclasses.replace(verdict, position_gap=math.nan) for verdict in ask(*pairs, **options)
    ]
    assert evaluate(judge, make_pairs(ROWS), progress=False).position_gap is None


def test_a_stream_is_never_far_ahead_of_the_judge(FakeJudge, make_pairs):
    """10,000 pairs: what has been read and not been judged is at most a batch, so memory does not grow."""
    row = make_pairs([(200, 100, 1.0)])[0]
    judge, ahead = FakeJudge(), []

    def rows():
        for k in range(10_000):
            ahead.append(k + 1 - sum(map(len, judge.calls)))
            yield row | {"id": str(k), "prompt": f"prompt {k % 100}"}

    stream = datasets.IterableDataset.from_generator(rows, features=make_pairs([(1, 1, 1.0)]).features)
    record = evaluate(judge, stream, progress=False, swap_check=0, batch_size=50)
    assert record.n == 10_000 and record.accuracy == 1.0
    assert max(ahead) <= 51
    assert max(map(len, judge.calls)) == 50


def test_videos_are_judged_as_clips_and_few_at_a_time(tmp_path):
    """GenAI-Bench's video rows through a judge of images, which prefers the redder picture."""
    av = pytest.importorskip("av")
    for name, red in (("red", 220), ("dark", 20)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(9):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (red, 0, 0)))
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    row = {"prompt": "x", "left_video": "red.mp4", "right_video": "dark.mp4", "vote_type": "leftvote"}
    (tmp_path / "test_v1.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    asked, watched, seen, boards = [], [], [], []

    class Redder:
        name = "redder"

        def compare_many(self, prompts, firsts, seconds, *, think=None):
            asked.append(len(firsts))
            seen.extend((*firsts, *seconds))
            stills = [[to_still(clip).image for clip in clips] for clips in (firsts, seconds)]
            boards.extend(still.size for some in stills for still in some)
            sums = [[np.asarray(still)[..., 0].mean() for still in some] for some in stills]
            return [_verdict(0.9 if one > other else 0.1) for one, other in zip(*sums, strict=True)]

    pairs = load_pairs(f"genai-bench:{tmp_path / 'test_v1.jsonl'}")
    assert 0 < sum(pairs["swapped"]) < 20
    record = evaluate(
        Redder(), pairs, progress=False, swap_check=4, watch=lambda rows, _: watched.extend(rows["images"])
    )  # fmt: skip
    assert (record.n, record.accuracy, record.swap_consistency) == (20, 1.0, 1.0)
    assert max(asked) == 8, "clips are large"
    assert all(isinstance(clip, Clip) and len(clip.frames) == 8 for clip in seen)
    assert set(boards) == {(4 * 32 + 3 * 4, 2 * 32 + 4)}, "2 rows of 4 frames"
    assert all(clip in seen for pair in watched for clip in pair)


def test_a_validation_set_gives_pickscore_its_threshold(FakeJudge, make_pairs):
    # Slope ln 4: p_first - p_second is tanh(ln 2 * (red - red) / 255), which is 0.6 of 255 and 0.265 of 100.
    judge, validation = FakeJudge(slope=math.log(4)), make_pairs([(255, 0, 1.0), (200, 100, 0.5), (0, 100, 0.5)])
    test = make_pairs([(0, 255, 0.0), (120, 100, 0.5), (50, 100, 1.0)])
    with pytest.raises(InputError, match="imagereward has no use; ask for the protocol pickscore"):
        evaluate(judge, test, validation=validation, progress=False)
    assert judge.calls == [], "refused before anything slow"
    options = {"protocols": ["pickscore"], "progress": False, "swap_check": 0}
    record = evaluate(judge, test, validation=validation, batch_size=2, **options)
    assert record.n == 3 and sum(map(len, judge.calls)) == 6
    assert record.protocols[0].thresholds == (0.3,)
    assert record.protocols[0].value == (1 + 1 + 0.5) / 3, "the last is a tie to the judge and none to people"
    assert len(evaluate(judge, test, **options).protocols[0].thresholds) == 2, "without, it is cross-fitted"


def test_a_stream_without_pairs(FakeJudge, make_pairs):
    empty = datasets.IterableDataset.from_generator(lambda: iter(()), features=make_pairs([(1, 1, 1.0)]).features)
    with pytest.raises(InputError, match="0 rows"):
        evaluate(FakeJudge(), empty, progress=False)
