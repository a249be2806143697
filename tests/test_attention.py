"""attention: every backend against float64, values and gradients of everything it takes."""

import itertools
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from t2ct.models import CLIP3D, CLIP3DConfig, TextConfig, VisionConfig
from t2ct.ops import attention, explain_rows, use_backend
from t2ct.ops.attention import TABLE, _op, expand_relative, why_not_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {t: torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
BACKENDS = ("triton", "xformers", "sdpa", "reference")
# B, H, N, M, D and what else: blocks that are full and not, one token, few keys, head dims beside powers of two
CASES = {
    "plain": (2, 2, 20, 20, 32),
    "blocks": (1, 2, 150, 133, 24),
    "one query": (2, 2, 1, 5, 16),
    "one key": (1, 2, 70, 1, 32),
    "few keys": (1, 2, 140, 77, 64),
    "wide head": (1, 1, 30, 30, 128),
    "causal": (2, 2, 40, 40, 64, "causal"),
    "causal blocks": (1, 2, 140, 140, 32, "causal", "bias"),
    "bias of one batch row": (2, 2, 17, 19, 32, "bias"),
    "bias of each": (2, 2, 17, 19, 32, "full bias"),
    "relative": (2, 2, 15, 15, 32, "relative"),
    "cosine": (1, 2, 33, 33, 40, "cosine"),
    "cosine, relative": (2, 2, 15, 15, 32, "relative", "cosine"),
}
GRID = (3, 5)
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


def make(case, dtype):
    """(tensors by name, causal)"""
    torch.manual_seed(0)
    b, h, n, m, d, *extra = CASES[case]
    sizes = {"q": n, "k": m, "v": m}  # heads as a view of the channels: what a projection gives
    tensors = {key: torch.randn(b, size, h, d, device=DEVICE).to(dtype).transpose(1, 2) for key, size in sizes.items()}
    if "bias" in extra or "full bias" in extra:
        tensors["bias"] = torch.randn(b if "full bias" in extra else 1, h, n, m, device=DEVICE).to(dtype)
    if "relative" in extra:
        offsets = (2 * GRID[0] - 1) * (2 * GRID[1] - 1)
        tensors["table"] = torch.randn(h, offsets, device=DEVICE).to(dtype)
    if "cosine" in extra:
        tensors |= {name: (torch.rand(d, device=DEVICE) + 0.5).to(dtype) for name in ("q_scale", "k_scale")}
    return tensors, "causal" in extra


def call(tensors, causal, fn=attention):
    given = dict(tensors)
    table = given.pop("table", None)
    return fn(**given, causal=causal, relative_bias=None if table is None else (table, GRID))


def definition(q, k, v, bias=None, causal=False, relative_bias=None, q_scale=None, k_scale=None):
    """The formula, word for word."""
    if q_scale is not None:
        q, k = F.normalize(q, dim=-1) * q_scale, F.normalize(k, dim=-1) * k_scale
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias
    if relative_bias is not None:
        table, (h, w) = relative_bias
        place = [(i // w, i % w) for i in range(h * w)]
        index = [[(a - c + h - 1) * (2 * w - 1) + b - d + w - 1 for c, d in place] for a, b in place]
        s = s + table[:, torch.tensor(index, device=table.device)]
    if causal:
        s = s + torch.full_like(s, -torch.inf).triu(1)
    return s.softmax(-1) @ v


def run(tensors, causal, fn, do):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = call(leaves, causal, fn)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), do.to(y.dtype))]


def error(y, exact, scale=1.0):
    """Relative to the exact value, or to `scale` where that is 0: with one key no query has a gradient."""
    return ((y.double() - exact).norm() / (exact.norm() or scale)).item()


