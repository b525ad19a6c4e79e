"""The options that several commands share, and the judge that they describe."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar, cast, get_type_hints

import typer

from listener_reward.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from listener_reward.judge import Judge

_F = TypeVar("_F", bound=Callable[..., None])

_JUDGE, _MODEL = "The judge", "Model, memory and speed"


def _judge(*names: str, default: str | bool = "the judge's own", **more: Any) -> Any:
    """An option of how a judge judges, and what it is where it is not given."""
    return typer.Option(*names, rich_help_panel=_JUDGE, show_default=default, **more)


def _model(*names: str, default: str | bool = False, **more: Any) -> Any:
    """An option of where and how its models run."""
    return typer.Option(*names, rich_help_panel=_MODEL, show_default=default, **more)


JudgeName = Annotated[
    str | None,
    _judge(
        "--judge",
        help='"tiny" (embedded, CPU, no download), a checkpoint folder, or a Hub name.',
        default="the paper's released checkpoint",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The text that the images were generated from.")]
Criterion = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help='Judge by this alone: "alignment", or another criterion of the judge\'s card.',
        show_default="the general question",
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="FILE",
        help="An image that the prompt speaks of: an edit's original, a reference subject, a first frame. Repeatable.",
        show_default="none",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class JudgeOptions(TypedDict, total=False):
    """The options of every command that loads a judge, in the order of `--help`.

    The names are those of `Judge.from_pretrained` and of `ModelOptions`. None leaves an option to the judge's card, or
    to its default.
    """

    listener: Annotated[str | None, _judge("--listener", help='A listener: a folder, a Hub name, "base" or "none".')]
    card: Annotated[
        Path | None,
        _judge(
            "--card",
            metavar="FILE",
            help="A card in place of the checkpoint's own: how it is asked and what it answers. `listener-reward card` "
            "finds one.",
        ),
    ]
    no_think: Annotated[
        bool, _judge("--no-think", help="Skip the reasoning: one forward pass for each order.", default=False)
    ]
    thoughts: Annotated[int | None, _judge("--thoughts", metavar="K", min=1, help="Thoughts for each order.")]
    aggregate: Annotated[
        str | None,
        _judge(
            "--aggregate", help='"mean" of the thoughts, "majority" of their answers, "listener" (its mean), or "both".'
        ),
    ]
    orders: Annotated[str | None, _judge("--orders", help='"both", or "one" at random for half the cost.')]
    early_stop: Annotated[
        float | None,
        _judge("--early-stop", metavar="P", help="No more thoughts once this sure, in (0.5, 1]; 1 changes nothing."),
    ]
    max_new_tokens: Annotated[
        int | None, _judge("--max-new-tokens", metavar="N", min=1, help="The longest completion; a longer one is cut.")
    ]
    sampling_temperature: Annotated[
        float | None,
        _judge("--sampling-temperature", metavar="T", min=0, help="Of the thoughts; 0 takes the likeliest token."),
    ]
    masking: Annotated[
        str | None,
        _judge(
            "--masking",
            help='What the listener does not read: "answer", or "verdict" for sentences that say which is better too.',
        ),
    ]
    clips: Annotated[
        str | None,
        _judge(
            "--clips",
            help='How videos are looked at: "storyboard", "frames", "video" or "clip"; images do not care.',
            default="storyboard",
        ),
    ]
    strict: Annotated[
        bool,
        _judge("--strict", help="Fail where the answers are in another format, in place of a warning.", default=False),
    ]
    lenient: Annotated[
        bool,
        _judge(
            "--lenient",
            help="Count answers such as `**1**` or `Image 1`, of a model never trained as a judge.",
            default=False,
        ),
    ]

    backend: Annotated[
        str | None,
        _model(
            "--backend",
            help='Who runs the weights: "vllm", or the address of a server of them, [MODEL@]http://host:port/v1.',
            default="transformers",
        ),
    ]
    engine: Annotated[
        str | None,
        _model("--engine", metavar="JSON", help='More for vLLM\'s engine, such as {"tensor_parallel_size": 2}.'),
    ]
    accept_less: Annotated[
        bool, _model("--accept-less", help="Take a server without log-probabilities, and say what that costs.")
    ]
    device: Annotated[str | None, _model("--device", help='"cuda:1", "cpu".', default="this process's GPU, or the CPU")]
    device_map: Annotated[
        str | None,
        _model(
            "--device-map",
            help='Layers over several GPUs: "auto", "balanced", or JSON, {"part": device}. Without a shared prefix.',
        ),
    ]
    dtype: Annotated[
        str | None,
        _model("--dtype", help='Of the weights, or "auto".', default="bfloat16 on a GPU, float32 on a CPU"),
    ]
    quantization: Annotated[
        str | None,
        _model("--quantization", help='"4bit" or "8bit": a quarter or half of bfloat16\'s memory, at some accuracy.'),
    ]
    attn_implementation: Annotated[
        str | None,
        _model(
            "--attn-implementation",
            help='"flash_attention_2", "eager"; all but "sdpa" do without a shared prefix.',
            default="sdpa",
        ),
    ]
    revision: Annotated[
        str | None, _model("--revision", help="Branch, tag or commit of the judge on the Hub.", default="main")
    ]
    max_pixels: Annotated[
        int | None,
        _model(
            "--max-pixels",
            metavar="N",
            min=1,
            help="Scale larger pictures down to N pixels: fewer tokens, less memory, finer detail lost.",
            default="the checkpoint's own",
        ),
    ]
    batch_size: Annotated[
        int | None,
        _model("--batch-size", metavar="N", min=1, help="Thoughts sampled or read together.", default="32"),
    ]
    token_budget: Annotated[
        int | None,
        _model("--token-budget", metavar="N", min=1, help="Most tokens in one forward pass.", default="16384"),
    ]
    memory: Annotated[
        str | None,
        _model(
            "--memory",
            metavar="SIZE",
            help="What a batch may take beside the weights, as 8GB; batches are made smaller to fit.",
            default="4GiB",
        ),
    ]
    vision_bytes: Annotated[
        int | None,
        _model(
            "--vision-bytes",
            metavar="N",
            min=0,
            help="Bytes of images' features to keep from batch to batch.",
            default="512 MiB",
        ),
    ]
    no_shared_prefix: Annotated[
        bool, _model("--no-shared-prefix", help="Run every chat for itself, as plain transformers does.")
    ]
    listener_option: Annotated[
        list[str] | None,
        _model(
            "--listener-option",
            metavar="NAME=VALUE",
            help="One of these for the listener alone: quantization=4bit, device=cuda:1, max-pixels=none for its own. "
            "Several times for several.",
            default="as the judge",
        ),
    ]


def judge_options(*, leave_out: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Lists the `JudgeOptions` in the signature of a command, which takes them as `**how: Unpack[JudgeOptions]`.

    typer makes its options of what stands there.
    """
    hints = get_type_hints(JudgeOptions, include_extras=True)
    options = {name: kind for name, kind in hints.items() if name not in leave_out}

    def decorate(command: _F) -> _F:
        signature = inspect.signature(command)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        command.__annotations__ = {name: command.__annotations__[name] for name in (*(p.name for p in own), "return")}
        hints = get_type_hints(command, include_extras=True)
        known = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
        listed = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(kind), annotation=kind)
            for name, kind in options.items()
        ]
        cast("Any", command).__signature__ = signature.replace(parameters=[*known, *listed])
        command.__annotations__ |= options
        return command

    return decorate


