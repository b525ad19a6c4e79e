"""The judge: a reasoner and a listener give one verdict about two images, in both orders."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from listener_reward.errors import check_choice, missing

if fault := missing("judge", "a judge in this process"):
    raise fault

from listener_reward.anchor_sets import read_folder
from listener_reward.anchors import AnchoredScore, Anchors, Candidate, check_effort, fit_anchors, meet
from listener_reward.calibration.maps import CURVE_OF, Calibration, Curve
from listener_reward.card import Card, CardLike
from listener_reward.chat import Chat, Side
from listener_reward.conclude import Judgement, check_listens, check_thinks, on_grid, settled, verdict_of
from listener_reward.errors import InputError
from listener_reward.listener import (
    Listener,
    choose_listener,
    load_listener,
    options_of_listener,
    p_first_at_slot,
)
from listener_reward.media.clips import Clip, ClipView, frame_by_frame
from listener_reward.media.images import ImageLike, Picture
from listener_reward.media.storyboards import to_still, to_visual, to_visuals
from listener_reward.misfits import Misfits
from listener_reward.models.backends import load_vlm
from listener_reward.models.hub import resolve, same_checkpoint
from listener_reward.models.options import ModelOptions, check_options, is_address, listed
from listener_reward.models.vlm import VLM, check_finite
from listener_reward.pairs import Prompt, PromptLike, check_questions, key_of, prompt_with
from listener_reward.ranking import Ranking, copy_scores, first_equal, rank_images
from listener_reward.trace import Masking, Trace, parse
from listener_reward.verdict import LISTENING, Aggregate, Mode, Orders, Verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAIRS_AT_ONCE = 64
"""Pairs that go to the models together. The next pairs follow when these are done, so memory does not grow."""


@dataclass(frozen=True, slots=True)
class _Match:
    """Two sides to compare: two pictures, two clips as the judge looks at them, or one frame of each clip."""

    pair: int
    frame: int
    prompt: PromptLike
    sides: tuple[Side, Side]
    digests: tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Question:
    """One question to the models: a match in one of its two orders, with the seed of one thought."""

    match: int
    """Index of the match among those that are asked together."""
    flipped: bool
    """Whether the caller's second image stands in first place."""
    chat: Chat
    listener_chat: Chat | None
    """The same question in the listener's own words; None without a listener."""
    number: int
    seed: int
    twin: bool
    """Whether the two pictures are equal. One question then stands for both orders."""


