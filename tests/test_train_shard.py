"""shard="all": two processes with a share of the network each compute what one computes, leave the same files, go on to
the same bits. Over gloo, on CPUs."""

from collections import Counter
from dataclasses import replace

import pytest
import shards
import torch
from safetensors.torch import load_file
from shards import CONFIGS, CPU, together, train_micro, update_all

from t2ct.train.checkpoint import Checkpoints
from t2ct.train.config import KINDS
from t2ct.train.memory import make_plan
from t2ct.train.memory.measure import fixed_bytes, whole_bytes
from t2ct.train.memory.recipes import probe_recipe
from t2ct.train.optim import moment_bytes
from t2ct.train.parts.blocks import blocks_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"steps": 6, "keep": 9, "shard": "all"}
WAYS = {  # of a run: (changes to micro.CONFIG, updates that are bad)
    "plain": (STEPS, ()),
    "half": (STEPS | {"precision": "fp16"}, (2,)),  # with its scaler, which a bad update makes smaller
    "host": (STEPS | {"offload": "optimiser", "matrix_learning_rate": 0.0, "clip_norm": 0.5}, ()),
}
LAST = "checkpoints/step-00000006.safetensors"


@pytest.fixture(scope="module", autouse=True)
def leaves_no_trace():
    """Threads and random numbers of this process as they were: other files' networks are drawn from them."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of everything: what one process has made in one/, what two have in two/."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:  # the server that children come from does not take over sys.path
        patch.setenv("PYTHONPATH", str(shards.__file__).rpartition("/")[0])
        torch.set_num_threads(1)
        update_all(folder)
        for way, told in WAYS.items():
            train_micro(folder / "one" / way, *told)
        again = [(shards.from_step, folder / "two" / "plain", folder / "two" / "again", 3)]
        again += [(shards.from_step, folder / "one" / "plain", folder / "two" / "taken", 3)]
        jobs = [(train_micro, folder / "two" / way, *told) for way, told in WAYS.items()]
        jobs += again + [(train_micro, folder / "two" / name, STEPS) for name in ("again", "taken")]
        assert together(folder, (update_all, folder), (shards.held, folder), *jobs) == []
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_with_a_share_each_are_one(runs, name):
    one, two = (load_file(runs / n / f"{name}.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(one[k].shape == two[k].shape for k in one)
    moments = [k for k in one if k.startswith("first.") and k.endswith((".exp_avg", ".momentum_buffer"))]
    assert len(moments) > 40  # of the first update: linear in its gradients
    for part in {k.split(".")[2] for k in moments}:
        own = [k for k in moments if k.split(".")[2] == part]
        largest = max(one[k].abs().max() for k in own)
        assert largest > 0
        for key in own:
            assert (one[key] - two[key]).abs().max() <= 1e-5 * largest, key
    # The norm of the second update's gradients is that of what the first has made of the weights.
    assert torch.allclose(one["norms"], two["norms"], rtol=1e-4) and (one["norms"] > 0).all()
    for kind in ("part.", "ema.", "shown."):
        far = total = 0
        for key in (k for k in one if k.startswith(kind) and one[k].is_floating_point() and "cluster_size" not in k):
            far += ((one[key].float() - two[key].float()).abs() > 1e-5).sum().item()
            total += one[key].numel()
        # Adam steps along gradients that are rounding alone, Muon along the directions that a matrix hardly has.
        assert total and far <= (0.03 if CONFIGS[name].matrix_learning_rate else 1e-3) * total, (kind, far, total)
    assert {k.removeprefix("shown.") for k in two if k.startswith("shown.")} == {
        k.removeprefix("ema.") for k in two if k.startswith("ema.")
    }
    assert all(torch.equal(two[k], two["ema." + k[6:]]) for k in two if k.startswith("shown."))


def test_a_rank_holds_its_share(runs):
    ranks = [torch.load(runs / f"held-{rank}.pt") for rank in (0, 1)]
    network = probe_recipe("ldm", CONFIGS["ldm"], torch.device("meta")).model
    sizes = [sum(p.numel() for p in network.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    weights, gradients, moments, average = (sum(held) for held in zip(*ranks, strict=True))
    assert (weights, gradients, average) == (sizes[0], sizes[1], sizes[0])
    assert sizes[1] < moments < 1.1 * sizes[1]  # Muon has one for each number, Adam two
    for held in zip(*ranks, strict=True):
        assert max(held) < 0.52 * sum(held)


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_and_the_end_are_those_of_one_process(runs, way):
    files = [load_file(runs / n / way / LAST) for n in ("one", "two")]
    facts = [Checkpoints(runs / n / way / "checkpoints").facts(6) for n in ("one", "two")]
    finals = [load_file(runs / n / way / "final" / "micro.safetensors") for n in ("one", "two")]
    assert files[0].keys() == files[1].keys() and finals[0].keys() == finals[1].keys()
    loose = 3e-3 if way == "half" else 1e-5
    for one, two in (files, finals):
        for key in one:
            assert one[key].shape == two[key].shape and one[key].dtype == two[key].dtype
            assert "seen" in key or torch.allclose(one[key], two[key], rtol=loose, atol=loose), key
    assert facts[0]["scaler"] == facts[1]["scaler"] and bool(facts[0]["scaler"]) == (way == "half")
    assert facts[0]["skipped"] == facts[1]["skipped"] and (facts[0]["skipped"] > 0) == (way == "half")
    assert facts[0]["best"]["score"] == pytest.approx(facts[1]["best"]["score"], rel=loose)


def test_a_run_goes_on_to_the_same_bits(runs):
    whole, again = (load_file(runs / "two" / name / LAST) for name in ("plain", "again"))
    assert whole.keys() == again.keys() and len(whole) > 15
    assert not [key for key in whole if not torch.equal(whole[key], again[key])]
    ends = [(runs / "two" / name / "final" / "micro.safetensors").read_bytes() for name in ("plain", "again")]
    assert ends[0] == ends[1]
    before = load_file(runs / "two/plain/checkpoints/step-00000003.safetensors")
    assert not torch.equal(whole["part.micro.0.weight"], before["part.micro.0.weight"])


def test_any_number_of_processes_takes_up_a_checkpoint(runs, tmp_path):
    """Two processes that of one, one process that of two."""
    shards.from_step(runs / "two" / "plain", tmp_path, 3)
    train_micro(tmp_path, STEPS)
    files = [load_file(f / LAST) for f in (runs / "one" / "plain", runs / "two" / "taken", tmp_path)]
    for key in files[0]:
        assert "seen" in key or all(torch.allclose(files[0][key], f[key], atol=1e-5) for f in files[1:]), key


def test_every_rank_names_the_same_bad_weight(tmp_path):
    """Only one of them holds the row that is bad."""
    errors = together(tmp_path, (shards.train_spoilt, tmp_path / "run", STEPS | {"max_bad_steps": 2}))
    assert {rank for rank, _ in errors} == {0, 1}
    for _, message in errors:
        assert "no finite gradient in 2 updates in a row" in message and "is weight micro.0.weight" in message


def test_a_lost_process_ends_the_others_with_one_message(tmp_path):
    ((rank, message),) = together(tmp_path, (shards.train_lost, tmp_path / "run", STEPS))
    assert rank == 0
    assert message.startswith("RuntimeError: another process of this run was lost, so that all end; the same command")


def test_what_does_not_go_with_it_is_refused():
    for kind in KINDS.values():
        with pytest.raises(ValueError, match=r"shard: wanted none or optimiser beside optimiser_bits=8, got 'all'"):
            kind(shard="all", optimiser_bits=8)
        assert kind(shard="optimiser", optimiser_bits=8)
    with pytest.raises(ValueError, match="shard: wanted one of none, optimiser, all, got 'some'"):
        KINDS["ldm"](shard="some")


@pytest.mark.parametrize("name", ("vae", "clip", "ldm"))
def test_the_plan_counts_what_a_device_keeps(name):
    config = replace(CONFIGS[name], matrix_learning_rate=0.0)
    recipe = probe_recipe(name, config, torch.device("meta"))
    network = next(iter(recipe.parts.values()))
    alone, shared = (fixed_bytes(config, recipe, 0, world) for world in (1, 4))
    live = [p.numel() for p in network.parameters() if p.requires_grad]
    every = sum(p.numel() for p in network.parameters())
    saved = 0.75 * (2 * 4 * every + 4 * sum(live) + sum(moment_bytes(n, False, 32) for n in live))
    critic = sum(p.numel() for p in recipe.parts["critic"].parameters()) if name == "vae" else 0
    assert alone - shared == pytest.approx(saved + 0.75 * 8 * critic, rel=0.05)
    at_work, between = whole_bytes(config, recipe, 4)
    blocks = [sum(4 * p.numel() for p in block.parameters()) for block in blocks_of(network)]
    assert 2 * (max(blocks) + sorted(blocks)[-2]) <= at_work <= 8 * every
    assert 3 * every < between < 4.2 * every  # the whole network to look at, without a quarter of the gradients
    assert whole_bytes(config, recipe, 1) == (0, 0) == whole_bytes(replace(config, shard="none"), recipe, 4)
    assert whole_bytes(replace(config, shard="optimiser"), recipe, 4) == (0, 4 * sum(live))  # less than a message


def test_memory_decides_what_is_shared_out(monkeypatch):
    monkeypatch.setattr("t2ct.train.memory.plan.pace_of", lambda precision: Counter())
    config = replace(CONFIGS["ldm"], shard="none")
    plans = {s: make_plan("ldm", replace(config, shard=s), CPU, world=4) for s in ("none", "optimiser", "all")}
    peaks = [plans[s].peak for s in plans]
    assert peaks[0] > peaks[1] > peaks[2]
    for (way, plan), words in zip(plans.items(), ("again", ", optimisers", "weights, gradients and"), strict=True):
        limit = replace(config, memory=f"{1.001 * plan.peak / 1e6:.3f}MB")
        found = make_plan("ldm", limit, CPU, world=4)
        assert (found.shard, found.micro) == (way, 1) and words in found.text()
    with pytest.raises(ValueError, match="memory: wanted at least"):
        make_plan("ldm", replace(limit, optimiser_bits=8, memory="0.3MB"), CPU, world=4)
    alone = make_plan("ldm", replace(config, memory="50MB"), CPU)
    assert alone.shard == "none"
