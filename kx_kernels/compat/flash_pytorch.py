"""Stands in for FLASH-pytorch: its gated attention unit, and its layer of mixed-chunk attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gau_attention.api import gau_attention
from ..ops.gau_inputs.api import gau_inputs
from ..ops.mixed_chunk_attention.api import mixed_chunk_attention


class OffsetScale(nn.Module):
    """Scales γ and offsets β of heads, each [heads, dim]: parameters only."""

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(heads, dim))
        self.beta = nn.Parameter(torch.zeros(heads, dim))
        nn.init.normal_(self.gamma, std=0.02)


class T5RelativePositionBias(nn.Module):
    """A learned bias for each bucket of distances: single up to a quarter of the buckets (half, if causal), then in
    steps that grow, and one for all from `max_distance` on. Calling it with a length n gives the biases [2·n − 1] of
    the distances j − i, from −(n − 1) on (that of 0 for n = 0); the original gives them as an n × n matrix.
    """

    def __init__(self, scale: float, causal: bool = False, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.scale = scale
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, 1)

    def forward(self, length: int) -> Tensor:
        length = max(length, 1)
        back = torch.arange(length - 1, -length, -1, device=self.relative_attention_bias.weight.device)  # i − j
        buckets = self.num_buckets if self.causal else self.num_buckets // 2
        apart = back.clamp(min=0) if self.causal else back.abs()
        single = buckets // 2
        # In float32 and in this order, as the original has it: some distances lie on a bucket's edge.
        steps = (apart.clamp(min=1).float() / single).log() / math.log(self.max_distance / single)
        grown = (single + (steps * (buckets - single)).long()).clamp(max=buckets - 1)
        bucket = torch.where(apart < single, apart, grown)
        if not self.causal:
            bucket = torch.where(back < 0, bucket + buckets, bucket)
        return self.relative_attention_bias(bucket).squeeze(-1) * self.scale


class GAU(nn.Module):
    """A gated attention unit of FLASH-pytorch, with its norm and residual: [b, n, dim] to [b, n, dim].

    Args:
        dim: width of inputs and outputs.
        query_key_dim: of queries and keys.
        expansion_factor: gate and values have int(expansion_factor · dim) dimensions.
        add_residual: whether the input is added to the output.
        causal: a query sees no key after it.
        dropout: of attention weights and of the output. While it trains with dropout, the weights are n × n in memory.
        laplace_attn_fn: weights by the Laplace function, by the square of relu otherwise.
        rel_pos_bias: taken and not used, as in the original: there always is a T5 bias.
        norm_klass: called with `dim`, makes the norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        query_key_dim: int = 128,
        expansion_factor: float = 2.0,
        add_residual: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        laplace_attn_fn: bool = False,
        rel_pos_bias: bool = False,
        norm_klass: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        hidden_dim = int(expansion_factor * dim)
        self.norm = norm_klass(dim)
        self.causal = causal
        self.dropout = nn.Dropout(dropout)
        self.activation = "laplace" if laplace_attn_fn else "relu2"
        self.rel_pos_bias = T5RelativePositionBias(dim**0.5, causal)
        self.to_hidden = nn.Sequential(nn.Linear(dim, 2 * hidden_dim))  # values, gate: before their silu
        self.to_qk = nn.Sequential(nn.Linear(dim, query_key_dim))
        self.offsetscale = OffsetScale(query_key_dim, 2)
        self.to_out = nn.Sequential(nn.Linear(hidden_dim, dim), nn.Dropout(dropout))
        self.add_residual = add_residual

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[b, n, dim].

        Args:
            rel_pos_bias: added to scores beside the T5 bias: a vector [2·n − 1] by distance j − i, or as the original
                has it what an n × n matrix of scores can be added to, which costs a key n dimensions more.
            mask: [b, n], bool, False for keys that nothing sees.
        """
        length = x.shape[1]
        bias = self.rel_pos_bias(length)
        by_distance = rel_pos_bias is not None and rel_pos_bias.shape == bias.shape
        if rel_pos_bias is not None and by_distance:
            bias = bias + rel_pos_bias
        normed = self.norm(x)
        v, gate = self.to_hidden(normed).chunk(2, -1)
        rows = gau_inputs(gate, v, self.to_qk(normed), self.offsetscale.gamma, self.offsetscale.beta)
        gate, v, q, k = (y.unsqueeze(2) for y in rows)

        def one_by_one() -> Tensor:
            """[b, n, 1, n], which tells keys apart."""
            return torch.eye(length, dtype=v.dtype, device=v.device)[None, :, None].expand(len(x), -1, -1, -1)

        if rel_pos_bias is not None and not by_distance:
            matrix = rel_pos_bias.to(q.dtype).expand(len(x), length, length).unsqueeze(2)
            q, k = torch.cat((q, matrix), -1), torch.cat((k, one_by_one()), -1)
        how: dict[str, Any] = {"preset": "flash", "activation": self.activation, "causal": self.causal, "bias": bias}
        if mask is not None:
            how |= {"key_padding_mask": mask, "query_padding_mask": torch.ones_like(mask)}
        if self.training and self.dropout.p > 0:
            weights = self.dropout(gau_attention(q, k, one_by_one(), **how))  # [b, n, 1, n]
            out = gate * torch.einsum("bihj,bjhe->bihe", weights, v)
        else:
            out = gau_attention(q, k, v, gate, **how)
        out = self.to_out(out.squeeze(2))
        return out + x if self.add_residual else out


class FLASH(nn.Module):
    """A layer x + to_out(gate ⊙ attention), as the original's: [b, n, dim] to the same.

    Args:
        dim: width of inputs and outputs.
        group_size: tokens of a chunk.
        query_key_dim: s.
        expansion_factor: e / dim.
        causal: a token sees none after it.
        dropout: of the weights within groups. While it trains with dropout, these are n × group_size in memory.
        rotary_pos_emb: an object with the original's `rotate_queries_or_keys`, or None.
        norm_klass: makes the norm before the layer from dim.
        shift_tokens: the first half of the features are those of the token before.
        laplace_attn_fn: "laplace" for squared relu.
        reduce_group_non_causal_attn: if not causal, the linear sum is over the sequence; if False, over the group.
    """

    def __init__(
        self,
        *,
        dim: int,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 2.0,
        causal: bool = False,
        dropout: float = 0.0,
        rotary_pos_emb: Any = None,
        norm_klass: Callable[[int], nn.Module] = nn.LayerNorm,
        shift_tokens: bool = False,
        laplace_attn_fn: bool = False,
        reduce_group_non_causal_attn: bool = True,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * expansion_factor)
        self.group_size = group_size
        self.causal = causal
        self.shift_tokens = shift_tokens
        self.activation = "laplace" if laplace_attn_fn else "relu2"
        self.reduce_group_non_causal_attn = reduce_group_non_causal_attn
        self.rotary_pos_emb = rotary_pos_emb
        self.rel_pos_bias = T5RelativePositionBias(query_key_dim**0.5, causal=causal)
        self.norm = norm_klass(dim)
        self.dropout = nn.Dropout(dropout)
        self.to_hidden = nn.Sequential(nn.Linear(dim, hidden_dim * 2))  # values, gate: before their silu
        self.to_qk = nn.Sequential(nn.Linear(dim, query_key_dim))
        self.qk_offset_scale = OffsetScale(query_key_dim, heads=4)
        self.to_out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`mask` [b, n], bool: no token sees one that is False, but such a token sees others."""
        batch, length, _ = x.shape
        normed = self.norm(x)
        if self.shift_tokens:
            shifted, kept = normed.chunk(2, -1)
            normed = torch.cat((F.pad(shifted, (0, 0, 1, -1)), kept), -1)
        v, gate = self.to_hidden(normed).chunk(2, -1)
        scales = self.qk_offset_scale
        gate, v, *features = gau_inputs(gate, v, self.to_qk(normed), scales.gamma, scales.beta)
        if self.rotary_pos_emb is not None:
            features = [self.rotary_pos_emb.rotate_queries_or_keys(x) for x in features]
        quad_q, lin_q, quad_k, lin_k = features
        rows = [t.unsqueeze(-2) for t in (quad_q, quad_k, lin_q, lin_k, v, gate)]  # [b, n, 1, s or e]
        if mask is not None:
            mask = mask.reshape(batch, length)
        how: dict[str, Any] = {"causal": self.causal}
        if not self.causal and not self.reduce_group_non_causal_attn:  # groups are sequences, packed
            starts = torch.arange(0, max(length, 1), self.group_size, dtype=torch.int32, device=x.device)
            starts = starts + length * torch.arange(batch, dtype=torch.int32, device=x.device)[:, None]
            how = {"cu_seqlens": F.pad(starts.flatten(), (0, 1), value=batch * length)}
            how["lin_normalizer"] = float(max(length, 1))
            rows = [t.flatten(0, 1) for t in rows]
            mask = None if mask is None else mask.flatten()
        how |= {"chunk_size": self.group_size, "preset": "lucidrains", "activation": self.activation}
        how |= {"bias": self.rel_pos_bias(self.group_size), "key_padding_mask": mask}
        how["query_padding_mask"] = None if mask is None else torch.ones_like(mask)
        if self.training and self.dropout.p > 0:
            out = self._with_dropout(rows, v.shape, how)
        else:
            out = mixed_chunk_attention(*rows, **how).reshape(v.shape)
        return self.to_out(out) + x

    def _with_dropout(self, rows: list[Tensor], shape: torch.Size, how: dict[str, Any]) -> Tensor:
        """[b, n, e]: weights within groups, which are what attention makes of values one by one, dropped and summed;
        and the linear sum, times the gate. Numbers by row leave out one or the other."""
        (batch, length, _), size = shape, self.group_size
        *features, v, gate = rows
        nothing = torch.zeros(v.shape[:-2], dtype=torch.float32, device=v.device)
        place = torch.arange(length, device=v.device) % size
        one_by_one = F.one_hot(place, size).to(v.dtype).expand(batch, -1, -1).reshape(*nothing.shape, 1, size)
        weights = mixed_chunk_attention(*[*features, one_by_one], **how | {"lin_normalizer": nothing})
        linear = mixed_chunk_attention(*[*features, v], **how | {"normalizer": nothing})
        groups = -(-length // size)
        weights, values = (
            F.pad(y.reshape(batch, length, y.shape[-1]), (0, 0, 0, groups * size - length)).unflatten(1, (groups, size))
            for y in (weights, v)
        )
        within = (self.dropout(weights) @ values).flatten(1, 2)[:, :length]
        return gate.reshape(shape) * (within + linear.reshape(shape))
