"""The command line: `listener-reward compare | rank | eval | demo | train`.

The answer goes to stdout and everything else to stderr, so `--json` prints one JSON object and nothing more. Exit
codes: 1 where `card` finds no format that fits, 2 for input that cannot be used, 3 for a judge that broke. Nothing
heavy is imported until a command needs it.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from listener_reward import __version__
from listener_reward.cli.anchoring import anchors
from listener_reward.cli.cards import card
from listener_reward.cli.evaluating import calibrate, check_data, evaluate_pairs
from listener_reward.cli.judging import compare, rank, rank_videos
from listener_reward.cli.planning import plan
from listener_reward.cli.scoring import score
from listener_reward.cli.serving import serve
from listener_reward.cli.studying import study
from listener_reward.cli.training import bench, demo, launch_config, merge, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look at preference data.")
app.add_typer(data_app, name="data")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A name, a thought or a bar that the terminal's encoding lacks is shown as "?", and ends no command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="listener-reward")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"listener-reward {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Judge images against a prompt, with reasons that a second model has checked.

    Start with `listener-reward demo`: it trains, evaluates and ranks on this machine, without a download.
    """


# Every command, in the order of `--help`.
app.command()(compare)
app.command()(rank)
app.command("rank-videos")(rank_videos)
app.command("eval")(evaluate_pairs)
app.command()(score)
app.command(no_args_is_help=True)(anchors)
app.command()(calibrate)
app.command(no_args_is_help=True)(card)
data_app.command("check")(check_data)
app.command(no_args_is_help=True, context_settings={"allow_extra_args": True})(plan)
app.command()(demo)
app.command(no_args_is_help=True)(study)
app.command()(bench)
app.command(
    no_args_is_help=True,
    # Parsing stops at the first value, so that every option of the training configuration reaches its own parser.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(train)
app.command(no_args_is_help=True)(merge)
app.command("launch-config", no_args_is_help=True)(launch_config)
app.command()(serve)
