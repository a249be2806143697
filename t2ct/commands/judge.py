"""`t2ct judge`: which findings a volume shows, as far as a small network can tell."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

LEAST = 0.5  # probability of what is listed

EPILOG = """\
examples:
  t2ct judge ct.nii.gz
  t2ct judge ct.nii.gz --all --json
  t2ct judge --data phantoms:500            how good it is, on volumes that it was not trained on
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
    from t2ct.checks import find_device
    from t2ct.data.io import load_volume
    from t2ct.eval.judging.verdict import verdicts
    from t2ct.eval.look import open_judge

    volumes = {path: load_volume(path) for path in args.volumes}
    judge, _ = open_judge(args.judge, None, find_device(args.device), all(v.synthetic for v in volumes.values()))
    found = {}
    for path, volume in volumes.items():
        try:
            said = verdicts(volume, judge)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found[path] = [v for v in said if args.all or v.probability >= LEAST]
    if args.json:
        print(json.dumps({path: [asdict(v) for v in said] for path, said in found.items()}, indent=2))
        return
    for path, said in found.items():
        print(path)
        for v in said:
            details = ", ".join(word for word in (v.side, v.lobe and f"{v.lobe} lobe", v.size) if word)
            print(f"  {v.probability:.2f}  {v.finding:<34}  {details}".rstrip())
        if not said:
            print("  nothing")


def _measure(args: argparse.Namespace) -> None:
    from t2ct.eval.judging.judged import as_markdown, judged
    from t2ct.eval.run import plain

    found = judged(args.data, args.judge, count=args.count, device=args.device)
    print(json.dumps(plain(found), indent=2) if args.json else as_markdown(found))
