"""What a newcomer waits for: a CT from the command line, all included, and `import t2ct` beyond torch's own import."""

import statistics
import subprocess
import sys

import pytest

from t2ct.checks import EMBEDDED

# A child counts the memory of the process it was forked from: a small one stands between, and measures.
BETWEEN = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def child(command):
    """(seconds, peak resident bytes) of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BETWEEN, *command], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


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
