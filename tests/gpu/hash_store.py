"""One process whose group has a store in memory, as the benchmarks make it.

Every kind of collective that the product uses passes through it.
"""

import torch
import torch.distributed as dist

from inrank_megatron.distributed.platform import device, prepare_process


def main() -> None:
    prepare_process()
    from inrank_megatron.benchmarks.blocks import single_process

    with single_process() as parallel:
        ones = torch.ones(8, device=device())
        dist.all_reduce(ones)
        gathered, scattered = torch.empty_like(ones), torch.empty_like(ones)
        dist.all_gather_into_tensor(gathered, ones, group=parallel.tp_group)
        dist.reduce_scatter_tensor(scattered, ones, group=parallel.dp_group)
        dist.broadcast(ones, src=0)
        assert torch.equal(gathered, ones) and torch.equal(scattered, ones) and ones.sum().item() == 8
        assert parallel.broadcast_from_rank_0(lambda: 3) == 3 and parallel.gather_from_all_ranks(4) == [4]
        parallel.barrier()


if __name__ == "__main__":
    main()
