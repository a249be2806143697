"""The Triton kernels compile for GPUs that are not here, use matrix units, and spill nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent.parent / "benchmarks/aot.py"
# launches, by a word in their names
SOME = {"conv": "128 to 128", "attention": "D=32", "norm": "128", "resample": "64"}


def compile_them(*arguments):
    """In a process of its own: an interpreted function, which the tests have, does not compile."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("family", SOME)
def test_main_launches_compile(family):
    out = compile_them("--family", family, "--match", SOME[family])
    rows = [line for line in out.splitlines() if line.startswith("| ") and " | 90 | " in line]
    assert rows and ", 0 with a problem" in out
    wide = {"conv": rows, "norm": [r for r in rows if "apply" in r]}
    for row in wide.get(family, []):  # 128-bit loads and stores of whole rows of channels
        assert all(int(cell) > 0 for cell in row.split("|")[7:9]), row


@pytest.mark.slow
def test_every_launch_compiles():
    assert ", 0 with a problem" in compile_them()
