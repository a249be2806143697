"""`t2ct train clip|vae|ldm|judge`: from volumes, or phantoms, to weights. `t2ct train status`: where a run is."""

from __future__ import annotations

import argparse
from typing import Any

from t2ct.commands import arguments
from t2ct.train import PRESETS

KINDS = {
    "clip": "the text and volume encoders", "vae": "the volume's autoencoder", "ldm": "the latent diffusion",
    "judge": "the classifier of 18 findings that evaluation asks",
}  # fmt: skip
EPILOG = """\
examples:
  t2ct train ldm --preset tiny --out run          all three networks, small, on phantoms: about a minute
  t2ct train vae --data DIR --out vae --memory 24GB --dry-run
  t2ct train judge --data DIR --out judge         volumes with 18 labels
  t2ct train ldm --init > run.toml                a commented configuration, for --config
SIGTERM and SIGUSR1 save and end with code 75; the same command with --resume goes on.
"""


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "train",
        help="train the networks",
        description="Train a network, or see how a training run stands.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    kinds = parser.add_subparsers(title="what to train", metavar="KIND", required=True)
    for kind, told in KINDS.items():
        _add_kind(kinds, kind, told, **options)
    status = kinds.add_parser("status", help="how a run stands", description="How a training run stands.", **options)
    status.add_argument("folder", metavar="RUN", help="the folder given to --out")
    status.set_defaults(run=run_status)


def _add_kind(kinds: Any, kind: str, told: str, **options: Any) -> None:
    parser = kinds.add_parser(kind, help=told, description=f"Train {told}.", **options)
    parser.add_argument("--data", metavar="DIR", help="a prepared folder, CT-RATE, latents (ldm), phantoms:N or NxK")
    parser.add_argument("--out", metavar="RUN", help="folder of the run; the weights come into RUN/final")
    parser.add_argument("--preset", choices=PRESETS, default="recommended", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help="TOML on top of the preset; --init writes one")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="values",
        help="any field of the configuration, such as learning_rate=3e-4 or model.vae.channels=[8,16]; may be repeated",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="updates of the weights")
    parser.add_argument("--seed", type=arguments.seed)
    parser.add_argument("--memory", metavar="24GB", help="what a device may use: picks micro-batch and recomputation")
    if kind == "ldm":
        parser.add_argument("--vae", metavar="RUN", help='a trained VAE: run or model folder, or "embedded"')
        parser.add_argument("--clip", metavar="RUN", help='a trained CLIP3D: run or model folder, or "embedded"')
        parser.add_argument("--lora", type=int, metavar="RANK", help="train low-rank adapters of --start alone")
    parser.add_argument("--start", metavar="RUN", help='weights to begin with: run, folder, file, or "embedded"')
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU if there is one")
    parser.add_argument("--cache", metavar="DIR", help="for prepared volumes; runs may share it; default: RUN/cache")
    parser.add_argument("--skip-bad", action="store_true", default=None, help="leave out volumes that cannot be used")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if it holds one")
    parser.add_argument("--dry-run", action="store_true", help="print the cost, train nothing")
    parser.add_argument("--init", action="store_true", help="print the configuration as commented TOML, train nothing")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    parser.set_defaults(run=run, kind=kind)


def run(args: argparse.Namespace) -> None:
    """Train, or print what would be done."""
    from t2ct.train.config import KINDS, check_keys, read_override, to_toml

    values: dict[str, Any] = {}
    for word in args.values:
        _merge(values, read_override(word))
    check_keys(KINDS[args.kind], values, "--set")  # before they meet arguments of other names
    for name in ("steps", "seed", "memory", "start", "skip_bad", "vae", "clip", "lora"):
        if getattr(args, name, None) is not None:
            values[name] = getattr(args, name)
    if args.init:
        from t2ct.train.run import configure

        print(to_toml(configure(args.kind, args.preset, args.config, **values), comments=True), end="")
        return
    if not args.out and not args.dry_run:
        raise ValueError("--out: wanted a folder for the run, got nothing")
    from t2ct.train import train

    final = train(
        args.kind, args.data, args.out or "", preset=args.preset, config=args.config, resume=args.resume,
        dry_run=args.dry_run, device=args.device, quiet=args.quiet, cache=args.cache, **values,
    )  # fmt: skip
    if not args.quiet and not args.dry_run:
        print(f"wrote {final}")


def run_status(args: argparse.Namespace) -> None:
    """Print where a run stands, and bring its report.html up to date."""
    from t2ct.train.show.metrics import status
    from t2ct.train.show.report import write_report

    rows = status(args.folder)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    print(f"{'report':{width}}  {write_report(args.folder)}")


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value
