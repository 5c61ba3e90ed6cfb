"""Multi-head attention whose heads need not add up to its embedding: what is left of one after its heads are cut."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NarrowAttention"]


class NarrowAttention(nn.Module):
    """Compute what `torch.nn.MultiheadAttention` computes, with fewer heads and the same parameter names.

    Parameters
    ----------
    source : whose parameters, still whole, it takes over
    heads : of this module, once the parameters are cut
    """

    def __init__(self, source: nn.MultiheadAttention, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = source.head_dim
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        # Keeps torch.nn.TransformerEncoderLayer off its fused path, which knows no narrow attention.
        self._qkv_same_embed_dim = False
        self.in_proj_weight: nn.Parameter | None
        self.q_proj_weight: nn.Parameter
        self.k_proj_weight: nn.Parameter
        self.v_proj_weight: nn.Parameter
        self.in_proj_bias: nn.Parameter | None
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(source, name))
        self.out_proj = source.out_proj
        self.train(source.training)

    def forward(
        self,
        query: Shaped[Tensor, "..."],
        key: Shaped[Tensor, "..."],
        value: Shaped[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 (a hint, as there)
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments are those of `torch.nn.MultiheadAttention.forward`.

        Parameters
        ----------
        query, key, value : ``(length, batch, features)``, ``(batch, length, features)`` if `batch_first`, or unbatched
        key_padding_mask : ``(batch, source)`` true, or minus infinity, where a key is padding
        need_weights : return the attention weights too
        attn_mask : ``(target, source)`` or ``(batch * heads, target, source)`` true where attention is forbidden, or
            added to the scores
        average_attn_weights : average the weights over the heads that are left
        is_causal : a hint that `attn_mask` is causal

        Returns
        -------
        The output, shaped like the query, and the weights or None.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        bias = self._bias(q, attn_mask, key_padding_mask)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = functional.dropout((scores + bias).softmax(-1), self.dropout, self.training)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        out = self.out_proj(mixed)
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            return out.squeeze(0), None if shown is None else shown.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if whole is None else whole.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _bias(self, q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        bias = q.new_zeros(())
        if mask is not None:
            mask = mask.unflatten(0, (len(q), self.num_heads)) if mask.dim() == 3 else mask
            bias = bias + _additive(mask, q.dtype)
        if padding is not None:
            bias = bias + _additive(padding, q.dtype)[:, None, None, :]
        return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
