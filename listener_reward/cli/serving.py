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

_Scheme = Annotated[
    str, typer.Option("--scheme", help='"reference", "anchors", "group" or "auto"; see `ListenerReward`.')
]
_Criteria = Annotated[
    str | None,
    typer.Option(
        "--criteria",
        metavar="NAME=WEIGHT,...",
        help="Score by these criteria of the judge's card, the weighted sum: alignment=1,quality=0.5.",
        show_default="the general question",
    ),
]
_GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        min=2,
        help="Wait until N images of a prompt have come, in whatever requests, and compare them with one another.",
        show_default="do not wait",
    ),
]
_GroupTimeout = Annotated[
    float,
    typer.Option("--group-timeout", metavar="S", min=1, help="Seconds for a group to fill, from its first image."),
]
_GroupClients = Annotated[
    int | None,
    typer.Option(
        "--group-clients",
        metavar="N",
        min=1,
        help="Requests that the host sends at once, over all its processes. Where so many wait for their groups, "
        "nobody is left who could fill them, and they fail at once.",
        show_default="wait for --group-timeout",
    ),
]
_Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        help='JSON, {"prompt": "image.png"}: what the images of each prompt are compared with.',
        show_default="the first image seen of each prompt",
    ),
]
_Anchors = Annotated[
    str | None,
    typer.Option(
        "--anchors",
        metavar="DIR",
        help="For --scheme anchors: a folder that `listener-reward anchors` made, or a number, to take so many out "
        "of the first group of each prompt.",
        show_default="4",
    ),
]
_State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="File that keeps the first image seen of each prompt, or its anchors, for the next start.",
        show_default="a temporary file",
    ),
]
_OnFailure = Annotated[
    str,
    typer.Option(
        "--on-failure", help='Where the judge breaks: "nan" fails the image, "raise" the request; or "group-mean".'
    ),
]
_Host = Annotated[str, typer.Option("--host", help="Address; one that others can reach needs an API key.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
_Name = Annotated[str, typer.Option("--name", help="What clients call the reward.")]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="LISTENER_REWARD_API_KEY",
        help="What clients have to send. Set the variable: other users of the machine see a command's options.",
        show_default="none",
    ),
]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without an API key.")]
_AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="NAME", help='A name of this server beside the machine\'s own; "*" for any.'),
]
_MaxBody = Annotated[
    int, typer.Option("--max-body", metavar="MIB", min=1, help="MiB of a request's body; more is refused.")
]
_MaxImages = Annotated[int, typer.Option("--max-images", metavar="N", min=1, help="Pictures of a request.")]
_RequestPixels = Annotated[
    int,
    typer.Option("--request-pixels", metavar="N", min=1, help="Pixels of a request's pictures; each takes 4 bytes."),
]
_MaxPrompt = Annotated[int, typer.Option("--max-prompt", metavar="N", min=1, help="Characters of a prompt.")]
_MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", metavar="N", min=1, help="Requests at once; others are told to come again.")
]
_MaxBatch = Annotated[
    int, typer.Option("--max-batch", metavar="N", min=1, help="Pairs of several requests that are judged together.")
]
_Wait = Annotated[
    float, typer.Option("--wait", metavar="MS", min=0, help="Milliseconds for more requests to come, for a batch.")
]
_Drain = Annotated[
    float, typer.Option("--drain", metavar="S", min=0, help="Seconds for what is under way, at SIGTERM or Ctrl-C.")
]
_Replicas = Annotated[
    str | None,
    typer.Option(
        "--replicas",
        metavar="N",
        help="Judges in processes of Ray Serve's: 4, or 1-8 for as many as the load wants.",
        show_default="one judge, in this process",
        rich_help_panel=_REPLICAS,
    ),
]
_GpusPerReplica = Annotated[
    float,
    typer.Option(
        "--gpus-per-replica", metavar="G", min=0, help="GPUs of each; 0.5 shares one.", rich_help_panel=_REPLICAS
    ),
]
_RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help='A running cluster: "auto", or "ray://HEAD:10001".',
        show_default="starts Ray here",
        rich_help_panel=_REPLICAS,
    ),
]
_Deployed = Annotated[
    str | None,
    typer.Option(
        "--deployed",
        metavar="NAME",
        help="Ask the judges of this application, which `serve deploy` has started and which stay.",
        show_default="starts replicas",
        rich_help_panel=_REPLICAS,
    ),
]


