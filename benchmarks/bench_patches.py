"""The published VAE over whole CTs inside memory budgets, against the published ways: windows, and split convolutions.

On a GPU 512 x 512 x 128 and 512 x 512 x 512 voxels in float16. On a CPU the same on small volumes in float32: it shows
that the script works, and nothing else. Every budget's bits are compared before anything is timed.
"""

import statistics
import tempfile
from functools import partial

import pytest
import torch
from bench_networks import memory
from conftest import CUDA, once
from networks import DEVICE, monai_vae

SIZE, LARGE = ((512, 512, 128), (512, 512, 512)) if CUDA else ((64, 64, 32), (64, 64, 64))
DTYPE = torch.float16 if CUDA else torch.float32
BUDGETS = ("4GB", "2GB") if CUDA else ("150MB", "100MB")
LARGE_BUDGET, ENCODE_BUDGET = ("8GB", "4GB") if CUDA else ("300MB", "150MB")
SPLITS = 8 if CUDA else 2  # of few voxels fewer
ROUNDS = 3
TOLERANCE = 2e-2 if CUDA else 1e-5


@pytest.fixture(scope="module")
def vae():
    from t2ct.models import VAE

    torch.manual_seed(0)
    return VAE().eval().requires_grad_(False).to(DEVICE)


def latents(size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, *(n // 4 for n in size), generator=generator).to(DEVICE, DTYPE)


def theirs(vae, z, splits):
    """MONAI's decode in splits, or with 0 the published windows, by autocast."""
    from monai.inferers import SlidingWindowInferer

    network = monai_vae(max(1, splits))
    network.load_state_dict({k: v.float() for k, v in vae.state_dict().items()}, assign=True)
    network.eval().requires_grad_(False)
    roi = [round(n * 80 / 128) for n in z.shape[2:4]] + [z.shape[4]]
    inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=1, overlap=0.4, mode="gaussian")

    def run():
        with torch.autocast(DEVICE, DTYPE, enabled=CUDA):
            return network.decode(z.float()) if splits else inferer(z.float(), network.decode)

    return run


def race(benchmark, peers, group):
    """Time the peers in turns and take their memory; the first is what the others are divided by."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if CUDA else None
    times = {name: [] for name in peers}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, run in peers.items():
                times[name].append(once(run, flush))
        peaks = {name: memory(run) for name, run in peers.items()} if CUDA else {}
        benchmark.pedantic(next(iter(peers.values())), rounds=1)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    benchmark.group = group
    benchmark.extra_info.update(seconds=medians, memory=peaks, ratios={n: t / first for n, t in medians.items()})
    print(f"{group}: seconds {medians}, memory {peaks}")


def test_decode(vae, benchmark):
    z, ours = latents(SIZE), vae.to(DTYPE)
    peers = {"t2ct": partial(ours.decode, z)}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        spool = None if CUDA else folder
        peers |= {f"t2ct in {b}": partial(ours.decode, z, b, spool_dir=spool) for b in BUDGETS}
        peers |= {"monai windows": theirs(vae, z, 0), f"monai in {SPLITS} splits": theirs(vae, z, SPLITS)}
        whole = ours.decode(z)
        assert all(torch.equal(peers[f"t2ct in {b}"](), whole) for b in BUDGETS), "another budget, other bits"
        other = peers[f"monai in {SPLITS} splits"]().float()
        error = ((whole.float() - other).norm() / other.norm()).item()
        assert error <= TOLERANCE, f"wrong before fast: {error:.1e} from MONAI in splits"
        benchmark.extra_info["error"] = error
        del whole, other
        race(benchmark, peers, f"decode {'x'.join(map(str, SIZE))}")


def test_large_decode(vae, benchmark):
    z, ours = latents(LARGE), vae.to(DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        run = partial(ours.decode, z, LARGE_BUDGET, spool_dir=None if CUDA else folder, hu=True)
        race(benchmark, {f"t2ct in {LARGE_BUDGET}": run}, f"decode {'x'.join(map(str, LARGE))}")


def test_encode(vae, benchmark):
    generator = torch.Generator().manual_seed(2)
    x, ours = torch.rand(1, 1, *SIZE, generator=generator).to(DEVICE, DTYPE), vae.to(DTYPE)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        within = partial(ours.encode, x, ENCODE_BUDGET, spool_dir=None if CUDA else folder)
        assert torch.equal(within()[0], ours.encode(x)[0]), "another budget, other bits"
        peers = {"t2ct": partial(ours.encode, x), f"t2ct in {ENCODE_BUDGET}": within}
        race(benchmark, peers, f"encode {'x'.join(map(str, SIZE))}")
