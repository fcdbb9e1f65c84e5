"""``--dry-run``: the plan of a run, printed without a network."""

from inrank_megatron.config.cli import Launch
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.plan import make_plan, render
from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.sources import select
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.distributed.launcher import launcher_ranks
from inrank_megatron.distributed.platform import device_name
from inrank_megatron.engine.deepspeed_setup import check_deepspeed
from inrank_megatron.engine.optimizers import check_installed
from inrank_megatron.interop.hub import is_on_hub
from inrank_megatron.reporting.console import unless_nobody_reads
from inrank_megatron.reporting.sinks.registry import check_installed as check_sinks
from inrank_megatron.training.pretrained import check_tokenizer, choose_pretrained, read_pretrained


def print_plan(launch: Launch) -> None:
    """Print what ``launch`` would train, on the first rank.

    Raises:
        UserError: what a run would refuse before it reads text, and a text or checkpoint that is not there.
    """
    config = launch.config
    vocab_size, vocabulary = planned_vocabulary(config.data)
    topology = topology_of(config, world_size=launch.world_size, vocab_size=vocab_size)
    extra = passthrough(launch.deepspeed_config or {}, config, topology)
    check_deepspeed(config, accumulation=topology.accumulation_steps, extra=extra)
    if launch.cluster is None:  # which may have other software
        check_installed(config)
        check_sinks(config)
    if config.data.dataset is None:  # which a look at would download
        select(config.data)
    if (name := config.training.pretrained_checkpoint) is not None and not is_on_hub(name):
        _check_start(config)  # a model of the hub would be downloaded; its settings have been read
    if launcher_ranks()[0] == 0:
        plan = make_plan(
            config,
            topology,
            vocab_size=topology.vocab_size,
            device=launch.cluster.device if launch.cluster else device_name(),
            cluster=launch.cluster,
            vocabulary=vocabulary,
        )
        with unless_nobody_reads():
            print("\n".join([*launch.notes, render(plan)]))


def _check_start(config: Config) -> None:
    """The weights that the run starts from, and its tokenizer if it is one that is here."""
    folder, _ = choose_pretrained(config)
    weights, name = read_pretrained(folder, config), config.data.tokenizer
    if name is not None and not is_on_hub(name):
        tokenizer = load_tokenizer(name, parse_special_tokens=config.data.parse_special_tokens)
        check_tokenizer(weights, tokenizer, own=weights.tokenizer)
