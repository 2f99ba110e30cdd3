"""How a block lies in the cold tiers if they hold KV in fewer bits than the GPU tier: one record of bytes for each block.

Every cold tier holds the same record: the CPU tier, the disk tier, and peers on the way. Layer by layer:

    | bounds of K | bounds of V | K | V |      int8, int4: K per channel, over the tokens of the block; V per token
    | exponents of K, of V | K | V |           fp8 (e4m3): one exponent for each head of K and of V

A bound is the least or the greatest value of its group, exactly; a number says where a value lies between them. So what is
decoded has the same bounds, and encoding it again gives the same record: a block that goes out again loses nothing more.
`encode` and `decode` here are the reference, with torch; cold_copy.cpp and cold_copy_kernel.py are what serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.attention.protocol import LayerShape

# Of the record: another one makes all files those of another version.
COLD_VERSION = 1
PAGE_BYTES = 4096
# Records, and the parts of layers in them, begin at multiples of it, so that bounds are aligned.
LAYER_ALIGNMENT = 16
# From so many pages on, a record has whole pages, which disks read and write past the page cache.
MIN_WHOLE_PAGES = 16
LEVELS = {"int8": 255, "int4": 15}
# A group whose range is a smaller part of its values, or that small, is one value.
MIN_RANGE, TINY = 2.0**-12, 1e-30
# Of fp8: below it, values are zero; and the exponent to which the greatest value of a head is brought.
LEAST_FP8, TOP_EXPONENT = 2.0**-100, 7


class Part(NamedTuple):
    """K or V of a layer.

    elements: where it begins in a block of the GPU tier, in elements: [heads, tokens, dim].
    scales, payload: where its bounds or exponents, and its numbers, begin in the record, in bytes.
    """

    is_key: bool
    heads: int
    dim: int
    elements: int
    scales: int
    payload: int


class TokenSpan(NamedTuple):
    """Bytes of a block that belong to single tokens: [heads, tokens of a chunk, bytes of a token], from `offset` on."""

    offset: int
    heads: int
    token_bytes: int


class ColdFormat:
    """The layout of a record for one model, and its reference codec.

    kind: "fp8", "int8" or "int4".
    dtype: of the GPU tier.
    block_bytes: of a record.
    layers: the parts of each layer.
    """

    def __init__(self, kind: str, layers: Sequence[LayerShape], chunk_size: int, dtype: torch.dtype) -> None:
        """Lay out the record."""
        self.kind, self.chunk_size, self.dtype = kind, chunk_size, dtype
        self.layers: list[tuple[Part, Part]] = []
        elements = offset = 0
        for layer in layers:
            offset = -(-offset // LAYER_ALIGNMENT) * LAYER_ALIGNMENT
            parts, scales = [], offset
            sides = ((True, layer.k_dim), (False, layer.v_dim))
            payload = offset + layer.num_kv_heads * sum(self._scale_bytes(is_key, dim) for is_key, dim in sides)
            for is_key, dim in sides:
                parts.append(Part(is_key, layer.num_kv_heads, dim, elements, scales, payload))
                elements += layer.num_kv_heads * chunk_size * dim
                scales += layer.num_kv_heads * self._scale_bytes(is_key, dim)
                payload += layer.num_kv_heads * chunk_size * self.row_bytes(dim)
            self.layers.append((parts[0], parts[1]))
            offset = payload
        offset = -(-offset // LAYER_ALIGNMENT) * LAYER_ALIGNMENT
        pages = -(-offset // PAGE_BYTES)
        self.block_bytes = pages * PAGE_BYTES if pages >= MIN_WHOLE_PAGES else offset
        self.num_elements = elements

    def row_bytes(self, dim: int) -> int:
        """Of the numbers of one token and head."""
        return -(-dim // 2) if self.kind == "int4" else dim

    def _scale_bytes(self, is_key: bool, dim: int) -> int:
        """Of the bounds, or the exponent, of a head."""
        return 1 if self.kind == "fp8" else 2 * self.dtype.itemsize * (dim if is_key else self.chunk_size)

    def units(self, layers: Sequence[int]) -> np.ndarray:
        """What kernels go by: int64 [n, 5], a row for K and one for V of each head of these layers.

        Whether it is K, its dim, and where it begins: in the block (elements), its scales, its numbers (bytes).
        """
        rows = []
        for part in (part for layer in layers for part in self.layers[layer]):
            scale_bytes = self._scale_bytes(part.is_key, part.dim)
            for head in range(part.heads):
                rows.append(
                    (
                        part.is_key,
                        part.dim,
                        part.elements + head * self.chunk_size * part.dim,
                        part.scales + head * scale_bytes,
                        part.payload + head * self.chunk_size * self.row_bytes(part.dim),
                    )
                )
        return np.array(rows, np.int64).reshape(-1, 5)

    def token_spans(self) -> Iterator[TokenSpan]:
        """All bytes that belong to single tokens. The bounds of K do not: they are of the block's tokens together."""
        for part in (part for parts in self.layers for part in parts):
            yield TokenSpan(part.payload, part.heads, self.row_bytes(part.dim))
            if self.kind != "fp8" and not part.is_key:
                yield TokenSpan(part.scales, part.heads, 2 * self.dtype.itemsize)

    # -- the reference ---------------------------------------------------------------------------------------------------

    def encode(self, block: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """The record of one block.

        block: [elements], of any device. num_tokens: leading tokens that are valid; None = all. Nothing else of the block
        counts; the rest of the record is zeros. Returns uint8 [block_bytes].
        """
        record = torch.zeros(self.block_bytes, dtype=torch.uint8, device=block.device)
        num_tokens = self.chunk_size if num_tokens is None else num_tokens
        for part in (part for parts in self.layers for part in parts):
            size = part.heads * self.chunk_size * part.dim
            values = block[part.elements : part.elements + size].view(part.heads, self.chunk_size, part.dim)
            values = values[:, :num_tokens].float()
            scales, numbers = _encode_fp8(values) if self.kind == "fp8" else self._encode_int(values, part.is_key)
            kept = record[part.scales : part.scales + part.heads * self._scale_bytes(part.is_key, part.dim)]
            if self.kind != "fp8" and not part.is_key:  # [heads, tokens, 2]: those behind the valid ones stay zeros
                kept = kept.view(part.heads, self.chunk_size, -1)[:, :num_tokens]
            kept.copy_(scales.view(torch.uint8).reshape(kept.shape))
            row_bytes = self.row_bytes(part.dim)
            payload = record[part.payload : part.payload + part.heads * self.chunk_size * row_bytes]
            payload.view(part.heads, self.chunk_size, row_bytes)[:, :num_tokens] = self._pack(numbers)
        return record

    def decode(self, record: torch.Tensor, block: torch.Tensor, layers: Sequence[int]) -> None:
        """Write what a record holds of these layers to a block [elements]; bounds or zeros behind the valid tokens."""
        for part in (part for layer in layers for part in self.layers[layer]):
            row_bytes = self.row_bytes(part.dim)
            payload = record[part.payload : part.payload + part.heads * self.chunk_size * row_bytes]
            numbers = self._unpack(payload.view(part.heads, self.chunk_size, row_bytes), part.dim)
            scales = record[part.scales : part.scales + part.heads * self._scale_bytes(part.is_key, part.dim)]
            if self.kind == "fp8":
                values = _decode_fp8(scales, numbers)
            else:
                values = self._decode_int(scales, numbers, part)
            size = part.heads * self.chunk_size * part.dim
            block[part.elements : part.elements + size] = values.to(self.dtype).reshape(-1)

    def _encode_int(self, values: torch.Tensor, is_key: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds [heads, 2, dim] of K or [heads, tokens, 2] of V in the GPU tier's dtype; numbers uint8, as `values`."""
        dim = 1 if is_key else 2
        # Of zeros, the positive one: which of them is the least is not defined.
        low, high = values.amin(dim, keepdim=True) + 0.0, values.amax(dim, keepdim=True) + 0.0
        is_flat = (high - low <= torch.maximum(low.abs(), high.abs()) * MIN_RANGE) | (high - low < TINY)
        high = torch.where(is_flat, low, high)
        levels = float(LEVELS[self.kind])
        # Not `levels / ...`, which multiplies by a reciprocal.
        ratio = torch.div(torch.tensor(levels, device=low.device), torch.where(is_flat, 1.0, high - low))
        inverse = torch.where(is_flat, 0.0, ratio)
        numbers = ((values - low) * inverse + 0.5).clamp(0.0, levels).to(torch.uint8)
        return torch.cat([low, high], dim).to(self.dtype).contiguous(), numbers

    def _decode_int(self, scales: torch.Tensor, numbers: torch.Tensor, part: Part) -> torch.Tensor:
        shape = (part.heads, 2, part.dim) if part.is_key else (part.heads, self.chunk_size, 2)
        # Copied, because a part may begin where torch cannot view its bytes as elements.
        bounds = scales.clone().view(self.dtype).view(shape).float()
        low, high = bounds.chunk(2, 1 if part.is_key else 2)
        share = numbers.float() / LEVELS[self.kind]
        return low * (1 - share) + high * share

    def _pack(self, numbers: torch.Tensor) -> torch.Tensor:
        """Two of four bits in a byte: that of the first half of the head in the lower bits, that of the second above."""
        if self.kind != "int4":
            return numbers
        half = self.row_bytes(numbers.shape[-1])
        packed = numbers[..., :half].clone()
        packed[..., : numbers.shape[-1] - half] |= numbers[..., half:] << 4
        return packed

    def _unpack(self, packed: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([packed & 15, packed >> 4], -1)[..., :dim] if self.kind == "int4" else packed


def _encode_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponents int8 [heads]; numbers uint8, as `values`."""
    greatest = values.abs().amax((1, 2))
    # Of the greatest value as e4m3 will round it, so that it has the same exponent when it is encoded again.
    exponents = ((greatest.view(torch.int32) + (1 << 19)) >> 23).clamp(max=254) - 127
    is_zero = greatest < LEAST_FP8
    exponents = torch.where(is_zero, 0, exponents)
    scaled = torch.ldexp(values, (TOP_EXPONENT - exponents)[:, None, None])
    scaled = torch.where(is_zero[:, None, None], 0.0, scaled)
    return exponents.to(torch.int8), scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def _decode_fp8(exponents: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    values = numbers.view(torch.float8_e4m3fn).float()
    return torch.ldexp(values, (exponents.view(torch.int8).int() - TOP_EXPONENT)[:, None, None])
