"""`ListenerReward`: a pairwise judge as the scalar reward that diffusion trainers call.

A judge compares two images, and a trainer wants one number for each image. A *scheme* says what an image is compared
with:

- `group`: the images of a prompt are compared with one another. Their Bradley-Terry log-odds are the scores, with mean
  zero in the group. For trainers that sample several images a prompt and normalise within the prompt.
- `reference`: each image is compared with one fixed image of its prompt. The score is the log-odds of beating the fixed
  image, so scores of different steps are on one scale.
- `anchors`: each image is compared with a few fixed images of its prompt, whose mutual scores are fixed too. The score
  is the most probable log-odds on their scale, so scores of different steps are on one scale, with smaller errors.

Importing this module loads no model and no torch; the first call loads the judge.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import numpy as np

from listener_reward.anchor_sets import AnchorSets
from listener_reward.anchors import check_effort, identity_of, meet
from listener_reward.batching import BatchingJudge
from listener_reward.criteria import check_criteria, combined, read_criteria, summed
from listener_reward.errors import FormatError, InputError, JudgeError, UnreachableError, check_choice
from listener_reward.forks import renew
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import ImageLike
from listener_reward.media.storyboards import to_visual, to_visuals
from listener_reward.meetings import INFO, REFERENCE, Match, Task, placed_among, row_by_anchors, rows_of
from listener_reward.models.options import MODEL_OPTIONS, check_options
from listener_reward.pairs import PromptLike, as_prompt, key_of, prompt_with, with_sources
from listener_reward.ranking import Ranking, first_equal, pairings
from listener_reward.references import Kept, ReferenceFile, is_kept, packed, read_references, size, unpacked
from listener_reward.verdict import PairJudge, Verdict, checked

if TYPE_CHECKING:
    from listener_reward.judge import Judge

PAPER_CHECKPOINT = "alexgambashidze/qwen2.5vl_image_preference_reasoner"
"""The weights that the paper's authors released."""

Scheme = Literal["auto", "group", "reference", "anchors"]
FailurePolicy = Literal["raise", "nan", "group-mean"]

JUDGE_OPTIONS = (
    "card", "listener", "listener_options", "thoughts", "aggregate", "orders", "early_stop", "think", "max_new_tokens",
    "sampling_temperature", "masking", "seed", "clips", "strict", "lenient", *MODEL_OPTIONS,
)  # fmt: skip
"""What `Judge.from_pretrained` takes, known without its module, which imports torch."""

MANY_REFERENCES = 1000
"""Keeping the first image of more prompts than this in memory is worth a word in the log; see `state`."""

