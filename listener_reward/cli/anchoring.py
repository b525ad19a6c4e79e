"""`anchors`: the images that a training run's scores are measured against, drawn before it begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from listener_reward.cli.options import AsJson, Debug, JudgeName, JudgeOptions, judge_options, load_judge, read_json
from listener_reward.cli.printing import print_anchors, print_json
from listener_reward.cli.terminal import errors_in_one_line, stopped_softly, working
from listener_reward.errors import InputError, JudgeError, missing
from listener_reward.files import quoted

if TYPE_CHECKING:
    from typing_extensions import Unpack


@judge_options()
def anchors(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to fill; a later run goes on in it.")],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="The prompts of the run to come, one a line.")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="NAME",
            help='What draws the samples: a diffusers pipeline\'s folder or Hub name, or "tiny" (embedded).',
            show_default="needs --images",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FILE.json",
            help='Samples that are there already, {"prompt": ["a.png", ...], ...}, in place of --pipeline.',
            show_default="draws them",
        ),
    ] = None,
    judge: JudgeName = None,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="Anchors of each prompt.")] = 4,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="M",
            min=2,
            help="Samples to draw of each prompt, of which N are kept, spread over their quality.",
            show_default="twice N",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The first of M seeds, the same for each prompt.")] = 0,
    call: Annotated[
        str | None,
        typer.Option(
            "--call",
            metavar="JSON",
            help='Arguments of the pipeline\'s call: {"num_inference_steps": 20}; take those of the training run.',
            show_default="the pipeline's own",
        ),
    ] = None,
    draw_at_once: Annotated[
        int, typer.Option("--draw-at-once", metavar="N", min=1, help="Samples that are drawn together.")
    ] = 4,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Draw anchors for a training run: a few images of each prompt, with scores that stay.

    `listener-reward anchors --prompts prompts.txt --pipeline tiny --judge tiny --out anchors -n 4`

    Of each prompt the pipeline, the model before training, draws M samples. The judge compares them with one another,
    and N of them, from bad to good, become anchors. The folder has their pictures, and in `anchors.jsonl` their scores,
    which are of this judge alone. Then, in the training run:

    `ListenerReward("tiny", scheme="anchors", anchors="anchors")`, or `listener-reward serve --scheme anchors --anchors
    anchors`

    The score of an image is its log-odds against the anchors of its prompt, on one scale from the first epoch to the
    last. Stopped by whatever, the same line goes on where it was, and with more prompts in the file it adds those.
    """
    with errors_in_one_line(debug), stopped_softly():
        with working("loading", spinner=False):
            from listener_reward.anchor_sets import fill_folder, read_images
            from listener_reward.anchors import Anchors
            from listener_reward.progress import progress_bars

            if (pipeline is None) == (images is None):
                raise InputError("give --pipeline to draw samples, or --images for those that are there")
            given = None if images is None else read_images(images)
            if given is None and prompts is None:
                raise InputError("prompts is missing; give --prompts, a file with one prompt a line")
            wanted = list(given or ()) if prompts is None else _read_prompts(prompts)
            draw_count = 2 * count if samples is None else samples
            if draw_count < count:
                raise InputError(f"samples is {draw_count}, and {count} of them are to be kept; draw at least as many")
            if given is not None:
                images_of: Callable[[str], Sequence[Any]] = _among(given, wanted)
            else:
                images_of = _drawn(str(pipeline), call, range(seed, seed + draw_count), draw_at_once)
            loaded = load_judge(judge, **how)
            made, failed = 0, {}
            with progress_bars(visible=sys.stderr.isatty()) as bars:
                filling = fill_folder(out, wanted, images_of, loaded, count)
                for prompt, found in bars.track(filling, total=len(wanted), description="anchors"):
                    made += isinstance(found, Anchors)
                    if isinstance(found, JudgeError):
                        failed[prompt] = str(found)
        answer = {
            "folder": str(out),
            "prompts": len(wanted) - len(failed),
            "made": made,
            "failed": failed,
            "judge": loaded.identity,
        }
        if as_json:
            print_json(answer)
        else:
            print_anchors(answer)
        if failed:
            raise JudgeError(
                f"{len(failed)} prompts have no anchors, such as {next(iter(failed))!r}: {next(iter(failed.values()))}"
            )


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts {quoted(path)} cannot be read ({error}); give a text file, one prompt a line"
        ) from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise InputError(f"prompts {quoted(path)} has no prompt; write one a line")
    return found


def _among(given: Mapping[str, Sequence[Path]], wanted: Sequence[str]) -> Callable[[str], Sequence[Path]]:
    if absent := [prompt for prompt in wanted if prompt not in given]:
        raise InputError(f"images has none for {len(absent)} of the prompts, such as {absent[0]!r}; add some")
    return lambda prompt: given[prompt]


def _drawn(name: str, call: str | None, seeds: Sequence[int], at_once: int) -> Callable[[str], Sequence[Any]]:
    """Samples of a prompt by the pipeline of that name, which is loaded here."""
    chosen = {} if call is None else read_json("call", call, 'give JSON such as {"num_inference_steps": 20}')
    if not isinstance(chosen, dict):
        raise InputError(f'call is {call!r}; give a JSON object such as {{"num_inference_steps": 20}}')
    if fault := missing("diffusers", "a pipeline that draws samples"):
        raise fault
    from diffusers.utils import logging

    from listener_reward.integrations.best_of_n import samples

    logging.disable_progress_bar()  # of the pipeline's parts, in the midst of ours
    if name == "tiny":
        from listener_reward.tiny.diffusion import CALL, load_pipeline

        pipeline, chosen = load_pipeline(), CALL | chosen
    else:
        pipeline = _load_pipeline(name)
    return lambda prompt: samples(pipeline, prompt, seeds, at_once, chosen)


def _load_pipeline(name: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from listener_reward.models.hub import loading
    from listener_reward.models.transformers_vlm import default_device

    device = default_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with loading(name):
        pipeline: Any = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
