"""What is said of the hosts of a job and of groups that reach over several of them."""

from inrank_megatron.distributed.placement import crossing_in_words, network_in_words


def crossing(machines: str, size: int) -> str | None:
    return crossing_in_words(list(machines), [f"host-{name}" for name in machines], size, sent="3.0 MiB")


def test_groups_inside_of_hosts_are_not_worth_a_line():
    assert crossing("aabb", 2) is None and crossing("ab", 1) is None and crossing("aaaabbbbbbbb", 4) is None


def test_ranks_that_alternate_can_be_started_host_by_host():
    assert crossing("abab", 2) == (
        "tensor parallelism crosses hosts in 2 of 2 groups (ranks 0-1 on host-a, host-b): every layer then "
        "waits for the network, for about 3.0 MiB per rank and step; start the ranks host by host (srun "
        "--distribution=block, mpirun --map-by slot)"
    )


def test_hosts_too_small_for_a_group_need_a_smaller_one():
    note = crossing("aabb", 4)
    assert note.startswith("tensor parallelism crosses hosts in 1 of 1 groups (ranks 0-3 on host-a, host-b)")
    assert note.endswith("give --tensor-model-parallel-size 2, or each host a multiple of 4 ranks")
    assert "(ranks 2-3 on host-a, host-b)" in crossing("aaabbb", 2)
    assert crossing("aaabbb", 2).endswith("parallel-size 1, or each host a multiple of 2 ranks")


def network(backend: str, *interfaces: str | None) -> str:
    return network_in_words(backend, interfaces, hosts=["a", "a", "b", "b"], count=2)


def test_the_interface_is_named_once_where_it_is_the_same():
    assert network("gloo", *["eth0"] * 4) == "2 hosts, connected by gloo over eth0 (GLOO_SOCKET_IFNAME)"
    assert network("nccl", "ib0", "ib0", "ib1", "ib1") == (
        "2 hosts, connected by nccl over ib0 (NCCL_SOCKET_IFNAME) on a, ib1 (NCCL_SOCKET_IFNAME) on b"
    )
    assert network("nccl", *[None] * 4) == (
        "2 hosts, connected by nccl over a network of its choice (NCCL_SOCKET_IFNAME is not set)"
    )