@pytest.mark.parametrize("dtype", EPS, **ids)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, backend, dtype):
    if why_not_attention(backend, DEVICE, dtype):
        pytest.skip(why_not_attention(backend, DEVICE, dtype))
    tensors, causal = make(case, dtype)
    do = torch.randn_like(tensors["q"])
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(wide, causal, definition, do)
    eager = run(tensors, causal, definition, do)
    with use_backend(backend):
        mine = run(tensors, causal, attention, do)
    for ours, theirs, truth in zip(mine, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert error(ours, truth, do.norm()) <= 2 * error(theirs, truth, do.norm()) + 8 * EPS[dtype]


def triton_or_skip():
    if why_not_attention("triton", DEVICE, torch.float32):
        pytest.skip(why_not_attention("triton", DEVICE, torch.float32))


def test_same_bits_twice():
    triton_or_skip()
    tensors, causal = make("causal blocks", torch.float16)
    with use_backend("triton"):
        first, second = (run(tensors, causal, attention, torch.ones_like(tensors["q"])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", ({"LAZY": 1}, {"EXP_SPLIT": 1}, {"EXP_SPLIT": 2}), ids=str)
def test_seams(options):
    """Lazy rescaling and exponentials by polynomial: the same numbers, within what float16 shows."""
    triton_or_skip()
    from t2ct.kernels import attention as kernels

    tensors, _ = make("blocks", torch.float16)
    q, k, v = (10 * tensors["q"], tensors["k"], tensors["v"])  # maxima that grow by more than lazy rescaling lets pass
    out, _ = kernels.attention(q, k, v, None, None, None, None, 24**-0.5, False, 1, BM=64, BN=32, **options)
    assert error(out, definition(q.double(), k.double(), v.double())) <= 2e-3


def test_registration():
    triton_or_skip()
    tensors, _ = make("cosine, relative", torch.float32)
    names = ("q", "k", "v", "bias", "table", "q_scale", "k_scale")
    given = [tensors[n].requires_grad_() if n in tensors else None for n in names]
    with use_backend("triton"):
        torch.library.opcheck(_op, (*given, 0.2, False, GRID[1]))


@pytest.mark.parametrize("backend", ("triton", "sdpa", "reference"))
def test_compiled_whole(backend):
    if backend == "triton":
        triton_or_skip()
    tensors, causal = make("cosine, relative", torch.float32)
    with use_backend(backend), torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors, causal)
        assert error(compiled, call(tensors, causal).double()) <= 1e-6


def test_gradcheck():
    tensors, causal = make("relative", torch.float64)
    small = [t[:1, :, :, :3].detach().requires_grad_() for name, t in tensors.items() if name != "table"]
    small.append(tensors["table"].requires_grad_())
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k, v, t: attention(q, k, v, relative_bias=(t, GRID)), small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_and_large_logits_are_numbers(backend):
    if why_not_attention(backend, DEVICE, torch.float16):
        pytest.skip(why_not_attention(backend, DEVICE, torch.float16))
    tensors, _ = make("plain", torch.float16)
    bias = torch.zeros(1, 2, 20, 20, device=DEVICE, dtype=torch.float16)
    bias[:, :, 3] = -torch.inf
    with use_backend(backend):
        y, *gradients = run(tensors | {"bias": bias}, False, attention, torch.ones_like(tensors["q"]))
        assert (y[:, :, 3] == 0).all() and y.isfinite().all()
        assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :, 3] == 0).all()
        assert attention(20 * tensors["q"], 20 * tensors["k"], tensors["v"]).isfinite().all()


@pytest.mark.parametrize("case", ("few keys", "causal blocks", "cosine"))
def test_split_queries(case, monkeypatch):
    """Few keys share the queries out among programs: the gradients of keys, values and scales are merged in order."""
    triton_or_skip()
    from t2ct.kernels import attention_backward
    from t2ct.kernels.attention import attention as attend
    from t2ct.kernels.attention import rows_first

    tensors, causal = make(case, torch.float32)
    do = torch.randn_like(tensors["q"])
    exact = run({name: t.double() for name, t in tensors.items()}, causal, definition, do)
    kernel, grids = attention_backward.dkdv_kernel, []

    class Spy:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention_backward, "SPLIT_ROWS", 16)
    monkeypatch.setattr(attention_backward, "dkdv_kernel", Spy())
    with use_backend("triton"):
        parts = run(tensors, causal, attention, do)
    assert [splits > 1 for _, splits in grids] == [True]
    assert all(error(part, truth) <= 2e-6 for part, truth in zip(parts, exact, strict=True))
    # strides as a compiler was promised them
    q, k, v = (tensors[name] for name in "qkv")
    out, lse = attend(q, k, v, None, None, None, None, 0.1, causal, 0)
    needs = [True] * 3 + [False] * 4
    made = attention_backward.attention_backward(do, q, k, v, *[None] * 4, out, lse, 0.1, causal, 0, needs)
    assert [t.stride() for t in made[:3]] == [rows_first(t).stride() for t in (q, k, v)]


