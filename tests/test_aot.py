"""The Triton kernels compile for GPUs that are not here, use matrix units, and spill nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent.parent / "benchmarks/aot.py"
FAMILIES = ("conv", "attention", "norm", "resample")


def compile_them(*arguments):
    """In a process of its own: an interpreted function, which the tests have, does not compile."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_main_launches_compile(family):
    """One width of each family, which alone is compiled in bfloat16: float16's code is like it, and in the docs."""
    out = compile_them("--family", family, "--match", "bfloat16")
    rows = [line for line in out.splitlines() if line.startswith("| ") and " | 90 | " in line]
    assert rows and ", 0 with a problem" in out
    wide = {"conv": rows, "norm": [r for r in rows if "apply" in r]}
    for row in wide.get(family, []):  # 128-bit loads and stores of whole rows of channels
        assert all(int(cell) > 0 for cell in row.split("|")[7:9]), row


def test_the_model_of_every_launch():
    """docs/kernels-work.md is what the script writes; no launch beats the roofline, none of its shares is empty."""
    script, page = SCRIPT.parent / "launch_work.py", SCRIPT.parent.parent / "docs/kernels-work.md"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == page.read_text(), "python benchmarks/launch_work.py --markdown docs/kernels-work.md"
    shares = [int(n) for n in re.findall(r" ms, (\d+)% \(", done.stdout)]
    assert len(shares) > 300 and all(0 < n <= 100 for n in shares)
    plain = next(line for line in done.stdout.splitlines() if line.startswith("| conv, 64 to 64 |"))
    assert plain.split("|")[4].strip() == f"{2 * 27 * 64 * 64 * 128 * 128 * 32 / 1e9:.1f}"  # GFLOP
    assert (SCRIPT.parent.parent / "docs/roofline.png").stat().st_size < 80_000


@pytest.mark.slow
def test_every_launch_compiles():
    assert ", 0 with a problem" in compile_them()
