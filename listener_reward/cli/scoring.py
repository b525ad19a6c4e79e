"""`score`: a judge's verdicts on any number of pairs, as a file."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from listener_reward import __version__
from listener_reward.cli.options import (
    AsJson,
    Debug,
    JudgeName,
    JudgeOptions,
    check_taken,
    judge_options,
    load_rater,
    making_verdicts,
)
from listener_reward.cli.printing import print_json, print_scored
from listener_reward.cli.terminal import errors_in_one_line, stopped_softly, working
from listener_reward.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack


@judge_options()
def score(
    data: Annotated[
        str, typer.Option("--data", help="Pairs as `eval --data` takes them; a file of your own needs no labels.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.parquet", help="What to write.")],
    judge: JudgeName = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Score the first N pairs.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Score every N-th pair from the I-th on, counted from 0, into FILE-0000I-of-0000N.parquet: one line "
            "for each job of an array.",
        ),
    ] = None,
    pairs_at_once: Annotated[
        int, typer.Option("--pairs-at-once", metavar="N", min=1, help="Pairs for each call of the judge.")
    ] = 64,
    max_failed: Annotated[
        float,
        typer.Option("--max-failed", metavar="SHARE", min=0, max=1, help="Stop above this share without a verdict."),
    ] = 0.2,
    ray: Annotated[
        int | None,
        typer.Option("--ray", metavar="N", min=1, help="Score in N workers of Ray's, on this machine or a cluster."),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option("--gpus-per-worker", metavar="G", min=0, help="With --ray: GPUs of each, 0.5 shares one.")
    ] = 0.0,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help='With --ray: a running cluster, "auto" or "ray://HEAD:10001".',
            show_default="starts Ray here",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run of this file left.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seeds the tiny world's pairs.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
    **how: Unpack[JudgeOptions],
) -> None:
    """Score pairs in bulk: a row a pair, in a Parquet file.

    `listener-reward score --judge tiny --data pairs.jsonl --out scores.parquet`

    Stopped by whatever, the same line goes on where it was: no pair is judged twice, and none is left out. After the
    last pair it does nothing. Images are first and second as the data has them; `eval --scores scores.parquet`
    measures the file.

    On many machines, with the array's number from the scheduler:

    `listener-reward score --data pairs.jsonl --out scores.parquet --shard $SLURM_ARRAY_TASK_ID/16`
    """
    with errors_in_one_line(debug), stopped_softly():
        with working("loading the judge", spinner=False):
            part = _shard(shard)
            check_taken([judge], how)
            from listener_reward.reward import PAPER_CHECKPOINT
            from listener_reward.scoring import Cluster, score_pairs

            if ray is None and (gpus_per_worker or ray_address):
                raise InputError("gpus_per_worker and ray_address are for Ray's workers; give their number by --ray")
            load = partial(load_rater, judge, **how)

            scored = score_pairs(
                load,
                data,
                out,
                settings=making_verdicts(how)
                | {"judge": PAPER_CHECKPOINT if judge is None else judge, "version": __version__},
                limit=limit,
                seed=seed,
                shard=part,
                batch_size=pairs_at_once,
                max_failed=max_failed,
                fresh=fresh,
                cluster=None if ray is None else Cluster(ray, gpus_per_worker, ray_address),
                progress=sys.stderr.isatty(),
            )
        if as_json:
            print_json(scored.to_dict())
        else:
            print_scored(scored)


def _shard(given: str | None) -> tuple[int, int]:
    if given is None:
        return 0, 1
    if not (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", given)):
        raise InputError(f"shard is {given!r}; give i/n, such as 0/16 for the first of sixteen")
    return int(found[1]), int(found[2])
