"""The vision tower's quantiser while it is trained: codes stand still during an update and move after it.

So every micro-batch and every rank sees the same codes, and gradients do not depend on how a batch is cut up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.models.quantizer import CosineQuantizer
from t2ct.train.recipe import gather, sum_ranks


class SteadyQuantizer(nn.Module):
    """Takes the place of a `CosineQuantizer`, under the same keys. Straight-through gradient, as there.

    While `counting`, it sums the tokens that chose each code and keeps some of each volume's tokens for codes that die;
    `move` then does what the original does in each forward pass.
    """

    def __init__(self, old: CosineQuantizer, decay: float, dead_share: float, batch: int):
        super().__init__()
        self._codebook = old._codebook
        self.decay, self.dead_share = decay, dead_share
        size = self._codebook.embed.shape[1]
        self.spare = -(-size // batch)  # tokens kept of each volume
        self.counting = False
        self.forget()

    def forget(self) -> None:
        """Begin a new count."""
        self.usage: Tensor | None = None
        self.sums: Tensor | None = None
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            tokens = F.normalize(x.float(), dim=-1)
            flat = tokens.flatten(0, -2)
            codes = F.normalize(self._codebook.embed[0].float(), dim=-1)
            with torch.no_grad():
                ids = (flat @ codes.T).argmax(-1)
                if self.counting:
                    self._count(tokens.detach(), flat.detach(), ids, len(codes))
            quantized = flat + (codes[ids] - flat).detach() if self.training else codes[ids]
        return quantized.view_as(x).to(x.dtype), ids.view(x.shape[:-1])

    def _count(self, tokens: Tensor, flat: Tensor, ids: Tensor, size: int) -> None:
        # A matrix product rather than scatter-add, whose order of summation varies from run to run on GPUs.
        chosen = (ids[:, None] == torch.arange(size, device=ids.device)).float()
        usage, sums = chosen.sum(0), chosen.T @ flat
        self.usage = usage if self.usage is None else self.usage + usage
        self.sums = sums if self.sums is None else self.sums + sums
        each = tokens.flatten(1, -2)  # (B, tokens of a volume, dim)
        index = torch.linspace(0, each.shape[1] - 1, min(self.spare, each.shape[1]), device=ids.device).long()
        self.kept.append(each[:, index].flatten(0, 1))

    @torch.no_grad()
    def move(self, step: int) -> None:
        """Move each chosen code towards the mean of its tokens, and give dead codes tokens of this batch."""
        if self.usage is None or self.sums is None:
            return
        usage, sums, spare = self.usage, self.sums, gather(torch.cat(self.kept))
        sum_ranks([usage, sums])
        book = self._codebook
        codes = F.normalize(book.embed[0].float(), dim=-1)
        moved = F.normalize(torch.lerp(F.normalize(sums, dim=-1), codes, self.decay), dim=-1)
        size, fair = len(codes), usage.sum() / len(codes)
        average = torch.lerp(usage, book.cluster_size[0].float(), self.decay)
        dead = (average < self.dead_share * fair) | (book.initted == 0)
        # The kept tokens in an order that depends on their values alone, not on who computed them.
        spare = spare[torch.argsort(spare[:, 0], stable=True)]
        drawn = torch.randperm(len(spare), generator=torch.Generator().manual_seed(step))[:size]
        drawn = drawn.to(spare.device)[torch.arange(size, device=spare.device) % len(drawn)]
        new = torch.where((usage > 0)[:, None], moved, codes)
        book.embed[0] = torch.where(dead[:, None], spare[drawn], new).to(book.embed.dtype)
        book.cluster_size[0] = torch.where(dead, fair, average).to(book.cluster_size.dtype)
        book.initted.fill_(1)
        self.forget()
