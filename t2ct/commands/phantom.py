"""`t2ct phantom`: a procedural chest CT with its report, organ mask and picture; a sheet of every finding."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ct.commands import arguments
from t2ct.files import check_output_folder, check_outputs, write_files

if TYPE_CHECKING:
    from t2ct.data.phantoms import Finding

FILES = ("ct.nii.gz", "ct.json", "mask.nii.gz", "parts.nii.gz", "findings.nii.gz", "report.json", "preview.png")
DEFAULT_SIZE = (128, 128, 64)


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "phantom",
        help="make a procedural chest CT whose truth is known",
        description="Make a procedural chest CT: volume, report, masks, picture; or a sheet of all findings.",
        **options,
    )
    parser.add_argument("--seed", type=arguments.seed, help="the patient; the same seed, the same bits (--sheet: 0)")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="folder to write into, made if missing")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    findings = parser.add_mutually_exclusive_group()
    findings.add_argument(
        "--finding",
        action="append",
        type=finding,
        metavar="NAME[:SIDE][:LOBE][:SIZE][:KIND][:8mm]",
        help='such as "pleural effusion:right:large"; may be repeated; default: drawn from the seed',
    )
    findings.add_argument("--normal", action="store_true", help="no findings")
    parser.add_argument(
        "--size", type=arguments.voxels, nargs=3, metavar=("X", "Y", "Z"), help="default 128 128 64, sheet 256 256 96"
    )
    parser.add_argument(
        "--spacing", type=arguments.millimetres, nargs=3, metavar=("X", "Y", "Z"), help="voxel size, mm"
    )
    parser.add_argument(
        "--sheet",
        metavar="FILE.png",
        help="draw every finding, or those of --finding: present, absent in the same patient, difference; about 2 min",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the phantom and write all its files together; draw the sheet."""
    if args.output is None and args.sheet is None:
        raise ValueError("-o, --output: wanted a folder (or --sheet FILE.png), got nothing")
    if args.output is not None and args.seed is None:
        raise ValueError("--seed: wanted an integer from 0, got nothing")
    if args.sheet is not None:
        if args.spacing:
            raise ValueError(f"--spacing: wanted none beside --sheet, which shows whole patients, got {args.spacing}")
        if args.normal:
            raise ValueError("--sheet: wanted findings to draw, got --normal")
        if Path(args.sheet).suffix.lower() != ".png":
            raise ValueError(f"--sheet: wanted a file that ends in .png, got {args.sheet!r}")
        check_outputs([args.sheet], overwrite=args.overwrite)
    if args.output is not None:
        _folder(args, args.output)
    if args.sheet is not None:
        _sheet(args)


def _folder(args: argparse.Namespace, output: str) -> None:
    check_output_folder(output)
    folder = Path(output)
    if folder.exists():
        check_outputs([folder / name for name in FILES], overwrite=args.overwrite)

    from t2ct.data.phantoms import phantom

    findings = [] if args.normal else args.finding
    spacing = args.spacing and tuple(args.spacing)
    made = phantom(args.seed, findings, tuple(args.size or DEFAULT_SIZE), spacing)
    with tempfile.TemporaryDirectory(prefix="t2ct-") as scratch:
        made.save(scratch)
        contents = {folder / path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    print(f"wrote {', '.join(path.name for path in contents)} to {folder}")
    print(made.prompt)


def _sheet(args: argparse.Namespace) -> None:
    from t2ct.data.phantoms.sheet import SHEET_SIZE, finding_sheet

    names = list(dict.fromkeys(f.name for f in args.finding)) if args.finding else None
    with tempfile.TemporaryDirectory(prefix="t2ct-") as scratch:
        path = Path(scratch) / "sheet.png"
        finding_sheet(path, names, args.seed or 0, size=tuple(args.size or SHEET_SIZE), asked=args.finding)
        write_files({Path(args.sheet): path.read_bytes()})
    print(f"wrote {args.sheet}")


def finding(text: str) -> Finding:
    """`name:qualifier:…` as a `Finding`. A qualifier is a side, lobe, size or kind the finding can have, or `8mm`.

    Raises ArgumentTypeError for an unknown name or qualifier, and for two qualifiers of one kind.
    """
    from t2ct.data.phantoms import FINDINGS, Finding

    name, *qualifiers = (" ".join(part.split()).lower() for part in text.split(":"))
    if name not in FINDINGS:
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(FINDINGS)}, got {name!r}")
    disease = FINDINGS[name]
    allowed = {"side": disease.sides, "lobe": disease.lobes, "size": disease.sizes, "kind": disease.kinds}
    fields: dict[str, Any] = {}
    for word in qualifiers:
        field = next((field for field, words in allowed.items() if word in words and field not in fields), None)
        if field is not None:
            fields[field] = word
        elif word.endswith("mm") and "size_mm" not in fields:
            fields["size_mm"] = arguments.millimetres(word.removesuffix("mm"))
        else:
            wanted = ", ".join(word for words in allowed.values() for word in words) or "nothing"
            raise argparse.ArgumentTypeError(f"wanted after {name}: {wanted} (each kind once), got {word!r}")
    return Finding(name, **fields)
