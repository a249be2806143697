"""`t2ct generate`: a CT volume from text, with its JSON and its picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from t2ct.commands import arguments
from t2ct.files import check_outputs, write_files
from t2ct.text import form_prompt

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "generate",
        help="make a CT volume from text",
        description="Make a CT volume from text: NIfTI in Hounsfield units, and beside it a JSON and a PNG.",
        **options,
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what the CT shows, as a radiologist would report it")
    parser.add_argument("--findings", help="instead of TEXT: the findings of a report")
    parser.add_argument("--impression", help="instead of TEXT: the impression of a report")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from; default: nothing")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="volume to write, .nii.gz or .nii")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--seed", type=arguments.seed, help="the same seed gives the same volume; default: drawn")
    parser.add_argument("--steps", type=arguments.steps, default=30, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=arguments.guidance, default=5.0, help="guidance scale (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance-interval", type=arguments.share, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times between which there is guidance, 1 being noise (default: 0 1); less of it is quicker",
    )  # fmt: skip
    parser.add_argument("--model", type=arguments.model, help="folder, run, or vae=FILE,unet=FILE,…; default: embedded")
    parser.add_argument(
        "--size",
        type=arguments.voxels,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="voxels; multiples of 16 (embedded model) or 32 (published)",
    )
    parser.add_argument(
        "--spacing", type=arguments.millimetres, nargs=3, metavar=("X", "Y", "Z"), help="voxel size, mm"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks; default: what suits the device")
    arguments.add_memory(parser)
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then load, sample and write all files together."""
    text = _text(args)
    form_prompt(text)
    if args.negative_prompt is not None:
        form_prompt(args.negative_prompt)
    if args.guidance_interval[0] > args.guidance_interval[1]:
        raise ValueError("--guidance-interval: wanted LOW <= HIGH, got {:g} {:g}".format(*args.guidance_interval))
    # Imported late: these bring numpy and torch, which --help and the checks above do without.
    from t2ct.data.io import sidecar_path, volume_files

    picture_path = sidecar_path(args.output, ".png")
    check_outputs([args.output, sidecar_path(args.output), picture_path], overwrite=args.overwrite)

    import torch

    from t2ct.data.preview import encode_png, render
    from t2ct.pipeline import T2CTPipeline, generate
    from t2ct.stream import parse_bytes

    if args.memory is not None:
        parse_bytes(args.memory)  # before a model is loaded
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = T2CTPipeline.from_pretrained(args.model, device=args.device, dtype=dtype)
    size, spacing = tuple(args.size or pipe.size), tuple(args.spacing or pipe.spacing)
    if not args.quiet:
        seconds = pipe.estimate_seconds(size, args.steps)
        print(
            f"{pipe.name} model on {pipe.device}, {str(pipe.dtype).removeprefix('torch.')}: "
            f"{_by(size)} voxels of {_by(spacing)} mm, {args.steps} steps, about {_duration(seconds)}",
            flush=True,
        )
    start = time.perf_counter()
    volume = generate(
        text,
        model=pipe,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        guidance_interval=tuple(args.guidance_interval),
        seed=args.seed,
        size=size,
        spacing=spacing,
        progress=not args.quiet,
        negative_prompt=args.negative_prompt,
        memory_budget=args.memory,
        spool_dir=args.spool,
    )
    files = {**volume_files(volume, args.output), picture_path: encode_png(render(volume))}
    write_files(files)
    if not args.quiet:
        names = ", ".join(map(str, files))
        print(f"wrote {names} (seed {volume.seed}, {_duration(time.perf_counter() - start)})")


def _text(args: argparse.Namespace) -> str | Mapping[str, str]:
    report = {name: getattr(args, name) for name in ("findings", "impression") if getattr(args, name) is not None}
    if (args.text is None) == (not report):
        got = "both" if report else "neither"
        raise ValueError(f"text: wanted either TEXT or --findings and --impression, got {got}")
    return report or args.text


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
