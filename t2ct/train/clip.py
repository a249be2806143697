"""CLIP3D: symmetric InfoNCE of volumes and reports (reference recipe; AdamW, logit scale clamped to [0, ln 100])."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.models import CLIP3D


def info_nce(text: Tensor, volume: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy over the batch; text and volume (B, E), L2-normalised; row i belongs to row i."""
    logits = scale * text @ volume.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_loss(model: CLIP3D, hu: np.ndarray, ids: Tensor, batch: int):
    """The loss function for `loop.run`. ids: (N, WORDINGS, L) token ids of every wording of every phantom."""

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        index = torch.randperm(len(hu), generator=generator)[:batch]
        wording = torch.randint(ids.shape[1], (batch,), generator=generator)
        volume = torch.from_numpy(hu[index.numpy()])[:, None].float()
        text, image, scale = model(ids[index, wording], volume)
        hit = ((text @ image.T).argmax(1) == torch.arange(batch)).float().mean()
        return info_nce(text, image, scale), {"hit": hit.item(), "scale": scale.item()}

    return loss_of


@torch.inference_mode()
def embed_texts(model: CLIP3D, ids: Tensor, batch: int = 256) -> Tensor:
    """(N, L) ids -> (N, embed_dim), a batch at a time."""
    return torch.cat([model.encode_text(part)[:, 0] for part in ids.split(batch)]).clone()
