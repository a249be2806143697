"""Budgets: what is named is enough, more is never slower, and what does not fit shows before the work."""

from __future__ import annotations

import errno
import re
from types import SimpleNamespace

import pytest
import torch

from t2ct import stream
from t2ct.models import VAE, VAEConfig
from t2ct.ops import use_backend
from t2ct.stream import budget, spool
from t2ct.stream.plan import RATES

CONFIG = VAEConfig(channels=(8, 16, 24), norm_groups=4, num_res_blocks=1)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(CONFIG).eval().requires_grad_(False)


def named(error):
    """The budget that a message names."""
    return re.search(r"wanted at least ([\d.]+ .?B)", str(error.value))[1]


def test_bytes_that_are_named_are_enough():
    for count in [*range(1, 3000, 7), 999_499, 999_501, 1_234_567, 12_340_000, 12_340_001, 68_719_476_737]:
        told = stream.enough_bytes(count)
        assert count <= stream.parse_bytes(told) <= 1.01 * count + 1, told


def test_the_least_budget_that_is_named_works(vae):
    for batch in (1, 3):
        z = torch.randn(batch, 4, 5, 4, 3)
        with pytest.raises(ValueError, match="wanted at least .* got 1 kB") as error:
            vae.decode(z, "1kB")
        assert ("of other samples" in str(error.value)) == (batch > 1)
        assert torch.equal(vae.decode(z, named(error)), vae.decode(z))
        with pytest.raises(ValueError, match="wanted at least"):
            vae.decode(z, int(0.97 * stream.parse_bytes(named(error))))


def test_more_memory_is_never_slower():
    with torch.device("meta"), use_backend("triton"):
        whole = VAE(VAEConfig())
        seconds, peaks = [], []
        for size in (1.5e9, 3e9, 4e9, 6e9, 8e9, 9e9, 9.5e9, 10e9, 11e9, 12e9, 12.5e9, 13e9, 16e9, 20e9, 40e9):
            plan = whole.plan("decode", (1, 4, 128, 128, 128), size, device="cuda", dtype=torch.float16, hu=True)
            work, moved = RATES["cuda"]
            seconds.append(plan.flops / work + plan.spooled / moved)
            peaks.append(plan.peak / size)
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 5 * seconds[-1]
    assert max(peaks) <= 1


def test_a_process_may_take_what_every_group_above_it_leaves(tmp_path):
    root, own = tmp_path / "fs", tmp_path / "cgroup"

    def group(path, limit, used, files, names=("memory.max", "memory.current", "inactive_file")):
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / names[0]).write_text(f"{limit}\n")
        (root / path / names[1]).write_text(f"{used}\n")
        (root / path / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")

    group("", "max", 9, 0)
    group("jobs", 8000, 5000, 1000)
    group("jobs/one", 9000, 2000, 500)
    own.write_text("0::/jobs/one\n")
    assert budget._control_group(str(root), str(own)) == 4000  # what files take of it can be had back
    own.write_text("0::/elsewhere\n")
    assert budget._control_group(str(root), str(own)) is None
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group("memory/slice", 700, 300, 100, old)
    own.write_text("11:cpu:/x\n4:hugetlb,memory:/slice\n")
    assert budget._control_group(str(root), str(own)) == 500
    assert budget._control_group(str(root), str(tmp_path / "none")) is None


def test_a_disk_without_room_shows_before_the_work(vae, tmp_path, monkeypatch):
    z = torch.randn(1, 4, 5, 4, 3)
    with pytest.raises(ValueError) as error:
        vae.decode(z, "1kB", spool_dir=tmp_path)
    plan = vae.plan("decode", z.shape, named(error), spool_dir=tmp_path)
    assert plan.spool > 0
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.spool - 1))
    for call in (vae.plan, lambda *a, **k: vae.decode(z, a[2], **k, step=pytest.fail)):
        with pytest.raises(OSError, match=f"no room for a spool of {plan.spool:,} bytes, {plan.spool - 1:,} are free"):
            call("decode", z.shape, named(error), spool_dir=tmp_path)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EACCES])
def test_file_systems_that_cannot_claim_room(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(spool.os, "posix_fallocate", refuse)
    if code == errno.EACCES:  # any other trouble keeps its name
        with pytest.raises(PermissionError, match="no"):
            spool.FileSpool(tmp_path, 2, (2, 2, 1), torch.float32)
        return
    file = spool.FileSpool(tmp_path, 2, (2, 2, 1), torch.float32)
    tile, back = torch.randn(1, 2, 2, 1), torch.empty(1, 2, 2, 1)
    file.write(1, tile)
    file.read(1, back)
    file.close()
    assert torch.equal(tile, back)


def test_windows_keep_their_budget_and_count_their_steps(vae):
    z = torch.randn(1, 4, 5, 4, 3)
    steps = []
    y = vae.decode(z, method="window", step=steps.append)
    assert sum(steps) > 0 and torch.equal(vae.decode(z, "1GB", method="window"), y)
    sums = 4**3 * 60 * (4 + 4 + 4 + 4)
    with pytest.raises(ValueError, match=f"wanted more than {stream.enough_bytes(sums)} for the sums of windows"):
        vae.decode(z, sums, method="window")
    with pytest.raises(ValueError, match="wanted at least"):  # of a window, beside the sums
        vae.decode(z, sums + 1000, method="window")


def test_planes_that_encoding_loses_are_told(vae):
    with pytest.warns(UserWarning, match=r"multiples of 4 voxels, got \(13, 16, 9\): decoding gives \(12, 16, 8\)"):
        mu, _ = vae.encode(torch.rand(1, 1, 13, 16, 9))
    assert mu.shape == (1, 4, 3, 4, 2)
