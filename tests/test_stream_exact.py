"""A corner of what a budget decodes, against the network's definition in float64 with the statistics that the run took.

Only with them is a corner defined at all: a norm's statistics depend on the whole volume. That the statistics are those
of the whole volume is what test_stream.py shows.
"""

import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from t2ct import stream
from t2ct.models import VAE, VAEConfig
from t2ct.stream.run import Run, planes_of

HALO = 12  # latent voxels that a decoded voxel depends on, to one side, in the published network: 10.5


def decoded(vae, z, budget, spool_dir):
    """The decoder's output for z (1, C, x, y, z), the statistics of its norms, and the plan."""
    nodes = vae.nodes("decode")
    plan = stream.plan_for(nodes, z.shape, z.dtype, "cpu", budget, spool_dir)
    out = torch.empty(*plan.graph.sizes[-1], nodes[-1].channels, dtype=z.dtype)
    with torch.no_grad():
        run = Run(plan, dict(vae.named_parameters()), planes_of(z), out, spool_dir, None, None)
        run()
    return out.permute(3, 0, 1, 2)[None], run.stats, plan


def defined(vae, z, stats):
    """What the nodes say, one after another, in float64; stats: per node that a norm reads, mean and 1/deviation."""
    nodes, parameters = vae.nodes("decode"), {k: p.double() for k, p in vae.named_parameters()}
    last = {n: m for m, node in enumerate(nodes) if m for n in node.inputs}
    values = {0: z.double()}

    def of(name):
        return parameters[f"{name}.weight"], parameters[f"{name}.bias"]

    for n, node in enumerate(nodes[1:], 1):
        h = values[node.source]
        if node.norm:
            each = h.shape[1] // node.groups
            mean, rstd = (s.double().reshape(-1).repeat_interleave(each) for s in stats[node.source])
            scale, shift = of(node.norm)
            h = (h - mean.view(-1, 1, 1, 1)) * (rstd * scale).view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
            h = F.silu(h) if node.silu else h
        if node.resample == "up":
            h = F.interpolate(h, scale_factor=2, mode="trilinear", align_corners=False)
        h = convolved(h, *of(node.name), node.kernel // 2)
        if node.residual is not None:
            skip = values[node.residual]
            h = h + (F.conv3d(skip, *of(node.shortcut)) if node.shortcut else skip)
        values = {k: v for k, v in values.items() if last[k] > n} | {n: h}
    return h


def convolved(h, weight, bias, padding, planes=4):
    """F.conv3d, a few planes at a time: in float64 it writes every voxel 27 times before it multiplies."""
    h = F.pad(h, [padding] * 6)
    starts = range(0, h.shape[2] - 2 * padding, planes)
    return torch.cat([F.conv3d(h[:, :, a : a + planes + 2 * padding], weight, bias) for a in starts], 2)


def error_of_corner(config, size, dtype, budget, spool_dir, corner):
    """Relative root mean square error of the first 4 * corner voxels along every axis; the plan; the resident bytes
    that decoding added at its highest moment."""
    torch.manual_seed(0)
    vae = VAE(config).eval().requires_grad_(False)
    z = torch.randn(1, 4, *size)
    vae = vae.to(dtype)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    made, stats, plan = decoded(vae, z.to(dtype), budget, spool_dir)
    resident = status("VmHWM") - before
    few = tuple(slice(min(n, corner + HALO)) for n in size)
    wanted = defined(vae, z.to(dtype)[(..., *few)], stats)
    inside = (..., *[slice(4 * corner)] * 3)
    difference = made[inside].double() - wanted[inside]
    return (difference.square().mean() / wanted[inside].square().mean()).sqrt().item(), plan, resident


def status(name):
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def test_a_corner_is_the_definition(tmp_path):
    config = VAEConfig(channels=(16, 32, 48), norm_groups=8)
    for budget in ("1GB", "40MB"):
        error, plan, _ = error_of_corner(config, (20, 18, 17), torch.float32, budget, tmp_path, 4)
        assert error < 1e-5, error
    assert plan.peak <= 40e6


@pytest.mark.slow
def test_the_published_size_in_two_gigabytes(tmp_path):
    """512 x 512 x 128 voxels with random weights of the published size: minutes, and 17 GB of disk."""
    error, plan, resident = error_of_corner(VAEConfig(), (128, 128, 32), torch.bfloat16, "2GB", tmp_path, 12)
    print(f"peak {plan.peak / 1e9:.2f} GB, resident {resident / 1e9:.2f} GB, relative error {error:.4f}")
    assert plan.peak <= 2e9 and resident <= 2e9 and error < 0.02
