"""`serve`: a judge as a reward over HTTP."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer

from listener_reward.cli.options import Debug, JudgeName, ListenerName, NoThink, Thoughts, load_judge
from listener_reward.cli.terminal import errors_in_one_line, stderr, working


def serve(
    judge: JudgeName = None,
    listener: ListenerName = None,
    no_think: NoThink = False,
    thoughts: Thoughts = None,
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
    host: Annotated[str, typer.Option("--host", help="Address; mind that there is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8300,
    name: Annotated[str, typer.Option("--name", help="What clients call the reward.")] = "listener",
    debug: Debug = False,
) -> None:
    """Serve a judge as a reward over HTTP, as JSON, for trainers that cannot share its environment.

    `POST /compute` is what Flow-Factory's remote rewards and `RemoteReward` ask, `POST /score` what UniRL asks,
    `GET /health` what both ask first.

    `listener-reward serve --judge tiny`
    """
    with errors_in_one_line(debug):
        with working("loading the judge"):
            from listener_reward.integrations.serving.app import make_server  # pyright: ignore[reportMissingImports]
            from listener_reward.integrations.serving.collector import GroupCollector  # pyright: ignore[reportMissingImports]
            from listener_reward.reward import ListenerReward

            loaded = load_judge(judge, listener=listener, no_think=no_think, thoughts=thoughts)
            chosen: Any = "group" if group_size else scheme
            reward: Any = ListenerReward(loaded, scheme=chosen, on_failure="nan")
            server = make_server(
                GroupCollector(reward, group_size) if group_size else reward, host=host, port=port, name=name
            )
        with server:
            stderr().print(f"serving on http://{host}:{server.server_address[1]}", soft_wrap=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
