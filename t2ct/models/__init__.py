"""The three networks: thin torch modules with the published keys."""

from t2ct.models.clip import CLIP3D, CLIP3DConfig
from t2ct.models.text import TextConfig
from t2ct.models.unet import UNet, UNetConfig
from t2ct.models.vae import VAE, VAEConfig, hu_to_unit, unit_to_hu
from t2ct.models.vision import VisionConfig

__all__ = [
    "CLIP3D",
    "VAE",
    "CLIP3DConfig",
    "TextConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "VisionConfig",
    "hu_to_unit",
    "unit_to_hu",
]
