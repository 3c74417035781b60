"""Sequence parallelism over `torch.distributed`: who shares a sequence, and how tokens, heads and keys travel."""

from fastvideo.distributed.agreement import RanksDisagree
from fastvideo.distributed.mesh import (
    SequenceGroup,
    current_sequence_group,
    init_sequence_parallel,
    sequence_parallel,
    sequence_parallel_world,
)
from fastvideo.distributed.parity import check_parallel_parity
from fastvideo.distributed.shards import gather_sequence, key_padding_shard, shard_sequence, shards_of, split_lengths

__all__ = [
    "RanksDisagree",
    "SequenceGroup",
    "check_parallel_parity",
    "current_sequence_group",
    "gather_sequence",
    "init_sequence_parallel",
    "key_padding_shard",
    "sequence_parallel",
    "sequence_parallel_world",
    "shard_sequence",
    "shards_of",
    "split_lengths",
]
