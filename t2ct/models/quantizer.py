"""Cosine vector quantiser of the vision tower, with the state-dict keys of vector-quantize-pytorch 1.1.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineCodebook(nn.Module):
    """The codes and their running statistics; the leading axis of 1 is the published layout."""

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("initted", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(1, codebook_size))
        self.register_buffer("embed", F.normalize(torch.randn(1, codebook_size, dim), dim=-1))

    @torch.no_grad()
    def replace_dead(self, tokens: Tensor, dead_share: float) -> None:
        """Put random tokens of the batch (N, dim; unit norm) in place of the codes that (nearly) no token chooses.

        Before the first batch every code counts as dead, so the same step initialises the codebook.
        """
        count, size = len(tokens), self.embed.shape[1]
        fair_share = count / size
        unused = self.cluster_size[0] < dead_share * fair_share
        dead = unused | (self.initted == 0)
        # Distinct tokens where there are enough. Drawn every time, so that the RNG stream does not depend on the data.
        index = torch.randperm(count, device=tokens.device)[:size]
        if count < size:
            index = index[torch.arange(size, device=tokens.device) % count]
        self.embed[0] = torch.where(dead[:, None], tokens[index].to(self.embed.dtype), self.embed[0])
        # A fair share of usage gives the new code time to win tokens before it can be called dead again.
        self.cluster_size[0] = torch.where(dead, fair_share, self.cluster_size[0])
        self.initted.fill_(1)

    @torch.no_grad()
    def update(self, tokens: Tensor, ids: Tensor, decay: float) -> None:
        """Move each chosen code towards the mean of its tokens (N, dim; unit norm), and back to the unit sphere."""
        size = self.embed.shape[1]
        # A matrix product rather than scatter-add, whose order of summation varies from run to run on GPUs.
        chosen = (ids[:, None] == torch.arange(size, device=ids.device)).float()
        usage = chosen.sum(0)
        mean = F.normalize(chosen.T @ tokens, dim=-1)
        codes = F.normalize(self.embed[0].float(), dim=-1)
        moved = F.normalize(torch.lerp(mean, codes, decay), dim=-1)
        self.embed[0] = torch.where((usage > 0)[:, None], moved, codes).to(self.embed.dtype)
        self.cluster_size[0] = torch.lerp(usage, self.cluster_size[0].float(), decay).to(self.cluster_size.dtype)


class CosineQuantizer(nn.Module):
    """Replace every token by the unit-norm code of the highest cosine similarity.

    x (..., dim) -> codes (..., dim) in the dtype of x, ids (...) int64. Similarities and statistics are float32.
    Training: the gradient of a code is that of the unit-norm token it stands for (straight through); the codebook
    follows the tokens by an exponential moving average, starts from the first batch, and gives codes whose average
    usage falls under dead_share of an even share to random tokens (from torch's global RNG).
    Evaluation changes nothing.
    """

    def __init__(self, codebook_size: int, dim: int, decay: float = 0.8, dead_share: float = 0.03) -> None:
        super().__init__()
        self.decay = decay
        self.dead_share = dead_share
        self._codebook = CosineCodebook(codebook_size, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast knows no meta device, on which sizes are counted.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            tokens = F.normalize(x.float(), dim=-1).flatten(0, -2)
            book = self._codebook
            if self.training:
                book.replace_dead(tokens.detach(), self.dead_share)
            codes = F.normalize(book.embed[0].float(), dim=-1)
            with torch.no_grad():
                ids = (tokens @ codes.T).argmax(-1)
            quantized = codes[ids]
            if self.training:
                book.update(tokens.detach(), ids, self.decay)
                quantized = tokens + (quantized - tokens).detach()
        return quantized.view_as(x).to(x.dtype), ids.view(x.shape[:-1])
