"""Encoder-decoder Transformer for translation.

Shapes: ``B`` batch, ``S`` source and ``T`` target tokens, ``Q`` queries, ``K`` keys, ``E`` embedding, ``h`` heads.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, in the form of Maestro's and Pufferfish's Multi30k
experiments: projections of attention without bias, one embedding for both languages.
Departures: norms come before each sublayer and once more at the end (Xiong et al., ICML 2020), which trains without a
long warm-up and has as many parameters; the output projection is not tied to the embedding, so that it can be cut.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro.errors import UserError
from fedmaestro.models.shape import InputShape, sequence_length
from fedmaestro.models.width import Scale

PADDING = 0
"""Token id that fills sequences up."""


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Widths and depth; ``depth`` layers in the encoder and as many in the decoder."""

    embedding: int
    feed_forward: int
    heads: int
    depth: int
    dropout: float = 0.1


BASE = TransformerSize(embedding=512, feed_forward=2048, heads=8, depth=6)
SMALL = TransformerSize(embedding=96, feed_forward=384, heads=4, depth=3)


class Attention(nn.Module):
    """Multi-head attention with linear layers of its own, which a LoD form can take the place of."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.q, self.k, self.v, self.out = (nn.Linear(size.embedding, size.embedding, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        """Let ``x (B, Q, E)`` attend to ``memory (B, K, E)`` where ``mask`` (broadcast to ``(B, h, Q, K)``) is true."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(memory)), self._heads(self.v(memory))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them, on every position."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size.embedding, size.feed_forward)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(size.feed_forward, size.embedding)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.embedding)
        self.attention = Attention(size)
        self.norm2 = nn.LayerNorm(size.embedding)
        self.feed_forward = FeedForward(size)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``(B, S, E)`` to the same shape; ``mask (B, 1, 1, S)`` is false on padding."""
        normed = self.norm1(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and feed-forward."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.embedding)
        self.attention = Attention(size)
        self.norm2 = nn.LayerNorm(size.embedding)
        self.source_attention = Attention(size)
        self.norm3 = nn.LayerNorm(size.embedding)
        self.feed_forward = FeedForward(size)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map ``(B, T, E)`` to the same shape, given the encoded source ``(B, S, E)`` and where it is no padding."""
        normed = self.norm1(x)
        x = x + self.dropout(self.attention(normed, normed, is_causal=True))
        x = x + self.dropout(self.source_attention(self.norm2(x), memory, mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Scores of every next target token, given the source and the tokens before it.

    Costs count linear layers only (``fleet.cost``): the products of queries, keys and values inside attention,
    ``2·Q·K·E`` multiply-accumulates each, are not among them (1 % of the total at 28 tokens).
    """

    def __init__(self, vocabulary: int, size: TransformerSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.embedding)
        self.dropout = nn.Dropout(size.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(size) for _ in range(size.depth))
        self.encoder_norm = nn.LayerNorm(size.embedding)
        self.decoder = nn.ModuleList(DecoderLayer(size) for _ in range(size.depth))
        self.decoder_norm = nn.LayerNorm(size.embedding)
        self.output = nn.Linear(size.embedding, vocabulary, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Map token ids ``(B, S)`` and ``(B, T)`` to logits ``(B, T, vocabulary)``.

        Nothing attends to padding: it is masked in the source, and it trails the target, where every token only looks
        back.
        """
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoded source ``(B, S, E)`` and its mask ``(B, 1, 1, S)``, for any number of ``decode`` calls."""
        mask = (source != PADDING)[:, None, None]
        x = self._embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of the tokens that follow each prefix of ``target``."""
        x = self._embed(target)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        logits: Tensor = self.output(self.decoder_norm(x))
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        dropped: Tensor = self.dropout(x * math.sqrt(x.shape[-1]) + positions(x))
        return dropped


def positions(x: Tensor) -> Tensor:
    """Return the sinusoidal positions ``(L, E)`` of a sequence ``x (…, L, E)`` (section 3.5).

    Computed anew each time: a buffer would hold anything after ``to_empty``. Sines come first, then cosines, where the
    paper alternates them: the same up to the order of features.
    """
    length, E = x.shape[-2:]
    rates = torch.exp(torch.arange(E // 2, device=x.device) * (-2 * math.log(10_000) / E))
    angles = torch.arange(length, device=x.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)


def transformer(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """The base model on a vocabulary of ``num_classes``: 6 + 6 layers of 512 features (53.85 M parameters at 9,521)."""
    return _transformer("transformer", BASE, input_shape, num_classes, scale)


def transformer_small(input_shape: InputShape, num_classes: int, scale: Scale) -> nn.Module:
    """A form of it that trains on a CPU: 3 + 3 layers of 96 features."""
    return _transformer("transformer-small", SMALL, input_shape, num_classes, scale)


def _transformer(
    name: str, size: TransformerSize, input_shape: InputShape, num_classes: int, scale: Scale
) -> nn.Module:
    sequence_length(name, input_shape)
    if scale.width != 1:
        raise UserError(
            f"model.name={name!r} has no narrower dense form (width {float(scale.width):.3g}): "
            "use a strategy whose submodels are rank prefixes"
        )
    return Transformer(num_classes, size)
