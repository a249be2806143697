"""A small model in the published layout: three .pt files of random weights, and a tokenizer."""

import pytest
import torch

from t2ct.config import PipelineConfig
from t2ct.models import CLIP3D, VAE, CLIP3DConfig, TextConfig, UNet, UNetConfig, VAEConfig, VisionConfig
from t2ct.text import Tokenizer

SMALL = PipelineConfig(
    name="small",
    size=(16, 16, 16),
    spacing=(20.0, 20.0, 20.0),
    vae=VAEConfig(channels=(8, 8, 16), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(
        channels=(8, 16),
        attention_levels=(False, True),
        head_dim=8,
        cross_attention_dim=24,
        norm_groups=4,
        num_res_blocks=1,
    ),
    clip=CLIP3DConfig(
        text=TextConfig(vocab_size=280, width=16, layers=1, heads=2, mlp_width=32, max_length=48),
        vision=VisionConfig(
            dim=16,
            image_size=16,
            patch_size=8,
            temporal_patch_size=4,
            spatial_layers=1,
            temporal_layers=1,
            heads=2,
            head_dim=8,
            codebook_size=8,
            depth=16,
        ),
        embed_dim=24,
    ),
)


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Files as they were published: three .pt, the UNet's wrapped with its scale factor, and a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    states = {
        "vae": randomised(VAE(SMALL.vae), 1).state_dict(),
        "unet": {
            "unet_state_dict": randomised(UNet(SMALL.unet), 2).state_dict(),
            "scale_factor": torch.tensor(1.25),
            "epoch": 200,
        },
        "clip": randomised(CLIP3D(SMALL.clip), 3).state_dict(),
    }
    files = {name: folder / f"{name}.pt" for name in states}
    for name, state in states.items():
        torch.save(state, files[name])
    files["tokenizer"] = folder / "tokenizer.json"
    words = [
        f"{a} {b} pleural effusion nodule in the {c} lobe of lung"
        for a in ("large", "small")
        for b in ("left", "right")
        for c in ("upper", "lower")
    ]
    Tokenizer.train(words * 9, SMALL.clip.text.vocab_size, files["tokenizer"])
    files["config"] = folder / "config.json"
    files["config"].write_text(SMALL.to_json())
    return files