def _default(kind: Any) -> bool | None:
    return False if kind.__origin__ is bool else None


def load_rater(name: str | None, **options: Unpack[JudgeOptions]) -> Any:
    """A judge of ours, or a peer, which knows of none of the options."""
    from listener_reward.peers import is_peer, load_peer

    return load_peer(name) if name and is_peer(name) else load_judge(name, **options)


def check_taken(names: Sequence[str | None], options: JudgeOptions) -> None:
    """Refuses options where nobody takes them: each of `names` is a peer, or there are none.

    Raises:
        InputError: names the options.
    """
    from listener_reward.peers import is_peer

    given = [f"--{name.replace('_', '-')}" for name in asked(options)]
    if given and all(name is not None and is_peer(name) for name in names):
        who = f"{', '.join(map(str, names))} takes no options" if names else "no judge is asked"
        raise InputError(f"{', '.join(given)}: options of a judge of this package, and {who}; leave them out")


def load_judge(name: str | None, **options: Unpack[JudgeOptions]) -> Judge:
    """The judge of that name, the paper's released checkpoint without one."""
    from listener_reward.judge import Judge
    from listener_reward.reward import PAPER_CHECKPOINT

    given: dict[str, Any] = asked(options)
    think = not given.pop("no_think", False)
    if given.pop("no_shared_prefix", False):
        given["shared_prefix"] = False
    if "device_map" in given:
        given["device_map"] = _device_map(given["device_map"])
    if "engine" in given:
        given["engine"] = _engine(given["engine"])
    if "listener_option" in given:
        given["listener_options"] = dict(map(_named_value, given.pop("listener_option")))
    return Judge.from_pretrained(PAPER_CHECKPOINT if name is None else name, think=think, **given)


def asked(options: JudgeOptions) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


_WHERE = (
    *("backend", "engine", "device", "device_map"),
    *("batch_size", "token_budget", "memory", "vision_bytes", "no_shared_prefix"),
)
"""Options of where and how fast a judge runs; they move a verdict by rounding at the most."""


def making_verdicts(options: JudgeOptions) -> dict[str, Any]:
    """The options that were given and that verdicts depend on, as JSON has them."""
    given = {name: value for name, value in asked(options).items() if name not in _WHERE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _device_map(value: str) -> Any:
    if not value.lstrip().startswith("{"):
        return value
    return read_json("device-map", value, """give "auto", "balanced", or JSON such as {"": 0}""")


def _engine(value: str) -> Any:
    return read_json("engine", value, """give JSON such as {"tensor_parallel_size": 2}""")


def read_json(option: str, value: str, fix: str) -> Any:
    """The JSON that an option is given as.

    Raises:
        InputError: it is none; `fix` says what to give.
    """
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"{option} is {value!r}, which is no JSON ({error}); {fix}") from error


def _named_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of a model's option, as Python has it."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise InputError(f"listener-option is {text!r}; give NAME=VALUE, such as quantization=4bit")
    if name == "max_pixels" and value == "none":
        return name, None
    if name in ("batch_size", "token_budget", "max_pixels", "vision_bytes"):
        try:
            return name, int(value)
        except ValueError as error:
            raise InputError(f"listener-option is {text!r}; {name} is a whole number") from error
    if name == "engine":
        return name, _engine(value)
    if name in ("shared_prefix", "accept_less"):
        if value.lower() not in ("true", "false"):
            raise InputError(f"listener-option is {text!r}; {name} is true or false")
        return name, value.lower() == "true"
    return name, _device_map(value) if name == "device_map" else value
