"""Gradients through the VAE inside a memory budget: those of the whole volume."""

from itertools import product

import pytest
import torch
from memory import peak_bytes
from test_stream import SMALL, THREE, inputs, network, tiles_of

from t2ct import stream
from t2ct.models import VAE
from t2ct.stream.gradient import BackwardPlan, plan_backward
from t2ct.stream.graph import Graph
from t2ct.stream.simulate import AGAIN, MEMORY, SPOOL

DIRECTIONS = ("decode", "encode")


@pytest.fixture(autouse=True)
def thin_tiles(monkeypatch):
    yield from tiles_of(2**13, monkeypatch)  # not so many as to take long


def whole(vae, direction, x):
    return vae.decoder(vae.post_quant_conv(x)) if direction == "decode" else vae.encoder(x)


def gradients(run, vae, x):
    """Of a weighted sum of the outputs, with respect to x and to every parameter that counts."""
    x = x.clone().requires_grad_()
    y = run(x)
    torch.manual_seed(2)
    (y * torch.randn(y.shape).to(y)).sum().backward()
    found = {"x": x.grad} | {k: p.grad for k, p in vae.named_parameters() if p.grad is not None}
    vae.zero_grad(set_to_none=True)
    return y.detach(), found


def all_plans(vae, direction, x, folder):
    """Every plan for the backward pass, from the one of most memory to the one of least."""
    graph = Graph(vae.nodes(direction), tuple(x.shape[2:]), x.itemsize)
    found, room = [], 10**12
    while True:
        try:
            found.append(plan_backward(graph, room, folder is not None, 0))
        except ValueError:
            return found
        room = found[-1].peak - 1


def through(vae, direction, plan, folder):
    from t2ct.stream import gradient
    from t2ct.stream.execute import Run, channels_last, plan_for, planes_of

    def forward(parameters, x):
        forward_plan = plan_for(vae.nodes(direction), x.shape, x.dtype, "cpu")
        *size, channels = *forward_plan.graph.sizes[-1], vae.nodes(direction)[-1].channels
        out = torch.empty(*size, channels, dtype=x.dtype)
        run = Run(forward_plan, parameters, planes_of(x), out)
        run()
        return channels_last(out.permute(3, 0, 1, 2)[None]), [run.stats]

    def run(x):
        names = [part for n in vae.nodes(direction) for part in (n.name, n.norm, n.shortcut) if part]
        values = dict(vae.named_parameters())
        used = {f"{name}.{kind}": values[f"{name}.{kind}"] for name in names for kind in ("weight", "bias")}
        return gradient.differentiable(forward, plan, folder, used, x)

    return run


def worst(mine, theirs):
    """The largest relative error of any gradient."""
    assert mine.keys() == theirs.keys()
    return max(((mine[k].double() - g).norm() / g.norm().clamp_min(1e-30)).item() for k, g in theirs.items())


CASES = [(SMALL, *case) for case in product(DIRECTIONS, (False, True))]


