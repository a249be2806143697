"""The VAE inside a memory budget: every plan gives the whole volume's bits, in the bytes that it said."""

import errno
import os
import signal
import subprocess
import sys
from importlib import import_module
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes

from t2ct import stream
from t2ct.models import VAE, VAEConfig
from t2ct.ops import conv, conv_cpu, conv_gradient, norm, use_backend
from t2ct.ops.dispatch import channels_last, why_not
from t2ct.stream import graph as graphs
from t2ct.stream import plan as plans
from t2ct.stream import spool as spools
from t2ct.stream.plan import smallest_plan
from t2ct.stream.simulate import AGAIN, MEMORY, SPOOL, pack

SMALL = VAEConfig(channels=(16, 32), norm_groups=8, num_res_blocks=2)
THREE = VAEConfig(channels=(16, 32, 48), norm_groups=8, num_res_blocks=2)


def tiles_of(numbers, monkeypatch):
    """Tiles of a few planes while a test runs, so that small volumes have many."""
    monkeypatch.setattr(graphs, "TILE", {"cpu": numbers, "cuda": numbers})
    for cached in (plans.make_plan, plans.smallest_plan):
        cached.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the bound was measured so: with one thread convolutions take a little less
    yield
    torch.set_num_threads(threads)
    for cached in (plans.make_plan, plans.smallest_plan):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def thin_tiles(monkeypatch):
    yield from tiles_of(2**12, monkeypatch)


def network(config, dtype=torch.float32):
    torch.manual_seed(0)
    vae = VAE(config).eval().requires_grad_(False)
    for p in vae.parameters():
        p.add_(0.05 * torch.randn_like(p))  # norms with their own scale and shift
    return vae.to(dtype)


def inputs(direction, config, dtype=torch.float32, batch=1):
    torch.manual_seed(1)
    if direction == "decode":
        return torch.randn(batch, 4, 9, 6, 5).to(dtype)
    return torch.rand(batch, 1, 9 * config.factor + 1, 6 * config.factor, 5 * config.factor + 1).to(dtype)


