"""Nothing is lost: kills, signals, a full disk, damaged checkpoints; the end has the bits of a run never stopped."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from t2ct.train import loop
from t2ct.train.checkpoint import Checkpoints
from t2ct.train.loop import EXIT_PREEMPTED, Preempted
from t2ct.train.show.metrics import read_table

pytestmark = pytest.mark.usefixtures("one_thread")

END = "checkpoints/step-00000030.safetensors"


@pytest.fixture(scope="module")
def processes():
    """Children that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["micro"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path
        patch.setenv("PYTHONPATH", str(Path(micro.__file__).parent))
        context.Process(target=print).start()
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    micro.train(folder)
    return folder


def check_same(folder, whole):
    a, b = load_file(folder / END), load_file(whole / END)
    assert a.keys() == b.keys() and len(a) > 15
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different
    kinds = {key.split(".")[0] for key in a}
    assert kinds == {"part", "ema", "optim"}
    assert any("momentum_buffer" in key for key in a) and any("exp_avg_sq" in key for key in a)
    final = "final/micro.safetensors"
    assert (folder / final).read_bytes() == (whole / final).read_bytes()
    facts = [Checkpoints(f / "checkpoints").facts(30) for f in (folder, whole)]
    assert [{k: v for k, v in f.items() if k != "sha256"} for f in facts][0] == {
        k: v for k, v in facts[1].items() if k != "sha256"
    }
    # the tables tell one life, not several
    columns = ("step", "loss", "norm", "seen")
    rows = [[[row[c] for c in columns] for row in read_table(f / "metrics.csv")] for f in (folder, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 30
    assert (folder / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()


def killed_run(processes, folder, seed):
    """Start, kill at a random moment of a random update, start again, until a run comes to its end by itself."""
    draw, met, kept = random.Random(seed), [], Checkpoints(folder / "checkpoints")
    while True:
        child = processes.Process(target=micro.train_in_child, args=(str(folder),))
        child.start()
        wanted = (met[-1] if met else 0) + draw.randint(0, 4)
        while child.is_alive() and max(kept.steps(), default=0) < wanted:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.008))  # about an update with its checkpoint
        child.kill()
        child.join()
        if child.exitcode == 0:
            return met
        assert child.exitcode == -signal.SIGKILL
        met.append(max(kept.steps(), default=0))


def test_kills_at_random_moments_change_nothing(processes, whole, tmp_path):
    met = []
    for seed in itertools.count():
        folder = tmp_path / str(seed)
        met += killed_run(processes, folder, seed)
        check_same(folder, whole)
        if len(met) >= 40:
            break
    assert len(set(met)) >= 8, met  # early, late and between


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(processes, whole, tmp_path):
    met = []
    for seed in itertools.count(100):
        folder = tmp_path / str(seed)
        met += killed_run(processes, folder, seed)
        check_same(folder, whole)
        if len(met) >= 100:
            break


def test_a_finished_run_only_exports_again(whole, tmp_path):
    before = (whole / END).stat().st_mtime_ns
    micro.train(whole)
    assert (whole / END).stat().st_mtime_ns == before


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1))
def test_a_signal_saves_and_ends_with_a_code_of_its_own(whole, tmp_path, monkeypatch, number):
    config = replace(micro.CONFIG, save_every=0)

    class Interrupted(micro.MicroRecipe):
        def after(self, step):
            if step == 12:
                os.kill(os.getpid(), number)

    with pytest.raises(Preempted) as stop:
        loop.run(Interrupted(config), config, tmp_path, torch.device("cpu"), 2, quiet=True)
    assert stop.value.code == EXIT_PREEMPTED == 75
    assert stop.value.step == 13 == Checkpoints(tmp_path / "checkpoints").steps()[-1]
    assert signal.getsignal(number) == signal.SIG_DFL  # given back
    micro.train(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1))
def test_a_signal_to_the_whole_group_leaves_the_readers_until_all_is_saved(processes, whole, tmp_path, number):
    """As `kill -- -PID`, `timeout` and schedulers send it: readers that died first would take the run with them."""
    child = processes.Process(target=micro.signalled_in_child, args=(str(tmp_path), number))
    child.start()
    child.join(60)
    assert child.exitcode == EXIT_PREEMPTED
    assert 0 < Checkpoints(tmp_path / "checkpoints").steps()[-1] < 30
    micro.train(tmp_path)
    check_same(tmp_path, whole)


def test_readers_end_with_a_run_that_fails(processes, tmp_path):
    child = processes.Process(target=micro.broken_in_child, args=(str(tmp_path),))
    child.start()
    group = child.pid
    child.join(30)
    assert child.exitcode == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    micro.train(tmp_path, replace(micro.CONFIG, keep=2))
    kept = Checkpoints(tmp_path / "checkpoints")
    best = kept.facts(30)["best"]["step"]
    assert kept.steps() == sorted({best, 29, 30})
    assert best % 7 == 0 or best == 30
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {f"step-{s:08d}.{e}" for s in kept.steps() for e in ("json", "safetensors")}


