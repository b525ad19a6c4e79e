"""The reward callable: its schemes worked by hand, its contract with trainers, and what it does when a judge breaks."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from listener_reward.errors import InputError, JudgeError, UnreachableError
from listener_reward.judge import Judge
from listener_reward.media.storyboards import to_visual
from listener_reward.meetings import INFO, log_odds
from listener_reward.models.transformers_vlm import default_device
from listener_reward.references import ReferenceFile, is_kept, packed, size
from listener_reward.reward import JUDGE_OPTIONS, PAPER_CHECKPOINT, ListenerReward


@pytest.fixture
def loads(monkeypatch, FakeJudge):
    """Replaces the judge that a name loads by a fake one; the list holds the arguments of each load."""
    seen = []

    def from_pretrained(name, **options):
        time.sleep(0.02)  # long enough for a second thread to come by
        seen.append((name, options))
        return FakeJudge(delay=0.002)

    fake_module = SimpleNamespace(Judge=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "listener_reward.judge", fake_module)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Schemes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_group_of_two_worked_by_hand(FakeJudge, shade):
    # With the prior's variance 4, scores (s, -s) solve p - sigmoid(2s) = s / 4 (see test_ranking).
    # s = 0.4 needs p = sigmoid(0.8) + 0.1 = 0.78997; the fake judge says so of red 255 against red 0 at slope logit(p).
    p = 1 / (1 + math.exp(-0.8)) + 0.1
    reward = ListenerReward(FakeJudge(slope=math.log(p / (1 - p))))
    scores, info = reward([shade(255), shade(0)], ["a", "a"])
    assert scores == pytest.approx([0.4, -0.4], abs=1e-6)
    assert info["comparisons"].tolist() == [1, 1]


def test_groups_are_centred_ordered_and_judged_in_one_call(FakeJudge, shade):
    judge = FakeJudge()
    reds, prompts = [10, 200, 60, 90, 30], ["a", "b", "a", "b", "a"]
    scores, info = ListenerReward(judge)([shade(r) for r in reds], prompts)
    assert scores[[0, 2, 4]].sum() == pytest.approx(0, abs=1e-6) and scores[[1, 3]].sum() == pytest.approx(0, abs=1e-6)
    assert scores[2] > scores[4] > scores[0] and scores[1] > scores[3]
    assert judge.calls == [[("a", 10, 60), ("a", 10, 30), ("a", 60, 30), ("b", 200, 90)]]
    assert info["comparisons"].tolist() == [2, 1, 2, 1, 2]


def test_a_large_group_is_thinned_and_keeps_its_order(FakeJudge, shade):
    judge = FakeJudge(slope=6.0, noise=0.3)
    reds = list(range(0, 240, 10))
    scores, info = ListenerReward(judge)([shade(r) for r in reds], ["a"] * 24)
    assert len(judge.calls[0]) == 24 * 7 / 2
    assert set(info["comparisons"]) == {7}
    assert np.corrcoef(scores, reds)[0, 1] > 0.98


def test_a_given_reference_gives_log_odds(FakeJudge, shade):
    # The fake judge's log-odds are slope * (red - red of the reference) / 255.
    references = {"a": shade(100), "b": shade(0)}
    reward = ListenerReward(FakeJudge(slope=3.0), scheme="reference", reference=references)
    scores, info = reward([shade(185), shade(15), shade(51)], ["a", "a", "b"])
    assert scores == pytest.approx([1.0, -1.0, 0.6], abs=1e-6)
    # One comparison's information and the prior's: p (1 - p) + 1/4.
    p = 1 / (1 + math.exp(-1))
    assert info["standard_error"][:2] == pytest.approx([(p * (1 - p) + 0.25) ** -0.5] * 2)


def test_the_reference_may_be_a_function_of_the_prompt(FakeJudge, shade):
    reward = ListenerReward(FakeJudge(slope=3.0), reference=lambda prompt: shade(int(prompt)))
    assert reward([shade(85), shade(85)], ["0", "85"])[0] == pytest.approx([1.0, 0.0], abs=1e-6)


def test_the_first_image_seen_is_kept_and_scores_zero(FakeJudge, shade):
    judge = FakeJudge(slope=3.0)
    reward = ListenerReward(judge, scheme="reference")
    scores, info = reward([shade(85), shade(170)], ["a", "a"])
    assert scores.tolist() == [0.0, pytest.approx(1.0, abs=1e-6)]
    assert info["comparisons"].tolist() == [0, 1] and info["standard_error"][0] == 0 and not info["failed"].any()
    assert reward([shade(0)], ["a"])[0] == pytest.approx([-1.0], abs=1e-6)  # still against the 85 of the first call
    assert judge.calls == [[("a", 170, 85)], [("a", 0, 85)]]


def test_auto_takes_groups_where_it_can_and_a_reference_where_it_must(FakeJudge, shade):
    judge = FakeJudge()
    ListenerReward(judge, reference={"b": shade(1)})([shade(10), shade(20), shade(30)], ["a", "b", "a"])
    assert judge.calls == [[("a", 10, 30), ("b", 20, 1)]]


def test_alone_in_the_group_scheme_is_zero_knowing_nothing(FakeJudge, shade):
    judge = FakeJudge()
    scores, info = ListenerReward(judge, scheme="group")([shade(10)], ["a"])
    assert judge.calls == []
    assert (scores[0], info["standard_error"][0], info["comparisons"][0], info["failed"][0]) == (0, 2, 0, 0)


def test_an_image_scores_the_same_wherever_it_stands_in_the_batch(FakeJudge, shade):
    reds = [10, 60, 30, 200]
    scores = ListenerReward(FakeJudge())([shade(r) for r in reds], ["a"] * 4)[0]
    turned = ListenerReward(FakeJudge())([shade(r) for r in reversed(reds)], ["a"] * 4)[0]
    assert scores == pytest.approx(turned[::-1], abs=1e-6)


def test_certainty_has_bounded_log_odds():
    assert log_odds(1.0)[0] == pytest.approx(math.log(9999)) and log_odds(0.0)[0] == pytest.approx(-math.log(9999))
    assert log_odds(0.5) == (0.0, pytest.approx(2**0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Contract
# ---------------------------------------------------------------------------------------------------------------------


def _batch(reds: list[int]) -> np.ndarray:
    """(N, 3, H, W) float32 in [0, 1], N plain images."""
    batch = np.zeros((len(reds), 3, 4, 4), dtype=np.float32)
    batch[:, 0] = np.array(reds, dtype=np.float32)[:, None, None] / 255
    return batch


def _as_list(batch: np.ndarray) -> list[np.ndarray]:
    return [np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8) for image in batch]


@pytest.mark.parametrize(
    "make",
    [
        lambda batch: torch.from_numpy(batch),
        lambda batch: torch.from_numpy(batch).requires_grad_(),
        lambda batch: torch.from_numpy(batch).half(),
        lambda batch: torch.from_numpy(batch).bfloat16(),
        lambda batch: batch,
        lambda batch: np.stack(_as_list(batch)),
        _as_list,
    ],
    ids=["float32", "with gradient", "float16", "bfloat16", "numpy", "uint8 NHWC", "list"],
)
def test_reads_what_trainers_send(FakeJudge, make):
    scores, info = ListenerReward(FakeJudge())(make(_batch([0, 128, 255])), ("a", "a", "a"), ({}, {}, {}))
    assert type(scores) is np.ndarray and scores.dtype == np.float32 and scores.shape == (3,)
    assert scores == pytest.approx(ListenerReward(FakeJudge())(_batch([0, 128, 255]), ["a"] * 3)[0], abs=0.02)
    assert torch.as_tensor(scores).requires_grad is False
    assert set(info) == set(INFO)
    for values in info.values():
        assert values.dtype == np.float32 and values.shape == (3,)
        assert torch.cat([torch.as_tensor(values).float()] * 2).shape == (6,)  # what flow_grpo does with each


def test_numpy_strings_are_prompts(FakeJudge, shade):
    scores, _ = ListenerReward(FakeJudge())([shade(0), shade(9)], np.array(["a", "a"]))  # pyright: ignore[reportArgumentType]
    assert scores[1] > scores[0]


def test_an_empty_batch_has_empty_scores(FakeJudge):
    scores, info = ListenerReward(FakeJudge())([], [])
    assert scores.shape == (0,) and all(values.shape == (0,) for values in info.values())


def test_info_is_told_from_each_image_s_own_side(FakeJudge, shade):
    # Reds 255, 51, 0: each meets the others, and the listener believes the opposite of the judge.
    judge = FakeJudge(slope=4.0, listener_slope=-2.0)
    _, info = ListenerReward(judge)([shade(255), shade(51), shade(0)], ["a"] * 3)
    most, some, few = (1 / (1 + math.exp(-2 * gap / 255)) for gap in (-204, -255, -51))  # 1st-2nd, 1st-3rd, 2nd-3rd
    assert info["listener_p_first"] == pytest.approx([(most + some) / 2, (1 - most + few) / 2, (2 - some - few) / 2])
    assert info["contradicted"].tolist() == [1, 1, 1]


def test_the_position_gap_is_its_mean_size(FakeJudge, shade):
    _, info = ListenerReward(FakeJudge(bias=-0.125))([shade(9), shade(10)], ["a", "a"])
    assert info["position_gap"].tolist() == [0.125, 0.125]


def test_what_does_not_apply_is_nan(FakeJudge, shade):
    _, info = ListenerReward(FakeJudge())([shade(1), shade(2)], ["a", "a"])  # no listener
    assert np.isnan(info["listener_p_first"]).all() and np.isnan(info["contradicted"]).all()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [("a red circle", "one string"), (["a"], "1 entries for 2 images"), (["a", 3], r"prompts\[1\] is a int")],
)
def test_refuses_prompts_that_do_not_fit(FakeJudge, shade, prompts, words):
    with pytest.raises(InputError, match=words):
        ListenerReward(FakeJudge())([shade(1), shade(2)], prompts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "best"}, "scheme is 'best'.*'auto', 'group', 'reference'"),
        ({"on_failure": "zero"}, "on_failure is 'zero'"),
        ({"scheme": "group", "reference": {}}, "compares no reference"),
        ({"scheme": "group", "state": "a.db"}, "state is given.*compares no reference"),
        ({"reference": {}, "state": "a.db"}, "nothing to keep"),
        ({"thoughts": 4}, "thoughts would have no effect"),
    ],
)
def test_refuses_a_configuration_that_makes_no_sense(FakeJudge, options, words):
    with pytest.raises(InputError, match=words):
        ListenerReward(FakeJudge(), **options)


def test_refuses_what_is_no_judge():
    with pytest.raises(InputError, match="judge is a int"):
        ListenerReward(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("reference", [{"b": 1}, lambda prompt: None])
def test_a_prompt_without_its_reference_is_an_error(FakeJudge, shade, reference):
    with pytest.raises(InputError, match="no image for prompt 'a'"):
        ListenerReward(FakeJudge(), reference=reference)([shade(1)], ["a"])


def test_ranks_and_compares(FakeJudge, shade):
    reward = ListenerReward(FakeJudge())
    assert reward.rank("a", [shade(3), shade(90), shade(40)]).order == [1, 2, 0]
    assert reward.rank("a", torch.from_numpy(_batch([3, 90, 40]))).order == [1, 2, 0]
    assert reward.compare("a", shade(3), shade(90)).preferred == 2


# ---------------------------------------------------------------------------------------------------------------------
# Loading, pickling, threads
# ---------------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_paper_s_checkpoint_and_nothing_is_loaded_before_use(loads):
    reward = ListenerReward()
    assert reward.judge == PAPER_CHECKPOINT and PAPER_CHECKPOINT in repr(reward) and loads == []
    assert reward.__name__ == "listener_reward" and ListenerReward.__name__ == "ListenerReward"
    assert not isinstance(reward, torch.nn.Module)


def test_loads_once_with_its_options(loads, shade, tmp_path):
    reward = ListenerReward(tmp_path, thoughts=2, device="cpu")
    reward([shade(1), shade(2)], ["a", "a"])
    reward.compare("a", shade(1), shade(2))
    assert loads == [(str(tmp_path), {"thoughts": 2, "device": "cpu"})]


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs, of which each thread has a current one, 0 at first; `gpus.index = 2` chooses for this thread."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return current


@pytest.mark.parametrize("options", [{}, {"device": "cuda"}, {"device": torch.device("cuda")}])
def test_the_judge_goes_to_the_gpu_of_the_thread_that_made_the_reward(loads, gpus, shade, options):
    gpus.index = 2
    reward = ListenerReward("tiny", **options)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(reward, [shade(1), shade(2)], ["a", "a"]).result()
    gpus.index = 1
    copy = pickle.loads(pickle.dumps(reward))  # as in another process, of which another GPU is the current one
    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy, [shade(1), shade(2)], ["a", "a"]).result()
    assert [given["device"] for _, given in loads] == ["cuda:2", "cuda:1"]


def test_a_device_that_was_asked_for_is_kept(loads, gpus, shade):
    gpus.index = 2
    for asked in ("cuda:3", "cpu"):
        reward = ListenerReward("tiny", device=asked)
        reward.prefer_device("cuda:1")
        reward.compare("a", shade(1), shade(2))
    reward = ListenerReward("tiny")
    reward.prefer_device(torch.device("cuda"))  # says no more than was known
    reward.compare("a", shade(1), shade(2))
    reward = ListenerReward("tiny", device="cuda")
    reward.prefer_device("cpu")
    assert [given["device"] for _, given in loads] == ["cuda:3", "cpu", "cuda:2"]


def test_a_reward_made_before_cuda_is_awake_does_not_wake_it(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was initialised"))
    ListenerReward("tiny")


@pytest.mark.parametrize(
    "current, rank, count, index", [(0, None, 4, 0), (0, "3", 4, 3), (2, "3", 4, 2), (0, "3", 1, 0), (0, "x", 4, 0)]
)
def test_each_process_of_a_launcher_has_a_gpu_of_its_own(monkeypatch, gpus, current, rank, count, index):
    gpus.index = current
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_its_state_is_the_images_it_has_kept(FakeJudge, shade, tmp_path):
    reward = ListenerReward(FakeJudge(slope=3.0), scheme="reference")
    reward([shade(100), shade(7)], ["a", "b"])
    torch.save(reward.state_dict(), tmp_path / "state.pt")
    other = ListenerReward(FakeJudge(slope=3.0), scheme="reference")
    other([shade(250), shade(250)], ["a", "c"])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other([shade(200), shade(50)], ["a", "c"])[0].tolist() == pytest.approx([3 * 100 / 255, 0], abs=1e-4)
    assert reward.state_dict()["references"].keys() == {"a", "b"}, "a copy: calls of the other do not reach it"
    for state in (None, {}, {"references": {"a": "an image"}}, {"references": [b""]}):
        with pytest.raises(InputError, match="state_dict"):
            other.load_state_dict(state)  # pyright: ignore[reportArgumentType]


def test_pickles_by_its_configuration_without_the_judge(loads, shade):
    reward = ListenerReward("tiny", scheme="reference", on_failure="nan", thoughts=2)
    reward([shade(85)], ["a"])
    copy = pickle.loads(pickle.dumps(reward))
    assert len(loads) == 1, "unpickling loads nothing"
    assert len(pickle.dumps(reward)) < 2000
    # The kept reference came along: the copy's zero is the original's.
    scores = copy([shade(170)], ["a"])[0]
    assert scores == pytest.approx(reward([shade(170)], ["a"])[0]) and scores[0] > 1
    assert loads == [("tiny", {"thoughts": 2})] * 2
    assert (copy.scheme, copy.on_failure) == ("reference", "nan")


def test_eight_threads_share_one_judge(loads, shade):
    reward = ListenerReward("tiny", reference={"a": shade(0), "b": shade(128)})
    batches = [([shade(r), shade(2 * r), shade(3 * r)], ["a", "b", "b"]) for r in range(1, 41)]
    alone = [ListenerReward("tiny", reference=reward.reference)(*batch)[0] for batch in batches]
    loads.clear()
    with ThreadPoolExecutor(max_workers=8) as pool:  # the fake judge fails an assertion if two threads meet in it
        together = [future.result()[0] for future in [pool.submit(reward, *batch) for batch in batches]]
    assert len(loads) == 1
    assert np.array_equal(together, alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_answers_or_raises(FakeJudge, shade, tmp_path, busy):
    """The thread that holds the lock is not copied, so that the child would wait for it without end."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(FakeJudge):
        def compare_many(self, *args, **options):
            began.set()
            go_on.wait(30)
            return super().compare_many(*args, **options)

    judge = Slow(slope=3.0)
    reward = ListenerReward(judge, scheme="reference", state=tmp_path / "state.db")
    reward([shade(0)], ["a"])
    thread = threading.Thread(target=reward, args=([shade(3), shade(4)], ["a", "b"]))
    if busy:
        thread.start()
        assert began.wait(30)
    else:
        go_on.set()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # which ends a child that hangs
        go_on.set()
        try:
            os._exit(int(reward([shade(255)], ["a"])[0][0] == pytest.approx(3.0, abs=1e-3)))
        except JudgeError as error:
            os._exit(2 if "forked while another thread scored" in str(error) else 3)
        finally:
            os._exit(4)
    status = os.waitpid(pid, 0)[1]
    go_on.set()
    if busy:
        thread.join()
    assert os.waitstatus_to_exitcode(status) == (2 if busy else 1)
    assert reward([shade(255)], ["a"])[0][0] == pytest.approx(3.0, abs=1e-3), "the parent goes on"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_loads_a_judge_of_its_own(loads, shade):
    reward = ListenerReward("tiny", reference={"a": shade(0)})
    reward([shade(9)], ["a"])
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        reward([shade(9)], ["a"])
        os._exit(len(loads))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2 and len(loads) == 1


