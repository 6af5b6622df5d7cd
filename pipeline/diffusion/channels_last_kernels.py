"""The Triton kernels of `channels_last`: a module of its own, because only CUDA builds of torch bring Triton.

Maps are channels-last, so an element's place is (sample * positions + position) * channels + channel. A program has 64
channels of up to 1,024 positions of one sample. No two programs write the same place, so results do not vary.
"""

import triton
import triton.language as tl


@triton.jit
def sums(  # noqa: D103 (Triton's docstrings are not Python's)
    maps,
    out,  # float32 (2, samples, chunks, channels)
    positions,
    channels,
    samples,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    # Per channel: the sum of the differences from the sample's first position, and of their squares.
    part, sample = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    inside = columns < channels
    base = maps + sample.to(tl.int64) * positions * channels
    origin = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros((block_rows, block_channels), tl.float32)
    second = tl.zeros((block_rows, block_channels), tl.float32)
    for start in range(0, chunk, block_rows):
        rows = part * chunk + start + tl.arange(0, block_rows)
        mask = (rows[:, None] < positions) & inside[None, :]
        values = tl.load(base + rows[:, None] * channels + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values - origin[None, :], 0.0)
        first += values
        second += values * values
    place = (sample * tl.num_programs(1) + part) * channels + columns
    tl.store(out + place, tl.sum(first, 0), mask=inside)
    tl.store(out + samples * tl.num_programs(1) * channels + place, tl.sum(second, 0), mask=inside)


@triton.jit
def scale(  # noqa: D103
    maps,
    out,
    factor,  # float32 (samples, channels)
    offset,  # float32 (samples, channels)
    positions,
    channels,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    part, sample = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    inside = columns < channels
    own_factor = tl.load(factor + sample * channels + columns, mask=inside, other=0.0)
    own_offset = tl.load(offset + sample * channels + columns, mask=inside, other=0.0)
    base = sample.to(tl.int64) * positions * channels
    for start in range(0, chunk, block_rows):
        rows = part * chunk + start + tl.arange(0, block_rows)
        mask = (rows[:, None] < positions) & inside[None, :]
        place = base + rows[:, None] * channels + columns[None, :]
        values = tl.load(maps + place, mask=mask, other=0.0).to(tl.float32)
        values = values * own_factor[None, :] + own_offset[None, :]
        tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)
