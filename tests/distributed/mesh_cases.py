"""Run by test_mesh.py once per rank, as `torchrun` would: meshes of four ranks, and ranks that disagree."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastvideo.attention import DistributedAttention
from fastvideo.distributed import (
    SequenceGroup,
    current_sequence_group,
    init_sequence_parallel,
    sequence_parallel,
    sequence_parallel_world,
)
from fastvideo.distributed.agreement import RanksDisagree
from fastvideo.testing import reference_attention


def draw(length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 1, length, 4, 8, generator=generator, dtype=torch.float64))


def check_shares(group: SequenceGroup, seed: int) -> None:
    """The ranks of `group` attend over one sequence, which other groups don't see."""
    whole = draw(6 * group.size, seed)
    out, _ = DistributedAttention(4, 8)(*(x.chunk(group.size, 1)[group.rank] for x in whole))
    torch.testing.assert_close(out, reference_attention(*whole).chunk(group.size, 1)[group.rank])


def main() -> None:
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match="ring as a positive number of ranks, got 0"):
        init_sequence_parallel(ring=0, device_type="cpu", timeout=timedelta(seconds=30))
    with pytest.raises(ValueError, match="a world of 4 ranks can't be cut into groups of ring=1 × ulysses=3"):
        init_sequence_parallel(ulysses=3, device_type="cpu")
    rank = dist.get_rank()

    mesh = init_sequence_parallel(ulysses=2, device_type="cpu")
    assert mesh.mesh_dim_names == ("data", "ring", "ulysses")
    assert tuple(mesh.shape) == (2, 1, 2)
    assert sequence_parallel_world() == (rank % 2, 2)
    check_shares(current_sequence_group(), seed=rank // 2)

    mesh = init_sequence_parallel(ring=2, device_type="cpu")
    group = current_sequence_group()
    assert (group.ranks, group.rank, group.name) == ((0, 1, 2, 3), rank, "")
    assert (group.ring.ranks, group.ulysses.ranks) == ((rank % 2, rank % 2 + 2), (rank // 2 * 2, rank // 2 * 2 + 1))
    check_shares(group, seed=9)
    for part in (mesh["ring"], mesh["ulysses"], mesh["ring", "ulysses"], mesh["ring"].get_group(), dist.group.WORLD):
        with sequence_parallel(part) as group:
            check_shares(group, seed=int(sum(group.ranks)))
    with pytest.raises(ValueError, match="dims 'ring' and 'ulysses'"):
        SequenceGroup.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y")))
    with pytest.raises(ValueError, match=r"'ring' comes before 'ulysses', .* got \('ulysses', 'ring'\)"):
        SequenceGroup.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring")))
    with pytest.raises(TypeError, match="a DeviceMesh or a ProcessGroup, got str"):
        SequenceGroup.from_mesh("ring")
    with pytest.raises(ValueError, match="shard_lengths of 4 ranks"), sequence_parallel(mesh, shard_lengths=(1, 2)):
        pass

    # Shards of unequal lengths without a word about them: every rank is told, before anything is sent.
    q, k, v = draw(5 + rank % 2, seed=3)
    with pytest.raises(RanksDisagree, match=r"lengths"):
        DistributedAttention(4, 8)(q, k, v)

    # In another process group, what was initialised in the last one counts no more.
    dist.destroy_process_group()
    assert sequence_parallel_world() == (0, 1)
    server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=30))
    store = dist.PrefixStore("again", server)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=30))
    assert sequence_parallel_world() == (rank, 4)
    check_shares(current_sequence_group(), seed=1)
    init_sequence_parallel(ulysses=2, device_type="cpu")
    assert sequence_parallel_world() == (rank % 2, 2)
    check_shares(current_sequence_group(), seed=rank // 2)


if __name__ == "__main__":
    main()
    sys.exit(0)
