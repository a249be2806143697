"""Peaks measured in the same session; a row is proven right before it is timed and carries its share of the roofline.

Threads are pinned: OMP_PROC_BIND=true OMP_PLACES=cores pytest benchmarks --benchmark-json=out.json
"""

import importlib.metadata
import os
import statistics
import subprocess
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
    """(bytes/s of a copy, flop/s of a matrix product, of float16 on a GPU, else of float32) on this machine, now."""
    source = torch.ones(1 << (30 if CUDA else 27), dtype=torch.uint8, device=DEVICE)
    target, n = torch.ones_like(source), 8192 if CUDA else 1024
    m = torch.randn(n, n, device=DEVICE, dtype=torch.float16 if CUDA else torch.float32)
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


def once(fn, flush):
    """Seconds of one call; on a GPU by events, after the cache was overwritten."""
    if not CUDA:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@pytest.fixture
def race(benchmark, peaks):
    """race(peers, work, rounds): name -> function, all proven right before; they take turns, medians are compared.

    The row keeps seconds and peak bytes of each, and the ratio of the fastest other peer's time to the fastest t2ct's.
    """

    def run(peers, work, rounds=15):
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if CUDA else None
        times, memory = {name: [] for name in peers}, {}
        for name, fn in peers.items():
            fn()
            synchronize()
            if CUDA:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                fn()
                memory[name] = torch.cuda.max_memory_allocated() - before
        for _ in range(rounds):
            for name, fn in peers.items():
                times[name].append(once(fn, flush))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ours = min(v for k, v in seconds.items() if k.startswith("t2ct"))
        theirs = {k: v for k, v in seconds.items() if not k.startswith("t2ct")}
        benchmark.pedantic(lambda: None)  # pytest-benchmark keeps a row only where it timed something
        benchmark.extra_info.update(
            race=seconds, peak_bytes=memory, work=vars(work), best_peer=min(theirs, key=theirs.get),
            speedup=min(theirs.values()) / ours,
            roofline=max(work.bytes / peaks[0], work.flops / peaks[1]) / ours)
        if CUDA:
            asked = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
            benchmark.extra_info["clock_mhz"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        print({k: f"{v * 1e3:.3f} ms" for k, v in seconds.items()}, f"{min(theirs.values()) / ours:.2f}x")

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
        "pinned": os.environ.get("OMP_PROC_BIND"), "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        "device": torch.cuda.get_device_name() if CUDA else "cpu"}
