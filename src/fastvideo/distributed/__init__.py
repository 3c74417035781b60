"""Sequence parallelism over `torch.distributed`: who shares a sequence, and how heads and tokens change places."""

from fastvideo.distributed.mesh import SequenceGroup, current_sequence_group, sequence_parallel, sequence_parallel_world
from fastvideo.distributed.shards import gather_sequence, shard_sequence

__all__ = [
    "SequenceGroup",
    "current_sequence_group",
    "gather_sequence",
    "sequence_parallel",
    "sequence_parallel_world",
    "shard_sequence",
]
