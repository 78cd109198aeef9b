"""Multi-head attention whose projections are LoD layers.

Shapes: ``N`` batch, ``L`` queries, ``S`` keys, ``E`` embedding, ``h`` heads, ``D = E / h``.

Source: Maestro (Horváth et al., ICML 2024), section 3.1: the query, key, value and output projections are one factor
pair each over the whole embedding, not one per head.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmaestro.errors import UserError
from fedmaestro.lod.layers import LoDLayer, LoDLinear


class LoDMultiheadAttention(nn.Module):
    """Takes the place of ``nn.MultiheadAttention``: same call, same return value.

    Attributes:
        q: LoD layer ``(E, E)``, as are ``k (E, kdim)``, ``v (E, vdim)`` and ``out (E, E)``; ``lod.recompose`` may put
            plain linear layers in their place, so they are only ever called.
    """

    # nn.TransformerEncoderLayer looks at these: both say that its fused evaluation, which reads weights, cannot be.
    in_proj_bias: ClassVar[None] = None
    _qkv_same_embed_dim: ClassVar[bool] = False

    def __init__(
        self,
        q: LoDLinear,
        k: LoDLinear,
        v: LoDLinear,
        out: LoDLinear,
        *,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = q.v.shape[1], k.v.shape[1], v.v.shape[1]
        if self.embed_dim % num_heads:
            raise UserError(f"an embedding of {self.embed_dim} cannot be split over {num_heads} heads")
        self.q, self.k, self.v, self.out = q, k, v, out
        self.num_heads, self.head_dim = num_heads, self.embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention`` does.

        Args:
            query: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)``.
            key: the same with ``S`` and ``kdim``.
            value: the same with ``S`` and ``vdim``.
            key_padding_mask: ``(N, S)`` or ``(S,)``; True, or what is added to the scores, keeps a key out.
            need_weights: whether to return the weights; without them the fused kernel is used.
            attn_mask: ``(L, S)`` or ``(N·h, L, S)``, of the same two kinds.
            average_attn_weights: whether to average the weights over the heads.
            is_causal: a promise that ``attn_mask`` is the causal mask, which saves looking at it.

        Returns:
            The output in the layout of ``query``, and the weights ``(N, L, S)`` or ``(N, h, L, S)``, or None.

        Raises:
            ValueError: a mask of another shape, or ``is_causal`` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only describes attn_mask: pass that too")
        is_batched = query.dim() == 3
        batch_dim = (0 if self.batch_first else 1) if is_batched else None
        q, k, v = (
            self._heads(project(_batch_first(x, batch_dim)))
            for project, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask[None]
        causal_only = is_causal and key_padding_mask is None and not need_weights
        bias = None if causal_only else _score_bias(key_padding_mask, attn_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            mixed, weights = _attend(q, k, v, bias, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if is_batched else weights[0]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal_only)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        if batch_dim is None:
            return output[0], weights
        return (output.transpose(0, 1) if batch_dim == 1 else output), weights

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"

    def _heads(self, x: Tensor) -> Tensor:
        """Turn ``(N, L, E)`` into ``(N, h, L, D)``."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def keep_off_fast_path(model: nn.Module) -> None:
    """Make PyTorch's encoder layers call their LoD layers, also where only some of them are.

    In evaluation mode, ``nn.TransformerEncoderLayer`` hands the weights of its parts to one fused kernel, and
    ``nn.TransformerEncoder`` hands nested tensors to all of its layers if the first one can take them. Both ask these
    attributes first and use them for nothing else.
    """
    for module in model.modules():
        if not any(isinstance(part, LoDLayer) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _batch_first(x: Tensor, batch_dim: int | None) -> Tensor:
    if batch_dim is None:
        return x[None]
    return x.transpose(0, 1) if batch_dim == 1 else x


def _score_bias(key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores ``(N, h, L, S)``, in a shape that broadcasts to it."""
    (N, h, L, _), S = q.shape, k.shape[2]
    bias = None
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (N * h, L, S)):
            raise ValueError(f"attn_mask must be {(L, S)} or {(N * h, L, S)}, got {tuple(attn_mask.shape)}")
        per_head = (N, h, L, S) if attn_mask.dim() == 3 else (1, 1, L, S)
        bias = _additive(attn_mask, q.dtype).reshape(per_head)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (N, S):
            raise ValueError(f"key_padding_mask must be {(N, S)}, got {tuple(key_padding_mask.shape)}")
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
        bias = padding if bias is None else bias + padding
    return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Return the mixed values ``(N, h, L, D)`` and the weights ``(N, h, L, S)`` that mixed them."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout((scores if bias is None else scores + bias).softmax(dim=-1), dropout)
    return weights @ v, weights
