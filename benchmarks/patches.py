"""What windows cost in exactness, and what fits a GPU's memory: python benchmarks/patches.py

Writes docs/patches-figures.md and docs/windows.png. The published windows, 80 of 128 latent voxels along X and Y and
all of Z, are scaled to the volumes here, so that a CPU can decode them: the embedded VAE's latents of a phantom, and
random latents under the published network with random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from t2ct import stream
from t2ct.data import phantom
from t2ct.data.preview import BACKGROUND, MUTED, TEXT, encode_png, font
from t2ct.files import write_files
from t2ct.models import VAE
from t2ct.models.vae import hu_to_unit
from t2ct.models.window import OVERLAP, decode_windows, starts
from t2ct.ops import use_backend
from t2ct.pipeline import T2CTPipeline

SHARE = 80 / 128  # of X and Y that a published window spans
BUDGETS = ("8GB", "12GB", "16GB", "24GB", "80GB")
SIZES = ((256, 256, 128), (512, 512, 128), (512, 512, 256), (512, 512, 512))
FOLDER = Path(__file__).resolve().parents[1] / "docs"


def compare(vae: VAE, z: torch.Tensor) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """HU (X, Y, Z) of the network itself and of windows, and where windows begin and end along X, in voxels."""
    f, window = vae.config.factor, [round(SHARE * n) for n in z.shape[2:4]] + [z.shape[4]]
    exact = vae.decode(z).float() * 2000 - 1000
    blended = decode_windows(lambda part: vae.decode(part), z, f, window, OVERLAP).float() * 2000 - 1000
    seams = [f * edge for a in starts(z.shape[2], window[0], OVERLAP) for edge in (a, a + window[0])]
    inner = sorted(edge for edge in seams if 0 < edge < f * z.shape[2])
    return exact[0, 0].numpy(), blended[0, 0].numpy(), inner


def embedded() -> tuple[VAE, torch.Tensor]:
    pipe = T2CTPipeline.from_pretrained(device="cpu")
    hu = phantom(7, [{"name": "pleural effusion", "side": "right", "size": "large"}], size=tuple(pipe.size)).hu
    return pipe.vae, pipe.vae.encode(hu_to_unit(torch.tensor(hu)[None, None].float()))[0]


def random() -> tuple[VAE, torch.Tensor]:
    torch.manual_seed(0)
    return VAE().eval().requires_grad_(False), torch.randn(1, 4, 32, 32, 8)


def picture(exact: np.ndarray, blended: np.ndarray, seams: list[int], most: float) -> Image.Image:
    """An axial slice of both, and their difference, grey where there is none."""
    k, scale = exact.shape[2] // 2, 4
    panels = []
    for volume, low, high in ((exact, -1000, 400), (blended, -1000, 400), (blended - exact, -most, most)):
        grey = np.clip((volume[::-1, ::-1, k].T - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        panels.append(Image.fromarray(grey).resize([scale * n for n in exact.shape[:2]], Image.Resampling.NEAREST))
    width, height = panels[0].size
    made = Image.new("RGB", (3 * width + 40, height + 70), BACKGROUND)
    draw = ImageDraw.Draw(made)
    titles = ("the network itself (t2ct)", "overlapping windows, blended", f"difference, +-{most:.0f} HU")
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        at = 10 + i * (width + 10)
        draw.text((at, 24), title, TEXT, font(16), anchor="lm")
        made.paste(panel, (at, 44))
    for x in seams:  # the picture's left is the patient's right: X runs to the left
        at = 10 + 2 * (width + 10) + width - scale * x
        draw.line((at, height + 46, at, height + 54), TEXT)
    draw.text((made.width - 10, height + 60), "marks: where windows begin and end", MUTED, font(12), anchor="rm")
    return made


def memory_table() -> list[str]:
    """One row a budget: what the planner says of decoding in float16 on a GPU, the spool being its host's memory."""
    with torch.device("meta"):
        vae = VAE()
    rows = ["| budget | " + " | ".join("x".join(map(str, s)) for s in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for budget in BUDGETS:
        cells = []
        for size in SIZES:
            shape = (1, 4, *(n // 4 for n in size))
            try:
                plan = vae.plan("decode", shape, budget, hu=True, dtype=torch.float16, device="cuda")
            except ValueError:
                cells.append("no plan")
                continue
            spool = f", {stream.format_bytes(plan.spool)} spooled" if plan.spool else ""
            cells.append(f"{stream.format_bytes(plan.peak)}, {plan.work:.2f}x work{spool}")
        rows.append(f"| {budget} | " + " | ".join(cells) + " |")
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the page and the picture")
    folder = parser.parse_args().out
    lines = ["# Patches and windows: figures", "", "Made by `python benchmarks/patches.py`, never typed.", ""]
    lines += ["Windows against the network itself, both in float32:", ""]
    lines += ["The published windows, 80 of 128 latents along X and Y and all of Z, are scaled to volumes that a CPU"]
    lines += ["decodes.", ""]
    lines += ["| VAE | volume | windows | of latents | RMS, HU | largest, HU | RMS of the volume's own spread |"]
    lines += ["|---" * 7 + "|"]
    image = b""
    for name, (vae, z) in (("embedded, a phantom's latents", embedded()), ("published, random weights", random())):
        exact, blended, seams = compare(vae, z)
        error = np.sqrt(np.mean((blended - exact) ** 2))
        count = np.prod([len(starts(n, round(SHARE * n), OVERLAP)) for n in z.shape[2:4]])
        shape = " x ".join(map(str, exact.shape))
        of = " x ".join(map(str, [*(round(SHARE * n) for n in z.shape[2:4]), z.shape[4]]))
        lines.append(f"| {name} | {shape} | {count} | {of} | {error:.1f} | {np.abs(blended - exact).max():.0f} | "
                     f"{error / exact.std():.2%} |")  # fmt: skip
        if not image:
            image = encode_png(picture(exact, blended, seams, 3 * float(error)))
    lines += ["", "![An axial slice: exact, in windows, and the difference](windows.png)", ""]
    lines += [
        "What the planner says of decoding on a GPU in float16, int16 HU out: bytes beyond the weights at most, work",
        "beside that of a plan which recomputes nothing, what is spooled into the host's memory. No GPU has run these",
        "plans, and no CPU either: a CPU's own plans, of its own kernels, are held to their bytes. What runs unasked,",
        "norms by plain torch, with its copies:",
        "",
        *memory_table(),
        "",
        "By the Triton kernels (`use_backend(\"triton\")`):",
        "",
    ]
    with use_backend("triton"):
        lines += [*memory_table(), ""]
    write_files({folder / "patches-figures.md": "\n".join(lines).encode(), folder / "windows.png": image})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
