"""`compare`, `rank` and `rank-videos`: a judge's answers on a few files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from listener_reward.cli.options import (
    AsJson,
    Criterion,
    Debug,
    JudgeName,
    JudgeOptions,
    Prompt,
    Sources,
    judge_options,
    load_judge,
)
from listener_reward.cli.printing import print_json, print_ranking, print_verdict
from listener_reward.cli.terminal import errors_in_one_line, working
from listener_reward.misfits import check_format

if TYPE_CHECKING:
    from typing_extensions import Unpack


@judge_options()
def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="The first image or video file.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The second image or video file.")],
    prompt: Prompt,
    source: Sources = None,
    criterion: Criterion = None,
    judge: JudgeName = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Say which of two images people would prefer, and why.

    `listener-reward compare --judge tiny --prompt "two red circles" a.png b.png`

    Two edits: `listener-reward compare --prompt "make the hat red" --source original.png a.png b.png`
    """
    with errors_in_one_line(debug):
        with working("judging"):
            from listener_reward.pairs import prompt_with

            asked = prompt_with(prompt, source, criterion)  # before the judge, which takes longer to load
            loaded = load_judge(judge, **how)
            verdict = loaded.compare(asked, first, second)
            check_format(loaded)
        if as_json:
            print_json(verdict.to_dict())
        else:
            print_verdict(verdict, first, second)


@judge_options()
def rank(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="The image files to order.")],
    prompt: Prompt,
    source: Sources = None,
    criterion: Criterion = None,
    judge: JudgeName = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            metavar="N",
            min=1,
            help="Make N comparisons, chosen as it goes; a quarter of all pairs is usually enough.",
            show_default="every pair",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Order images from best to worst, by comparing pairs of them.

    Scores are log-odds with mean zero: an image one above another is preferred 73 times in 100. In `--json`, `order`
    holds positions and `files` names, both best first; `scores` and `standard_errors` keep the order of the arguments.

    `listener-reward rank --judge tiny --prompt "two red circles" *.png`
    """
    with errors_in_one_line(debug):
        with working("judging"):
            from listener_reward.pairs import prompt_with

            asked = prompt_with(prompt, source, criterion)
            loaded = load_judge(judge, **how)
            ranking = loaded.rank(asked, images, budget=budget)
            check_format(loaded)
        if as_json:
            print_json(ranking.to_dict() | {"files": [images[place] for place in ranking.order]})
        else:
            print_ranking(ranking, images)


@judge_options(leave_out=["clips"])  # which `strategy` says
def rank_videos(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="The video files: mp4, webm, mov, mkv, gif.")],
    prompt: Prompt,
    source: Sources = None,
    criterion: Criterion = None,
    judge: JudgeName = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help='"storyboard": a grid of frames as one image. "frames": frame against frame, averaged. "video": the '
            'model\'s own video input, with times. "clip": all frames of a side as images.',
        ),
    ] = "storyboard",
    frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, help="Frames to look at in each video.")] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            help="Look at this many frames per second from the start, the same moments in each video.",
            show_default="frames spread evenly over the video",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", help="The videos' frames per second.", show_default="the files' own")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Order videos from best to worst, by comparing every pair of them.

    Scores and `--json` are those of `rank`. Files other than gif need PyAV: `pip install "listener-reward[video]"`.

    `listener-reward rank-videos --judge tiny --strategy frames --prompt "two red circles" *.mp4`
    """
    with errors_in_one_line(debug):
        with working("judging"):
            from listener_reward.integrations.video import rank_videos
            from listener_reward.pairs import prompt_with

            asked = prompt_with(prompt, source, criterion)
            loaded = load_judge(judge, **how)
            chosen: Any = strategy
            ranking = rank_videos(loaded, asked, videos, strategy=chosen, frames=frames, fps=fps, rate=rate)
            check_format(loaded)
        if as_json:
            print_json(ranking.to_dict() | {"files": [videos[place] for place in ranking.order]})
        else:
            print_ranking(ranking, videos, "video")
