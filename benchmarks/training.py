"""Training steps: this package's, as its loop makes them, and MONAI's networks with the same weights and torch's AdamW.

As a program it is one peer that waits for orders on stdin and answers each with a line (benchmarks/bench_training.py):
"step" (seconds), "memory" (two numbers of bytes), "gradients FILE".
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from networks import monai_unet, monai_vae
from safetensors.torch import save_file

GRID = (16, 16, 8)  # of latents
PATCH = (32, 32, 32)  # of a volume
TOWERS = 64  # volumes in a batch of CLIP3D


def ours(kind, precision, micros=1, blocks=False):
    """(run, gradients, parameters): a whole step, its gradients alone, what they are of."""
    from t2ct.train.loop import Run
    from t2ct.train.memory.recipes import checkpoint_blocks, probe_recipe
    from t2ct.train.presets import TINY, preset

    torch.manual_seed(0)
    config = preset(kind, "published")
    vae, clip = config.model.vae, TINY.clip
    if kind == "ldm":
        config = replace(config, batch=1, model=replace(config.model, size=tuple(n * vae.factor for n in GRID)))
    elif kind == "vae":
        config = replace(config, batch=1, patches=(PATCH,), patch_from=(0.0,), perceptual="none", critic_from=0.0)
        config = replace(config, model=replace(config.model, size=PATCH))
    else:
        vision = replace(clip.vision, image_size=64, depth=64, dim=128, heads=4, head_dim=32, spatial_layers=2,
                         temporal_layers=2)  # fmt: skip
        text = replace(clip.text, width=128, heads=4, layers=4, mlp_width=512)
        model = replace(TINY, size=(64, 64, 64), clip=replace(clip, vision=vision, text=text, embed_dim=128))
        config = replace(config, batch=TOWERS, model=model)
    config = replace(config, precision={"float32": "float32", "bfloat16": "bf16"}[precision])
    recipe = probe_recipe(kind, config, torch.device("cpu"))
    if blocks:
        checkpoint_blocks(recipe.parts)
    randomise(recipe.parts[next(iter(recipe.parts))])
    for part in recipe.parts.values():
        part.train()
    state = Run(recipe, config, torch.device("cpu"))
    torch.manual_seed(1)
    batch = recipe.example(torch.device("cpu"), config.batch)
    torch.manual_seed(2)
    held = [{k: v.chunk(micros)[i] for k, v in batch.items()} for i in range(micros)]

    def gradients():
        recipe.begin(0)
        for name, call in state.calls.items():
            recipe.gradients(name, call, held, state._backward, state.autocast)

    parts = {name: dict(part.named_parameters()) for name, part in recipe.parts.items()}
    return partial(state.update, held), gradients, parts, (recipe, batch)


def randomise(network):
    """Zero-initialised branches get numbers: a gradient through zeros would prove nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def monai(kind, precision, layout):
    """The same of MONAI's networks; layout "contiguous" or "channels_last"."""
    *_, parts, (recipe, batch) = ours(kind, precision)
    memory_format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    low = precision == "bfloat16"

    def made(network, name):
        weights = {k: v.detach().clone() for k, v in recipe.parts[name].state_dict().items()}
        network.load_state_dict(weights, assign=True)
        network.requires_grad_(True).train().to(memory_format=memory_format)
        return network, torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=low)

    if kind == "ldm":
        unet, adam = made(monai_unet(), "unet")
        from t2ct.diffusion import shift_timestep

        x0, noise, c = batch["x0"], batch["noise"], recipe.config.model
        t = shift_timestep(batch["t"], x0[0, 0].numel(), c.base_voxels)
        share = t[:, None, None, None, None]
        label = torch.full((len(x0),), c.class_label, dtype=torch.long)

        def gradients():
            noisy = ((1 - share) * x0 + share * noise).contiguous(memory_format=memory_format)
            with autocast():
                v = unet(x=noisy, timesteps=t * 1000, context=batch["context"], class_labels=label,
                         spacing_tensor=batch["spacing"])  # fmt: skip
                loss = F.l1_loss(v.float(), x0 - noise)
            loss.backward()

        def run():
            adam.zero_grad(set_to_none=True)
            gradients()
            adam.step()

        return run, gradients, {"unet": dict(unet.named_parameters())}

    from monai.networks.nets import PatchDiscriminator

    vae, adam = made(monai_vae(), "vae")
    critic = PatchDiscriminator(spatial_dims=3, channels=32, in_channels=1, out_channels=1, num_layers_d=3,
                                norm="INSTANCE")  # fmt: skip
    theirs, mine = list(critic.parameters()), list(recipe.parts["critic"].parameters())
    assert [p.shape for p in theirs] == [p.shape for p in mine]
    with torch.no_grad():
        for p, q in zip(theirs, mine, strict=True):
            p.copy_(q)
    critic = critic.train().to(memory_format=memory_format)
    second = torch.optim.AdamW(critic.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    x, noise, c = batch["x"].contiguous(memory_format=memory_format), batch["noise"], recipe.config
    held = []

    def generator():
        with autocast():
            mu, sigma = vae.encode(x)
            y = vae.decode(mu + sigma * noise.to(mu.dtype)).float()
            critic.requires_grad_(False)
            opinion = critic(y)[-1].float()
            critic.requires_grad_(True)
        mu, sigma = mu.float(), sigma.float()
        kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).flatten(1).sum(1).mean()
        loss = F.l1_loss(y, x) + c.kl_weight * kl + c.adversarial_weight * (opinion - 1).square().mean()
        loss.backward()
        held[:] = [y.detach()]

    def discriminator():
        with autocast():
            real, fake = critic(x)[-1].float(), critic(held[0])[-1].float()
        ((real - 1).square().mean() + fake.square().mean()).div(2).backward()

    def gradients():
        generator()
        discriminator()

    def run():
        adam.zero_grad(set_to_none=True)
        generator()
        adam.step()
        second.zero_grad(set_to_none=True)
        discriminator()
        second.step()

    named = dict(zip(dict(recipe.parts["critic"].named_parameters()), critic.parameters(), strict=True))
    return run, gradients, {"vae": dict(vae.named_parameters()), "critic": named}


