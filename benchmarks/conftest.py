"""Peaks measured in the same session; a row is proven right before it is timed and carries its share of the roofline.

Threads are pinned: OMP_PROC_BIND=true OMP_PLACES=cores pytest benchmarks --benchmark-json=out.json
"""

import importlib.metadata
import os
import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = DEVICE == "cuda"


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def best(fn, repeat=5):
    times = []
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        fn()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def peaks():
    """(bytes/s of a copy, flop/s of a float32 matrix product) on this machine, now."""
    source = torch.ones(1 << (30 if CUDA else 27), dtype=torch.uint8, device=DEVICE)
    target, n = torch.ones_like(source), 8192 if CUDA else 1024
    m = torch.randn(n, n, device=DEVICE)
    return 2 * source.numel() / best(lambda: target.copy_(source)), 2 * n**3 / best(lambda: m @ m)


def relative_error(y, oracle):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(y, oracle, strict=True))


@pytest.fixture
def measure(benchmark, peaks):
    """measure(fn, oracle, nbytes, flops, tolerance): fn returns a tuple of tensors, compared with the float64 one."""

    def run(fn, oracle, nbytes, flops, tolerance):
        error = relative_error(fn(), oracle)
        assert error <= tolerance, f"wrong before fast: relative error {error:.1e} > {tolerance:.1e}"
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(lambda: (fn(), synchronize()), rounds=10, warmup_rounds=2)
        seconds = benchmark.stats["min"]
        benchmark.extra_info.update(
            error=error, gbs=nbytes / seconds / 1e9, roofline=max(nbytes / peaks[0], flops / peaks[1]) / seconds)
        if CUDA:
            benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()

    return run


def pytest_benchmark_update_machine_info(machine_info):
    versions = {}
    for name in ("t2ct", "torch", "triton", "monai"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    machine_info |= {
        "versions": versions, "cudnn": torch.backends.cudnn.version(), "threads": torch.get_num_threads(),
        "pinned": os.environ.get("OMP_PROC_BIND"), "device": torch.cuda.get_device_name() if CUDA else "cpu"}
