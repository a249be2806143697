"""`t2ct explain`: which backend every op uses on this machine, and why."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser("explain", help="show which backend every op uses, and why", **options)
    parser.add_argument("--device", help="cpu or cuda; by default all that this machine has")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table of ops."""
    from t2ct.ops import explain

    print(explain(args.device))