def test_references_in_a_file_survive_the_process_and_stay_out_of_memory(FakeJudge, shade, tmp_path):
    path = tmp_path / "state.db"
    reward = ListenerReward(FakeJudge(slope=3.0), scheme="reference", state=path)
    assert reward([shade(100), shade(50)], ["a", "b"])[0].tolist() == [0, 0]
    again = ListenerReward(FakeJudge(slope=3.0), scheme="reference", state=path)
    assert again([shade(185)], ["a"])[0].tolist() == pytest.approx([1.0], abs=1e-4)
    copy = pickle.loads(pickle.dumps(ListenerReward("tiny", scheme="reference", state=path)))
    assert copy.state_dict()["references"].keys() == {"a", "b"}
    assert [*map(type, (again._kept, copy._kept))] == [ReferenceFile] * 2
    again.load_state_dict({"references": {"c": reward.state_dict()["references"]["a"]}})
    assert reward.state_dict()["references"].keys() == {"c"}, "both look into the same file"


def test_a_clip_is_kept_in_a_file_with_its_times(shade, tmp_path):
    kept = ReferenceFile(tmp_path / "state.db")
    clip = {"frames": [packed(to_visual(shade(k))) for k in (1, 2)], "seconds": [0.0, 0.25]}
    kept["a"] = clip
    assert kept["a"] == clip and is_kept(kept["a"]) and size(kept["a"]) == sum(map(len, clip["frames"]))
    kept["a"] = packed(to_visual(shade(9)))
    assert kept["a"] == clip, "the first one stays"
    assert (len(kept), list(kept), "b" in kept, kept.get("b")) == (1, ["a"], False, None)
    del kept["a"]
    assert len(kept) == 0
    with pytest.raises(KeyError):
        del kept["a"]