def activations(gradients, parts):
    """Bytes beyond weights and gradients at the highest moment of computing them: where gradients lie there already,
    as in an update of several micro-batches, and where they are made anew."""
    from t2ct.train.memory.measure import peak_of

    gradients()
    there = round(peak_of(gradients, torch.device("cpu")))
    every = [p for part in parts.values() for p in part.values() if p.grad is not None]
    kept = sum(p.grad.nbytes for p in every)
    for p in every:
        p.grad = None
    return there, round(peak_of(gradients, torch.device("cpu"))) - kept


def main(kind, precision, peer):
    from t2ct.train.parts.machine import kept_memory

    mine = not peer.startswith("monai")
    made = ours(kind, precision, int(peer.partition("/")[2] or 1)) if mine else monai(kind, precision, peer.split()[1])
    run, gradients, parts = made[:3]
    print("ready", flush=True)
    with kept_memory(torch.device("cpu")) if mine else nullcontext():
        for line in sys.stdin:
            order, _, file = line.strip().partition(" ")
            if order == "step":
                started = time.perf_counter()
                run()
                print(time.perf_counter() - started, flush=True)
            elif order == "memory":
                print(*activations(gradients, parts), flush=True)
            elif order == "gradients":
                for part in parts.values():
                    for p in part.values():
                        p.grad = None
                gradients()
                named = {f"{n}.{k}": p.grad for n, part in parts.items() for k, p in part.items() if p.grad is not None}
                save_file({k: v.contiguous() for k, v in named.items()}, file)
                print("saved", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
