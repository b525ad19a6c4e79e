"""`serve`: a judge as a reward over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from listener_reward.cli.options import Debug, JudgeName, JudgeOptions, asked, judge_options, load_judge
from listener_reward.cli.terminal import errors_in_one_line, stderr, working
from listener_reward.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

_REPLICAS = "Replicas, by Ray Serve"


@judge_options()
def serve(
    judge: JudgeName = None,
    scheme: Annotated[
        str, typer.Option("--scheme", help='"reference", "anchors", "group" or "auto"; see `ListenerReward`.')
    ] = "reference",
    criteria: Annotated[
        str | None,
        typer.Option(
            "--criteria",
            metavar="NAME=WEIGHT,...",
            help="Score by these criteria of the judge's card, the weighted sum: alignment=1,quality=0.5.",
            show_default="the general question",
        ),
    ] = None,
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
    anchors: Annotated[
        str | None,
        typer.Option(
            "--anchors",
            metavar="DIR",
            help="For --scheme anchors: a folder that `listener-reward anchors` made, or a number, to take so many out "
            "of the first group of each prompt.",
            show_default="4",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            help="File that keeps the first image seen of each prompt, or its anchors, for the next start.",
            show_default="a temporary file",
        ),
    ] = None,
    on_failure: Annotated[
        str,
        typer.Option(
            "--on-failure", help='Where the judge breaks: "nan" fails the image, "raise" the request; or "group-mean".'
        ),
    ] = "nan",
    host: Annotated[
        str, typer.Option("--host", help="Address; one that others can reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8300,
    name: Annotated[str, typer.Option("--name", help="What clients call the reward.")] = "listener",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="LISTENER_REWARD_API_KEY",
            help="What clients have to send. Set the variable: other users of the machine see a command's options.",
            show_default="none",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without an API key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help='A name of this server beside the machine\'s own; "*" for any.'
        ),
    ] = None,
    max_body: Annotated[
        int, typer.Option("--max-body", metavar="MIB", min=1, help="MiB of a request's body; more is refused.")
    ] = 256,
    max_images: Annotated[int, typer.Option("--max-images", metavar="N", min=1, help="Pictures of a request.")] = 512,
    request_pixels: Annotated[
        int,
        typer.Option(
            "--request-pixels", metavar="N", min=1, help="Pixels of a request's pictures; each takes 4 bytes."
        ),
    ] = 2**28,
    max_prompt: Annotated[
        int, typer.Option("--max-prompt", metavar="N", min=1, help="Characters of a prompt.")
    ] = 20_000,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", metavar="N", min=1, help="Requests at once; others are told to come again.")
    ] = 512,
    max_batch: Annotated[
        int, typer.Option("--max-batch", metavar="N", min=1, help="Pairs of several requests that are judged together.")
    ] = 64,
    wait: Annotated[
        float, typer.Option("--wait", metavar="MS", min=0, help="Milliseconds for more requests to come, for a batch.")
    ] = 10.0,
    drain: Annotated[
        float, typer.Option("--drain", metavar="S", min=0, help="Seconds for what is under way, at SIGTERM or Ctrl-C.")
    ] = 60.0,
    replicas: Annotated[
        str | None,
        typer.Option(
            "--replicas",
            metavar="N",
            help="Judges in processes of Ray Serve's: 4, or 1-8 for as many as the load wants.",
            show_default="one judge, in this process",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    gpus_per_replica: Annotated[
        float,
        typer.Option(
            "--gpus-per-replica", metavar="G", min=0, help="GPUs of each; 0.5 shares one.", rich_help_panel=_REPLICAS
        ),
    ] = 0.0,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help='A running cluster: "auto", or "ray://HEAD:10001".',
            show_default="starts Ray here",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    deployed: Annotated[
        str | None,
        typer.Option(
            "--deployed",
            metavar="NAME",
            help="Ask the judges of this application, which `serve deploy` has started and which stay.",
            show_default="starts replicas",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Serve a judge as a reward over HTTP, as JSON, for trainers that cannot share its environment.

    `POST /compute` is what Flow-Factory's remote rewards and `RemoteReward` ask, `POST /score` what UniRL asks,
    `GET /health` what both ask first. `POST /v1/compare` and `/v1/rank` ask the judge itself; `GET /openapi.json` has
    their types, `GET /metrics` what Prometheus reads.

    A client may say which scheme it wants; a server that answers by another one refuses the request.

    `listener-reward serve --judge tiny`
    """
    with errors_in_one_line(debug), ExitStack() as ending:
        with working("loading the judge"):
            from listener_reward.integrations.serving.server import make_server  # first: it names the extra

            # isort: split
            from listener_reward.batching import BatchingJudge
            from listener_reward.integrations.contract import as_reward
            from listener_reward.integrations.serving.auth import check_exposure
            from listener_reward.integrations.serving.collector import GroupCollector
            from listener_reward.integrations.serving.limits import Limits
            from listener_reward.references import read_references
            from listener_reward.reward import ListenerReward

            check_exposure(host, api_key, insecure)  # before the judge, which is slow
            limits = Limits(
                body=max_body * 2**20,
                images=max_images,
                pixels=request_pixels,
                prompt=max_prompt,
                waiting=max_waiting,
                connections=max_waiting + 256,
                drain_seconds=drain,
            )
            chosen: Any = "group" if group_size else scheme
            given = None if reference is None else read_references(reference)
            ready = given is not None or chosen == "group" or (anchors is not None and Path(anchors).is_dir())
            kept = "" if state is None and not ready else state
            load, at_once = partial(load_judge, judge, **how), 1
            if replicas is None and deployed is None:
                if gpus_per_replica or ray_address:
                    raise InputError(
                        "gpus_per_replica and ray_address are for replicas; give their number by --replicas"
                    )
                loaded: Any = load()
            else:
                from listener_reward.integrations.serving.replicas import Scale, attach, start

                scale = None if replicas is None else Scale.read(replicas, gpus_per_replica)
                if deployed is not None:
                    if given_here := [*(["judge"] if judge else []), *asked(how)]:
                        raise InputError(f"{given_here[0]} has no effect on judges that run; it goes into their file")
                    loaded = attach(deployed, address=ray_address, most=scale and scale.most)
                else:
                    loaded = start(load, cast(Scale, scale), address=ray_address)
                ending.enter_context(loaded)
                at_once = loaded.most
            reward: Any = ListenerReward(
                BatchingJudge(loaded, limit=max_batch, wait=wait / 1000, at_once=at_once),
                scheme=chosen,
                reference=given,
                state=kept,
                anchors=int(anchors) if anchors is not None and anchors.isdecimal() else anchors,
                on_failure=cast(Any, on_failure),
                criteria=criteria,
            )
            as_reward(reward, {}, scheme="reference")  # refuses the mean of a part of a group
            if group_size:
                reward = GroupCollector(reward, group_size, timeout=group_timeout, workers=8)
            server = make_server(
                reward,
                host=host,
                port=port,
                name=name,
                api_key=api_key,
                insecure=insecure,
                allow_hosts=allow_host or (),
                limits=limits,
            )
        with server:
            shown = f"[{host}]" if ":" in host else host
            stderr().print(f"serving on http://{shown}:{server.server_address[1]}", soft_wrap=True, markup=False)
            server.serve_forever()
