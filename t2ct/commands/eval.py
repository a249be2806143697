"""`t2ct eval`: the paper's tables for a model, by one command. `t2ct eval compare`: two systems side by side."""

from __future__ import annotations

import argparse
from typing import Any

from t2ct.commands import arguments

TABLES = ("fidelity", "factual", "alignment", "ablation", "utility", "memorisation")
EPILOG = """\
examples:
  t2ct eval --quick --out DIR                         the model in the package, minutes on a CPU
  t2ct eval --model RUN --data phantoms:500 --out DIR
  t2ct eval --model text2ct --data CT-RATE --judge judge --out DIR
  t2ct eval --model volumes --data CT-RATE --judge judge --out DIR    volumes that another system made
  t2ct eval compare a b --out DIR                     two models, or two folders of volumes
A run that was stopped goes on with the same command and --resume.
"""


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "eval",
        help="measure a model: fidelity, factual correctness, alignment, utility, memorisation",
        description="Rerun the tables of Molino et al. 2025 for a model or for volumes that any system made.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument("--model", type=arguments.model, help="model (default: embedded), or a folder of volumes")
    _add_common(parser)
    parser.add_argument(
        "--without-contrastive", metavar="MODEL", type=arguments.model,
        help="a second model, whose text tower was not trained contrastively: the ablation",
    )  # fmt: skip
    parser.add_argument(
        "--relearn", type=int, metavar="STEPS", default=0,
        help="for utility, train three classifiers from nothing, so many updates each (default: a linear probe)",
    )  # fmt: skip
    parser.set_defaults(run=run)
    kinds = parser.add_subparsers(metavar="compare")
    # SUPPRESS: what is not said after `compare` must not undo what was said before it
    both = kinds.add_parser(
        "compare", help="two systems side by side", description="Two models, or folders of volumes, side by side.",
        argument_default=argparse.SUPPRESS, **options,
    )  # fmt: skip
    both.add_argument("a", metavar="A", help="a model, or a folder of volumes")
    both.add_argument("b", metavar="B", help="likewise")
    _add_common(both)
    both.set_defaults(run=run_compare)


def _add_common(parser: argparse.ArgumentParser) -> None:
    fallback = parser.argument_default
    parser.add_argument("--out", metavar="DIR", help="folder for results.json, report.html, volumes")
    parser.add_argument("--data", metavar="DATA", help="phantoms:N, or a folder (default: phantoms:500)")
    flag: dict[str, Any] = {"action": "store_true", "default": fallback or False}
    parser.add_argument("--quick", **flag, help="few volumes of few steps: minutes on a CPU")
    parser.add_argument("--judge", metavar="PATH", help="a judge's file or run; default: the model's or the package's")
    parser.add_argument(
        "--clip", metavar="RUN", help="run or folder of a CLIP3D with both towers, for alignment; default: the model's"
    )
    parser.add_argument(
        "--backbone", metavar="PATH:FACTORY", action="append", default=[] if fallback is None else fallback,
        help="a network whose features the distances use; twice for one of slices and one of volumes",
    )  # fmt: skip
    parser.add_argument("--tables", metavar="NAMES", type=_tables, help=f"some of {','.join(TABLES)}; default: all")
    parser.add_argument("--steps", type=arguments.steps, help="sampling steps")
    parser.add_argument("--guidance", type=arguments.guidance, help="guidance scale")
    parser.add_argument("--count", type=int, metavar="N", help="reports at most")
    parser.add_argument("--batch", type=int, metavar="N", help="volumes generated at once")
    parser.add_argument(
        "--known", type=int, metavar="N", help="training volumes at most to look for copies of (default: 2000)"
    )
    parser.add_argument(
        "--skip-bad", **flag, help="read all volumes of the data first, leave out what cannot be used"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU if there is one")
    parser.add_argument("--resume", **flag, help="go on with the evaluation in --out, if it holds one")
    parser.add_argument("--quiet", **flag, help="print errors and warnings only")


def _tables(word: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in word.split(",") if part.strip())
    wrong = [name for name in names if name not in TABLES]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"wanted some of {','.join(TABLES)}, got {word!r}")
    return names


def run(args: argparse.Namespace) -> None:
    """Evaluate a model."""
    if args.relearn < 0:
        raise ValueError(f"--relearn: wanted 0 or more updates, got {args.relearn}")
    options = _options(args)
    from t2ct.eval import evaluate

    more = {"without_contrastive": args.without_contrastive, "relearn": args.relearn}
    evaluate(args.out, args.model, **more, **options)


def run_compare(args: argparse.Namespace) -> None:
    """Compare two systems."""
    for name in ("model", "without_contrastive", "relearn"):
        if value := getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: has no say in a comparison of A and B, got {value}")
    options = _options(args)
    from t2ct.eval import compare

    compare(args.a, args.b, args.out, **options)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    if not args.out:
        raise ValueError("--out: wanted a folder for the results, got nothing")
    for name in ("count", "batch", "known"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: wanted an integer of at least 1, got {value}")
    options = {
        "quick": args.quick, "judge": args.judge, "clip": args.clip, "backbones": args.backbone, "steps": args.steps,
        "guidance": args.guidance, "count": args.count, "batch": args.batch, "known": args.known,
        "skip_bad": args.skip_bad, "device": args.device, "resume": args.resume, "quiet": args.quiet,
    }  # fmt: skip
    return options | {k: v for k in ("data", "tables") if (v := getattr(args, k)) is not None}
