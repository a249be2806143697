"""`t2ct info`: what a model consists of."""

from __future__ import annotations

import argparse
from typing import Any

from t2ct.commands import arguments


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser("info", help="show the networks, size and hash of a model", **options)
    parser.add_argument(
        "model", nargs="?", type=arguments.model, help="folder, run, or vae=FILE,unet=FILE,…; default: embedded"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Load the model and print one line per property."""
    from t2ct.pipeline import T2CTPipeline

    rows = T2CTPipeline.from_pretrained(args.model).info()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
