"""VAE and UNet against MONAI's networks with the same random weights, forward and backward."""

from pathlib import Path

import pytest
import torch

from t2ct.models import VAE, UNet, UNetConfig, VAEConfig
from t2ct.models.unet_blocks import Attention

monai_vae = pytest.importorskip("monai.apps.generation.maisi.networks.autoencoderkl_maisi")
monai_unet = pytest.importorskip("monai.apps.generation.maisi.networks.diffusion_model_unet_maisi")


def relative(mine, theirs):
    return ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()


def randomise(module, seed=0):
    """Every parameter random, the zero-initialised ones too: zeros would hide a wrong branch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) * (fan**-0.5 if p.dim() > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)


def pair_vae(config):
    theirs = monai_vae.AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=config.latent_channels,
        num_channels=config.channels,
        num_res_blocks=[config.num_res_blocks] * len(config.channels),
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        attention_levels=[False] * len(config.channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        norm_float16=False,
        num_splits=1,
        dim_split=1,
        save_mem=False,
    )
    if theirs.quant_conv_mu.conv.weight.is_meta:
        return None, theirs
    randomise(theirs)
    mine = VAE(config)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


def pair_unet(config):
    theirs = monai_unet.DiffusionModelUNetMaisi(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.num_res_blocks,
        num_channels=config.channels,
        attention_levels=config.attention_levels,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        resblock_updown=True,
        num_head_channels=config.head_dim,
        with_conditioning=True,
        cross_attention_dim=config.cross_attention_dim,
        num_class_embeds=config.num_class_embeds,
        include_spacing_input=True,
        include_fc=True,
    )
    randomise(theirs)
    mine = UNet(config)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


def compare_gradients(mine, theirs, loss_mine, loss_theirs):
    loss_mine.backward()
    loss_theirs.backward()
    ours = dict(mine.named_parameters())
    total = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt()
    for name, p in theirs.named_parameters():
        g = ours[name].grad
        if g is None:  # dead with a one-token context: the reference's gradient is rounding noise around zero
            assert ".attn2.to_q" in name or ".attn2.to_k" in name or ".norm2." in name, name
            assert p.grad.norm() <= 1e-5 * total
            continue
        # relative to the tensor, plus rounding of the whole: a bias before a norm over one channel has gradient zero
        assert (g - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-6 * total, (name, relative(g, p.grad))


VAES = [
    (VAEConfig(channels=(8, 16, 32), norm_groups=8), 1, (16, 12, 8)),
    (VAEConfig(channels=(16, 32), norm_groups=4, num_res_blocks=1, latent_channels=3), 2, (9, 11, 7)),
    (VAEConfig(channels=(32, 32, 64), norm_groups=32), 2, (13, 10, 15)),
]


@pytest.mark.parametrize("config,batch,size", VAES, ids=str)
def test_vae_equals_monai(config, batch, size):
    mine, theirs = pair_vae(config)
    x = torch.rand(batch, 1, *size)
    (mu, sigma), (their_mu, their_sigma) = mine.encode(x), theirs.encode(x)
    assert mu.shape == their_mu.shape == (batch, config.latent_channels, *(n // config.factor for n in size))
    assert relative(mu, their_mu) <= 1e-5
    assert relative(sigma, their_sigma) <= 1e-5
    z = torch.randn(mu.shape)
    y, their_y = mine.decode(z), theirs.decode(z)
    assert relative(y, their_y) <= 1e-5
    compare_gradients(
        mine,
        theirs,
        (mu * sigma).square().sum() + y.square().sum(),
        (their_mu * their_sigma).square().sum() + their_y.square().sum(),
    )


UNETS = [
    (
        UNetConfig(
            channels=(8, 16, 32),
            attention_levels=(False, True, True),
            head_dim=8,
            cross_attention_dim=24,
            norm_groups=4,
        ),
        1,
        (8, 4, 12),
    ),
    (
        UNetConfig(
            channels=(16, 16, 32, 32),
            attention_levels=(False, False, True, True),
            head_dim=16,
            cross_attention_dim=12,
            norm_groups=4,
            num_res_blocks=1,
            num_class_embeds=3,
        ),
        2,
        (16, 8, 8),
    ),
    (
        UNetConfig(channels=(8, 24), attention_levels=(True, False), head_dim=8, cross_attention_dim=7, norm_groups=2),
        3,
        (6, 2, 4),
    ),
]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("config,batch,size", UNETS, ids=str)
def test_unet_equals_monai(config, batch, size, tokens):
    mine, theirs = pair_unet(config)
    torch.manual_seed(1)
    x, context = torch.randn(batch, 4, *size), torch.randn(batch, tokens, config.cross_attention_dim)
    t, labels, spacing = torch.rand(batch) * 1000, torch.ones(batch, dtype=torch.long), torch.rand(batch, 3) * 300
    y = mine(x, t, context, labels, spacing)
    their_y = theirs(x=x, timesteps=t, context=context, class_labels=labels, spacing_tensor=spacing)
    assert relative(y, their_y) <= 1e-5
    compare_gradients(mine, theirs, y.square().sum(), their_y.square().sum())


def test_several_contexts_share_the_first_blocks():
    """K contexts per latent give what K separate passes give, whatever level attention starts at."""
    for config, batch, size in UNETS:
        unet = UNet(config)
        randomise(unet)
        x, context = torch.randn(batch, 4, *size), torch.randn(2 * batch, 1, config.cross_attention_dim)
        rest = torch.rand(batch) * 1000, torch.ones(batch, dtype=torch.long), torch.rand(batch, 3) * 300
        with torch.no_grad():
            both = unet(x, rest[0], context, *rest[1:])
            separate = torch.cat([unet(x, rest[0], c, *rest[1:]) for c in context.chunk(2)])
        assert both.shape[0] == 2 * batch
        assert relative(both, separate) <= 1e-5


def test_cross_attention_to_one_token_is_constant():
    layer = Attention(32, 8, 12).double()
    x, context = torch.randn(2, 50, 32).double(), torch.randn(2, 1, 12).double()
    general = layer(x, context)
    assert relative(layer.of_one_token(context).expand_as(general), general) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype(dtype):
    """Within a few roundings of float32: 2^-8 (bfloat16) or 2^-11 (float16) a layer, ~30 layers deep."""
    vae, unet = VAE(VAES[0][0]), UNet(UNETS[0][0])
    randomise(vae)
    x, z, context = torch.rand(1, 1, 16, 8, 8), torch.randn(1, 4, 4, 4, 4), torch.randn(1, 1, 24)
    extra = torch.tensor([500.0]), torch.ones(1, dtype=torch.long), torch.tensor([[75.0, 75.0, 300.0]])
    randomise(unet)
    with torch.no_grad():
        wide = [vae.decode(z), vae.encode(x)[0], unet(z, extra[0], context, *extra[1:])]
        vae, unet = vae.to(dtype), unet.to(dtype)
        low = [
            vae.decode(z.to(dtype)),
            vae.encode(x.to(dtype))[0],
            unet(z.to(dtype), extra[0], context.to(dtype), *extra[1:]),
        ]
    for a, b in zip(low, wide, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) <= 16 * torch.finfo(dtype).eps


def test_channels_last_all_the_way(monkeypatch):
    """Every tensor that enters a norm is channels-last: a stray contiguous() would cost a copy a layer."""
    from t2ct import ops
    from t2ct.models import layers

    seen = []

    def spy(function):
        def call(x, *args, **kwargs):
            seen.append(x.is_contiguous(memory_format=torch.channels_last_3d))
            return function(x, *args, **kwargs)

        return call

    for name in ("group_norm", "group_norm_silu", "group_norm_silu_conv3d_stats"):
        monkeypatch.setattr(layers.ops, name, spy(getattr(ops, name)))
    vae, unet = VAE(VAES[0][0]), UNet(UNETS[0][0])
    with torch.no_grad():
        vae.decode(vae.encode(torch.rand(1, 1, 16, 16, 16))[0])
        unet(
            torch.randn(1, 4, 8, 8, 8),
            torch.ones(1),
            torch.randn(2, 1, 24),
            torch.ones(1, dtype=torch.long),
            torch.ones(1, 3),
        )
    assert len(seen) > 40
    assert all(seen)


def published_unet():
    """{key: shape} of the published UNet."""
    lines = (Path(__file__).parent / "goldens/unet_keys.txt").read_text().splitlines()[1:]
    pairs = [line.split(" ", 1) for line in lines]
    return {name: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for name, shape in pairs}


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def millions(model):
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def test_published_unet_on_meta():
    with torch.device("meta"):
        model = UNet()
    assert shapes(model) == published_unet()
    assert millions(model) == 217.7


def test_published_vae_on_meta():
    with torch.device("meta"):
        model, (_, theirs) = VAE(), pair_vae(VAEConfig())
    assert shapes(model) == shapes(theirs)
    assert len(shapes(model)) == 130
    assert (millions(model), millions(model.encoder), millions(model.decoder)) == (20.9, 8.8, 12.1)


def test_compiles():
    unet = UNet(UNETS[2][0])
    randomise(unet)
    args = (
        torch.randn(1, 4, 4, 4, 4),
        torch.ones(1),
        torch.randn(1, 1, 7),
        torch.ones(1, dtype=torch.long),
        torch.ones(1, 3),
    )
    with torch.no_grad():
        assert relative(torch.compile(unet, backend="aot_eager", fullgraph=True)(*args), unet(*args)) <= 1e-6


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: VAE(VAEConfig(channels=(10, 20), norm_groups=8)), r"multiple of norm_groups=8, got \(10, 20\)"),
        (lambda: UNet(UNetConfig(attention_levels=(True,))), "attention_levels must have 4 entries"),
        (lambda: UNet(UNetConfig(channels=(64, 128, 256, 512), head_dim=48)), "multiples of head_dim=48"),
        (lambda: UNetConfig(norm_groups=0), "UNetConfig.norm_groups: wanted an integer from 1 to .*, got 0"),
        (lambda: UNetConfig(head_dim=0), "UNetConfig.head_dim: wanted an integer from 1 to .*, got 0"),
        (lambda: UNetConfig(channels=()), "every entry of channels must be a positive multiple"),
        (lambda: UNetConfig(channels=64), "UNetConfig.channels: wanted a list of integers .*, got 64"),
        (lambda: UNetConfig(attention_levels=(0, 0, 1, 1)), "attention_levels: wanted a list of entries true or false"),
        (lambda: UNetConfig(norm_eps=float("nan")), "UNetConfig.norm_eps: wanted a finite number above 0, got nan"),
        (lambda: VAEConfig(latent_channels=True), "VAEConfig.latent_channels: wanted an integer .*, got True"),
        (lambda: VAEConfig(num_res_blocks=10**9), "VAEConfig.num_res_blocks: wanted an integer from 1 to 128, got"),
        (
            lambda: VAE(VAES[0][0]).encode(torch.rand(1, 16, 16, 16)),
            r"floating \(B, 1, X, Y, Z\), got \(1, 16, 16, 16\)",
        ),
        (lambda: VAE(VAES[0][0]).encode(torch.rand(1, 1, 3, 16, 16)), "every axis of x must be >= 4"),
        (lambda: VAE(VAES[0][0]).decode(torch.rand(1, 3, 4, 4, 4)), r"floating \(B, 4, X, Y, Z\), got \(1, 3"),
        (lambda: UNet(UNETS[0][0])(torch.randn(1, 4, 6, 4, 4), *[None] * 4), "every axis of x must be a multiple of 4"),
        (
            lambda: UNet(UNETS[0][0])(
                torch.randn(2, 4, 4, 4, 4), torch.ones(2), torch.randn(3, 1, 24), torch.ones(2), torch.ones(2, 3)
            ),
            r"context must be \(K\*2, L>=1, 24\), got \(3, 1, 24\)",
        ),
        (
            lambda: UNet(UNETS[0][0])(
                torch.randn(2, 4, 4, 4, 4), torch.ones(2), torch.randn(2, 1, 24), torch.ones(2), torch.ones(3)
            ),
            r"spacing must be \(2, 3\), got \(3,\)",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
