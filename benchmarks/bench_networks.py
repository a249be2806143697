"""A pass of the published UNet and a decode of the published VAE, against MONAI's networks with the same weights.

Both peers are compared before they are timed. Time: the peers of a row take turns in one process, medians. Memory: on a
CPU each peer in a process of its own, the highest resident size during two passes less that of the loaded model; on a
GPU what torch allocated.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CUDA, once, synchronize
from networks import BUDGET, DEVICE, build

ROUNDS = 7
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
PEERS = ("monai", "monai compiled", "t2ct", "t2ct triton") if CUDA else ("monai", "t2ct")


def memory(run, *case):
    """Bytes above the loaded model at the highest moment of a pass."""
    if CUDA:
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, str(Path(__file__).with_name("networks.py")), json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


CASES = [(n, d) for n in ("unet", "vae") for d in (("float16", "bfloat16") if CUDA else ("float32", "bfloat16"))]
CASES += [] if CUDA else [("vae 128x128x64", "bfloat16"), ("vae encode", "bfloat16")]


@pytest.mark.parametrize("network,dtype", CASES)
def test_network(network, dtype, benchmark):
    within = (f"t2ct {BUDGET}", "monai windows") if network == "vae 128x128x64" else ()
    peers = {name: build(network, name, dtype) for name in PEERS + within}
    times: dict[str, list[float]] = {name: [] for name in peers}
    with torch.inference_mode():
        exact = build(network, "monai", "float32")().double()
        errors = {name: ((run().double() - exact).norm() / exact.norm()).item() for name, run in peers.items()}
        right = {name: e <= TOLERANCE[dtype] for name, e in errors.items()}  # windows are not the network
        assert all(right[name] for name in peers if name != "monai windows"), f"wrong before fast: {errors}"
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if CUDA else None
        for _ in range(ROUNDS if network in ("unet", "vae") else 3):  # the larger ones take 10 s and more
            for name, run in peers.items():
                times[name].append(once(run, flush))
        peaks = {name: memory(run, network, name, dtype) for name, run in peers.items()}
        benchmark.pedantic(peers["t2ct"], rounds=3)
    benchmark.group = f"{network} {dtype}"
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info.update(
        seconds=medians,
        memory=peaks,
        error=errors,
        time_ratio=medians["t2ct"] / medians["monai"],
        memory_ratio=peaks["t2ct"] / peaks["monai"],
    )
    print(
        f"{network} {dtype}: time {medians} ratio {medians['t2ct'] / medians['monai']:.3f}, "
        f"memory {peaks} ratio {peaks['t2ct'] / peaks['monai']:.3f}, error {errors}"
    )
