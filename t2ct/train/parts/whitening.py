"""Contexts as wide in every direction, for a network that learns from texts of one kind; and those of another encoder.

Embeddings of reports lie close together: what they share is long, what tells them apart short, and a network listens
to what is long. Training shows it W c with W = (E[c c^T] + floor)^(-1/2) instead of the context c. A context meets
linear layers without bias alone, so that W goes into their weights in the end; no text is still c = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FLOOR = 0.01  # of the mean variance besides the widest direction: what is narrower than that is wording, not meaning


def whitening(contexts: Tensor) -> Tensor:
    """contexts (N, D) -> W (D, D) float32, symmetric: second moments of W c are 1 in every direction, or less where c
    hardly goes."""
    c = contexts.double()
    values, vectors = torch.linalg.eigh(c.T @ c / len(c))  # rising
    floor = FLOOR * values[:-1].mean().clamp_min(1e-12)
    return ((vectors * (values.clamp_min(0) + floor).rsqrt()) @ vectors.T).float()


def fitted(contexts: Tensor, former: Tensor) -> Tensor:
    """contexts (N, D) of an encoder and `former` (N, D) of the same texts from the one that a network knows -> A (D, D)
    float32 with former ≈ A c, by least squares with a little ridge."""
    c, f = contexts.double(), former.double()
    moments = c.T @ c / len(c)
    ridge = 1e-3 * torch.linalg.eigvalsh(moments)[:-1].mean().clamp_min(1e-12)
    return torch.linalg.solve(moments + ridge * torch.eye(len(moments)), c.T @ f / len(c)).T.float()


def kept(contexts: Tensor, former: Tensor) -> float:
    """Of what tells the former contexts apart, the share that `fitted` finds in the new ones: fitted on the first nine
    tenths of the texts, measured on the rest, every direction of former counting alike, since a side is a narrow one.
    Not above 1; below 0 where a fit is worse than the mean; NaN where there is nothing to tell apart."""
    n = max(1, len(contexts) * 9 // 10)
    mean = former[:n].mean(0)
    if not (former - mean).abs().max() > 1e-6:
        return math.nan
    white = whitening(former[:n] - mean)
    left, all_of_it = former[n:] - contexts[n:] @ fitted(contexts[:n], former[:n]).T, former[n:] - mean
    return 1 - ((left @ white).square().sum() / (all_of_it @ white).square().sum()).item()


def context_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a UNet that a context goes into."""
    found = [m for name, m in model.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    return [m for m in found if isinstance(m, nn.Linear)]


@torch.no_grad()
def multiply(model: nn.Module, matrix: Tensor) -> None:
    """Multiply the weights of the context's layers by `matrix` (D, D), in place."""
    for layer in context_layers(model):
        layer.weight.copy_(layer.weight @ matrix.to(layer.weight))


@contextmanager
def folded(model: nn.Module, matrix: Tensor | None) -> Iterator[nn.Module]:
    """The model that takes contexts as they are, W inside its weights; afterwards as it was. None: nothing to fold."""
    kept = [] if matrix is None else [(m, m.weight.detach().clone()) for m in context_layers(model)]
    if matrix is not None:
        multiply(model, matrix)
    try:
        yield model
    finally:
        with torch.no_grad():
            for layer, weight in kept:
                layer.weight.copy_(weight)
