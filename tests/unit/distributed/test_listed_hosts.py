"""The hosts of ranks by DeepSpeed's own command line."""

from deepspeed.launcher.runner import encode_world_info

from inrank_megatron.distributed.listed_hosts import hosts_of, listed_hosts


def test_hosts_have_as_many_ranks_as_slots():
    slots = encode_world_info({"a": [0, 1], "b": [3]})
    words = [
        "python",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={slots}",
    ]
    assert hosts_of(words) == ["a", "a", "b"]


def test_other_launchers_know_no_list():
    assert hosts_of(["torchrun", "--nproc-per-node", "2"]) == [] == hosts_of(["--world_info=None"])
    assert listed_hosts() == []
