"""`t2ct judge`: which findings a volume shows, as far as a small network can tell."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2ct.eval.judging.verdict import Verdict

LEAST = 0.5  # probability of what is listed

EPILOG = """\
examples:
  t2ct judge ct.nii.gz
  t2ct judge ct.nii.gz --all --json
  t2ct judge --data phantoms:500            how good it is, on volumes that it was not trained on
  t2ct judge --data phantoms:192 --vae RUN  what of them comes through a VAE
  t2ct judge --data SCANS --judge RUN
The judge in the package has learnt from phantoms alone: it is there to measure generated volumes. Not for diagnosis.
"""


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "judge", help="say which findings a volume shows", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, **options,
    )  # fmt: skip
    parser.add_argument("volumes", nargs="*", metavar="VOLUME", help="NIfTI file in HU")
    parser.add_argument("--judge", metavar="PATH", help="a judge's file or run; default: the package's")
    parser.add_argument("--data", metavar="DATA", help="instead: phantoms:N or a folder with labels: how good it is")
    parser.add_argument("--count", type=int, metavar="N", help="volumes of DATA at most")
    parser.add_argument("--vae", metavar="RUN", help="encode and decode DATA first: what comes through a VAE")
    parser.add_argument("--device", help="cpu, cuda, …; default: cuda where there is one")
    parser.add_argument("--all", action="store_true", help="also what is improbable")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a line for every finding of every volume, or figures of the judge."""
    if bool(args.volumes) == bool(args.data):
        raise ValueError(f"wanted either VOLUME or --data, got {'both' if args.data else 'neither'}")
    if args.data:
        _measure(args)
        return
    if args.vae:
        raise ValueError("--vae: wanted --data, the volumes that go through it, got VOLUME")
    from t2ct.checks import find_device
    from t2ct.data.io import load_volume
    from t2ct.eval.judging.verdict import verdicts
    from t2ct.eval.look import SCANS, open_judge

    absent = [path for path in args.volumes if not Path(path).exists()]
    if absent:
        others = f", nor of {len(absent) - 1} more" if len(absent) > 1 else ""
        raise FileNotFoundError(f"{absent[0]}: wanted a NIfTI file, got no such file{others}")
    judge, _ = open_judge(args.judge, None, find_device(args.device), phantoms=True)
    found: dict[str, list[dict[str, Any]]] = {}
    warned = args.judge is not None
    try:
        for path in dict.fromkeys(args.volumes):  # one after another: there may be thousands
            volume = load_volume(path)
            if not volume.synthetic and not warned:
                warnings.warn(f"judge: {SCANS}", stacklevel=2)
                warned = True
            try:
                said = verdicts(volume, judge)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            said = [v for v in said if args.all or v.probability >= LEAST]
            if args.json:
                found[path] = [asdict(v) for v in said]
            else:
                print(as_text(path, said), flush=True)
    finally:  # a bad one loses nothing of what was said before it
        if args.json:
            print(json.dumps(found, indent=2))


def as_text(path: str, said: Sequence[Verdict]) -> str:
    """The verdicts on a volume, a line each."""
    lines = [path]
    for v in said:
        details = ", ".join(word for word in (v.side, v.lobe and f"{v.lobe} lobe", v.size) if word)
        lines.append(f"  {v.probability:.2f}  {v.finding:<34}  {details}".rstrip())
    return "\n".join(lines if said else [*lines, "  nothing"])


def _measure(args: argparse.Namespace) -> None:
    from t2ct.eval.judging.judged import as_markdown, judged
    from t2ct.eval.run import plain

    found = judged(args.data, args.judge, count=args.count, vae=args.vae, device=args.device)
    print(json.dumps(plain(found), indent=2) if args.json else as_markdown(found))