@judge_options()
def serve(
    judge: JudgeName = None,
    scheme: _Scheme = "reference",
    criteria: _Criteria = None,
    group_size: _GroupSize = None,
    group_timeout: _GroupTimeout = 600.0,
    group_clients: _GroupClients = None,
    reference: _Reference = None,
    anchors: _Anchors = None,
    state: _State = None,
    on_failure: _OnFailure = "nan",
    host: _Host = "127.0.0.1",
    port: _Port = 8300,
    name: _Name = "listener",
    api_key: _ApiKey = None,
    insecure: _Insecure = False,
    allow_host: _AllowHost = None,
    max_body: _MaxBody = 256,
    max_images: _MaxImages = 512,
    request_pixels: _RequestPixels = 2**28,
    max_prompt: _MaxPrompt = 20_000,
    max_waiting: _MaxWaiting = 512,
    max_batch: _MaxBatch = 64,
    wait: _Wait = 10.0,
    drain: _Drain = 60.0,
    replicas: _Replicas = None,
    gpus_per_replica: _GpusPerReplica = 0.0,
    ray_address: _RayAddress = None,
    deployed: _Deployed = None,
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
            from listener_reward.integrations.serving.auth import check_exposure
            from listener_reward.integrations.serving.limits import Limits

            check_exposure(host, api_key, insecure)  # before the judge, which is slow
            if group_clients and not group_size:
                raise InputError("group_clients is for groups that come in several requests; give --group-size as well")
            limits = Limits(
                body=max_body * 2**20,
                images=max_images,
                pixels=request_pixels,
                prompt=max_prompt,
                waiting=max_waiting,
                connections=max_waiting + 256,
                drain_seconds=drain,
            )
            yardstick = _yardstick("group" if group_size else scheme, reference, anchors, state)
            if replicas is None and deployed is None:
                if gpus_per_replica or ray_address:
                    raise InputError(
                        "gpus_per_replica and ray_address are for replicas; give their number by --replicas"
                    )
                loaded, at_once = load_judge(judge, **how), 1
            else:
                loaded = ending.enter_context(_replicas(judge, how, replicas, gpus_per_replica, ray_address, deployed))
                at_once = loaded.most
            batching = {"limit": max_batch, "wait": wait / 1000, "at_once": at_once}
            reward = _reward(loaded, batching, **yardstick, on_failure=on_failure, criteria=criteria)
            server = make_server(
                _collected(reward, group_size, group_timeout, group_clients) if group_size else reward,
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


def _yardstick(scheme: str, reference: Path | None, anchors: str | None, state: Path | None) -> dict[str, Any]:
    """What images are compared with, as options of `ListenerReward`."""
    from listener_reward.references import read_references

    given = None if reference is None else read_references(reference)
    ready = given is not None or scheme == "group" or (anchors is not None and Path(anchors).is_dir())
    return {
        "scheme": scheme,
        "reference": given,
        "anchors": int(anchors) if anchors is not None and anchors.isdecimal() else anchors,
        "state": "" if state is None and not ready else state,
    }


def _replicas(
    judge: str | None, how: JudgeOptions, replicas: str | None, gpus: float, address: str | None, deployed: str | None
) -> Any:
    """Judges that Ray Serve runs, in a context: those of an application, or as many as are asked for."""
    from listener_reward.integrations.serving.replicas import Scale, attach, start

    scale = None if replicas is None else Scale.read(replicas, gpus)
    if deployed is None:
        return start(partial(load_judge, judge, **how), cast(Scale, scale), address=address)
    if given_here := [*(["judge"] if judge else []), *asked(how)]:
        raise InputError(f"{given_here[0]} has no effect on judges that run; it goes into their file")
    return attach(deployed, address=address, most=scale and scale.most)


def _reward(judge: Any, batching: dict[str, Any], **options: Any) -> Any:
    """The reward of a judge whose pairs come from many requests."""
    from listener_reward.batching import BatchingJudge
    from listener_reward.integrations.contract import as_reward
    from listener_reward.reward import ListenerReward

    reward = ListenerReward(BatchingJudge(judge, **batching), **options)
    as_reward(reward, {}, scheme="reference")  # refuses the mean of a part of a group
    return reward


def _collected(reward: Any, group_size: int, timeout: float, clients: int | None) -> Any:
    """The reward, for images of a group that come in any pieces."""
    from listener_reward.integrations.serving.collector import GroupCollector

    return GroupCollector(reward, group_size, timeout=timeout, clients=clients, workers=8)
