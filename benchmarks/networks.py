"""The published networks and MONAI's with the same weights; run as a program it prints the memory one of them takes."""

import gc
import json
import sys
import tempfile

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU a published pass; a decode of half its edge, since MONAI's whole decode of the published size does not fit
INPUTS = {  # of each network's pass, channels and grid
    "unet": (4, *((128, 128, 32) if DEVICE == "cuda" else (32, 32, 16))),
    "vae": (4, *((64, 64, 16) if DEVICE == "cuda" else (16, 16, 16))),
    "vae 128x128x64": (4, 32, 32, 16),
    "vae encode": (1, 128, 128, 64),
}
BUDGET = "250MB"


def build(network: str, peer: str, dtype: str):
    """A function without arguments that runs one pass; weights depend on a seed alone, so both peers have the same."""
    from t2ct.models import VAE, UNet
    from t2ct.ops import use_backend

    torch.manual_seed(0)
    ours = UNet() if network == "unet" else VAE()
    generator = torch.Generator().manual_seed(1)
    for p in ours.parameters():
        if not p.any():  # zero-initialised branches: a pass through zeros would prove nothing
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    ours.eval().requires_grad_(False).to(DEVICE)
    x = torch.randn(1, *INPUTS[network], generator=generator)
    t, context = torch.tensor([500.0]), torch.randn(1, 1, 768, generator=generator)
    label, spacing = torch.ones(1, dtype=torch.long), torch.tensor([[75.0, 75.0, 300.0]])
    x, t, context, label, spacing = (v.to(DEVICE) for v in (x, t, context, label, spacing))
    wanted = getattr(torch, dtype)
    if peer.startswith("t2ct"):
        ours, x, context, spacing = ours.to(wanted), x.to(wanted), context.to(wanted), spacing.to(wanted)
        backend = "triton" if peer == "t2ct triton" else None

        def mine():
            with use_backend(backend):
                if network == "unet":
                    return ours(x, t, context, label, spacing)
                if network == "vae encode":
                    return ours.encode(x)[0]
                within = (BUDGET, tempfile.gettempdir()) if peer.endswith(BUDGET) else (None, None)
                return ours.decode(x, within[0], spool_dir=within[1])

        return mine

    theirs = monai_unet() if network == "unet" else monai_vae()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    passing = theirs if network == "unet" else theirs.decode
    if peer == "monai compiled":
        passing = torch.compile(passing)

    if peer == "monai windows":  # the published 80 of 128 latent voxels along X and Y, all of Z
        from monai.inferers import SlidingWindowInferer

        roi = [round(n * 80 / 128) for n in INPUTS[network][1:3]] + [INPUTS[network][3]]
        inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=1, overlap=0.4, mode="gaussian")

        def passing(z):
            return inferer(z, theirs.decode)

    def run():  # bfloat16 by autocast, as MAISI runs it: its average pooling has no bfloat16 of its own on a CPU
        with torch.autocast(DEVICE, wanted, enabled=dtype != "float32"):
            if network == "vae encode":
                return theirs.encode(x)[0]
            if network != "unet":
                return passing(x)
            return passing(x=x, timesteps=t, context=context, class_labels=label, spacing_tensor=spacing)

    return run


def monai_unet():
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    with torch.device("meta"):
        return DiffusionModelUNetMaisi(
            spatial_dims=3, in_channels=4, out_channels=4, num_channels=(64, 128, 256, 512),
            attention_levels=(False, False, True, True), norm_num_groups=32, resblock_updown=True, num_head_channels=32,
            with_conditioning=True, cross_attention_dim=768, num_class_embeds=128, include_fc=True,
            include_spacing_input=True)  # fmt: skip


def monai_vae(splits: int = 1):
    """splits: the pieces that every convolution's input is cut into, the published way to less memory."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    with torch.device("meta"):
        return AutoencoderKlMaisi(
            spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(64, 128, 256),
            num_res_blocks=(2, 2, 2), norm_num_groups=32, norm_eps=1e-6, attention_levels=(False, False, False),
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, norm_float16=False, num_splits=splits,
            dim_split=1, save_mem=False)  # fmt: skip


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    pass_once = build(*json.loads(sys.argv[1]))
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the highest resident size counts from here
    with torch.inference_mode():
        pass_once()
        pass_once()
    print(status("VmHWM") - before)
