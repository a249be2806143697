"""A training step, as the loop of t2ct.train makes it, against MONAI's networks with torch's fused AdamW; CLIP3D's step
with cached gradients against the whole batch at once.

Each peer is a process of its own (benchmarks/training.py), as it would be in use; they take turns step by step. Their
gradients are compared before anything is timed. Medians of whole steps; of MONAI the faster of two memory formats.
Memory: the most that torch allocates while gradients are computed, beyond weights and gradients, once where these lie
there already and once where they are made anew.
"""

import statistics
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROUNDS = 3
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
MONAI = ("monai contiguous", "monai channels_last")


@contextmanager
def peer(*case):
    """A function that hands an order to a process and returns its answer."""
    program = Path(__file__).with_name("training.py")
    with subprocess.Popen(
        [sys.executable, str(program), *case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(order):
            process.stdin.write(order + "\n")
            process.stdin.flush()
            return answer()

        def answer():
            line = process.stdout.readline().strip()
            assert line or process.poll() is None, f"{case} ended"
            return line or answer()

        yield ask, answer
        process.stdin.close()


def difference(got, wanted):
    """Of all gradients that both have, relative."""
    both = got.keys() & wanted.keys()
    square = sum((got[k] - wanted[k]).double().square().sum().item() for k in both)
    return (square / sum(wanted[k].double().square().sum().item() for k in both)) ** 0.5


def race(kind, precision, names, folder, benchmark, group):
    """Keeps what each peer takes; the ratios are to the fastest of the others. Returns how gradients differ from
    float32's of the first."""
    errors = {}
    with ExitStack() as stack:
        begun = {name: stack.enter_context(peer(kind, precision, name)) for name in names}
        exact = begun[names[0]] if precision == "float32" else stack.enter_context(peer(kind, "float32", names[0]))
        assert all(answer() == "ready" for _, answer in {*begun.values(), exact})
        peers = {name: ask for name, (ask, _) in begun.items()}
        exact[0](f"gradients {folder}/exact")
        wanted = load_file(folder / "exact")
        for name, ask in peers.items():
            ask(f"gradients {folder}/got")
            errors[name] = difference(load_file(folder / "got"), wanted)
        both = {name: [int(n) for n in ask("memory").split()] for name, ask in peers.items()}
        memory, anew = ({name: row[i] for name, row in both.items()} for i in (0, 1))
        for ask in peers.values():
            ask("step")
        times = [{name: float(ask("step")) for name, ask in peers.items()} for _ in range(ROUNDS)]
    seconds = {name: statistics.median(row[name] for row in times) for name in peers}
    mine = names[-1]
    best = min(names[:-1], key=seconds.get)
    benchmark.group = group
    benchmark.pedantic(lambda: None)  # pytest-benchmark keeps a row only where it timed something
    benchmark.extra_info.update(
        step=seconds, activations=memory, activations_anew=anew, gradients_differ=errors, best_peer=best, mine=mine,
        step_ratio=seconds[mine] / seconds[best], activation_ratio=memory[mine] / memory[best],
        activation_anew_ratio=anew[mine] / anew[best],
    )  # fmt: skip
    for what, values in (("seconds", seconds), ("activations", memory), ("made anew", anew), ("gradients", errors)):
        print(f"{group}: {what} {values}")
    print({k: round(v, 2) for k, v in benchmark.extra_info.items() if k.endswith("ratio")})
    return errors[mine]


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("ldm", "vae"))
def test_step(kind, precision, benchmark, tmp_path):
    error = race(kind, precision, (*MONAI, "t2ct"), tmp_path, benchmark, f"{kind} step, {precision}")
    assert error <= TOLERANCE[precision]


def test_cached_clip(benchmark, tmp_path):
    names = ("at once/1", "t2ct/8")
    error = race("clip", "float32", names, tmp_path, benchmark, "clip step, 64 volumes in 8 parts, float32")
    assert error <= 1e-5