def test_scales_in_any_strides():
    triton_or_skip()
    tensors, causal = make("cosine", torch.float32)
    strided = tensors | {k: torch.stack([tensors[k], -tensors[k]], 1)[:, 0] for k in ("q_scale", "k_scale")}
    do = torch.randn_like(tensors["q"])
    with use_backend("triton"):
        want, got = (run(given, causal, attention, do) for given in (tensors, strided))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_products_overlap_on_sm_90():
    """ptxas can be led to make every wgmma wait for the one before; it says so (C7515) only when asked."""
    pytest.importorskip("triton")
    code = """
import re, subprocess, sys, tempfile
sys.path.insert(0, "benchmarks")
import aot
for row in aot.rows("attention", 90):
    if re.fullmatch("(forward|dkdv|dq), D=32", row["name"]):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
            f.write(aot.compiled(row, 90).asm["ptx"])
            f.flush()
            command = [aot.TOOLS / "ptxas", "-v", "-arch=sm_90a", f.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
        print(row["name"], said.stdout + said.stderr)
"""
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert said.count("Used ") == 3 and "serialized" not in said, said


def test_shapes_alone():
    """Meta tensors have shapes whatever backend is forced."""
    q = torch.empty(2, 3, 40, 16, device="meta")
    for backend in (None, "triton"):
        with use_backend(backend):
            assert attention(q, q, q).shape == q.shape


def test_clip_by_triton():
    """Both towers: causal attention, cosine attention with its relative bias; nothing of tokens x tokens is stored."""
    triton_or_skip()
    torch.manual_seed(0)
    text = TextConfig(vocab_size=50, width=32, layers=1, heads=2, mlp_width=32, max_length=8)
    vision = VisionConfig(dim=32, image_size=24, patch_size=8, temporal_patch_size=4, spatial_layers=1,
                          temporal_layers=1, heads=2, head_dim=16, codebook_size=8, depth=8)  # fmt: skip
    clip = CLIP3D(CLIP3DConfig(text=text, vision=vision, embed_dim=16)).to(DEVICE).eval()
    ids, volume = torch.tensor([[3, 7, 49]], device=DEVICE), 500 * torch.randn(1, 1, 24, 24, 8, device=DEVICE)
    with torch.no_grad():
        plain = clip.encode_text(ids), clip.encode_volume(volume)
        with use_backend("triton"):
            mine = clip.encode_text(ids), clip.encode_volume(volume)
    assert all(error(a, b.double()) <= 1e-5 for a, b in zip(mine, plain, strict=True))
    # The quantiser rounds small errors of its tokens away: so the tokens too, under a bias that matters.
    tower, tokens = clip.model.vision_model, torch.randn(1, 9, 32, device=DEVICE)
    for p in tower.spatial_rel_pos_bias.parameters():
        torch.nn.init.normal_(p)
    with torch.no_grad():
        spatial = [tower.enc_spatial_transformer(tokens, (1, 1, 3, 3), tower.spatial_rel_pos_bias(3, 3))]
        with use_backend("triton"):
            spatial.append(tower.enc_spatial_transformer(tokens, (1, 1, 3, 3), tower.spatial_rel_pos_bias(3, 3)))
    assert error(spatial[1], spatial[0].double()) <= 1e-5


def test_relative_bias_is_a_bias():
    tensors, _ = make("relative", torch.float32)
    table = tensors.pop("table")
    grown = expand_relative(table, *GRID)
    assert grown.shape == (1, 2, 15, 15)
    assert torch.equal(attention(**tensors, bias=grown), attention(**tensors, relative_bias=(table, GRID)))


