"""Text tower of CLIP3D: the text model of openai/clip-vit-large-patch14 with 512 positions instead of 77."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2ct.models.attention import merge_heads, split_heads
from t2ct.models.fields import DEPTH, check_fields
from t2ct.ops import attention


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; the defaults are the published network.

    The end-of-text token (EOT) is the last id of the vocabulary, vocab_size - 1 (49407 in CLIP's vocabulary).
    """

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_length: int = 512

    def __post_init__(self) -> None:
        check_fields(self, "TextConfig.", layers=DEPTH)
        if self.width % self.heads:
            raise ValueError(f"TextConfig.width: wanted a multiple of heads={self.heads}, got {self.width}")

    @property
    def eot_id(self) -> int:
        return self.vocab_size - 1


class TextAttention(nn.Module):
    """Causal multi-head self-attention, (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v, causal=True)))


class TextMLP(nn.Module):
    """Two linear layers with CLIP's quick-GELU, x · sigmoid(1.702 x), between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class TextLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = TextAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = TextMLP(config.width, config.mlp_width)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEmbeddings(nn.Module):
    """Token plus position embedding, (B, L) -> (B, L, width)."""

    position_ids: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        # The published file carries this constant, so a strict load wants it in the state dict.
        self.register_buffer("position_ids", torch.arange(config.max_length).unsqueeze(0))
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextEncoder(nn.Module):
    """The stack of layers, (B, L, width) -> (B, L, width)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """Causal transformer, ids (B, L <= max_length) int64 -> final-LayerNorm states (B, L, width).

    Source: openai/clip-vit-large-patch14, text model. Causal mask, no padding mask.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation (Radford et al. 2021, released code): branches into the residual shrink with depth."""
        width = self.config.width
        branch_std = width**-0.5 * (2 * self.config.layers) ** -0.5
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, TextAttention):
                for proj in (module.q_proj, module.k_proj, module.v_proj):
                    nn.init.normal_(proj.weight, std=width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=branch_std)
            elif isinstance(module, TextMLP):
                nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.fc2.weight, std=branch_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


def check_input_ids(input_ids: Tensor, config: TextConfig) -> int:
    """Tokens that need computing: one more than the latest first EOT of the batch.

    The tower is causal and is read at each row's first EOT, so nothing after it matters.
    input_ids is (B, L) int64 or int32 with 1 <= L <= max_length and an EOT in every row.
    Raises TypeError or ValueError.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: wanted an int64 or int32 tensor, got {got}")
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or not 1 <= input_ids.shape[1] <= config.max_length:
        raise ValueError(f"input_ids: wanted shape (B, 1..{config.max_length}), got {tuple(input_ids.shape)}")
    is_eot = input_ids == config.eot_id
    length = torch.where(is_eot.any(-1), is_eot.int().argmax(-1) + 1, 0)
    # One transfer from the device for everything that Python must know.
    low, high, shortest, longest = torch.stack(
        [input_ids.min().long(), input_ids.max().long(), length.min(), length.max()]
    ).tolist()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"input_ids: wanted ids in [0, {config.vocab_size - 1}], got {low if low < 0 else high}")
    if shortest == 0:
        raise ValueError(f"input_ids: wanted the end-of-text id {config.eot_id} in every row, got a row without it")
    return longest
