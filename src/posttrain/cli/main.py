"""The command line's entry: subcommands, exit codes and errors.

Exit codes: 0 done; 1 a run or check failed; 2 wrong usage; 3 a promotion gate refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from posttrain.core import GateRefused, PosttrainError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors raised on purpose are printed without a traceback.

    With POSTTRAIN_TRACEBACK set in the environment they are raised, with theirs.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _action(words)()
        sys.stdout.flush()
        return int(code or 0)
    except SystemExit as stop:  # argparse has printed its help or its complaint
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (`posttrain runs | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PosttrainError, OSError) as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") or (isinstance(error, OSError) and error.filename is None):
            raise
        print(f"posttrain: {_message(error)}", file=sys.stderr)
        if isinstance(error, UsageError):
            return EXIT_USAGE
        return EXIT_REFUSED if isinstance(error, GateRefused) else EXIT_FAILED


def _action(words: list[str]) -> Callable[[], int | None]:
    """What the words ask for. A recipe's options are its own: they are parsed when the recipe is known."""
    parser = build_parser()
    if words[:1] in (["run"], ["evaluate"]):
        from posttrain.cli.run import run_command

        return lambda: run_command(words[1:] if words[0] == "run" else words)
    chosen = parser.parse_args(words)
    if not hasattr(chosen, "action"):
        chosen.parser.print_help() if hasattr(chosen, "parser") else parser.print_help()
        return lambda: 0 if not words else EXIT_USAGE
    return lambda: chosen.action(chosen)


def _message(error: PosttrainError | OSError) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


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
