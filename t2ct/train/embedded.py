"""Make the model in the package from nothing: `python -m t2ct.train.embedded --work DIR --output t2ct/assets/embedded`.

Phantoms, VAE, CLIP3D, latent diffusion, export: each stage is kept in --work and a second call goes on where the first
stopped. `torchrun --nproc-per-node 2 -m t2ct.train.embedded …` gives the diffusion one process a core instead of one
process with two threads. `--start t2ct/assets/embedded` trains the diffusion of the model in the package further.
"""

import argparse
import hashlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from t2ct.config import PipelineConfig
from t2ct.files import write_files
from t2ct.models import CLIP3D, VAE, CLIP3DConfig, TextConfig, UNet, UNetConfig, VAEConfig, VisionConfig
from t2ct.pipeline import T2CTPipeline
from t2ct.text import Tokenizer
from t2ct.train.clip import clip_loss, embed_texts
from t2ct.train.ldm import encode_volumes, freeze_dead, ldm_loss
from t2ct.train.loop import LoopConfig, ranks, run
from t2ct.train.phantom_set import PhantomSet, phantom_set
from t2ct.train.vae import vae_loss

PHANTOMS = 6000
CONFIG = PipelineConfig(
    name="embedded",
    size=(96, 96, 48),
    spacing=(352 / 96, 352 / 96, 320 / 48),
    schedule="exact",
    base_voxels=24 * 24 * 12 // 16,  # the shift that the published model has at its size: 16^(1/3) = 2.52
    vae=VAEConfig(channels=(16, 32, 96), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(
        channels=(64, 80, 96),
        attention_levels=(False, True, True),
        head_dim=16,
        cross_attention_dim=256,
        norm_groups=8,
        num_res_blocks=1,
        num_class_embeds=2,
    ),
    clip=CLIP3DConfig(
        text=TextConfig(vocab_size=1024, width=160, layers=4, heads=5, mlp_width=640, max_length=192),
        vision=VisionConfig(
            dim=96,
            image_size=96,
            patch_size=12,
            temporal_patch_size=12,
            spatial_layers=2,
            temporal_layers=2,
            heads=4,
            head_dim=24,
            codebook_size=512,
            depth=48,
        ),
        embed_dim=256,
    ),
)
# Slabs of whole cross-sections first, then whole volumes, whose statistics GroupNorm will see in use.
VAE_SLAB = (96, 96, 24)
VAE_SLAB_LOOP = LoopConfig(
    steps=1900, batch_size=1, learning_rate=5e-4, matrix_learning_rate=0.006, warmup=30, ema_decay=0.99
)
VAE_LOOP = LoopConfig(
    steps=500, batch_size=1, learning_rate=3e-4, matrix_learning_rate=0.004, warmup=20, ema_decay=0.99
)
CLIP_LOOP = LoopConfig(steps=1100, batch_size=64, learning_rate=5e-4, warmup=70, weight_decay=1e-4)
LDM_LOOP = LoopConfig(  # batch of each process
    steps=7800, batch_size=4, learning_rate=1e-3, matrix_learning_rate=0.008, warmup=100, ema_decay=0.998
)


def train_vae(work: Path, data: PhantomSet) -> VAE:
    torch.manual_seed(0)
    vae = VAE(CONFIG.vae)
    torch.nn.init.constant_(vae.quant_conv_log_sigma.conv.bias, -4.0)  # type: ignore[arg-type]  # little noise at first
    slab = vae_loss(vae, data.hu, VAE_SLAB_LOOP.batch_size, VAE_SLAB)
    run(vae, slab, VAE_SLAB_LOOP, work / "vae-slab.safetensors", "VAE, slabs")
    whole = vae_loss(vae, data.hu, VAE_LOOP.batch_size, CONFIG.size)
    run(vae, whole, VAE_LOOP, work / "vae.safetensors", "VAE, volumes")
    return vae


def train_tokenizer(work: Path, data: PhantomSet) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        Tokenizer.train([text for texts in data.prompts for text in texts], CONFIG.clip.text.vocab_size, path)
    return Tokenizer.from_file(path)


def token_ids(tokenizer: Tokenizer, data: PhantomSet) -> torch.Tensor:
    """(N, WORDINGS, L) ids of every wording."""
    flat = tokenizer.encode([text for texts in data.prompts for text in texts], CONFIG.clip.text.max_length)
    return flat.view(len(data), -1, flat.shape[1])


def train_clip(work: Path, data: PhantomSet, ids: torch.Tensor) -> CLIP3D:
    torch.manual_seed(0)
    clip = CLIP3D(CONFIG.clip)
    run(clip, clip_loss(clip, data.hu, ids, CLIP_LOOP.batch_size), CLIP_LOOP, work / "clip.safetensors", "CLIP3D")
    return clip


def latents(path: Path, hu: np.ndarray, vae: VAE) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and sigma of every volume: encoded once, kept at `path` with the hash of the VAE that made them."""
    maker = hashlib.sha256(save(vae.state_dict())).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as f:
            if f.metadata() == {"vae": maker, "count": str(len(hu))}:
                return f.get_tensor("mu"), f.get_tensor("sigma")
    mu, sigma = encode_volumes(vae, hu)
    write_files({path: save({"mu": mu, "sigma": sigma}, {"vae": maker, "count": str(len(hu))})})
    return mu, sigma


def train_ldm(
    work: Path, data: PhantomSet, ids: torch.Tensor, vae: VAE, clip: CLIP3D, start: Path | None = None
) -> tuple[UNet, float]:
    rank, world = ranks()
    torch.manual_seed(0)
    unet = UNet(CONFIG.unet)
    if start is not None:  # a checkpoint in `work` still goes before it
        unet.load_state_dict(T2CTPipeline.from_pretrained(start, "cpu", torch.float32).unet.state_dict())
    freeze_dead(unet)
    mu, _ = latents(work / f"latents-{rank}-of-{world}.safetensors", data.hu[rank::world], vae)
    std = mu.float().std()
    if world > 1:
        dist.all_reduce(std)
    scale = world / std.item()
    embeds = embed_texts(clip, ids[rank::world].flatten(0, 1)).view(len(mu), ids.shape[1], -1)
    trainee = DistributedDataParallel(unet) if world > 1 else unet
    loss = ldm_loss(trainee, mu, embeds, CONFIG.spacing, scale, LDM_LOOP.batch_size, CONFIG.base_voxels)
    run(unet, loss, LDM_LOOP, work / "unet.safetensors", "LDM")
    return unet, scale


def export(output: Path, vae: VAE, clip: CLIP3D, unet: UNet, tokenizer: Tokenizer, scale: float) -> None:
    """The folder that `T2CTPipeline.from_pretrained` reads, networks in float16, of CLIP3D the text tower."""

    def half(model: nn.Module) -> bytes:
        state = model.state_dict().items()
        return save({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state})

    text = CLIP3D(clip.config, towers=("text",))
    text.load_state_dict({key: clip.state_dict()[key] for key in text.state_dict()})
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": replace(CONFIG, scale_factor=scale).to_json().encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
        "vae.safetensors": half(vae),
        "clip.safetensors": half(text),
        "unet.safetensors": half(unet),
    }
    write_files({output / name: content for name, content in files.items()})
    for name, content in files.items():
        print(f"{name}  {len(content) / 1e6:.2f} MB  sha256 {hashlib.sha256(content).hexdigest()[:16]}")


def prepare(work: Path, start: Path | None = None) -> tuple[PhantomSet, Tokenizer, torch.Tensor, VAE, CLIP3D]:
    """Everything before the diffusion: phantoms, tokenizer, ids, VAE, CLIP3D; loaded where it is in `work` already.

    start: a model whose tokenizer, VAE and text tower are taken as they are.
    """
    data = phantom_set(work / "phantoms", PHANTOMS, CONFIG.size)
    if start is not None:
        pipe = T2CTPipeline.from_pretrained(start, "cpu", torch.float32)
        return data, pipe.tokenizer, token_ids(pipe.tokenizer, data), pipe.vae, pipe.clip
    tokenizer = train_tokenizer(work, data)
    ids = token_ids(tokenizer, data)
    return data, tokenizer, ids, train_vae(work, data), train_clip(work, data, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for phantoms and checkpoints (about 6 GB)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--start", type=Path, help="folder of a model: keep its VAE and text tower, train its UNet on")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
    rank, _ = ranks()
    if rank == 0:  # the first process makes what the others then find
        made = prepare(args.work, args.start)
    if dist.is_initialized():
        dist.barrier()
    data, tokenizer, ids, vae, clip = made if rank == 0 else prepare(args.work, args.start)
    unet, scale = train_ldm(args.work, data, ids, vae, clip, args.start)
    if rank == 0:
        export(args.output, vae, clip, unet, tokenizer, scale)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
