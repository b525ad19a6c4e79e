"""The options that several commands share, and the judge that they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from listener_reward.judge import Judge

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help='"tiny" (embedded, CPU, no download), a checkpoint folder, or a Hub name.',
        show_default="the paper's released checkpoint",
    ),
]
ListenerName = Annotated[
    str | None,
    typer.Option(
        "--listener", help='A listener: a folder, a Hub name, "base" or "none".', show_default="the judge's own"
    ),
]
NoThink = Annotated[bool, typer.Option("--no-think", help="Skip the reasoning: one forward pass for each order.")]
Thoughts = Annotated[
    int | None,
    typer.Option("--thoughts", metavar="K", min=1, help="Thoughts for each order.", show_default="the judge's own"),
]
AggregateName = Annotated[
    str | None,
    typer.Option(
        "--aggregate",
        help='"mean" of the thoughts, "majority" of their answers, "listener" (its mean), or "both".',
        show_default="the judge's own",
    ),
]
OrdersName = Annotated[
    str | None,
    typer.Option("--orders", help='"both", or "one" at random for half the cost.', show_default="the judge's own"),
]
EarlyStop = Annotated[
    float | None,
    typer.Option("--early-stop", metavar="P", help="No more thoughts once this sure, in (0.5, 1]; 1 changes nothing."),
]
Clips = Annotated[
    str | None,
    typer.Option(
        "--clips",
        help='How videos are looked at: "storyboard", "frames", "video" or "clip"; images do not care.',
        show_default="storyboard",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The text that the images were generated from.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class JudgeOptions(TypedDict, total=False):
    """The options that say how a judge judges, as the commands have them; None leaves it to the judge's card."""

    listener: str | None
    no_think: bool
    thoughts: int | None
    aggregate: str | None
    orders: str | None
    early_stop: float | None
    clips: str | None


def load_rater(name: str | None, **options: Unpack[JudgeOptions]) -> Any:
    """A judge of ours, or a peer, which knows of none of the options."""
    from listener_reward.peers import is_peer, load_peer

    return load_peer(name) if name and is_peer(name) else load_judge(name, **options)


def load_judge(name: str | None, **options: Unpack[JudgeOptions]) -> Judge:
    """The judge of that name, the paper's released checkpoint without one."""
    from listener_reward.judge import Judge
    from listener_reward.reward import PAPER_CHECKPOINT

    no_think = options.pop("no_think", False)
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    return Judge.from_pretrained(PAPER_CHECKPOINT if name is None else name, think=not no_think, **given)
