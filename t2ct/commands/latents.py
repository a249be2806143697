"""`t2ct latents`: what diffusion is trained on, computed once."""

from __future__ import annotations

import argparse
from typing import Any

from t2ct.commands import arguments


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "latents",
        help="encode a data set for training the diffusion",
        description="Encode volumes with a trained VAE: mean and standard deviation of every latent, in shards. "
        "A second call goes on where the first stopped.",
        **options,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="a prepared folder, CT-RATE, phantoms:N or NxK")
    parser.add_argument("--vae", required=True, metavar="RUN", help='run or model folder, or "embedded"')
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write into, made if missing")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU if there is one")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "float32"), default="auto")
    parser.add_argument(
        "--workers", type=arguments.workers, default=2, help="processes that read volumes ahead (default: %(default)s)"
    )
    arguments.add_memory(parser)
    parser.add_argument("--skip-bad", action="store_true", help="put the next volume in the place of a bad one")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Encode, and say where the latents are."""
    from t2ct.checks import find_device
    from t2ct.train import make_latents

    folder = make_latents(
        args.data, args.vae, args.out, device=find_device(args.device), precision=args.precision,
        skip_bad=args.skip_bad, quiet=args.quiet, workers=args.workers, memory_budget=args.memory,
        spool_dir=args.spool,
    )  # fmt: skip
    if not args.quiet:
        print(f"wrote {folder}")
