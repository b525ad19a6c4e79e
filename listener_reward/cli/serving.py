"""`serve`: a judge as a reward over HTTP."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from listener_reward.cli.options import Debug, JudgeName, JudgeOptions, judge_options, load_judge
from listener_reward.cli.terminal import errors_in_one_line, stderr, working

if TYPE_CHECKING:
    from typing_extensions import Unpack


@judge_options()
def serve(
    judge: JudgeName = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help='"reference", "group" or "auto"; see `ListenerReward`.')
    ] = "reference",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            min=2,
            help="Wait until N images of a prompt have come, in whatever requests, and compare them with one another.",
            show_default="do not wait",
        ),
    ] = None,
    group_timeout: Annotated[
        float,
        typer.Option("--group-timeout", metavar="S", min=1, help="Seconds for a group to fill, from its first image."),
    ] = 600.0,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help='JSON, {"prompt": "image.png"}: what the images of each prompt are compared with.',
            show_default="the first image seen of each prompt",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            help="File that keeps the first image seen of each prompt, for the next start.",
            show_default="a temporary file",
        ),
    ] = None,
    on_failure: Annotated[
        str,
        typer.Option(
            "--on-failure", help='Where the judge breaks: "nan" fails the image, "raise" the request; or "group-mean".'
        ),
    ] = "nan",
    host: Annotated[str, typer.Option("--host", help="Address; mind that there is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8300,
    name: Annotated[str, typer.Option("--name", help="What clients call the reward.")] = "listener",
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Serve a judge as a reward over HTTP, as JSON, for trainers that cannot share its environment.

    `POST /compute` is what Flow-Factory's remote rewards and `RemoteReward` ask, `POST /score` what UniRL asks,
    `GET /health` what both ask first.

    A client may say which scheme it wants; a server that answers by another one refuses the request.

    `listener-reward serve --judge tiny`
    """
    with errors_in_one_line(debug):
        with working("loading the judge"):
            from listener_reward.integrations.contract import as_reward
            from listener_reward.integrations.serving.app import make_server
            from listener_reward.integrations.serving.batching import Batching
            from listener_reward.integrations.serving.collector import GroupCollector
            from listener_reward.references import read_references
            from listener_reward.reward import ListenerReward

            chosen: Any = "group" if group_size else scheme
            given = None if reference is None else read_references(reference)  # before the judge, which is slow
            kept = "" if state is None and given is None and chosen != "group" else state
            loaded = load_judge(judge, **how)
            reward: Any = ListenerReward(
                loaded, scheme=chosen, reference=given, state=kept, on_failure=cast(Any, on_failure)
            )
            as_reward(reward, {}, scheme="reference")  # refuses the mean of a part of a group
            if group_size:
                reward = GroupCollector(reward, group_size, timeout=group_timeout)
            elif chosen == "reference":
                reward = Batching(reward)
            server = make_server(
                reward,
                host=host,
                port=port,
                name=name,
            )
        with server:
            shown = f"[{host}]" if ":" in host else host
            stderr().print(f"serving on http://{shown}:{server.server_address[1]}", soft_wrap=True, markup=False)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