def test_a_damaged_checkpoint_gives_way_to_an_older_one_that_says_so(whole, tmp_path):
    stop = replace(micro.CONFIG, save_every=1)

    class Stopped(micro.MicroRecipe):
        def begin(self, step):
            super().begin(step)
            if step == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(Stopped(stop), stop, tmp_path, torch.device("cpu"), 2, quiet=True)
    path = tmp_path / "checkpoints/step-00000020.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000020.safetensors is damaged \(sha256 .*going on from an older"):
        micro.train(tmp_path)
    check_same(tmp_path, whole)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"wanted a whole one, got \d damaged"):
            micro.train(tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path)
    kept.save(1, {"a": torch.ones(3)}, {})

    def full(*_, **__):
        (tmp_path / "step-00000002.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t2ct.train.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"step-00000002.safetensors: not written \(No space left on device\); the last "
                       r"good checkpoint is .*step-00000001"):
        kept.save(2, {"a": torch.zeros(3)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.json", "step-00000001.safetensors"]
    tensors, facts = kept.load()
    assert torch.equal(tensors["a"], torch.ones(3)) and facts["step"] == 1


def test_what_a_lost_life_left_behind_goes(tmp_path):
    """A damaged newest checkpoint must not push out the good ones that the run goes on to write before its step."""
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(5, {"a": torch.ones(3)}, {})
    kept.keep = 2
    kept.save(9, {"a": torch.zeros(3)}, {})
    (tmp_path / "step-00000009.safetensors").write_bytes(b"damaged")
    (tmp_path / "step-00000007.part").write_bytes(b"half")
    kept.keep = 1
    with pytest.warns(UserWarning, match="damaged"):
        assert kept.load()[1]["step"] == 5
    kept.save(6, {"a": torch.ones(3)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006.json", "step-00000006.safetensors"]
    assert kept.load()[1]["step"] == 6


def test_tensors_without_their_json_do_not_count(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(1, {"a": torch.ones(3)}, {})
    kept.save(2, {"a": torch.zeros(3)}, {})
    (tmp_path / "step-00000002.json").unlink()  # a kill between the two
    assert kept.load()[1]["step"] == 1
    kept.save(3, {"a": torch.zeros(3)}, {})
    assert not (tmp_path / "step-00000002.safetensors").exists()


def test_bad_updates_are_skipped_and_counted(whole, tmp_path):
    micro.train(tmp_path, poison=(3, 4, 9))
    rows = read_table(tmp_path / "metrics.csv")
    assert rows[-1]["skipped"] == "3" and rows[4]["loss"] == "nan"
    clean = read_table(whole / "metrics.csv")
    assert [r["loss"] for r in rows[:3]] == [r["loss"] for r in clean[:3]]
    steps = [k for k in load_file(tmp_path / END) if k.endswith(".step")]
    assert {float(load_file(tmp_path / END)[k]) for k in steps} == {27.0}  # the optimiser did not see them


def test_too_many_bad_updates_stop_the_run_and_name_the_tensor(tmp_path):
    config = replace(micro.CONFIG, max_bad_steps=3)
    wanted = r"no finite gradient in 3 updates .* the last at step 7; .* is the loss of micro; the last good .*07"
    with pytest.raises(RuntimeError, match=wanted):
        micro.train(tmp_path, config, poison=range(5, 30))

    class Overflowing(micro.MicroRecipe):
        def begin(self, step):
            super().begin(step)
            if step >= 5:
                with torch.no_grad():
                    self.model[0].weight.fill_(1e38)
                    self.model[0].bias.fill_(float("inf")) if step == 99 else None

        def loss(self, part, batch):
            h = self.model[2](self.model[0](batch["x"] * 1e3))
            return h.square().mean(), {"seen": 0.0}

    with pytest.raises(RuntimeError, match=re.escape("is the output of micro.0;")):
        loop.run(Overflowing(config), config, tmp_path / "b", torch.device("cpu"), 2, quiet=True)


def test_float16_scales_its_gradients(tmp_path):
    """The scale falls after an overflow, whose update is skipped, and the run goes on and learns."""
    config = replace(micro.CONFIG, precision="fp16", steps=60, matrix_learning_rate=0.0, save_every=0)
    recipe = micro.MicroRecipe(config, poison=(2,))
    loop.run(recipe, config, tmp_path, torch.device("cpu"), 2, quiet=True)
    facts = Checkpoints(tmp_path / "checkpoints").facts(60)
    assert facts["skipped"] >= 1 and facts["scaler"]["scale"] < 65536
    losses = [float(row["loss"]) for row in read_table(tmp_path / "metrics.csv")]
    assert sum(losses[-10:]) < sum(losses[3:13])


def test_cutting_an_update_up_changes_nothing_but_rounding(whole, tmp_path):
    """Accumulation: one micro-batch of four against two of two."""
    config = replace(micro.CONFIG, micro=4)

    class Quiet(micro.MicroRecipe):
        def loss(self, part, batch):
            loss = (self.model(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()
            return loss, {"seen": 0.0}

    ends = []
    for size in (2, 4):
        folder = tmp_path / str(size)
        loop.run(Quiet(config), config, folder, torch.device("cpu"), size, quiet=True)
        ends.append(load_file(folder / END))
    for key, value in ends[0].items():
        assert torch.allclose(value.double(), ends[1][key].double(), rtol=1e-4, atol=1e-5), key
