"""`t2ct plan`: how the VAE would run inside a memory budget, before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t2ct.commands import arguments
from t2ct.files import check_outputs, write_files

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(commands: Any, **options: Any) -> None:
    """Add this command to argparse's `commands`."""
    parser = commands.add_parser(
        "plan",
        help="show how the VAE fits a memory budget",
        description="How the VAE would encode or decode a volume inside a memory budget: where every tensor lies, what "
        "is computed again, how many bytes are in use. Nothing is run, and the device need not be there.",
        **options,
    )
    parser.add_argument("direction", choices=("decode", "encode"))
    parser.add_argument("--size", type=arguments.size, required=True, metavar="XxYxZ", help="voxels of the volume")
    arguments.add_memory(parser)
    parser.add_argument("--model", type=arguments.model, help="folder or config.json; default: the published network")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--plot", metavar="FILE", help="draw the bytes in use over the passes, a .png")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan as a table, and draw it where asked."""
    if args.plot is not None:
        if Path(args.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot: wanted a file that ends in .png, got {args.plot!r}")
        check_outputs([args.plot], overwrite=args.overwrite)

    import torch

    from t2ct.models import VAE
    from t2ct.stream import format_bytes, parse_bytes

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float16" if device == "cuda" else "float32"))
    with torch.device("meta"):
        vae = VAE(_config(args.model))
    factor, size = vae.config.factor, args.size
    if any(n % factor for n in size):
        raise ValueError(f"--size: wanted multiples of {factor}, got {'x'.join(map(str, size))}")
    shape = (1, vae.config.in_channels, *size)
    if args.direction == "decode":
        shape = (1, vae.config.latent_channels, *(n // factor for n in size))
    budget = args.memory
    if budget is None and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--memory: wanted a size such as 8GB, since there is no GPU whose free memory could be asked")
    decode = args.direction == "decode"
    plan = vae.plan(args.direction, shape, budget, spool_dir=args.spool, hu=decode, dtype=dtype, device=device)
    title = f"{args.direction} {' x '.join(map(str, size))} voxels in {args.dtype or str(dtype)[6:]} on {device}"
    print(title)
    print(plan.table())
    if args.plot is not None:
        from t2ct.data.chart import draw_plan
        from t2ct.data.preview import encode_png

        limit = None if budget is None else parse_bytes(budget)
        write_files({Path(args.plot): encode_png(draw_plan(plan, title, limit, format_bytes))})
        print(f"wrote {args.plot}")


def _config(model: Any) -> Any:
    """The VAE's sizes that a folder, a run or a config.json tells; None: the published ones."""
    if model is None or isinstance(model, dict):  # the published files, which bring no config
        return None
    from t2ct.checks import model_folder
    from t2ct.config import PipelineConfig

    file = Path(model) if Path(model).is_file() else model_folder(model) / "config.json"
    if file.is_file():
        return PipelineConfig.from_json(file).vae
    raise FileNotFoundError(f"--model: wanted a folder with config.json, or that file, got {model!r}")