class Judge:
    """Predicts which of two images people prefer for a prompt.

    Both models judge each pair in both orders, and a verdict averages the orders. So a position bias cannot decide, and
    swapping the images gives exactly `1 - p_first`. The card says how many thoughts, orders and rounds a verdict takes;
    docs/judging.md says what each choice costs and gives.
    """

    def __init__(
        self,
        reasoner: VLM,
        listener: Listener | None = None,
        card: Card | None = None,
        *,
        name: str = "judge",
        think: bool = True,
        seed: int = 0,
        clips: ClipView = "storyboard",
        strict: bool = False,
        lenient: bool = False,
    ):
        self.reasoner = reasoner
        self.listener = listener
        self.card = card or Card()
        check_listens(self.card.mode(think), listener is not None)
        self.name = name
        self.think = think
        """False is the fast mode: no thought is sampled, and one forward pass gives the probability at the answer
        slot."""
        self.seed = seed
        self.clips: ClipView = _checked(clips)
        """How clips are looked at; no effect on pictures."""
        self.lenient = lenient
        """Whether answers such as `**1**` or `Image 1` count, see `parse`; off, they are malformed."""
        self.misfits = Misfits("the judge", strict=strict)
        self._origin: dict[str, Any] | None = None
        self._told_of_mode = False
        self._told_of_criterion = False

    @classmethod
    @listed
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        card: CardLike | None = None,
        listener: str | Path | Listener | Literal["none"] | None = None,
        listener_options: ModelOptions | None = None,
        thoughts: int | None = None,
        aggregate: Aggregate | None = None,
        orders: Orders | None = None,
        early_stop: float | None = None,
        think: bool = True,
        max_new_tokens: int | None = None,
        sampling_temperature: float | None = None,
        masking: Masking | None = None,
        seed: int = 0,
        clips: ClipView = "storyboard",
        strict: bool = False,
        lenient: bool = False,
        **options: Unpack[ModelOptions],
    ) -> Judge:
        """Loads a judge by embedded name ("tiny"), folder, or Hub name.

        Args:
            name: the reasoner's checkpoint, or an adapter, which stays unmerged on the base that it names. Its
                `listener_reward.json` says how it is asked and who listens.
            card: another card than the checkpoint's own, which it replaces whole: a file such as `listener-reward card`
                writes, a `Card`, or its fields.
            listener: another listener than the checkpoint's own; "base" for the base under the reasoner's adapter;
                "none" for no listener, and for a verdict by the mean of the thoughts where the checkpoint would have it
                from its listener. A listener of the reasoner's own checkpoint or base shares its weights. An address
                is the checkpoint's own listener behind a server, and the judge's checkpoint where there is none.
            listener_options: `ModelOptions` in which the listener differs from the reasoner, such as
                `{"quantization": "4bit"}` or `{"device": "cuda:1"}`. With any, it has weights of its own.
            thoughts: thoughts sampled in each order; None takes the checkpoint's own number, here and below.
            aggregate: "mean" averages the reasoner's probabilities, "majority" counts its answers, "listener" averages
                the listener's probabilities, "both" averages reasoner and listener in log-odds.
            orders: "both", or "one" for a random order at half the cost.
            early_stop: sample no further thought once the preference will stay with this probability, in (0.5, 1]. 1
                leaves out only thoughts that cannot change the preference.
            think: False for the fast mode, in which no number of thoughts can be asked for.
            max_new_tokens: the longest completion.
            sampling_temperature: the temperature at which thoughts are sampled; 0 takes the likeliest token each time.
            masking: what the listener does not read of a thought: "answer", or "verdict" for sentences that say which
                image is better too.
            seed: seeds the thoughts, together with the pair's content.
            clips: how clips are looked at; see `ClipView`. A judge trained on single images has seen no "video" or
                "clip" question: evaluate it on such pairs first.
            strict: raise where most of the first thoughts are malformed, or the labels have next to no probability at
                the answer slot; else that is a `FormatWarning`.
            lenient: count answers such as `**1**`, `Image 1` or `\\boxed{1}`, which a checkpoint gives that was never
                trained as a judge; see `trace.parse`.
            options: where and how both models run; see `ModelOptions`.

        Raises:
            InputError: a checkpoint or a card that cannot be found, reached or read; an aggregate that needs a listener
                without one; an option that is none.
        """
        check_thinks(think, thoughts)
        check_options(options)
        check_options(listener_options or {}, "listener_options")
        chosen_options: Any = {option: value for option, value in options.items() if value is not None}
        folder = resolve(name)
        given_card = None if card is None else Card.read(card)
        card = Card.load(folder, given_card, revision=options.get("revision"))
        asked = {"card": given_card, "listener": listener, "listener_options": listener_options}
        if is_address(listener):
            listener_options = ModelOptions(**(listener_options or {}) | {"backend": str(listener)})
            listener = card.listener or str(name)
        chosen = choose_listener(listener, card.listener)
        refused = chosen is None and listener is not None
        if refused and aggregate is None and card.aggregate in LISTENING:
            card = replace(card, aggregate="mean")
        given = {
            "thoughts": thoughts,
            "aggregate": aggregate,
            "orders": orders,
            "early_stop": early_stop,
            "max_new_tokens": max_new_tokens,
            "sampling_temperature": sampling_temperature,
            "masking": masking,
        }
        card = replace(card, **{name: value for name, value in given.items() if value is not None})
        check_listens(card.mode(think), chosen is not None)
        if listener_options and not isinstance(chosen, str | Path):
            whose = "there is no listener" if chosen is None else "the listener is loaded already"
            raise InputError(f"listener_options are {dict(listener_options)}, and {whose}; leave them out")
        reasoner = load_vlm(folder, card.format, **chosen_options)
        if isinstance(chosen, str | Path):
            own = given_card if same_checkpoint(chosen, folder) else None
            loaded = load_listener(
                chosen,
                card,
                own=own,
                reasoner=reasoner,
                shared=not listener_options,
                **options_of_listener(chosen_options, listener_options),
            )
        else:
            loaded = chosen
        judge = cls(
            reasoner, loaded, card, name=str(name), think=think, seed=seed, clips=clips, strict=strict, lenient=lenient
        )
        if not isinstance(listener, Listener):
            judge._origin = {"name": name, **asked, **options, **given}
        for limit in judge.limits:
            warnings.warn(limit, stacklevel=2)
        return judge

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that reasoner and listener both have a question about, by name."""
        formats = [self.card.format, *([] if self.listener is None else [self.listener.chat_format])]
        return tuple(name for name in formats[0].known_criteria if all(name in f.known_criteria for f in formats))

    def sleep(self, level: int = 1) -> None:
        """Has every vLLM engine of this judge free its GPU memory; see `VllmVLM.sleep`. Other backends stay awake."""
        for vlm in self._vlms():
            if hasattr(vlm, "sleep"):
                vlm.sleep(level)

    def wake(self) -> None:
        """Brings back what `sleep` moved away."""
        for vlm in self._vlms():
            if hasattr(vlm, "wake"):
                vlm.wake()

    def _vlms(self) -> list[Any]:
        """The judge's models, each engine of vLLM once."""
        vlms: list[Any] = [self.reasoner, *([] if self.listener is None else [self.listener.vlm])]
        return list({id(getattr(vlm, "engine", vlm)): vlm for vlm in vlms}.values())

    @property
    def limits(self) -> tuple[str, ...]:
        """What the judge's models cannot give, a sentence each, where that was accepted; see `ModelOptions`."""
        said: list[str] = [limit for vlm in self._vlms() for limit in getattr(vlm, "limits", ())]
        return tuple(dict.fromkeys(said))

    @property
    def identity(self) -> str:
        """The name, and a digest of what verdicts depend on beside the weights and the seed: card, listener, mode.

        Scores of judges with other identities are not on one scale.
        """
        origin = self._origin or {}
        asked = ("listener", "listener_options", "revision", "quantization", "max_pixels")
        about = {
            # The listener's name in it is a path of this machine. What is at its default is left out, so that a field
            # that a later version adds changes nothing.
            "card": _differences(asdict(replace(self.card, listener=None)), asdict(Card())),
            "listens": self.listener is not None,
            **{name: getattr(self, name) for name in ("think", "clips", "lenient")},
            **{name: origin.get(name) for name in asked},
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        return f"{self.name} {digest[:12]}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by configuration: the copy loads its weights from where this judge got them."""
        if self._origin is None:
            raise TypeError(
                f"the judge {self.name!r} was put together from loaded models, which do not pickle by configuration; "
                "save them to folders and load it by Judge.from_pretrained, or hand on the folder's name"
            )
        load = partial(
            type(self).from_pretrained,
            **self._origin,
            seed=self.seed,
            clips=self.clips,
            strict=self.misfits.strict,
            lenient=self.lenient,
        )
        return load, (), {"think": self.think}  # set afterwards: a judge that was loaded to think may do without

    def with_clips(self, clips: ClipView) -> Judge:
        """A judge with the same weights and another way to look at clips."""
        other = object.__new__(type(self))  # copy.copy would load the weights anew, as a pickle does
        other.__dict__ |= self.__dict__ | {"clips": _checked(clips)}
        return other

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
        """The verdict on one pair of images, or of clips; see `compare_many`.

        Args:
            prompt: what both were made from; for edits the instruction.
            first: an image, or a clip.
            second: the other one, of the same kind.
            sources: what the prompt speaks of: the original of an edit, reference subjects, a first frame.
            criterion: the name of the question to ask, out of the card's `criteria`; None is the general one.
            think: another choice than the judge's own.

        Raises:
            InputError: as `compare_many`; or the card has no question about sources, or no such criterion.
        """
        asked = prompt_with(prompt, sources, criterion)
        visuals = to_visual(first, field="first"), to_visual(second, field="second")
        return self.compare_many([asked], [visuals[0]], [visuals[1]], think=think)[0]

    def compare_many(
        self,
        prompts: Sequence[PromptLike],
        firsts: Sequence[ImageLike | Clip],
        seconds: Sequence[ImageLike | Clip],
        *,
        think: bool | None = None,
    ) -> list[Verdict]:
        """One verdict per pair, judged in batches.

        A prompt with source images or a criterion is a `Prompt`. A pair is two images, or two clips: `Clip`s, as
        `read_clip` makes them, or video files. `clips` says how clips are looked at. With "frames", the verdict is the
        mean of the frames' verdicts.

        A malformed completion still counts: its thought is closed where the text ended, and the answer slot after it is
        read. `Verdict.malformed` has the number of such completions. A verdict depends on the pair, the seed and the
        models, not on the batch.

        Raises:
            InputError: unequal lengths, a prompt that is no text, an image that cannot be read, or one beside a clip.
            JudgeError: the reasoner or the listener gave NaN or infinite probabilities.
            FormatError: the judge is strict, and its first judgements are not in its format.
        """
        gathered = self.judgements(prompts, firsts, seconds, think=think, early_stop=self.card.early_stop)
        return [self.conclude(judgements, think=think) for judgements in gathered]

    def judgements(
        self,
        prompts: Sequence[PromptLike],
        firsts: Sequence[ImageLike | Clip],
        seconds: Sequence[ImageLike | Clip],
        *,
        think: bool | None = None,
        early_stop: float | None = None,
    ) -> list[list[Judgement]]:
        """The uncalibrated judgements of each pair, one list a pair; see `compare_many`.

        With `early_stop`, thoughts are sampled in rounds. Each round samples one thought in each order of every pair
        that is still undecided.
        """
        check_questions(prompts, firsts, seconds)
        mode = replace(self.card.mode(self._thinks(think)), early_stop=early_stop)
        gathered: list[list[Judgement]] = [[] for _ in prompts]
        stills: dict[bytes, Picture] = {}
        for start in range(0, len(prompts), PAIRS_AT_ONCE):
            pairs = range(start, min(start + PAIRS_AT_ONCE, len(prompts)))
            matches = [
                match
                for pair in pairs
                for match in self._matches(pair, prompts[pair], firsts[pair], seconds[pair], stills)
            ]
            for match, judgements in zip(matches, self._gather(matches, mode), strict=True):
                gathered[match.pair] += judgements
        return gathered

    def _gather(self, matches: Sequence[_Match], mode: Mode) -> list[list[Judgement]]:
        """The judgements of each match."""
        questions = [
            question for place, match in enumerate(matches) for question in self._questions(place, match, mode.thoughts)
        ]
        gathered: list[list[Judgement]] = [[] for _ in matches]
        if mode.early_stop is None:
            self._ask(questions, mode.think, gathered)
        else:
            calibrations = [self._calibration(mode, _criterion(match.prompt)) for match in matches]
            for number in range(mode.thoughts):
                done = {
                    place
                    for place, (judgements, calibration) in enumerate(zip(gathered, calibrations, strict=True))
                    if settled(judgements, mode, calibration)
                }
                due = [question for question in questions if question.number == number and question.match not in done]
                self._ask([question for question in due if number == 0 or not question.twin], mode.think, gathered)
        return [
            [replace(judgement, frame=match.frame, criterion=_criterion(match.prompt)) for judgement in judgements]
            for match, judgements in zip(matches, gathered, strict=True)
        ]

    def conclude(
        self,
        judgements: Sequence[Judgement],
        *,
        think: bool | None = None,
        calibration: Calibration | None = None,
        aggregate: Aggregate | None = None,
    ) -> Verdict:
        """One pair's verdict from its judgements; arithmetic only, no model runs.

        Args:
            judgements: one element of what `judgements` returns.
            think: whether the judgements have thoughts; None is the judge's own setting.
            calibration: another than the card's, which is that of the judgements' criterion.
            aggregate: another than the card's.

        Raises:
            InputError: the aggregate needs a listener, and there was none.
        """
        mode = self.card.mode(self._thinks(think))
        if aggregate is not None:
            mode = replace(mode, aggregate=aggregate)
        if calibration is None:
            calibration = self._calibration(mode, judgements[0].criterion if judgements else None)
        return verdict_of(self._needed(judgements, mode, calibration), mode, calibration)

    def rank(
        self,
        prompt: PromptLike,
        images: Sequence[ImageLike | Clip],
        *,
        sources: Sequence[ImageLike] | ImageLike = (),
        criterion: str | None = None,
        budget: int | None = None,
    ) -> Ranking:
        """Orders images or clips of one prompt by comparing every pair, or `budget` pairs chosen one round at a time.

        Equal images are compared as one and get the same score; see `ranking`. `sources` and `criterion` are those of
        `compare`.
        """
        prompt = prompt_with(prompt, sources, criterion)
        visuals = to_visuals(images)
        same = first_equal(visuals)
        distinct = [visual for place, visual in enumerate(visuals) if same[place] == place]
        mode = self.card.mode(self.think)
        calibration, curve = self._calibration(mode, _criterion(prompt)), None
        if not mode.think:  # docs/ranking.md has what this gains, and that thoughts are better off without
            last = CURVE_OF[mode.aggregate]
            curve = getattr(calibration, last)
            calibration = replace(calibration, **{last: Curve()})

        def compare_batch(pairs: Sequence[tuple[int, int]]) -> list[float]:
            firsts, seconds = [distinct[i] for i, _ in pairs], [distinct[j] for _, j in pairs]
            gathered = self.judgements([prompt] * len(pairs), firsts, seconds, early_stop=mode.early_stop)
            return [verdict_of(judgements, mode, calibration).p_first for judgements in gathered]

        return copy_scores(rank_images(compare_batch, len(distinct), budget=budget, curve=curve), same)

    def score(
        self,
        prompt: PromptLike,
        image: ImageLike | Clip,
        *,
        anchors: Anchors | Sequence[ImageLike | Clip] | str | os.PathLike[str],
        sources: Sequence[ImageLike] | ImageLike = (),
        criterion: str | None = None,
        comparisons: int | None = None,
        error: float | None = None,
    ) -> AnchoredScore:
        """How good one image is by itself: its expected share of wins against anchors, other images of its prompt.

        Args:
            prompt: what the image was made from.
            image: an image, or a clip.
            anchors: what `fit_anchors` gave; the images themselves, which are compared with one another first, in every
                call; or a folder that `listener-reward anchors` made.
            sources: as in `compare`.
            criterion: as in `compare`.
            comparisons: most comparisons of the image, each with the anchor that tells most; None is every anchor.
            error: no more comparisons once the score's standard error is as low as this, in log-odds.

        Raises:
            InputError: an image that cannot be read, anchors of another judge, or a folder without this prompt.
            JudgeError: as `compare_many`.
        """
        check_effort(comparisons, error)
        asked = prompt_with(prompt, sources, criterion)
        if isinstance(anchors, str | os.PathLike):
            anchors = read_folder(Path(anchors)).of(asked)
        if not isinstance(anchors, Anchors):
            anchors = fit_anchors(self, asked, anchors)
        anchors.check_judge(self.identity)
        candidate = Candidate(asked, to_visual(image), anchors)
        meet(
            [candidate],
            lambda matches: self.compare_many(*zip(*matches, strict=True)),
            comparisons=comparisons,
            error=error,
        )
        return candidate.score

    def check_question(self, *, sources: int = 0, criterion: str | None = None) -> None:
        """Whether a prompt with so many source images and this criterion can be asked about. Nothing is judged.

        Raises:
            InputError: the card has no question about sources, or no such criterion; or the listener's format has none.
        """
        for asks in (self.card.format, *([] if self.listener is None else [self.listener.chat_format])):
            asks.messages("", sources=sources, criterion=criterion)

    def check_format(self) -> None:
        """Says whether the answers so far are in the judge's format, and the listener's, however few they are.

        The first 16 judgements say it by themselves. A program that asks for fewer calls this after its last one, as
        `listener-reward compare` does.

        Raises:
            FormatError: they are not, and the judge is strict; else that is a `FormatWarning`.
        """
        self.misfits.end()
        if self.listener is not None:
            self.listener.misfits.end()

    def _thinks(self, think: bool | None) -> bool:
        return self.think if think is None else think

    def _ask(self, questions: Sequence[_Question], thinks: bool, gathered: list[list[Judgement]]) -> None:
        """Asks both models `questions` in one batch and adds each judgement to `gathered` at its match."""
        if not questions:
            return
        chats = [question.chat for question in questions]
        completions: list[str] = []
        if thinks:
            completions = self.reasoner.generate(
                chats,
                seeds=[question.seed for question in questions],
                max_new_tokens=self.card.max_new_tokens,
                temperature=self.card.sampling_temperature,
            )
            traces = [parse(completion, self.card.format, lenient=self.lenient) for completion in completions]
        else:
            traces = [Trace("", None)] * len(chats)
        reasoner = p_first_at_slot(
            self.reasoner,
            self.card.format,
            chats,
            [trace.thought for trace in traces],
            who="the reasoner",
            own=[trace.slot for trace in traces],
        )
        malformed = [not trace.well_formed for trace in traces] if thinks else []
        bad = next((said for said, is_bad in zip(completions, malformed, strict=True) if is_bad), "")
        self.misfits.see(reasoner.label_mass.tolist(), malformed, bad)
        listener: list[Any] = [None] * len(chats)
        if self.listener is not None:
            asked = [question.listener_chat for question in questions if question.listener_chat is not None]
            listener = check_finite(self.listener.p_first(asked, traces), "the listener").tolist()
        said = zip(traces, reasoner.p_first.tolist(), reasoner.label_mass.tolist(), listener, strict=True)
        for question, (trace, p_reasoner, mass, p_listener) in zip(questions, said, strict=True):
            p_listener = None if p_listener is None else on_grid(p_listener)
            judgement = Judgement(question.flipped, question.number, trace, on_grid(p_reasoner), p_listener, mass)
            gathered[question.match].append(judgement)
            if question.twin:
                gathered[question.match].append(replace(judgement, flipped=True))

    def _calibration(self, mode: Mode, criterion: str | None) -> Calibration:
        """The card's calibration for this mode and criterion. Warns once if it was fitted for another of either."""
        calibration = self.card.calibration_for(mode.think, criterion)
        if not (self._told_of_mode or calibration.covers(mode)):
            self._told_of_mode = True
            warnings.warn(
                f"the judge's confidence was calibrated for {calibration.mode}; it judges with {mode}, and may be more "
                "or less sure than it should. Fit it by `listener-reward calibrate` with the options that it judges "
                "with. Said once",
                stacklevel=2,
            )
        fitted = replace(calibration, mode=None) != Calibration()
        borrowed = criterion is not None and calibration is self.card.calibration_for(mode.think)
        if fitted and borrowed and not self._told_of_criterion:
            self._told_of_criterion = True
            warnings.warn(
                f"the judge's confidence was calibrated for its general question; by {criterion!r} it may be more or "
                f"less sure than it should. Fit it by `listener-reward calibrate --criterion {criterion}`. Said once",
                stacklevel=2,
            )
        return calibration

    def _needed(self, judgements: Sequence[Judgement], mode: Mode, calibration: Calibration) -> Sequence[Judgement]:
        """The judgements that an early stop would have asked for, out of all: calibration replays early stopping this
        way."""
        if mode.early_stop is None:
            return judgements
        needed: dict[int, list[Judgement]] = {judgement.frame: [] for judgement in judgements}
        for number in range(1 + max(judgement.number for judgement in judgements)):
            done = {frame for frame, some in needed.items() if settled(some, mode, calibration)}
            for judgement in judgements:
                if judgement.number == number and judgement.frame not in done:
                    needed[judgement.frame].append(judgement)
        return [judgement for some in needed.values() for judgement in some]

    def _matches(
        self,
        pair: int,
        prompt: PromptLike,
        first: ImageLike | Clip,
        second: ImageLike | Clip,
        stills: dict[bytes, Picture],
    ) -> Iterator[_Match]:
        """The matches of one pair: one, or one for each frame. `stills` keeps the storyboards of clips."""
        fields = f"firsts[{pair}]", f"seconds[{pair}]"
        one, other = (to_visual(x, field=field) for x, field in zip((first, second), fields, strict=True))
        if not (isinstance(one, Clip) and isinstance(other, Clip)):
            for visual, field in ((one, fields[0]), (other, fields[1])):
                if isinstance(visual, Clip):
                    raise InputError(f"{field} is a clip, and the other side an image; give two of a kind")
            yield _Match(pair, 0, prompt, (one, other), (one.digest, other.digest))
        elif self.clips == "frames":
            for number, frames in enumerate(frame_by_frame(one, other, fields)):
                yield _Match(pair, number, prompt, frames, (frames[0].digest, frames[1].digest))
        else:
            sides = self._side(one, fields[0], stills), self._side(other, fields[1], stills)
            timed = self.clips == "video"  # only there are the times seen
            digests = (one.digest, other.digest) if timed else (one.looks, other.looks)
            yield _Match(pair, 0, prompt, sides, digests)

    def _side(self, clip: Clip, field: str, stills: dict[bytes, Picture]) -> Side:
        if self.clips == "clip":
            return clip.frames
        if self.clips == "storyboard":
            if clip.looks not in stills:
                stills[clip.looks] = to_still(clip)
            return stills[clip.looks]
        if len(clip.frames) < 2:
            raise InputError(f"{field} has a single frame; clips='video' needs at least 2: one frame is an image")
        return clip

    def _questions(self, place: int, match: _Match, thoughts: int) -> list[_Question]:
        """Both orders of a match, `thoughts` times each. The sequence does not depend on which side came first.

        A thought's seed is a hash of prompt and sides, and so is the choice of order with `orders="one"`. Two equal
        sides are asked in one order only: the same question in two rows of a batch may differ by rounding.
        """
        prompt, digests = match.prompt, match.digests
        name = key_of(prompt).encode("utf-8", "replace")
        twin = digests[0] == digests[1]
        orders = [(0, 1)] if twin else [(0, 1), (1, 0)] if digests[0] < digests[1] else [(1, 0), (0, 1)]
        if self.card.orders == "one" and not twin:
            key = f"{self.seed}/order/".encode() + name
            coin = hashlib.blake2b(key + b"".join(sorted(digests)), digest_size=1).digest()[0] & 1
            orders = orders[coin : coin + 1]
        questions = []
        for left, right in orders:
            placed = prompt, match.sides[left], match.sides[right]
            chat = self.card.format.chat(*placed, self.reasoner.reserved)
            listener_chat = self.listener and self.listener.chat_format.chat(*placed, self.listener.vlm.reserved)
            for number in range(thoughts):
                key = f"{self.seed}/{number}/".encode() + name
                seed = hashlib.blake2b(key + digests[left] + digests[right], digest_size=8).digest()
                questions.append(
                    _Question(place, left == 1, chat, listener_chat, number, int.from_bytes(seed, "big"), twin)
                )
        return questions


def _criterion(prompt: PromptLike) -> str | None:
    return prompt.criterion if isinstance(prompt, Prompt) else None  # what is no prompt is refused where it is asked


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The entries of `one` that are not those of `other`; of entries that are dicts, their own."""
    found: dict[str, Any] = {}
    for name, value in one.items():
        against = other.get(name)
        if value != against:
            if isinstance(value, dict) and isinstance(against, dict):
                found[name] = _differences(value, against)
            else:
                found[name] = value
    return found


def _checked(clips: ClipView) -> ClipView:
    check_choice("clips", clips, get_args(ClipView))
    return clips
