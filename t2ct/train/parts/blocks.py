"""The blocks of the networks: what is computed again for a gradient, and what several devices put together at once."""

from torch import nn

from t2ct.models.text import TextLayer
from t2ct.models.unet_blocks import ResBlock, SpatialTransformer
from t2ct.models.vae import ResBlock as VAEBlock
from t2ct.models.vision import CosineAttention

KINDS = (ResBlock, SpatialTransformer, VAEBlock, TextLayer, CosineAttention)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks in a network, none inside another: tensors go in and one comes out."""
    feed_forward = 5  # modules of the vision tower's, which has no class of its own
    return [
        m
        for m in network.modules()
        if isinstance(m, KINDS) or (isinstance(m, nn.Sequential) and len(m) == feed_forward)
    ]
