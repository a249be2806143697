"""How good a reconstruction is, in figures and in a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # truth and reconstruction, (1, 1, X, Y, Z) in [0, 1]
# Organs by their density, in HU: what can be told on any CT, without masks.
TISSUES = {"air_lung": (-1001, -500), "fat": (-150, -30), "soft": (-30, 150), "bone": (200, 1001)}


def reconstruction(pairs: Sequence[Pair]) -> dict[str, float]:
    """Means over the volumes: L1 in HU first, PSNR in dB of the window, SSIM, and L1 of every tissue in HU."""
    rows = []
    for x, y in pairs:
        y = y.clamp(0, 1)
        error, hu = 2000 * (x - y).abs(), 2000 * x - 1000
        row = {
            "l1_hu": error.mean().item(),
            "psnr_db": -10 * (x - y).square().mean().clamp_min(1e-12).log10().item(),
            "ssim": ssim(x, y).item(),
        }
        for name, (low, high) in TISSUES.items():
            there = (hu >= low) & (hu < high)
            row[f"{name}_hu"] = error[there].mean().item() if there.any() else float("nan")
        rows.append(row)
    # a tissue that no volume shows has no error
    return {name: float(_mean([row[name] for row in rows])) for name in rows[0]}


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else 0.0


def ssim(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """Structural similarity (Wang et al. 2004) of volumes in [0, 1], uniform windows of 7³ (smaller volumes: 3³)."""
    window = window if min(x.shape[2:]) >= 2 * window else 3

    def local(t: Tensor) -> Tensor:
        return F.avg_pool3d(t.double(), window, 1)

    mx, my = local(x), local(y)
    vx, vy = local(x.double() ** 2) - mx**2, local(y.double() ** 2) - my**2
    cov = local(x.double() * y.double()) - mx * my
    a, b = 0.01**2, 0.03**2
    return ((2 * mx * my + a) * (2 * cov + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean()


def picture_pairs(pairs: Sequence[Pair]) -> bytes:
    """A PNG: a column for each volume, the truth's middle axial slice, the reconstruction's, their difference."""
    from PIL import Image

    columns = []
    for x, y in pairs:
        a, b = (t[0, 0, :, :, t.shape[4] // 2].float().cpu().numpy() for t in (x, y))
        rows = [a, np.clip(b, 0, 1), np.clip(0.5 + 5 * (b - a), 0, 1)]
        columns.append(np.concatenate([np.flipud(r.T) for r in rows]))
    picture = (255 * np.concatenate(columns, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    scale = max(1, 192 // max(1, columns[0].shape[1]))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def recall(text: Tensor, volume: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Retrieval in both directions: share of rows whose own partner is among the `k` most similar; (N, E) unit rows.

    What is equally similar counts as more: rows that are all alike find nothing.
    """
    similarity = text @ volume.T
    own = similarity.diagonal()
    found: dict[str, float] = {}
    for name, rank in (
        ("volume", (similarity >= own[:, None]).sum(1) - 1), ("text", (similarity >= own[None]).sum(0) - 1),
    ):  # fmt: skip
        found |= {f"{name}_r{k}": (rank < k).float().mean().item() for k in at}
    return found
