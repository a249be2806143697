"""The command `t2ct`. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from t2ct.commands import eval as evaluation
from t2ct.commands import explain, generate, info, judge, latents, phantom, plan, train

COMMANDS = (generate, phantom, train, latents, evaluation, judge, plan, explain, info)

# What the library raises for something that the user can put right. Anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0: done. 1: nobody reads the output any more. 2: bad input, told in one line on stderr. 130: interrupted. No file is
    ever left half-written.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot spell is no reason to fail after the work
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            args.run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # how argparse ends --help, --version and bad usage
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\nt2ct: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return 1
    except USER_ERRORS as error:
        if debug:
            raise
        lacking = "not enough memory: " if isinstance(error, MemoryError) else ""
        print(f"t2ct: error: {lacking}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; every module of t2ct.commands adds its own part."""
    common = argparse.ArgumentParser(add_help=False)
    # Left out unless given, or the default of a command would overwrite what stood before its name.
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog="t2ct",
        description="Synthetic chest CT from text. Not for diagnosis.",
        epilog="`t2ct COMMAND --help` tells more about a command.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands, parents=[common], allow_abbrev=False)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"t2ct: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, *_: Any) -> NoReturn:
        import t2ct

        print(f"t2ct {getattr(t2ct, '__version__', 'unknown')}")
        raise SystemExit(0)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"t2ct: warning: {' '.join(str(message).split())}", file=sys.stderr)
