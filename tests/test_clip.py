"""CLIP3D against the golden vectors of the reference code, the published keys, and its own promises."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2ct.models.clip import CLIP3D, CLIP3DConfig
from t2ct.models.quantizer import CosineQuantizer
from t2ct.models.text import TextConfig
from t2ct.models.vision import VisionConfig
from t2ct.ops import attention

GOLDENS = Path(__file__).parent / "goldens"


def tiny_config() -> CLIP3DConfig:
    raw = json.loads((GOLDENS / "clip3d_tiny.json").read_text())
    text, vision = raw["text"], raw["vision"]
    return CLIP3DConfig(
        text=TextConfig(
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            max_length=text["max_position_embeddings"],
        ),
        vision=VisionConfig(
            dim=vision["dim"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            spatial_layers=vision["spatial_depth"],
            temporal_layers=vision["temporal_depth"],
            heads=vision["heads"],
            head_dim=vision["dim_head"],
            codebook_size=vision["codebook_size"],
            depth=raw["depth"],
        ),
        embed_dim=raw["projection_dim"],
    )


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return torch.load(GOLDENS / "clip3d_tiny.pt", weights_only=True)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / "clip3d_tiny_io.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def model(published) -> CLIP3D:
    model = CLIP3D(tiny_config()).eval()
    model.load_state_dict(published, strict=True)
    return model


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= bound  # false for NaN


@torch.no_grad()
def test_text_stages_equal_the_goldens(model, golden):
    assert_close(model.model.text_model(golden["input_ids"]), golden["text_last_hidden"])
    assert_close(model.encode_text(golden["input_ids"]), golden["text_embed"].unsqueeze(1))


@torch.no_grad()
def test_vision_stages_equal_the_goldens(model, golden):
    tokens, ids = model.model.vision_model(golden["volume"])
    assert_close(tokens, golden["vision_tokens"])
    assert torch.equal(ids, golden["codebook_ids"])
    assert_close(model.encode_volume(golden["volume"]), golden["image_embed"])
    assert torch.equal(model.logit_scale, golden["logit_scale"])


def test_published_network_has_the_published_keys_shapes_and_size():
    want = {}
    for line in (GOLDENS / "clip3d_keys.txt").read_text().splitlines():
        key, shape = line.split(" ", 1)
        want[key] = ast.literal_eval(shape)
    with torch.device("meta"):
        whole, text_only = CLIP3D(), CLIP3D(towers=("text",))
    assert {key: tuple(value.shape) for key, value in whole.state_dict().items()} == want
    assert all(value.is_meta for value in whole.state_dict().values())
    assert round(sum(math.prod(shape) for shape in want.values()) / 1e9, 2) == 0.79
    assert set(text_only.state_dict()) == {k for k in want if ".text_" in k}
    assert round(sum(p.numel() for p in text_only.parameters()) / 1e6) == 124


def test_published_vision_tower_gives_its_shapes_on_meta():
    with torch.device("meta"):
        vision = CLIP3D(towers=("vision",)).eval()
        volume = torch.empty(2, 1, 512, 512, 128)
    tokens, ids = vision.model.vision_model(volume)
    assert tokens.shape == (2, 8, 32, 32, 768) and ids.shape == (2, 8, 32, 32)
    assert vision.encode_volume(volume).shape == (2, 768)


def test_strict_load_names_what_is_wrong(published):
    wrong = {key: value for key, value in published.items() if key != "model.logit_scale"}
    with pytest.raises(RuntimeError, match="logit_scale"):
        CLIP3D(tiny_config()).load_state_dict(wrong, strict=True)


def test_text_only_holds_a_subset_and_gives_the_same_embedding(model, published, golden):
    text_only = CLIP3D(tiny_config(), towers=("text",)).eval()
    text_only.load_state_dict({key: published[key] for key in text_only.state_dict()}, strict=True)
    assert torch.equal(text_only.encode_text(golden["input_ids"]), model.encode_text(golden["input_ids"]))
    with pytest.raises(RuntimeError, match="wanted the vision tower, got a model built without it"):
        text_only.encode_volume(golden["volume"])
    with pytest.raises(RuntimeError, match="wanted the logit scale"):
        _ = text_only.logit_scale
    with pytest.raises(ValueError, match=r"towers: wanted some of .* got \('audio',\)"):
        CLIP3D(tiny_config(), towers=("audio",))


@torch.no_grad()
def test_text_runs_only_to_the_first_end_of_the_longest_row(model, golden, monkeypatch):
    ids = golden["input_ids"]
    eot = model.config.text.eot_id
    first = (ids == eot).int().argmax(-1)
    full = model.model.text_model(ids)[torch.arange(len(ids)), first]
    want = F.normalize(model.model.text_projection(full), dim=-1).unsqueeze(1)

    lengths = []
    model.model.text_model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert_close(model.encode_text(ids), want, 1e-6)
    assert lengths == [int(first.max()) + 1] and lengths[0] < ids.shape[1]

    junk = ids.clone()
    junk[:, int(first.max()) + 1 :] = 1  # what follows the first end cannot matter
    assert torch.equal(model.encode_text(junk), model.encode_text(ids))


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(model, golden):
    texts = torch.cat([model.encode_text(row[None]) for row in golden["input_ids"]])
    assert_close(model.encode_text(golden["input_ids"]), texts, 1e-6)
    volumes = torch.cat([model.encode_volume(volume[None]) for volume in golden["volume"]])
    assert_close(model.encode_volume(golden["volume"]), volumes, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_dtypes(golden, dtype, bound):
    torch.manual_seed(0)
    model = CLIP3D(tiny_config()).eval()
    text, (_, ids) = model.encode_text(golden["input_ids"]), model.model.vision_model(golden["volume"])
    model.to(dtype)
    assert model.encode_text(golden["input_ids"]).dtype == dtype
    assert_close(model.encode_text(golden["input_ids"]), text, bound)
    # A rounded token near a border takes the neighbouring code, so codes are counted rather than embeddings compared.
    assert (model.model.vision_model(golden["volume"])[1] == ids).float().mean() >= 0.9
    embedding = model.encode_volume(golden["volume"])
    assert embedding.dtype == dtype
    assert_close(embedding.float().norm(dim=-1), torch.ones(2), 1e-2)


@torch.no_grad()
def test_volume_may_be_of_any_number_type(model, golden):
    hu = golden["volume"].round()
    want = model.encode_volume(hu)
    for dtype in (torch.int16, torch.int32, torch.float64):
        assert torch.equal(model.encode_volume(hu.to(dtype)), want)


def test_depth_may_differ_by_whole_patches(model):
    assert model.encode_volume(torch.zeros(1, 1, 32, 32, 8)).shape == (1, 48)


def test_gradients_reach_every_live_parameter_and_training_learns(golden):
    torch.manual_seed(0)
    model = CLIP3D(tiny_config()).train()
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(any(mark in n for mark in ("first_frame", "to_pixels", "context_norm", "null_kv")) for n in dead)
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3)
    losses = []
    for step in range(12):
        text, volume, scale = model(golden["input_ids"], golden["volume"])
        loss = F.cross_entropy(scale * text @ volume.T, torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            missing = [name for name, p in live.items() if p.grad is None or not p.grad.norm() > 0]
            assert missing == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_towers_trace_without_graph_breaks(model, golden):
    text = torch.compile(model.model.text_model, fullgraph=True, backend="eager")
    assert_close(text(golden["input_ids"]), golden["text_last_hidden"])
    vision = torch.compile(model.model.vision_model, fullgraph=True, backend="eager")
    assert_close(vision(golden["volume"])[0], golden["vision_tokens"])


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_quantizer_picks_the_nearest_unit_code_and_evaluation_changes_nothing():
    torch.manual_seed(0)
    vq = CosineQuantizer(16, 8).eval()
    before = {key: value.clone() for key, value in vq.state_dict().items()}
    x = 100 * torch.randn(2, 3, 8)
    codes, ids = vq(x)
    book = F.normalize(vq._codebook.embed[0].double(), dim=-1)
    want = F.cosine_similarity(x.double().unsqueeze(-2), book, dim=-1).argmax(-1)
    assert torch.equal(ids, want)
    assert_close(codes, book[want], 1e-6)
    assert all(torch.equal(before[key], value) for key, value in vq.state_dict().items())


def test_quantizer_first_batch_fills_the_codebook_with_its_tokens():
    torch.manual_seed(0)
    vq, x = CosineQuantizer(6, 8, decay=1.0).train(), torch.randn(10, 8)
    vq(x)
    similarity = vq._codebook.embed[0] @ F.normalize(x, dim=-1).T
    assert vq._codebook.initted.item() == 1
    assert_close(similarity.max(-1).values, torch.ones(6), 1e-6)
    assert len(similarity.argmax(-1).unique()) == 6  # distinct tokens


def test_quantizer_moving_average_follows_the_formula():
    torch.manual_seed(0)
    decay, vq, x = 0.8, CosineQuantizer(4, 8).train(), 3 * torch.randn(32, 8)
    book = vq._codebook
    book.initted.fill_(1)
    book.cluster_size.fill_(8)  # nothing is dead
    old, size = book.embed[0].clone().double(), book.cluster_size[0].clone().double()
    _, ids = vq(x)
    tokens = F.normalize(x.double(), dim=-1)
    for code in range(4):
        mine = tokens[ids == code]
        want = old[code]
        if len(mine):
            want = F.normalize(decay * old[code] + (1 - decay) * F.normalize(mine.sum(0), dim=-1), dim=-1)
        assert_close(book.embed[0, code], want, 1e-6)
        assert_close(book.cluster_size[0, code], decay * size[code] + (1 - decay) * len(mine), 1e-6)


def test_quantizer_replaces_dead_codes_and_is_deterministic():
    torch.manual_seed(0)
    tokens = unit(64, 8).abs()  # all in one orthant
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        vq = CosineQuantizer(4, 8).train()
        vq._codebook.initted.fill_(1)
        vq._codebook.embed.fill_(-1.0)  # opposite to every token: ties go to code 0, the others die
        vq._codebook.embed[0, 0] = 1.0
        vq._codebook.cluster_size.fill_(16.0)
        used = [len(vq(tokens)[1].unique()) for _ in range(40)]
        runs.append(vq.state_dict())
    assert used[0] == 1 and used[-1] == 4
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_quantizer_gradient_is_that_of_the_unit_token():
    torch.manual_seed(0)
    vq, weight = CosineQuantizer(4, 8).train(), torch.randn(5, 8)
    x = (7 * torch.randn(5, 8)).requires_grad_()
    (vq(x)[0] * weight).sum().backward()
    y = x.detach().clone().requires_grad_()
    (F.normalize(y, dim=-1) * weight).sum().backward()
    assert_close(x.grad, y.grad, 1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_equals_its_formula(causal, with_bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5) if with_bias else None
    logits = 8.0 * q.double() @ k.double().mT
    if bias is not None:
        logits = logits + bias
    if causal:
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    want = logits.softmax(-1) @ v.double()
    assert_close(attention(q, k, v, bias=bias, scale=8.0, causal=causal), want, 1e-6)


def test_attention_refuses_wrong_shapes():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"attention: wanted q, k, v of shape .* got \(2, 3, 4\)"):
        attention(q[0], q, q)
    with pytest.raises(ValueError, match="causal wants as many queries as keys, got 3 and 2"):
        attention(q, q[:, :, :2], q[:, :, :2], causal=True)


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([[1, 299]], TypeError, "input_ids: wanted an int64 or int32 tensor, got list"),
        (torch.zeros(1, 4), TypeError, "input_ids: .* got torch.float32"),
        (torch.tensor([1, 299]), ValueError, r"input_ids: wanted shape \(B, 1..24\), got \(2,\)"),
        (torch.full((1, 25), 299), ValueError, r"input_ids: wanted shape \(B, 1..24\), got \(1, 25\)"),
        (torch.tensor([[1, 300, 299]]), ValueError, r"input_ids: wanted ids in \[0, 299\], got 300"),
        (torch.tensor([[-1, 299]]), ValueError, r"input_ids: wanted ids in \[0, 299\], got -1"),
        (torch.tensor([[1, 299], [1, 2]]), ValueError, "input_ids: wanted the end-of-text id 299 in every row"),
    ],
)
def test_encode_text_refuses_wrong_input(model, ids, error, message):
    with pytest.raises(error, match=message):
        model.encode_text(ids)


@pytest.mark.parametrize(
    "volume, error, message",
    [
        (np.zeros((1, 1, 32, 32, 12)), TypeError, "volume: wanted a tensor of HU, floating or integer, got ndarray"),
        (torch.zeros(1, 1, 32, 32, 12, dtype=torch.bool), TypeError, "volume: .* got torch.bool"),
        (torch.zeros(1, 32, 32, 12), ValueError, r"volume: wanted shape \(B, 1, 32, 32, Z\)"),
        (torch.zeros(1, 1, 32, 24, 12), ValueError, r"got \(1, 1, 32, 24, 12\)"),
        (torch.zeros(1, 1, 32, 32, 10), ValueError, r"Z a multiple of 4, got \(1, 1, 32, 32, 10\)"),
        (torch.zeros(1, 1, 32, 32, 0), ValueError, r"Z a multiple of 4, got \(1, 1, 32, 32, 0\)"),
    ],
)
def test_encode_volume_refuses_wrong_input(model, volume, error, message):
    with pytest.raises(error, match=message):
        model.encode_volume(volume)


def test_configs_refuse_what_cannot_be_built():
    with pytest.raises(ValueError, match="TextConfig.width: wanted a multiple of heads=5, got 64"):
        TextConfig(width=64, heads=5)
    with pytest.raises(ValueError, match="TextConfig.layers: wanted an integer from 1 to 128, got 0"):
        TextConfig(layers=0)
    with pytest.raises(ValueError, match="VisionConfig.image_size: wanted a multiple of patch_size=16, got 40"):
        VisionConfig(image_size=40)
    with pytest.raises(ValueError, match="VisionConfig.depth: wanted a multiple of temporal_patch_size=16, got 40"):
        VisionConfig(depth=40)
    with pytest.raises(TypeError, match="CLIP3DConfig.text: wanted TextConfig, got dict"):
        CLIP3DConfig(text={})
