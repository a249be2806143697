"""Phantoms: seconds of one core, healthy, with what a seed draws, and with the slowest findings at once.

OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 pytest benchmarks/bench_phantom.py
The clock counts the time of all cores, so that neither more threads nor other work on the machine flatter it.
"""

import time

import pytest

from t2ct.data.phantoms import phantom

LIMITS = {(128, 128, 64): 1.0, (512, 512, 128): 25.0}  # seconds of one core
CASES = {
    "healthy": [],
    "drawn from the seed": None,
    "six findings": [
        {"name": "interlobular septal thickening", "size": "severe"},
        {"name": "pleural effusion", "side": "bilateral", "size": "moderate"},
        {"name": "peribronchial thickening", "size": "severe"},
        {"name": "lung opacity", "side": "bilateral", "size": "extensive"},
        {"name": "cardiomegaly", "size": "severe"},
        {"name": "pulmonary fibrotic sequela", "side": "bilateral", "size": "severe"},
    ],
}


@pytest.mark.benchmark(timer=time.process_time, warmup=False)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", LIMITS, ids=lambda size: "x".join(map(str, size)))
def test_phantom(benchmark, size, case):
    benchmark.group = f"phantom {size[0]}x{size[1]}x{size[2]}"
    phantom(0, size=(16, 16, 16))
    rounds = 5 if size[0] <= 128 else 1
    made = benchmark.pedantic(phantom, (7, CASES[case], size), rounds=rounds)
    assert made.hu.shape == size
    assert benchmark.stats.stats.min <= LIMITS[size]