def test_bad_input():
    q = torch.randn(2, 3, 4, 8)
    table = torch.randn(3, 9)
    for arguments, message in (
        ((q[0], q, q), r"wanted q, k, v of shape \(B, heads, N, D\).*got \(3, 4, 8\)"),
        ((q, q[:, :2], q), "wanted q, k, v of shape"),
        ((q, q, q[:, :, :3]), "wanted q, k, v of shape"),
        ((q[:, :, :0], q, q), "wanted tensors that are not empty"),
        ((q, q.double(), q), "of one floating dtype, got torch.float32, torch.float64"),
        ((q, q, q.to("meta")), "v must be on cpu, got meta"),
        ((q, q, q, torch.zeros(3, 5)), r"bias must broadcast to \(2, 3, 4, 4\), got \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match="attention: .*" + message):
            attention(*arguments)
    with pytest.raises(ValueError, match="causal wants as many queries as keys, got 4 and 3"):
        attention(q, q[:, :, :3], q[:, :, :3], causal=True)
    with pytest.raises(ValueError, match="q_scale and k_scale both or neither"):
        attention(q, q, q, q_scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"k_scale must be \(8,\), got \(7,\)"):
        attention(q, q, q, q_scale=torch.ones(8), k_scale=torch.ones(7))
    with pytest.raises(ValueError, match=r"a 2 x 3 grid wants a table \(3, 15\) and 6 tokens, got \(3, 9\) and 4, 4"):
        attention(q, q, q, relative_bias=(table, (2, 3)))


def test_a_forced_backend_runs_or_raises():
    wide = torch.randn(1, 1, 4, 136)
    with use_backend("xformers"):
        if why_not_attention("xformers", DEVICE, torch.float32):
            with pytest.raises(RuntimeError, match="attention: backend 'xformers' cannot run: "):
                attention(wide, wide, wide)
    triton_or_skip()
    wide = wide.to(DEVICE)
    with use_backend("triton"):
        for tensors, message in (
            ((wide, wide, wide), "head dims 1 to 128, one for q, k and v, not 136 and 136"),
            ((wide.double()[..., :8],) * 3, "it takes float16, bfloat16 and float32, not float64"),
        ):
            with pytest.raises(RuntimeError, match="attention: backend 'triton' cannot run: .*" + message):
                attention(*tensors)
        with pytest.raises(RuntimeError, match="it wants a positive scale, not -1"):
            attention(wide[..., :8], wide[..., :8], wide[..., :8], scale=-1.0)
    assert next(row for row in explain_rows("cpu") if row[1] == "attention")[2] == "sdpa"


@pytest.mark.parametrize("form", ("plain", "causal", "bias", "causal bias", "gradient of the bias alone"))
def test_xformers_as_documented(form, monkeypatch):
    """A stand-in of the documented signature: what it is given is laid out as it wants, what it returns is ours."""

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        b, n, h, _ = query.shape
        mask = attn_bias
        if isinstance(mask, LowerTriangularMask):
            mask = torch.full((n, n), float("-inf")).triu(1)
        elif mask is not None:  # every pair is there, rows begin at multiples of 8 numbers
            assert mask.shape == (b, h, n, key.shape[1]) and mask.dtype == query.dtype
            assert mask.stride(-1) == 1 and mask.stride(-2) % 8 == 0
        with torch.set_grad_enabled(any(t.requires_grad for t in (query, key, value))):  # as it does without gradients
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, mask, p, scale=scale).transpose(1, 2)

    module, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.LowerTriangularMask, ops.memory_efficient_attention, module.ops = (
        LowerTriangularMask, memory_efficient_attention, ops)  # fmt: skip
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in "qkv")
    leaves = [torch.randn(1, 3, 5, 5)] if "bias" in form else []
    leaves = leaves if "alone" in form else [q, k, v, *leaves]
    for t in leaves:
        t.requires_grad_()
    bias = leaves[-1] if "bias" in form else None
    results = []
    for backend in ("xformers", "reference"):
        y = TABLE[backend](q, k, v, bias, 0.3, "causal" in form)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for mine, wanted in zip(*results, strict=True):
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=("fp16", "bf16", "fp32"))
def test_xformers_own_checks_object_to_nothing_but_the_device(dtype, monkeypatch):
    """The library itself, which computes on GPUs alone: what we hand it passes its checks, gradients included."""
    ops = pytest.importorskip("xformers.ops")
    from xformers.ops.fmha import cutlass
    from xformers.ops.fmha.common import Inputs

    handed = []

    def checked(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        handed.append(Inputs(query=query, key=key, value=value, attn_bias=attn_bias, p=p, scale=scale))
        return query

    monkeypatch.setattr(ops, "memory_efficient_attention", checked)
    for d, n, batch, causal in itertools.product((16, 32, 40, 128), (5, 64), (None, 1, 2), (False, True)):
        q, k, v = (torch.randn(2, 3, n, d, dtype=dtype, requires_grad=True) for _ in "qkv")
        bias = None if batch is None else torch.randn(batch, 3, n, n, dtype=dtype, requires_grad=True)
        TABLE["xformers"](q, k, v, bias, 0.3, causal)
        handed[-1].validate_inputs()
        for operator in (cutlass.FwOp, cutlass.BwOp):
            reasons = operator.not_supported_reasons(handed[-1])
            reasons = [r for r in reasons if r != "bf16 is only supported on A100+ GPUs"]  # the device once more
            assert reasons == ["device=cpu (supported: {'cuda'})"], (operator.NAME, d, n, batch, causal)
