"""Modules that quantization needs and torch lacks: attention made of linear layers, and a sum of two tensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srq_dropbits.errors import OverrideError

__all__ = ["ResidualAdd", "SplitAttention"]


class ResidualAdd(nn.Module):
    """Sum of two tensors, ``ResidualAdd()(a, b)``: a place where quantization can put both on one grid.

    Once prepared, both terms share one step, so that the sum is a sum of integers.

    Examples
    --------
    >>> ResidualAdd()(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    input_quantizer: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("input_quantizer", None)

    def forward(self, a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Add two tensors of one shape, such as (n, m)."""
        if self.input_quantizer is not None:
            a, b = self.input_quantizer(a), self.input_quantizer(b)
        return a + b


class SplitAttention(nn.Module):
    """``torch.nn.MultiheadAttention`` with its projections as four ``nn.Linear``, which can be quantized one by one.

    Takes and returns what ``nn.MultiheadAttention`` does.

    Parameters
    ----------
    source : the attention to take size, weights and mode from
    name : of the module, for messages
    """

    def __init__(self, source: nn.MultiheadAttention, name: str = "attention") -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn:
            raise OverrideError(f"layer '{name}': add_bias_kv and add_zero_attn are not supported; exclude the layer")
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.head_dim, self.dropout = source.head_dim, source.dropout
        self.batch_first = source.batch_first
        # nn.TransformerEncoderLayer asks for these before it takes its fused path, which would pass the quantizers by.
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        if source.in_proj_weight is not None:  # pyright: ignore[reportUnnecessaryComparison]
            weights = source.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(
                part.detach() for part in (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
            )
        bias = source.in_proj_bias
        biases = (None, None, None) if bias is None else bias.detach().chunk(3)  # pyright: ignore[reportUnnecessaryComparison]
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        out = source.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())  # pyright: ignore[reportUnnecessaryComparison]
        self.train(source.training)

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
        """Attend; shapes and meanings as in ``nn.MultiheadAttention``, e.g. (batch, length, features)."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (part.unsqueeze(0 if self.batch_first else 1) for part in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = _merged(attn_mask, key_padding_mask, q.shape[0], self.num_heads, q.dtype)
        if attn_mask is None and is_causal:
            causal = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
            mask = causal if mask is None else mask + causal
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        shares = (scores if mask is None else scores + mask).softmax(-1)
        dropped = nn.functional.dropout(shares, self.dropout, self.training)
        out = self.out_proj((dropped @ v).transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        weights = None
        if need_weights:
            weights = shares.mean(1) if average_attn_weights else shares
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _merged(
    attention: Tensor | None, padding: Tensor | None, batch: int | torch.SymInt, heads: int, dtype: torch.dtype
) -> Tensor | None:
    def additive(mask: Tensor) -> Tensor:
        if mask.dtype is not torch.bool:
            return mask.to(dtype)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)

    total: Tensor | None = None
    if attention is not None:
        total = additive(attention)
        if total.dim() == 3:
            total = total.unflatten(0, (batch, heads))
    if padding is not None:
        own = additive(padding)[:, None, None, :]
        total = own if total is None else total + own
    return total
