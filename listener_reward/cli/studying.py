"""`study`: experiments that are planned beforehand, run once, and shown whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from listener_reward.cli.options import Debug
from listener_reward.cli.terminal import errors_in_one_line, print_error, quieten, stderr
from listener_reward.errors import missing


def study(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The study's plan.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs.", show_default="the plan's name without suffix")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="An arm, or a question's beginning; repeatable.")
    ] = None,
    at_once: Annotated[int, typer.Option("--at-once", metavar="N", min=1, help="Jobs side by side.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and what is there; run nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Only make tables and figures of what is there.")] = False,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ARM", help="Compare with this arm.", show_default="as the plan says"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a planned study: judges trained in several ways, from seeds that are named beforehand, and measured.

    `listener-reward study --config study.yaml --dry-run`

    ```yaml
    # study.yaml
    title: Does the listener make a better judge?
    planned_at: 2026-11-28
    recipe: {steps: 160}     # shared by all arms; the fields of recipes.variants.Recipe
    arms:
      accuracy-only GRPO: {weights: [1, 1, 0]}
      listener-shaped GRPO: {weights: [1, 0.5, 0.5]}
      Bradley-Terry: {method: bradley-terry}
    measurements:
      splits: {kind: splits, splits: [id, ood, wrong], pairs: 300}
    planned:
      - question: Which way to train gives the best judge?
        arms: [accuracy-only GRPO, listener-shaped GRPO, Bradley-Terry]
        measurements: [splits]
        seeds: [0, 1, 2, 3, 4]
        against: accuracy-only GRPO
    added: []                # the same, with added_at and reason, after results were seen
    ```

    Each run is one JSON file in `runs/` and is never made twice: stop the command whenever you like, and give it again
    to go on. `tables.md` and a figure for each question are made of what is there, and say how much of the plan that
    is. Jobs run side by side, one thread each; on a machine with several GPUs each job has one: `--at-once 8`.
    docs/evidence.md has the study of this package, and how to run its plan on your own checkpoint and votes.
    """
    with errors_in_one_line(debug):
        quieten()
        from listener_reward.recipes.study.conduct import conduct, due
        from listener_reward.recipes.study.plans import compared_with, read_study
        from listener_reward.recipes.study.results import counted
        from listener_reward.recipes.study.runs import finished
        from listener_reward.recipes.study.show import write_results
        from listener_reward.recipes.workers import JobsFailedError

        planned = read_study(config)
        if against is not None:
            planned = compared_with(planned, against)
        folder = config.with_suffix("") if out is None else out
        console = stderr()
        if dry_run:
            waiting = due(planned, folder, only or ())
            for run in {run.key: run for run in planned.runs()}.values():
                state = "to do" if run.key in waiting else "left out" if run.key not in finished(folder) else "there"
                print(f"{state:9} {run.key}  {run.measured.kind:9} {run.label}, seed {run.seed}")
            print(counted(planned, finished(folder)))
            return
        failed: JobsFailedError | None = None
        if not table:
            try:
                conduct(planned, folder, only=only or (), at_once=at_once, console=console)
            except JobsFailedError as error:
                failed = error
        found = finished(folder)
        for path in write_results(planned, found, folder):
            console.print(f"Written: {path}")
        if fault := missing("plot", "drawing"):
            console.print(f"No figures: {fault}", markup=False)
        print(counted(planned, found))
        if failed is not None:
            print_error(failed)
            raise typer.Exit(1)