Reward = Callable[[Any, Sequence[Any], Any], tuple[Any, Mapping[str, Any]]]
"""B images, B prompts (texts or `Prompt`s) and B metadata to B scores and a dict of arrays; `ListenerReward` is one."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ListenerReward:
    """Scores images for their prompts: `reward(images, prompts, metadata) -> (scores, info)`.

    A `ListenerReward` is a plain callable: no gradient, thread-safe. It pickles by its configuration and the reference
    images it has kept, so a copy scores on the same scale. The judge is loaded on first use. Calls that come while the
    judge is busy are judged together afterwards; see `BatchingJudge`, of which rewards that share a judge need one.
    """

    __name__ = "listener_reward"  # trainers name a reward in their logs by this

    def __init__(
        self,
        judge: str | os.PathLike[str] | Judge | PairJudge = PAPER_CHECKPOINT,
        *,
        scheme: Scheme = "auto",
        reference: Mapping[str, ImageLike] | Callable[[str], ImageLike] | str | os.PathLike[str] | None = None,
        on_failure: FailurePolicy = "raise",
        state: str | os.PathLike[str] | None = None,
        criteria: Mapping[str, float] | str | None = None,
        anchors: Mapping[str, Any] | Callable[[str], Any] | str | os.PathLike[str] | int | None = None,
        anchor_comparisons: int | None = None,
        anchor_error: float | None = None,
        **judge_options: Any,
    ):
        """
        Args:
            judge: what `Judge.from_pretrained` takes ("tiny", a folder, a Hub name), or a judge: a `Judge` or any
                `PairJudge`. A judge given as an object pickles as that object does; a name is the lighter choice.
            scheme: "group", "reference", "anchors", or "auto": group for a prompt with two images or more in a call,
                reference for one that stands alone.
            reference: the image that each prompt's images must beat, or the path of a JSON file
                `{"prompt": "image.png", ...}`. Left out, the first image seen for a prompt is kept; it scores 0
                exactly.
            on_failure: what an image scores when the judge broke on all its comparisons: "raise" raises `JudgeError`,
                "nan" gives NaN, "group-mean" the mean of the prompt's other images in the call (NaN without any).
            state: a file that keeps the first images seen, or the anchors and their scores, made where it is missing,
                so that memory does not grow with the prompts and the next run has the same scale; see
                `references.ReferenceFile`. Left out, they are kept in memory.
            criteria: what to judge by, each with its weight: `{"alignment": 1.0, "quality": 0.5}`, or as a text
                "alignment=1,quality=0.5". Each comparison is asked once for each criterion, and the score is the
                weighted sum of the criteria's scores: weights are not normalised. None asks the general question.
            anchors: for scheme "anchors" the images that each prompt's images are compared with: a dict of prompts and
                lists of images, a function of the prompt, a JSON file `{"prompt": ["a.png", ...], ...}`, or a folder
                that `listener-reward anchors` made, which has their scores too. A number takes so many out of the first
                group of different images seen for a prompt, spread over its quality; left out, that is 4.
            anchor_comparisons: most comparisons of an image, each with the anchor that tells most; None: all anchors.
            anchor_error: no more comparisons for an image whose score has a standard error as low as this, in log-odds.
            judge_options: passed on to `Judge.from_pretrained`. Without a `device`, or with "cuda", the judge goes to
                the GPU that is current where the reward is made: the first call may come from a thread with another
                current GPU.

        Raises:
            InputError: an unknown scheme, policy or option, options that would have no effect, or files that cannot be
                used.
        """
        for field, value, allowed in (("scheme", scheme, Scheme), ("on_failure", on_failure, FailurePolicy)):
            check_choice(field, value, get_args(allowed))
        for field, value in (("reference", reference), ("state", state)):
            if scheme == "group" and value is not None:
                raise InputError(
                    f"{field} is given, but scheme='group' compares no reference; use 'auto' or 'reference'"
                )
        if scheme == "anchors":
            if reference is not None:
                raise InputError("reference is given, but scheme='anchors' compares with anchors; give it as anchors")
            check_effort(anchor_comparisons, anchor_error, prefix="anchor_")
        else:
            effort = {"anchors": anchors, "anchor_comparisons": anchor_comparisons, "anchor_error": anchor_error}
            if ineffective := [name for name, value in effort.items() if value is not None]:
                raise InputError(f"{', '.join(ineffective)} would have no effect with scheme={scheme!r}; use 'anchors'")
        if reference is not None and state is not None:
            raise InputError("state is given, but with reference= there is nothing to keep; leave one of them out")
        if isinstance(judge, (str, os.PathLike)):
            judge = os.fspath(judge)
            if unknown := [name for name in judge_options if name not in JUDGE_OPTIONS]:
                own = ("scheme", "reference", "on_failure", "state", "criteria")
                own += ("anchors", "anchor_comparisons", "anchor_error")
                known = ", ".join((*own, *JUDGE_OPTIONS))
                raise InputError(f"{', '.join(unknown)}: no option of a ListenerReward, which has {known}")
            check_options({name: value for name, value in judge_options.items() if name in MODEL_OPTIONS})
        elif not isinstance(judge, PairJudge):
            raise InputError(f"judge is a {type(judge).__name__}; give a checkpoint's name, its folder, or a Judge")
        elif judge_options:
            raise InputError(
                f"{', '.join(judge_options)} would have no effect on a judge already loaded; give it to "
                "Judge.from_pretrained, or give the judge by name"
            )
        self.criteria = {} if criteria is None else read_criteria(criteria)
        if not isinstance(judge, str):
            check_criteria(judge, self.criteria)
        self.judge = judge
        self.scheme = scheme
        self.reference = read_references(reference) if isinstance(reference, (str, os.PathLike)) else reference
        self.on_failure = on_failure
        self.judge_options = judge_options
        self._anchors = AnchorSets(anchors, state=state) if scheme == "anchors" else None
        self._effort = {"comparisons": anchor_comparisons, "error": anchor_error}
        # The first image of each prompt, as PNG: raw pixels are ten times that.
        self._kept: dict[str, Kept] | ReferenceFile = {} if state is None or self._anchors else ReferenceFile(state)
        self._loaded: BatchingJudge | None = None  # a judge holds one model on one device: one caller at a time
        self._device = _current_gpu()
        self._forked = False
        self._begin()
        renew(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # of all that is kept here; not held while the judge works
        self._opening: set[PromptLike] = set()  # prompts whose first image is being scored, and not their reference yet
        self._opened = threading.Condition(self._lock)

    def __call__(
        self, images: Any, prompts: Sequence[PromptLike], metadata: Any = None, *, sources: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores a batch.

        Args:
            images: B images: a tensor or array, NCHW float in [0, 1] or NHWC uint8, or a sequence of anything that
                `images.to_pil` reads; or a sequence of `Clip`s.
            prompts: their B prompts; images with equal prompts form a group. Prompts with other sources are others.
            metadata: None, or what a trainer knows of each image. Read of it are `metadata[i]["sources"]`.
            sources: the source images of each prompt, B entries of one image, several, or None; they belong to the
                prompt, see `Prompt.sources`.

        Returns:
            Scores, float32 `(B,)`, in log-odds (higher is better), and a dict of float32 arrays `(B,)`, NaN where a
            quantity does not apply:

            - `standard_error` of the score;
            - `comparisons` that the score rests on;
            - `position_gap`: mean absolute position gap of those comparisons, in [0, 1];
            - `contradicted`: fraction of those comparisons in which the listener prefers the other image than the
              verdict;
            - `listener_p_first`: the listener's mean probability that this image is the better one;
            - `malformed`: fraction of the thoughts that were malformed;
            - `label_mass`: the two labels' total probability at the judge's answer slot, see `Verdict.label_mass`;
            - `failed`: 1 where the judge broke on every comparison of the image, else 0;
            - `win_share`: with anchors, the expected share of wins against them, in [0, 1].

            With `criteria` these are of the whole: errors taken as independent, comparisons counted, other entries the
            means over them, `failed` where a criterion failed. Beside them each criterion has its own, unweighted:
            `NAME/score`, `NAME/missing` (its `failed`), `NAME/standard_error` and so on. An image that a criterion
            gave no score has none, unless `on_failure="group-mean"` gives it that criterion's mean.

        Raises:
            InputError: unusable images, sources or prompts, or lengths that differ.
            JudgeError: the judge broke, and `on_failure` is "raise"; or it is strict, and its answers are not in its
                format.
        """
        pictures = to_visuals(images)
        groups = _group_by_prompt(with_sources(prompts, len(pictures), metadata, sources))
        names: Sequence[str | None] = [*self.criteria] or [None]
        together = {prompt: [pictures[b] for b in members] for prompt, members in groups.items()}
        scored = (self._score_by_anchors if self._anchors else self._score_by_others)(together, names)

        tables = np.zeros((len(names), len(pictures), 1 + len(INFO)), dtype=np.float32)
        for by_name, members in zip(scored, groups.values(), strict=True):
            for table, rows in zip(tables, by_name, strict=True):
                table[members] = rows
                if self.on_failure == "group-mean":
                    scores = table[members, 0]
                    if not np.isnan(scores).all():
                        table[members, 0] = np.where(np.isnan(scores), np.nanmean(scores), scores)
        parts = [{name: table[:, k].copy() for k, name in enumerate(("score", *INFO))} for table in tables]
        columns = combined(dict(zip(self.criteria, parts, strict=True)), self.criteria) if self.criteria else parts[0]
        return columns.pop("score"), columns

    def prefer_device(self, device: Any) -> None:
        """For hosts that name a device: where to load the judge. No effect if the judge is loaded, or `judge_options`
        name a device."""
        if str(device) != "cuda":  # which says nothing that was not known
            self._device = str(device)

    def rank(
        self,
        prompt: PromptLike,
        images: Any,
        *,
        sources: Sequence[ImageLike] | ImageLike = (),
        criterion: str | None = None,
        budget: int | None = None,
    ) -> Ranking:
        """Orders images of one prompt; see `Judge.rank`. `images` as in a call.

        A reward with `criteria` ranks by each of them, with a budget of its own, and orders by the weighted sum. A
        `criterion` named here is the only one.
        """
        asked, visuals = prompt_with(prompt, sources, criterion), to_visuals(images)
        if not self.criteria or as_prompt(asked).criterion is not None:
            return self._get_judge().rank(asked, visuals, budget=budget)
        by_criterion = {
            name: self._get_judge().rank(prompt_with(asked, (), name), visuals, budget=budget) for name in self.criteria
        }
        return summed(by_criterion, self.criteria)

    def compare(
        self,
        prompt: PromptLike,
        first: ImageLike | Clip,
        second: ImageLike | Clip,
        *,
        sources: Sequence[ImageLike] | ImageLike = (),
        criterion: str | None = None,
        think: bool | None = None,
    ) -> Verdict:
        """Judges one pair; see `Judge.compare`. Without `criterion` it is by the general question."""
        prompt = prompt_with(prompt, sources, criterion)
        visuals = to_visual(first, field="first"), to_visual(second, field="second")
        return self._get_judge().compare_many([prompt], [visuals[0]], [visuals[1]], think=think)[0]

    def state_dict(self) -> dict[str, Any]:
        """The reference images kept so far, one for each prompt, as the bytes of a PNG; or anchors and their scores.

        A clip is kept as a dict of its frames' bytes and its times.

        `DDPOTrainer` keeps this state in its checkpoints: without it, a resumed run would score on another scale.
        """
        with self._lock:
            anchors = {"anchors": self._anchors.state()} if self._anchors else {}
            return {"references": dict(self._kept), **anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the images, or the anchors, of a `state_dict` in the place of those kept so far.

        Raises:
            InputError: it is no `state_dict` of a `ListenerReward`.
        """
        kept = state.get("references") if isinstance(state, Mapping) else None
        if not isinstance(kept, Mapping) or not all(map(is_kept, kept.values())):
            raise InputError(f"state is {state!r:.80}; give what state_dict() of a ListenerReward gave")
        anchors = state.get("anchors", {})
        if not isinstance(anchors, Mapping) or (anchors and not self._anchors):
            raise InputError("state has anchors, which this reward does not take; make it with scheme='anchors'")
        with self._lock:
            if self._anchors:
                self._anchors.load(anchors)
            self._kept.clear()
            _add(self._kept, kept)

    def __repr__(self) -> str:
        judge = repr(self.judge) if isinstance(self.judge, str) else self.judge.name
        by = f", criteria={self.criteria!r}" if self.criteria else ""
        return f"ListenerReward({judge}, scheme={self.scheme!r}, on_failure={self.on_failure!r}{by})"

    def __getstate__(self) -> dict[str, Any]:
        kept = self._kept if isinstance(self._kept, ReferenceFile) else dict(self._kept)
        here = {name: None for name in ("_loaded", "_lock", "_opening", "_opened", "_device")}
        return self.__dict__ | here | {"_kept": kept, "_forked": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _device=_current_gpu())
        self._begin()
        renew(self)

    def after_fork(self) -> None:
        """For the child of a fork: no lock is held in it, and a judge by name is loaded anew."""
        self._forked = True
        self._begin()
        if isinstance(self.judge, str):
            self._loaded = None
        for kept in (self._kept, self._anchors.kept if self._anchors else {}):
            if isinstance(kept, ReferenceFile):
                kept.after_fork()

    def _get_judge(self) -> BatchingJudge:
        with self._lock:
            if self._forked and (torch := sys.modules.get("torch")):
                torch.set_num_threads(1)  # OpenMP's other threads were not copied, and are waited for without end
                self._forked = False
            if self._loaded is None:
                judge = self._load() if isinstance(self.judge, str) else self.judge
                check_criteria(judge, self.criteria)
                self._loaded = (
                    judge if isinstance(judge, BatchingJudge) else BatchingJudge(judge, wait=0, own_thread=False)
                )
            return self._loaded

    def _load(self) -> PairJudge:
        from listener_reward.judge import Judge  # imports torch: only once a judge is wanted

        options, asked = dict(self.judge_options), self.judge_options.get("device")
        free = asked is None and options.get("device_map") is None
        if self._device and (free or (str(asked) == "cuda" and self._device.startswith("cuda"))):
            options["device"] = self._device
        return Judge.from_pretrained(str(self.judge), **options)

    def _score_by_others(
        self, groups: Mapping[PromptLike, list[Visual]], criteria: Sequence[str | None]
    ) -> list[list[np.ndarray]]:
        """The rows of each group, for each criterion, by its own images or by its reference."""

        def plan() -> tuple[list[Task], set[PromptLike]]:
            tasks = [self._plan(prompt, pictures) for prompt, pictures in groups.items()]
            return tasks, {task.prompt for task in tasks if task.opens}

        with self._planned(groups, plan) as tasks:
            matches = [match for task in tasks for match in task.matches(criteria)]
            verdicts = iter(self._ask(self._get_judge(), matches))
            # Only now: a call that raised must not leave its image as the prompt's reference.
            with self._lock:
                self._keep({task.prompt: task.pictures[0] for task in tasks if task.opens})
        said = [[next(verdicts) for _ in task.meetings for _ in criteria] for task in tasks]
        return [
            [rows_of(task, verdicts[number :: len(criteria)]) for number in range(len(criteria))]
            for task, verdicts in zip(tasks, said, strict=True)
        ]

    def _score_by_anchors(
        self, groups: Mapping[PromptLike, list[Visual]], criteria: Sequence[str | None]
    ) -> list[list[np.ndarray]]:
        """The rows of each group by its prompt's anchors, for each criterion, which has a scale of its own."""
        sets, judge = cast(AnchorSets, self._anchors), self._get_judge()
        ask, name = partial(self._ask, judge), identity_of(judge)
        asked = {prompt: [prompt_with(prompt, (), criterion) for criterion in criteria] for prompt in groups}

        def plan() -> tuple[dict[PromptLike, list[Visual]], set[PromptLike]]:
            new = {each: groups[prompt] for prompt in groups for each in asked[prompt] if not sets.has(each)}
            return new, {prompt for prompt in groups if not new.keys().isdisjoint(asked[prompt])}

        with self._planned(groups, plan) as new:
            sets.open(new, ask, name)
        placed = [
            [placed_among(each, pictures, sets.of(each, name)) for each in asked[prompt]]
            for prompt, pictures in groups.items()
        ]
        # By image and then by criterion: a judge looks at a pair once for all of them.
        together = [each for group in placed for row in zip(*group, strict=True) for each in row if each is not None]
        meet([*dict.fromkeys(together)], ask, **self._effort)
        return [
            [np.array([row_by_anchors(each) for each in column], dtype=np.float32) for column in group]
            for group in placed
        ]

    @contextmanager
    def _planned(
        self, groups: Mapping[PromptLike, list[Visual]], plan: Callable[[], tuple[T, set[PromptLike]]]
    ) -> Iterator[T]:
        """What `plan` gives, beside the prompts that are opened here: their reference or anchors are not known yet.

        Whoever comes with a prompt that is being opened waits for the end.
        """
        with self._opened:
            self._opened.wait_for(lambda: self._opening.isdisjoint(groups))
            planned, opening = plan()
            self._opening |= opening
        try:
            yield planned
        finally:
            with self._opened:
                self._opening -= opening
                self._opened.notify_all()

    def _plan(self, prompt: PromptLike, pictures: list[Visual]) -> Task:
        if self.scheme == "group" or (self.scheme == "auto" and len(pictures) > 1):
            same = first_equal(pictures)  # equal images are compared as one, and share its score
            distinct = sorted(set(same))
            meetings = [(distinct[i], distinct[j]) for i, j in pairings(len(distinct))]
            return Task(prompt, pictures, meetings, same=same)
        reference = self._reference_of(prompt)
        opens = reference is None
        met = range(1 if opens else 0, len(pictures))
        return Task(prompt, pictures, [(i, REFERENCE) for i in met], reference or pictures[0], opens)

    def _reference_of(self, prompt: PromptLike) -> Visual | None:
        """The image to beat for `prompt`; None where its first image has yet to be seen."""
        if self.reference is None:
            kept = self._kept.get(key_of(prompt))
            return None if kept is None else unpacked(kept)
        text = as_prompt(prompt).text
        if isinstance(self.reference, Mapping):
            given = self.reference.get(text)
        else:
            given = self.reference(prompt)  # pyright: ignore[reportArgumentType] - texts for those who have only texts
        if given is None:
            raise InputError(f"reference has no image for prompt {text!r}; add one, or leave reference out")
        return to_visual(given, field=f"reference[{text!r}]")

    def _keep(self, firsts: Mapping[PromptLike, Visual]) -> None:
        before = len(self._kept)
        _add(self._kept, {key_of(prompt): packed(visual) for prompt, visual in firsts.items()})
        if isinstance(self._kept, dict) and before <= MANY_REFERENCES < len(self._kept):
            logger.warning(
                "%d prompts have their first image kept in memory (%.0f MiB); with this many prompts, give state= to "
                "keep them in a file, or reference=, or sample several images a prompt",
                len(self._kept),
                sum(map(size, self._kept.values())) / 2**20,
            )

    def _ask(self, judge: PairJudge, matches: list[Match]) -> list[Verdict | None]:
        """The verdicts of `matches`; None where the judge broke, unless the policy is "raise".

        A batch that fails is halved until the failing comparisons stand alone. So one bad pair costs a few more calls,
        and every other pair keeps its verdict.
        """
        if not matches:
            return []
        try:
            prompts, firsts, seconds = map(list, zip(*matches, strict=True))
            return [*checked(judge.compare_many(prompts, firsts, seconds), prompts, "the judge")]
        except JudgeError as error:
            if self.on_failure == "raise" or isinstance(error, FormatError):
                raise
            if isinstance(error, UnreachableError):
                logger.warning("no verdict on %d comparisons: %s", len(matches), error)
                return [None] * len(matches)
            if len(matches) == 1:
                logger.warning("no verdict for prompt %r: %s", as_prompt(matches[0][0]).text, error)
                return [None]
            half = len(matches) // 2
            return self._ask(judge, matches[:half]) + self._ask(judge, matches[half:])


def _current_gpu() -> str | None:
    """The GPU that is current in this thread; None as long as nobody can have chosen one.

    It loads no torch, and wakes no CUDA, which a process that is yet to fork must not.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    index = torch.cuda.current_device()
    return f"cuda:{index}" if index else None  # 0 may mean that none was chosen: then `default_device` decides


def _add(kept: dict[str, Kept] | ReferenceFile, images: Mapping[str, Kept]) -> None:
    """A file takes all of them in one transaction, and may have got some from another process in the meantime."""
    kept.keep(images) if isinstance(kept, ReferenceFile) else kept.update(images)


def _group_by_prompt(prompts: Sequence[PromptLike]) -> dict[PromptLike, list[int]]:
    """The positions of each prompt in a batch, in order of first appearance."""
    groups: dict[PromptLike, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(position)
    return groups


def read_scores(given: Any, info: Mapping[str, Any], n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What any `Reward` gave for `n` images: scores, float32 `(n,)`, and those of its info that are numbers, likewise.

    Raises:
        JudgeError: the scores are not `n` numbers.
    """
    scores = _numbers(given)
    if scores is None or scores.shape != (n,):
        shape = "no numbers" if scores is None else f"shape {scores.shape}"
        raise JudgeError(f"the reward gave {shape} for {n} images; it has to give one score for each")
    arrays = {name: _numbers(values) for name, values in info.items()}
    return scores, {name: values for name, values in arrays.items() if values is not None and len(values) == n}


def _numbers(values: Any) -> np.ndarray | None:
    """`values` as float32 of rank 1, None where they are not that."""
    if hasattr(values, "detach"):  # a tensor, perhaps in bfloat16, which numpy does not have
        values = values.detach().float().cpu()
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 else None
