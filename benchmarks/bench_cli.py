"""What a newcomer waits for: a CT from the command line, all included, and `import t2ct` beyond torch's own import."""

import os
import statistics
import subprocess
import sys
import time

import pytest

from t2ct.checks import EMBEDDED


def child(command, **options):
    """(seconds, peak resident bytes) of a command in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - start, usage.ru_maxrss * 1024


@pytest.mark.skipif(not (EMBEDDED / "unet.safetensors").exists(), reason="the package holds no embedded model")
def test_generate(benchmark, tmp_path):
    text = "Large right pleural effusion with adjacent atelectasis."
    command = [sys.executable, "-m", "t2ct", "generate", text, "-o", str(tmp_path / "ct.nii.gz"), "--seed", "1"]
    command += ["--device", "cpu", "--overwrite", "--quiet"]
    benchmark.group = "t2ct generate"
    results = []
    benchmark.pedantic(lambda: results.append(child(command)), rounds=3)
    benchmark.extra_info.update(
        seconds=statistics.median(s for s, _ in results), peak_bytes=max(peak for _, peak in results)
    )


def test_import(benchmark):
    benchmark.group = "import"
    results = []

    def both():  # interleaved: the difference is of neighbours
        torch, _ = child([sys.executable, "-c", "import torch"])
        ours, _ = child([sys.executable, "-c", "import torch, t2ct"])
        results.append(ours - torch)

    benchmark.pedantic(both, rounds=5)
    benchmark.extra_info.update(seconds_beyond_torch=statistics.median(results))