def ladder(vae, direction, x, spool_dir, count=8):
    """At most `count` plans, from the whole one to the smallest, evenly chosen from all that budgets lead to."""
    rungs = [stream.plan_for(vae.nodes(direction), x.shape, x.dtype, "cpu", "1TB", spool_dir)]
    least = smallest_plan(rungs[0].graph, spool_dir is not None, x.element_size()).peak
    while rungs[-1].peak > least:
        rungs.append(stream.plan_for(vae.nodes(direction), x.shape, x.dtype, "cpu", rungs[-1].peak - 1, spool_dir))
    return [rungs[i * (len(rungs) - 1) // (count - 1)] for i in range(count)] if len(rungs) > count else rungs


def run(vae, direction, x, budget=None, spool_dir=None):
    with torch.no_grad():
        return stream.execute(vae.nodes(direction), dict(vae.named_parameters()), x, budget, spool_dir)


# With AMX oneDNN's bfloat16 convolutions take room inside themselves, per thread, that no plan counts yet: there the
# bound is an expected failure, and shown as one.
AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
CASES = list(product((SMALL, THREE), ("decode", "encode"), (torch.float32, torch.bfloat16), (False, True)))
PLANS: dict[int, set] = {}  # of every case above that was run


@pytest.mark.parametrize(("config", "direction", "dtype", "spool"), CASES)
def test_same_bits_within_the_bytes_that_were_said(config, direction, dtype, spool, tmp_path):
    """The same bits, and a predicted peak that the measured one reaches to 15 % and never passes."""
    vae, x = network(config, dtype), inputs(direction, config, dtype)
    folder = tmp_path if spool else None
    want, rungs = run(vae, direction, x), ladder(vae, direction, x, folder)
    outside: list[str] = []
    plans_seen = PLANS.setdefault(CASES.index((config, direction, dtype, spool)), set())
    for rung in rungs:
        plan = stream.plan_for(vae.nodes(direction), x.shape, dtype, "cpu", rung.peak, folder)
        assert plan.peak <= rung.peak
        got, measured = peak_bytes(lambda r=rung: run(vae, direction, x, r.peak, folder))
        assert torch.equal(got, want), plan.table()
        if not measured <= plan.peak <= 1.15 * measured:
            outside.append(f"measured {measured}\n{plan.table()}")
        plans_seen.add((plan.graph, plan.place))
    places = {where for plan in rungs for where in plan.place}
    assert {MEMORY, SPOOL if spool else AGAIN} <= places or len(rungs) == 1
    assert not list(tmp_path.iterdir())
    if outside and AMX and dtype == torch.bfloat16:
        pytest.xfail(f"AMX's room is not counted: {outside[0]}")
    assert not outside, outside[0]


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_bound_holds_where_bfloat16_is_emulated(direction, monkeypatch):
    """As on a processor without its products: float32 copies are on the way."""
    if why_not("cpu", "cpu", torch.bfloat16):
        pytest.skip("the compiled extension is not there")
    for module in (import_module("t2ct.stream.execute"), conv, conv_cpu, conv_gradient):
        monkeypatch.setattr(module, "EMULATED", frozenset({torch.bfloat16}))
    vae, x = network(THREE, torch.bfloat16), inputs(direction, THREE, torch.bfloat16)
    want = run(vae, direction, x)
    for rung in ladder(vae, direction, x, None, 3):
        got, measured = peak_bytes(lambda p=rung: run(vae, direction, x, p.peak))
        assert torch.equal(got, want) and measured <= rung.peak <= 1.15 * measured, rung.table()


@pytest.mark.parametrize("at_once", [2**22, 2**10])
def test_plain_torch_keeps_the_bound(at_once, monkeypatch):
    """float16 has no compiled norm on a CPU: the bound still holds, if less closely."""
    monkeypatch.setattr(norm, "AT_ONCE", at_once)
    vae, z = network(THREE, torch.float16), inputs("decode", THREE, torch.float16)
    want = run(vae, "decode", z)
    for rung in ladder(vae, "decode", z, None, 3):
        got, measured = peak_bytes(lambda p=rung: run(vae, "decode", z, p.peak))
        assert torch.equal(got, want) and measured <= rung.peak


def test_plain_torch_is_counted_on_a_gpu():
    """Until a GPU has proven the kernels, norms there are plain torch's, which makes copies."""
    vae = VAE(VAEConfig()).half()
    plain = vae.plan("decode", (1, 4, 32, 32, 8), "80GB", device="cuda")
    with use_backend("triton"):
        kernels = vae.plan("decode", (1, 4, 32, 32, 8), "80GB", device="cuda")
    assert plain.graph.generic and not kernels.graph.generic and plain.peak > kernels.peak


def test_a_block_takes_over_the_memory_of_what_it_reads():
    """What a block with a shortcut reads, and twice its channels: neither the block's first convolution nor its
    shortcut wants memory of its own."""
    vae = VAE(VAEConfig()).requires_grad_(False)
    plan = vae.plan("decode", (1, 4, 8, 8, 4), "1GB", device="cpu")
    assert {plan.label(m) for m in plan.graph.halves} == {"decoder.blocks.3.conv", "decoder.blocks.6.conv"}
    for p, step in enumerate(plan.passes):
        if step.halved:
            following, own = plan.passes[p + 1], plan.graph.costs[step.node].bytes
            assert following.in_place == step.node and following.shortcut == plan.graph.halves[step.node][1]
            lying = [b for b in plan.buffers if b.key[1] in ("node", "shortcut") and b.first <= p + 1 <= b.last]
            assert sum(b.bytes for b in lying) == own
            assert plan.table().splitlines()[p + 1].count("in two halves") == 1
    encoder = vae.plan("encode", (1, 1, 32, 32, 16), "1GB", device="cpu").graph
    assert not encoder.halves  # channels grow there


def test_that_was_sixty_plans():
    if len(PLANS) < len(CASES):
        pytest.skip(f"{len(PLANS)} of {len(CASES)} cases were run in this process")
    assert len(set().union(*PLANS.values())) >= 60


@pytest.mark.parametrize(("config", "direction"), list(product((SMALL, THREE), ("decode", "encode"))))
def test_equals_the_definition_in_float64(config, direction):
    vae, x = network(config), inputs(direction, config, batch=2)
    others = vae.decode(x)[0].nbytes if direction == "decode" else x[0].nbytes
    got = run(vae, direction, x, ladder(vae, direction, x[:1], None)[-1].peak + others)

    def whole(dtype):
        model, y = network(config).to(dtype), channels_last(x.to(dtype))
        return model.decoder(model.post_quant_conv(y)) if direction == "decode" else model.encoder(y)

    want = whole(torch.float64)
    error, eager = ((y.double() - want).norm() / want.norm() for y in (got, whole(torch.float32)))
    assert error <= max(2 * eager.item(), 1e-6)


def test_decode_and_encode_take_budgets():
    vae = network(SMALL)
    z, x = inputs("decode", SMALL, batch=2), inputs("encode", SMALL)
    for budget in ("1GB", "1 GB", 1e9, 10**9, "953.7MiB"):
        assert torch.equal(vae.decode(z, budget), vae.decode(z))
    mu, sigma = vae.encode(x, memory_budget="100MB")
    assert torch.equal(mu, vae.encode(x)[0]) and (sigma > 0).all()
    hu = vae.decode(z, hu=True)
    assert hu.dtype == torch.int16
    want = (vae.decode(z) * 2000 - 1000).clamp(-1000, 1000).round()
    assert torch.equal(hu, want.to(torch.int16))


def test_steps_count_the_operations():
    vae, z, done = network(SMALL), inputs("decode", SMALL), []
    vae.decode(z, step=done.append)
    plan = stream.plan_for(vae.nodes("decode"), z.shape, z.dtype, "cpu")
    assert sum(done) == pytest.approx(plan.flops, rel=1e-3) and len(done) > 20


def test_autocast_computes_in_its_dtype():
    vae, z = network(SMALL), inputs("decode", SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        y = vae.decode(z)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, network(SMALL, torch.bfloat16).decode(z.bfloat16()))


def test_budget_too_small_names_the_smallest_that_works(tmp_path):
    vae, z = network(SMALL), inputs("decode", SMALL)
    with pytest.raises(ValueError, match=r"memory_budget: wanted at least .* with a spool .* got 1 kB") as error:
        vae.decode(z, "1kB")
    assert "kB" in str(error.value) or "MB" in str(error.value)
    graph = stream.plan_for(vae.nodes("decode"), z.shape, z.dtype, "cpu").graph
    for folder in (None, tmp_path):
        least = smallest_plan(graph, folder is not None, 4).peak
        assert torch.equal(vae.decode(z, least, spool_dir=folder), vae.decode(z))
        with pytest.raises(ValueError, match="memory_budget"):
            vae.decode(z, least - 1, spool_dir=folder)


@pytest.mark.parametrize("bad", ["6 apples", "", "GB", "-6GB", "0", "nan", 0, -1.0, float("nan"), 1e999, "6 G B"])
def test_malformed_budgets(bad):
    with pytest.raises(ValueError, match=r'memory_budget: wanted a positive size such as "6GB"'):
        stream.parse_bytes(bad)


@pytest.mark.parametrize("bad", [None, True, [6], b"6GB"])
def test_budgets_of_the_wrong_type(bad):
    with pytest.raises(TypeError, match="memory_budget: wanted bytes"):
        stream.parse_bytes(bad)


def test_sizes_are_read():
    assert [stream.parse_bytes(s) for s in ("6 GB", "6GiB", 6e9, "6e9", "1.5kb", "7B", 12)] == [
        6 * 10**9, 6 * 2**30, 6 * 10**9, 6 * 10**9, 1500, 7, 12]  # fmt: skip
    assert stream.format_bytes(1234567) == "1.23 MB" and stream.format_bytes(999) == "999 B"


def test_free_memory_is_known_and_limited_by_a_control_group(tmp_path, monkeypatch):
    assert 2**20 < stream.free_memory("cpu") < 2**50
    (tmp_path / "memory.max").write_text("5000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    from t2ct.stream import budget

    assert budget._control_group(str(tmp_path)) == 4_000_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._control_group(str(tmp_path)) is None


def test_latents_that_are_not_finite_are_refused():
    z = inputs("decode", SMALL)
    z[0, 1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="z must be finite"):
        network(SMALL).decode(z)


def test_budget_with_replaced_modules_is_refused():
    vae, z = network(SMALL), inputs("decode", SMALL)
    vae.decoder.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="memory_budget does not go with modules that were replaced or hooked"):
        vae.decode(z, "1GB")
    assert vae.decode(z).shape == (1, 1, 18, 12, 10)


def test_spool_folder_is_checked(tmp_path):
    vae, z = network(SMALL), inputs("decode", SMALL)
    with pytest.raises(ValueError, match="spool_dir: wanted a folder"):
        vae.decode(z, "1GB", spool_dir=tmp_path / "missing")


def test_full_disk_is_a_clean_error(tmp_path, monkeypatch):
    vae, z = network(SMALL), inputs("decode", SMALL)
    least = ladder(vae, "decode", z, tmp_path)[-1].peak

    def full(fd, at, count):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spools.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for a spool of") as error:
        vae.decode(z, least, spool_dir=tmp_path)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_interrupt_leaves_no_file(tmp_path):
    vae, z = network(SMALL), inputs("decode", SMALL)
    least = ladder(vae, "decode", z, tmp_path)[-1].peak
    names = []

    def stop(_):
        names.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.decode(z, least, spool_dir=tmp_path, step=stop)
    assert not names and not list(tmp_path.iterdir())  # a spool has no name even while it is used


KILLED = """
import os, signal, sys, torch
from t2ct.models import VAE, VAEConfig
from t2ct.stream import graph, plan_for
from t2ct.stream.plan import smallest_plan
graph.TILE = {"cpu": 2**12, "cuda": 2**12}
vae = VAE(VAEConfig(channels=(16, 32), norm_groups=8, num_res_blocks=2)).eval().requires_grad_(False)
z = torch.zeros(1, 4, 9, 6, 5)
plan = smallest_plan(plan_for(vae.nodes("decode"), z.shape, z.dtype, "cpu").graph, True, 4)
assert plan.spool > 0
done = []
def step(_):
    done.append(1)
    if len(done) == 20:
        held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        print(sum(sys.argv[1] in name for name in held), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
vae.decode(z, plan.peak, spool_dir=sys.argv[1], step=step)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_leaves_no_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout.split()[-1]) > 0  # it held spools when it died
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=14))
def test_packing_never_overlaps_and_wastes_little(rows):
    from t2ct.stream.simulate import Buffer

    buffers = [Buffer((i, "node", 0), size, first, first + more) for i, (size, first, more) in enumerate(rows)]
    placed, arena = pack(buffers)
    for i, a in enumerate(placed):
        assert a.offset + a.bytes <= arena and a.offset % 64 == 0
        for b in placed[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    assert arena <= sum(b.bytes + 64 for b in buffers)


def test_published_decoder_in_gigabytes(monkeypatch):
    """The plans that the documentation speaks of, made without a tensor."""
    monkeypatch.setattr(graphs, "TILE", {"cpu": 2**22, "cuda": 2**27})
    with torch.device("meta"):
        nodes = VAE().nodes("decode")
    shape = (1, 4, 128, 128, 32)
    plan = stream.plan_for(nodes, shape, torch.bfloat16, "cpu", "2GB", "/tmp")
    assert plan.peak <= 2e9 and plan.work == 1.0 and plan.spool > 1e10
    again = stream.plan_for(nodes, shape, torch.bfloat16, "cpu", "2GB")
    assert again.peak <= 2e9 and 1 < again.work < 4 and again.spool == 0
    whole = stream.plan_for(nodes, shape, torch.bfloat16, "cpu", "40GB")
    assert whole.work == 1 and whole.spool == 0 and whole.flops == pytest.approx(78e12, rel=0.01)
    assert "decoder.blocks.7.conv2" in plan.table() and "at most" in plan.table()
