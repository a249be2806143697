"""`t2ct phantom`: a procedural chest CT with its report, organ mask and picture."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ct.commands import arguments
from t2ct.files import check_output_folder, check_outputs, write_files

if TYPE_CHECKING:
    from t2ct.data.phantoms import Finding

FILES = ("ct.nii.gz", "ct.json", "mask.nii.gz", "report.json", "preview.png")
SHEET = "sheet.png"
SHEET_SEEDS = 16


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "phantom",
        help="make a procedural chest CT whose truth is known",
        description="Make a procedural chest CT: volume, report, organ mask and picture, in a folder.",
        **options,
    )
    parser.add_argument("--seed", type=arguments.seed, required=True, help="the patient; the same seed, the same bits")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write into, made if missing")
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
    parser.add_argument("--size", type=arguments.voxels, nargs=3, metavar=("X", "Y", "Z"), default=(128, 128, 64))
    parser.add_argument(
        "--spacing", type=arguments.millimetres, nargs=3, metavar=("X", "Y", "Z"), help="voxel size, mm"
    )
    parser.add_argument(
        "--sheet", action="store_true", help=f"also {SHEET}: this seed and the {SHEET_SEEDS - 1} after it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the phantom and write all its files together."""
    folder = Path(args.output)
    names = [*FILES, SHEET] if args.sheet else list(FILES)
    check_output_folder(folder)
    if folder.exists():
        check_outputs([folder / name for name in names], overwrite=args.overwrite)

    from t2ct.data.phantoms import contact_sheet, phantom

    findings = [] if args.normal else args.finding
    grid: dict[str, Any] = {
        "findings": findings,
        "size": tuple(args.size),
        "spacing": args.spacing and tuple(args.spacing),
    }
    made = phantom(args.seed, **grid)
    with tempfile.TemporaryDirectory(prefix="t2ct-") as scratch:
        made.save(scratch)
        if args.sheet:
            contact_sheet(range(args.seed, args.seed + SHEET_SEEDS), Path(scratch) / SHEET, **grid)
        contents = {folder / path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    print(f"wrote {', '.join(path.name for path in contents)} to {folder}")
    print(made.prompt)


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
