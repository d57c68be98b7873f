"""The command line's entry: subcommands, exit codes and errors.

Exit codes: 0 done; 1 a run or check failed; 2 wrong usage; 3 a promotion gate refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from posttrain.core import GateRefused, PosttrainError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors raised on purpose are printed without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if words[:1] == ["run"]:  # a recipe's options are its own: they are parsed when the recipe is known
        from posttrain.cli.run import run_command

        action = lambda: run_command(words[1:])  # noqa: E731
    else:
        chosen = parser.parse_args(words)
        if not hasattr(chosen, "action"):
            parser.print_help()
            return 0
        action = lambda: chosen.action(chosen)  # noqa: E731
    try:
        return int(action() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (`posttrain runs | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PosttrainError as error:
        if os.environ.get("POSTTRAIN_TRACEBACK"):
            raise
        print(f"posttrain: {error}", file=sys.stderr)
        if isinstance(error, UsageError):
            return EXIT_USAGE
        return EXIT_REFUSED if isinstance(error, GateRefused) else EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The whole command tree; cheap, imports no room."""
    from posttrain import __version__
    from posttrain.cli import artifacts, doctor, feedback, models, rows

    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="Evaluate, tune and serve language models; learn from what users say of the answers.",
        epilog="`posttrain run` lists the recipes; `posttrain run RECIPE --help` shows a recipe's options.",
    )
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    commands.add_parser("run", help="run a recipe: a built-in name or a Python file", add_help=False)
    models.add_commands(commands)
    artifacts.add_commands(commands)
    feedback.add_commands(commands)
    rows.add_commands(commands)
    doctor.add_commands(commands)
    return parser
