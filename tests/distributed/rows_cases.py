"""Rows that are copied within a device: how many, how long, and how far apart there and here, in bytes."""

from __future__ import annotations

import torch

ROWS = [
    (9, 256, 256, 1280),
    (37, 768, 768, 2560),
    (21, 3584, 5120, 3584),
    (70, 16, 32, 48),
    (33, 144, 288, 144),
    (3, 4112, 4112, 4128),
]


def check_copying(
    device: str,
    count: int,
    number: int,
    length: int,
    target_distance: int,
    source_distance: int,
    *,
    start: int = 0,
    by_kernel: bool,
) -> None:
    """Copy `count` times such rows, and compare all memory around them; the last has one row less."""
    from fastvideo.distributed.row_kernels import launch_moves
    from fastvideo.distributed.rows import Move

    torch.manual_seed(number)
    size = number * source_distance + 64
    sources = [torch.randint(0, 200, (size,), dtype=torch.uint8, device=device) for _ in range(count)]
    room = torch.full((count * (number * target_distance + 64),), 255, dtype=torch.uint8, device=device)
    expected, moves = room.clone(), []
    for i in range(count):
        rows, place = number - (i == count - 1 > 0), start + i * number * target_distance
        moves.append(Move(count, place, target_distance, i, start, source_distance, length, rows))
        for row in range(rows):
            there, here = place + row * target_distance, start + row * source_distance
            expected[there : there + length] = sources[i][here : here + length]
    bases = [x.data_ptr() for x in (*sources, room)]
    assert all(base % 16 == 0 for base in bases)
    index = room.device.index or 0
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    for _ in range(2):
        rest = launch_moves(tuple(moves), bases, index, stream)
        assert rest == ([] if by_kernel else moves)
        assert torch.equal(room, expected) == by_kernel
