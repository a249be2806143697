"""A pass of the published UNet and a decode of the published VAE, against MONAI's networks with the same weights.

Both peers are compared before they are timed. Time: the peers of a row take turns in one process, medians. Memory: each
peer in a process of its own, the highest resident size during two passes less that of the loaded model.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import build

ROUNDS = 7
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def memory(*case):
    command = [sys.executable, str(Path(__file__).with_name("networks.py")), json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["unet", "vae"])
def test_network(network, dtype, benchmark):
    peers = {name: build(network, name, dtype) for name in ("monai", "t2ct")}
    times: dict[str, list[float]] = {name: [] for name in peers}
    with torch.inference_mode():
        exact = build(network, "monai", "float32")().double()
        errors = {name: ((run().double() - exact).norm() / exact.norm()).item() for name, run in peers.items()}
        assert all(e <= TOLERANCE[dtype] for e in errors.values()), f"wrong before fast: {errors}"
        for _ in range(ROUNDS):
            for name, run in peers.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        benchmark.pedantic(peers["t2ct"], rounds=3)
    benchmark.group = f"{network} {dtype}"
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: memory(network, name, dtype) for name in peers}
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