def test_two_processes_keep_the_first_image_of_both(FakeJudge, shade, tmp_path):
    one, other = (ListenerReward(FakeJudge(slope=3.0), scheme="reference", state=tmp_path / "db") for _ in range(2))
    one([shade(100)], ["a"])
    assert other([shade(185)], ["a"])[0].tolist() == pytest.approx([1.0], abs=1e-4)


def test_what_is_no_file_of_references_is_named(FakeJudge, shade, tmp_path):
    (tmp_path / "a.db").write_bytes(b"no database at all, " * 100)
    for path in (tmp_path / "a.db", tmp_path / "no" / "folder.db"):
        with pytest.raises(InputError, match=r"state .* cannot be opened"):
            ListenerReward(FakeJudge(), scheme="reference", state=path)
    reward = ListenerReward(FakeJudge(), scheme="reference", state=tmp_path / "b.db")
    kept: Any = reward._kept
    kept._connection.execute('DROP TABLE "references"')
    with pytest.raises(JudgeError, match="references cannot be kept"):
        reward([shade(3)], ["a"])


def test_references_are_read_from_a_file(FakeJudge, shade, tmp_path):
    (tmp_path / "pictures").mkdir()
    shade(100).save(tmp_path / "pictures" / "a.png")
    path = tmp_path / "references.json"
    path.write_text('{"a": "pictures/a.png"}', encoding="utf-8")
    reward = ListenerReward(FakeJudge(slope=3.0), scheme="reference", reference=path)
    assert reward([shade(185)], ["a"])[0].tolist() == pytest.approx([1.0], abs=1e-4)
    with pytest.raises(InputError, match="no image for prompt 'b'"):
        reward([shade(185)], ["b"])
    for text, words in (('{"a": "b.png"}', "1 files that are not there"), ('["a"]', "no object"), ("{", "as JSON")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            ListenerReward(FakeJudge(), reference=path)


def test_an_unknown_option_is_named_before_anything_is_loaded():
    with pytest.raises(InputError, match=r"grup_size, thinks: no option of a .*, which has scheme.*thoughts"):
        ListenerReward("tiny", grup_size=3, thinks=False)
    options = inspect.signature(Judge.from_pretrained).parameters
    assert tuple(name for name in options if name != "name") == JUDGE_OPTIONS, "the list in reward.py is out of date"
    with pytest.raises(InputError, match="quantization is '5bit'"):
        ListenerReward("tiny", quantization="5bit")


def test_importing_loads_no_torch():
    code = "import sys, listener_reward.reward, listener_reward.evaluate; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in modules, "the probe sees nothing"
    assert not {"torch", "transformers", "datasets", "trl"} & set(modules)


# ---------------------------------------------------------------------------------------------------------------------
# Failure: never a zero that means it
# ---------------------------------------------------------------------------------------------------------------------


def _broken_image(FakeJudge, red, **options):
    return FakeJudge(breaks_on=lambda prompt, first, second: red in (first, second), **options)


@pytest.mark.parametrize("answers_nan", [False, True])
def test_a_broken_judge_raises(FakeJudge, shade, answers_nan):
    reward = ListenerReward(_broken_image(FakeJudge, 9, answers_nan=answers_nan))
    with pytest.raises(JudgeError):
        reward([shade(9), shade(20)], ["a", "a"])


def test_a_call_that_raised_keeps_no_reference(FakeJudge, shade):
    reward = ListenerReward(_broken_image(FakeJudge, 9), scheme="reference")
    with pytest.raises(JudgeError):
        reward([shade(50), shade(9)], ["a", "a"])
    assert reward([shade(60)], ["a"])[0].tolist() == [0.0]


@pytest.mark.parametrize("answers_nan", [False, True])
def test_nan_masks_the_broken_image_and_no_other(FakeJudge, shade, answers_nan):
    reward = ListenerReward(_broken_image(FakeJudge, 9, answers_nan=answers_nan), on_failure="nan")
    reds, prompts = [30, 9, 60, 1, 2], ["a", "a", "a", "b", "b"]
    scores, info = reward([shade(r) for r in reds], prompts)
    assert np.isnan(scores).tolist() == [False, True, False, False, False]
    assert info["failed"].tolist() == [0, 1, 0, 0, 0] and info["comparisons"].tolist() == [1, 0, 1, 1, 1]
    # What is left of group "a" is scored as a group of two would be.
    without = ListenerReward(FakeJudge())([shade(30), shade(60)], ["a", "a"])[0]
    assert scores[[0, 2]] == pytest.approx(without, abs=1e-6)


def test_one_broken_pair_is_found_by_halving(FakeJudge, shade):
    judge = _broken_image(FakeJudge, 9)
    prompts = [f"prompt {k}" for k in range(64)]
    reward = ListenerReward(judge, on_failure="nan", reference=lambda prompt: shade(100))
    scores, _ = reward([shade(9 if k == 40 else 50) for k in range(64)], prompts)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [40]
    assert len(judge.calls) == 1 + 2 * 6  # all 64, then two halves of each size from 32 to 1


def test_a_judge_whose_server_has_gone_is_asked_once(FakeJudge, shade):
    class Gone(FakeJudge):
        asked = 0

        def compare_many(self, prompts, *args, **options):
            self.asked += 1
            raise UnreachableError("no response in 6 tries")

    judge = Gone()
    reward = ListenerReward(judge, on_failure="nan", reference=lambda prompt: shade(100))
    scores, info = reward([shade(50)] * 8, [f"prompt {k}" for k in range(8)])
    assert np.isnan(scores).all() and info["failed"].tolist() == [1] * 8
    assert judge.asked == 1
    with pytest.raises(UnreachableError):
        ListenerReward(judge, reference=lambda prompt: shade(100), on_failure="raise")([shade(50)] * 2, ["a", "b"])


def test_group_mean_gives_the_mean_of_the_prompt_s_other_images(FakeJudge, shade):
    # Against a reference of red 0 at slope 3: 85 scores 1, 170 scores 2; the broken one gets 1.5. "b" has no other.
    judge = _broken_image(FakeJudge, 9, slope=3.0)
    reward = ListenerReward(judge, scheme="reference", reference=lambda prompt: shade(0), on_failure="group-mean")
    scores, info = reward([shade(85), shade(9), shade(170), shade(9)], ["a", "a", "a", "b"])
    assert scores[:3] == pytest.approx([1.0, 1.5, 2.0], abs=1e-6) and np.isnan(scores[3])
    assert info["failed"].tolist() == [0, 1, 0, 1] and np.isnan(info["standard_error"][[1, 3]]).all()


def test_only_the_judge_s_own_failures_are_masked(FakeJudge, shade):
    class Buggy(FakeJudge):
        def compare_many(self, *args, **kwargs):
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        ListenerReward(Buggy(), on_failure="nan")([shade(1), shade(2)], ["a", "a"])


def test_a_judge_that_skips_a_pair_is_broken(FakeJudge, shade):
    class Short(FakeJudge):
        def compare_many(self, *args, **kwargs):
            return super().compare_many(*args, **kwargs)[1:]

    with pytest.raises(JudgeError, match="0 verdicts on 1 pairs"):
        ListenerReward(Short())([shade(1), shade(2)], ["a", "a"])


def test_equal_images_of_a_group_are_compared_as_one_and_share_its_row(FakeJudge, shade):
    """Twelve images meet few others each: copies met different ones and scored differently."""
    judge = FakeJudge(noise=0.5)
    reds = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 40, 180]
    scores, info = ListenerReward(judge, scheme="group")([shade(red) for red in reds], ["a"] * 12)
    alone, without = ListenerReward(FakeJudge(noise=0.5), scheme="group")([shade(r) for r in reds[:10]], ["a"] * 10)
    assert scores.tolist() == [*alone.tolist(), alone[2], alone[9]]
    for name, values in info.items():
        expected = [*without[name].tolist(), without[name][2], without[name][9]]
        assert np.array_equal(values, np.array(expected, dtype=np.float32), equal_nan=True), name
    scores, info = ListenerReward(judge, scheme="group")([shade(7)] * 3, ["a"] * 3)
    assert (scores.tolist(), info["failed"].tolist()) == ([0, 0, 0], [0, 0, 0])