@pytest.mark.parametrize(("config", "direction", "spool"), CASES)
def test_every_plan_gives_the_whole_volumes_gradients(config, direction, spool, tmp_path):
    vae, x = network(config).requires_grad_(), inputs(direction, config)
    if direction == "encode":
        x = x[..., : x.shape[4] // config.factor * config.factor]
    double = network(config, torch.float64).requires_grad_()
    _, theirs = gradients(lambda t: whole(double, direction, t), double, x.double())
    _, eager = gradients(lambda t: whole(vae, direction, t), vae, x)
    folder = tmp_path if spool else None
    found = all_plans(vae, direction, x, folder)
    places = [set(plan.place) for plan in found]
    assert len(found) >= 2 and MEMORY in places[0] and (SPOOL if spool else AGAIN) in places[-1]
    for plan in found:
        y, mine = gradients(through(vae, direction, plan, folder), vae, x)
        assert torch.equal(y, stream.execute(vae.nodes(direction), dict(vae.named_parameters()), x).detach())
        assert worst(mine, theirs) <= max(1e-5, 2 * worst(eager, theirs)), plan.place
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_decode_and_encode_learn_inside_a_budget(direction):
    """A batch, the other parameters untouched, and what autocast casts."""
    vae, x = network(SMALL).requires_grad_(), inputs(direction, SMALL, batch=2)
    x = x[..., : x.shape[4] // 2 * 2]
    call = vae.decode if direction == "decode" else lambda t, *args: torch.cat(vae.encode(t, *args))
    y, theirs = gradients(call, vae, x)
    z, mine = gradients(lambda t: call(t, "1GB"), vae, x)
    assert (y - z).norm() <= 5e-6 * y.norm() and worst(mine, {k: g.double() for k, g in theirs.items()}) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        y, mine = gradients(lambda t: call(t, "1GB").float(), vae, x)
    assert worst(mine, {k: g.double() for k, g in theirs.items()}) <= 0.1
    assert all(g.dtype == torch.float32 for g in mine.values())


def test_bfloat16_in_thin_tiles():
    """Tiles two planes thick, of which oneDNN's bfloat16 gradient of the weights is wrong."""
    vae, z = network(SMALL, torch.bfloat16).requires_grad_(), inputs("decode", SMALL, torch.bfloat16)
    double = network(SMALL, torch.float64).requires_grad_()
    _, theirs = gradients(lambda t: whole(double, "decode", t), double, z.double())
    _, mine = gradients(lambda t: vae.decode(t, "1GB"), vae, z)
    assert worst(mine, theirs) <= 0.1


def test_a_frozen_network_passes_the_gradient_on():
    vae, x = network(SMALL), inputs("decode", SMALL)
    _, theirs = gradients(lambda t: whole(vae, "decode", t), vae, x)
    _, mine = gradients(lambda t: vae.decode(t, "1GB"), vae, x)
    assert mine.keys() == {"x"} and worst(mine, {"x": theirs["x"].double()}) <= 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_budget_holds(direction, tmp_path):
    """By torch's allocator, forward and backward together."""
    vae, x = network(THREE).requires_grad_(), inputs(direction, THREE)
    call = vae.decode if direction == "decode" else lambda t, *a, **k: torch.cat(vae.encode(t, *a, **k))
    _, unlimited = peak_bytes(lambda: gradients(call, vae, x))
    graph = Graph(vae.nodes(direction), tuple(x.shape[2:]), x.itemsize)
    for folder in (None, tmp_path):
        least = _least(lambda b, f=folder: call(x.requires_grad_(), b, spool_dir=f))
        _, measured = peak_bytes(lambda b=least, f=folder: gradients(lambda t: call(t, b, spool_dir=f), vae, x))
        assert measured <= least
    assert measured < unlimited, graph.sizes


def _least(call):
    """The smallest budget for a gradient, from the message that names it; one too small for the forward pass names
    that."""
    budget, message = 1e6, ""
    while "for the gradient" not in message:
        with pytest.raises(ValueError, match="memory_budget: wanted at least") as error:
            call(budget)
        message = str(error.value)
        number, unit = message.split("wanted at least ")[1].replace(",", "").split()[:2]
        budget = stream.parse_bytes(f"{number} {unit}")
    return budget


def test_integers_have_no_gradient():
    vae, z = network(SMALL).requires_grad_(), inputs("decode", SMALL)
    with pytest.raises(ValueError, match="a gradient is wanted, and integers have none"):
        vae.decode(z, "1GB", hu=True)


def test_published_decoder_learns_in_gigabytes():
    """Made without a tensor: what a decoder-side loss on 256^3 voxels takes."""
    with torch.device("meta"):
        nodes = VAE().nodes("decode")
    plan = plan_backward(Graph(nodes, (64, 64, 64), 2), 24 * 10**9, False, 0)
    assert isinstance(plan, BackwardPlan) and plan.peak <= 24e9
