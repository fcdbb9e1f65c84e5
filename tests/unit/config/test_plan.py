"""The plan's arithmetic against known counts and against what torch counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from inrank_megatron.config.cli import parse
from inrank_megatron.config.cluster import parse_cluster
from inrank_megatron.config.costs import (
    break_even_rank,
    flops_per_token,
    memory_per_device,
    parameters,
    tensor_parallel_bytes,
)
from inrank_megatron.config.devices import device_peak_flops
from inrank_megatron.config.loading import from_flat, resolve
from inrank_megatron.config.plan import changed_settings, make_plan, render
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.errors import UserError

GPT2_VOCABULARY = 50257


def config(preset="tiny", **settings):
    return from_flat({"model_preset": preset, "train_iters": 100} | settings)


class Linear(nn.Module):
    """Dense, or factors with or without a frozen W0."""

    def __init__(self, out, inp, *, columns, frozen_base, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, inp)) if columns is None or frozen_base else None
        self.bias = nn.Parameter(torch.zeros(out)) if bias else 0
        if columns is not None:
            self.u, self.v = nn.Parameter(torch.zeros(out, columns)), nn.Parameter(torch.zeros(columns, inp))
            if frozen_base:
                self.weight.requires_grad_(False)
        self.factorised = columns is not None

    def forward(self, x):
        y = self.bias
        if self.factorised:
            y = y + F.linear(F.linear(x, self.v), self.u)
        return y if self.weight is None else y + F.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self, model, *, llama, **kind):
        super().__init__()
        h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_size
        self.heads, self.groups = model.num_attention_heads, model.query_groups
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(h), norm(h)
        total, biased = (self.heads + 2 * self.groups) * d, not llama or model.add_qkv_bias
        self.qkv, self.proj = nn.Linear(h, total, bias=biased), nn.Linear(self.heads * d, h, bias=not llama)
        self.head_norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)] if model.qk_layernorm else [])
        self.fc1 = Linear(2 * f if llama else f, h, bias=not llama, **kind)
        self.fc2 = Linear(h, f, bias=not llama, **kind)
        self.activation = swiglu if llama else F.gelu

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.groups, self.groups], dim=1)
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (k, v))
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Gpt(nn.Module):
    """A plain GPT, as much as matrix products and parameters are concerned."""

    def __init__(self, run, vocab_size, **kind):
        super().__init__()
        model, llama = run.model, run.model.model_type == "llama"
        self.words = nn.Embedding(vocab_size, model.hidden_size)
        self.positions = None if llama else nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.blocks = nn.Sequential(*(Block(model, llama=llama, **kind) for _ in range(model.num_layers)))
        self.norm = (nn.RMSNorm if llama else nn.LayerNorm)(model.hidden_size)
        self.head = nn.Linear(model.hidden_size, vocab_size, bias=False) if model.has_own_head else None

    def forward(self, ids):
        x = self.words(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        head = self.words if self.head is None else self.head
        return self.norm(self.blocks(x)) @ head.weight.t()


GROUPED = {"model_type": "llama", "num_query_groups": 2, "kv_channels": 10}


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gpt2"},
        {"model_type": "llama"},
        GROUPED | {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
        GROUPED | {"qk_layernorm": True},
    ],
)
@pytest.mark.parametrize(
    ("columns", "frozen_base"), [(None, False), (5, False), (5, True)], ids=["dense", "phase 2", "phase 1"]
)
def test_counts_agree_with_torch(columns, frozen_base, model):
    sizes = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 80, "seq_length": 16}
    run = config(**sizes, max_position_embeddings=20, **model)
    model = Gpt(run, 48, columns=columns, frozen_base=frozen_base)
    ids = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    flops = flops_per_token(run, 48, ranks=columns, frozen_base=frozen_base)
    assert flops * ids.numel() == counter.get_total_flops()
    counted = parameters(run, 48, ranks=columns, frozen_base=frozen_base)
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    assert counted.total == sum(size for size, _ in sizes)
    assert counted.trainable == sum(size for size, trained in sizes if trained)


LLAMA_VOCABULARY = 32100
"""Of T5's tokenizer, which ReLoRA uses."""


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-60m", 58_176_000),
        ("llama-130m", 134_259_456),
        ("llama-250m", 247_524_096),
        ("llama-350m", 368_174_080),
        ("llama-1.3b", 1_339_492_352),
    ],
)
def test_a_llama_has_the_size_of_hugging_faces(preset, count):
    run = config(preset)
    assert parameters(run, LLAMA_VOCABULARY).total == count
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=LLAMA_VOCABULARY,
                hidden_size=run.model.hidden_size,
                intermediate_size=run.model.ffn_hidden_size,
                num_hidden_layers=run.model.num_layers,
                num_attention_heads=run.model.num_attention_heads,
                tie_word_embeddings=False,
            )
        )
    assert model.num_parameters() == count


@pytest.mark.parametrize(
    ("preset", "vocabulary", "count"),
    [
        ("smollm2-135m", 49_152, 134_515_008),
        ("smollm2-360m", 49_152, 361_821_120),
        ("tinyllama-1.1b", 32_000, 1_100_048_384),
        ("llama-3.2-1b", 128_256, 1_235_814_400),
        ("qwen2.5-0.5b", 151_936, 494_032_768),
        ("mistral-7b", 32_768, 7_248_023_552),
    ],
)
def test_a_public_model_has_its_published_size(preset, vocabulary, count):
    run = config(preset)
    assert parameters(run, vocabulary).total == count
    attention = config(preset, factorised_linears="mlp-attention", qkv_factors="separate")
    factors = sum(min(8, *shape) * sum(shape) for shape in linear_shapes(attention).values())
    counted = parameters(attention, vocabulary, ranks=8, frozen_base=True)
    assert counted.total - factors == count


@pytest.mark.parametrize(
    ("preset", "count"), [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080)]
)
def test_gpt2_has_its_published_size(preset, count):
    assert parameters(config(preset), GPT2_VOCABULARY).total == count


TABLE_2 = [("small", 254, 91.2), ("medium", 286, 223), ("large", 312, 445)]


@pytest.mark.parametrize(("preset", "rank", "millions"), TABLE_2)
def test_factorised_sizes_of_the_papers_table_2(preset, rank, millions):
    count = parameters(config(preset), GPT2_VOCABULARY, ranks=rank).total / 1e6
    assert count == pytest.approx(millions, rel=0.005)


def test_ranks_may_differ_by_layer():
    run = config()
    shapes = linear_shapes(run)
    ranks = {name: index + 1 for index, name in enumerate(shapes)}
    same = {name: 4 for name in shapes}
    extra = sum(ranks.values()) - 4 * len(shapes)
    for count in (
        lambda ranks: parameters(run, 100, ranks=ranks).total,
        lambda ranks: flops_per_token(run, 100, ranks=ranks),
    ):
        assert count(same) == count(4)
        assert count(ranks) - count(same) == (count(5) - count(4)) * extra / len(shapes)


def test_break_even_rank_costs_what_dense_costs():
    run = config("small")
    rank = break_even_rank(run)
    dense = flops_per_token(run, 128)
    assert rank == 614  # 0.8 of the width
    assert flops_per_token(run, 128, ranks=rank) <= dense < flops_per_token(run, 128, ranks=rank + 1)


@pytest.mark.parametrize(
    ("qkv_factors", "ratio"), [("fused", 0.75), ("separate", 0.5)], ids=["fused", "separate"]
)
def test_break_even_counts_every_factorised_linear(qkv_factors, ratio):
    """OI / (O + I) is 3/4 of the width for the fused QKV, half of it for each part and for the projection."""
    run = config("small", factorised_linears="mlp-attention", qkv_factors=qkv_factors)
    rank, dense = break_even_rank(run), flops_per_token(run, 128)
    assert flops_per_token(run, 128, ranks=rank) <= dense < flops_per_token(run, 128, ranks=rank + 1)
    shapes = linear_shapes(run)
    attention = [shape for name, shape in shapes.items() if "linear_qkv" in name]
    assert all(out * inp / (out + inp) == ratio * 768 for out, inp in attention)
    assert parameters(run, 100).total == parameters(config("small"), 100).total


def test_settings_of_a_llama_are_shown_against_its_presets():
    changed = {setting.name for setting in changed_settings(config("llama-60m", ffn_hidden_size=1344))}
    assert changed == {"model_preset", "train_iters", "ffn_hidden_size"}
    changed = {setting.name for setting in changed_settings(config("tiny", model_type="llama"))}
    assert changed == {"model_preset", "train_iters", "model_type"}


def memory(run, world_size, **kind):
    run = resolve(run, world_size=world_size)
    return memory_per_device(run, topology_of(run, world_size=world_size), **kind)


def test_memory_follows_the_topology():
    one, two = memory(config(), 1), memory(config(), 2)
    count = parameters(config(), 4096).total
    assert (one.parameters, one.gradients) == (two.parameters, two.gradients) == (4 * count, 4 * count)
    # One replica in FP32 has nothing to shard: its parameters are their own masters, no bucket is filled.
    assert (one.optimizer, one.bucket) == (8 * count, 0)
    assert (two.optimizer, two.bucket) == (12 * count // 2, 4 * count)
    half = memory(config(bf16=True), 1)
    assert (half.parameters, half.gradients, half.optimizer) == (2 * count, 4 * count, 12 * count)
    sharded = memory(config(tensor_model_parallel_size=2), 2)
    assert one.parameters / 2 < sharded.parameters < one.parameters * 0.52
    assert sharded.activations * 2 == one.activations
    whole_tokens = memory(config(tensor_model_parallel_size=2, sequence_parallel=False), 2)
    assert sharded.activations < whole_tokens.activations < one.activations


@pytest.mark.parametrize(
    ("settings", "bytes_a_parameter"),
    [
        # parameters, gradients, master weights and moments of one of four replicas
        ({"zero_stage": 0}, (4, 4, 8)),  # an FP32 parameter is its own master
        ({"zero_stage": 0, "bf16": True}, (2, 4, 12)),
        ({"zero_stage": 1}, (4, 4, 3)),
        ({"zero_stage": 2}, (4, 1, 3)),
        ({"zero_stage": 3}, (1, 1, 3)),
        ({"zero_stage": 3, "fp16": True}, (0.5, 1, 3)),
        ({"zero_stage": 2, "offload_optimizer": True}, (4, 1, 0)),
        ({"zero_stage": 1, "optimizer": "sgd"}, (4, 4, 2)),
        ({"zero_stage": 1, "optimizer": "sgd", "sgd_momentum": 0.0}, (4, 4, 1)),
        ({"zero_stage": 0, "optimizer": "sgd", "sgd_momentum": 0.0}, (4, 4, 0)),
    ],
    ids=str,
)
def test_memory_follows_the_stage_and_the_optimizer(settings, bytes_a_parameter):
    one = memory(config(**settings), 4)
    count = parameters(config(), 4096).total
    assert (one.parameters, one.gradients, one.optimizer) == pytest.approx(
        [count * size for size in bytes_a_parameter], abs=1
    )


def test_zero_3_keeps_what_it_gathers():
    count = parameters(config(), 4096).total
    half = memory(config(zero_stage=3, bf16=True), 4)
    assert (half.gathered_parameters, half.parameters) == (2 * count, 2 * count // 4)
    assert memory(config("llama-1.3b", zero_stage=3), 4).gathered_parameters == 4 * 10**9
    assert memory(config(zero_stage=2), 4).gathered_parameters == 0


@pytest.mark.parametrize(
    ("settings", "bytes_a_number"),
    [
        ({}, 4),
        ({"global_batch_size": 4}, 8),  # and the sum of their gradients
        ({"global_batch_size": 4, "sequence_parallel": False}, 6),  # of the shards
        ({"tensor_model_parallel_size": 1}, 0),
    ],
    ids=str,
)
def test_a_step_keeps_half_of_the_factors_gathered(settings, bytes_a_number):
    run = config(**({"tensor_model_parallel_size": 2} | settings))
    numbers = 8 * 192 * 48  # linears, width, columns
    assert memory(run, 2, ranks=48).gathered_factors == bytes_a_number * numbers


def test_memory_of_muon_lacks_second_moments():
    """Of attention's 4 h^2 in each layer, and of the factors."""
    model = config().model
    attention = model.num_layers * 4 * model.hidden_size**2
    factors = 8 * sum(sum(shape) for shape in linear_shapes(config()).values())
    muon = {"matrix_optimizer": "muon"}
    for settings, entries in ((muon, attention), (muon | {"factor_optimizer": "muon"}, attention + factors)):
        sizes = [memory(config(zero_stage=0, **s), 1, ranks=8).optimizer for s in ({}, settings)]
        assert sizes[0] - sizes[1] == 4 * entries


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"zero_stage": 1}, 4),
        ({"zero_stage": 1, "bf16": True}, 2),  # on a CPU: FP32 gradients are next to it
        ({"zero_stage": 2, "bf16": True}, 2),
        ({"zero_stage": 3}, 4),
    ],
    ids=str,
)
def test_the_bucket_of_gradients_is_no_larger_than_the_model(settings, size):
    run, count = config(**settings), parameters(config(), 4096).total
    assert memory(run, 4).bucket == size * count
    assert memory(config("llama-1.3b", **settings), 4).bucket == size * 500_000_000


@pytest.mark.parametrize(("stage", "buffers"), [(1, 3), (2, 3), (3, 1)])
def test_buckets_that_overlap_count_on_a_gpu(stage, buffers):
    """Two by turns and the copy that is reduced; stage 3 fills one on the stream that reduces it."""
    run = config("large", zero_stage=stage)
    topology = topology_of(run, world_size=4)
    embedding = topology.padded_vocab_size * 1280
    on_a_gpu = memory_per_device(run, topology, device="NVIDIA H200")
    assert on_a_gpu.bucket == buffers * 4 * max(40_000_000, embedding)


def test_tensor_parallelism_sends_activations_of_every_layer():
    """Attention and MLP: an all-gather and a reduce-scatter of half of them, forward and backward."""
    run = config("tiny", tensor_model_parallel_size=2, micro_batch_size=2, global_batch_size=8)
    layers, tokens, width, micro_batches = 4, 2 * 256, 192, 2
    sent = layers * 2 * 4 * tokens * width // 2 * micro_batches
    assert tensor_parallel_bytes(run, topology_of(run, world_size=4)) == 4 * sent
    half = config("tiny", tensor_model_parallel_size=2, micro_batch_size=2, global_batch_size=8, bf16=True)
    assert tensor_parallel_bytes(half, topology_of(half, world_size=4)) == 2 * sent


def test_frozen_weights_have_no_gradients_and_no_moments():
    run = config(method="inrank")
    phase_1, factors = memory(run, 1, ranks=96, frozen_base=True), parameters(run, 4096, ranks=96).total
    assert (phase_1.gradients, phase_1.optimizer) == (4 * factors, 8 * factors)
    assert phase_1.parameters == 4 * parameters(run, 4096, ranks=96, frozen_base=True).total
    assert phase_1.initial_factors == 4 * 96 * (192 + 768) * 8
    assert (
        memory(config(method="inrank", rank_criterion="eq7"), 1, ranks=96, frozen_base=True).initial_factors
        == 0
    )


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H800", "bf16", 989e12),
        ("NVIDIA H800 PCIe", "bf16", 756e12),
        ("NVIDIA H20", "bf16", 148e12),
        ("NVIDIA H20-3e", "fp32", 44e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA B200", "bf16", 2.25e15),
        ("NVIDIA GB200", "bf16", 2.5e15),
        ("NVIDIA A100X", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp32", 14e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65e12),
        ("cpu", "fp32", None),
    ],
)
def test_peak_rate_of_each_device_is_known(name, dtype, peak):
    assert device_peak_flops(name, dtype) == peak


def plan_of(run, world_size=2):
    run = resolve(run, world_size=world_size)
    topology = topology_of(run, world_size=world_size, vocab_size=4000)
    return make_plan(run, topology, vocab_size=4000, device="cpu")


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, [None]),
        ({"method": "fixed-rank", "rank": 9}, [None, 9]),
        ({"method": "inrank"}, [None, 27, 96]),
        ({"method": "inrank-efficient"}, [None, 27, 96, 2, 71, 153]),
        ({"method": "inrank-efficient", "final_ranks": "output"}, [None, 27, 96, 153]),
        ({"method": "inrank-efficient", "factor_optimizer": "lora-muon"}, [None, 74, 96, 76, 153]),
        ({"method": "warm-start"}, [None, 153]),
        ({"method": "warm-start", "parameter_budget": 0.1}, [None, 15, 153]),
    ],
)
def test_plan_shows_the_phases_of_each_method(settings, columns):
    assert [phase.shape.columns for phase in plan_of(config(**settings)).phases] == columns


def test_changed_settings_are_those_that_differ_from_their_defaults():
    run = config(num_layers=2, lr=1e-3, buffer=3, data_path=["a"])
    changed = {setting.name: setting for setting in changed_settings(run)}
    assert set(changed) == {"model_preset", "num_layers", "lr", "train_iters", "buffer", "data_path"}
    assert (changed["num_layers"].value, changed["num_layers"].default) == (2, 4)
    assert changed["buffer"].idle and not changed["lr"].idle
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 4, "train_iters": 1}
    assert {setting.name for setting in changed_settings(from_flat(sizes))} == set(sizes)


def test_the_plan_shows_what_contradicts_a_preset():
    run = config(method="inrank", inrank_preset="paper", buffer=9, threshold=0.9)
    changed = {setting.name: (setting.value, setting.default) for setting in changed_settings(run)}
    assert changed.keys() == {"model_preset", "method", "train_iters", "inrank_preset", "buffer"}
    assert changed["buffer"] == (9, 100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "ZeRO stage 0 (1 shards nothing)"),
        ({"zero_stage": 2}, "ZeRO stage 2,"),
        ({"bf16": True}, "ZeRO stage 1,"),
    ],
)
def test_the_page_says_which_stage_one_replica_has(settings, words):
    assert words in render(plan_of(config(**settings), world_size=1))


def test_the_page_says_what_will_run():
    batch = {"micro_batch_size": 4, "global_batch_size": 16, "tensor_model_parallel_size": 2}
    run = config(method="inrank-efficient", data_path=["[bold]a.txt", "b.txt"], **batch)
    page = render(plan_of(run, world_size=4))
    for words in (
        "4 processes = tensor-parallel 2 x data-parallel 2",
        "16 sequences = micro 4 x accumulation 2 x data-parallel 2",
        "16 x 256 = 4,096 per step, x 100 steps = 409,600",
        "4,000, padded to 4,096",
        "phase 1",
        "phase 2",
        f"{parameters(run, 4000).total:,}",
        f"{flops_per_token(run, 4096) / 1e6:,.1f}",
        "up to rank 153",
        "[bold]a.txt b.txt",
        "inrank-efficient",
    ):
        assert words in page
    assert "not read" not in page
    assert max(map(len, page.splitlines())) <= 110


def test_the_page_of_a_warm_start_has_the_memory_of_the_dense_phase():
    assert "Memory of dense:" in render(plan_of(config(method="warm-start")))


def test_the_page_breaks_no_line_of_the_memory():
    lines = render(plan_of(config(preset="medium", method="inrank-efficient"))).splitlines()
    [bucket] = [line for line in lines if "reduction bucket" in line]
    assert bucket.startswith("gradient reduction bucket ")
    assert lines[lines.index(bucket) - 1].startswith("FP32 master weights and moments ")


def test_the_page_marks_settings_that_the_method_ignores():
    assert "not read by method dense" in render(plan_of(config(buffer=3)))


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "device", "gib"),
    [
        ("8xA100-80GB", 1, 8, "A100-80GB", 79.2),
        ("4x8xh100", 4, 8, "H100", 79.1),
        ("2xcpu", 1, 2, "cpu", None),
        ("H200", 1, 1, "H200", 139.8),
        ("V100-32GB", 1, 1, "V100-32GB", 31.7),
    ],
)
def test_cluster_names_are_parsed(text, nodes, devices, device, gib):
    cluster = parse_cluster(text)
    assert (cluster.nodes, cluster.devices, cluster.device) == (nodes, devices, device)
    assert cluster.memory == (gib and int(gib * 2**30)) and cluster.world_size == nodes * devices
    assert device == "cpu" or device_peak_flops(device, "fp16") is not None


@pytest.mark.parametrize("text", ["", "8x", "A100", "8xB300", "0xH100", "2x2x2xH100", "-1xcpu", "8 H100"])
def test_faulty_cluster_names_are_refused(text):
    with pytest.raises(UserError, match=r"must be .*A100-80GB"):
        parse_cluster(text)


def test_cluster_without_dry_run_is_refused():
    with pytest.raises(UserError, match="give --dry-run"):
        parse(["--cluster", "8xH100"], world_size=1)
    launch = parse(["--cluster", "2x3xH100", "--dry-run"], world_size=1)
    assert (launch.world_size, launch.config.training.global_batch_size) == (6, 48)


def cluster_page(text, preset="small", **settings):
    cluster, run = parse_cluster(text), config(preset, method="inrank-efficient", **settings)
    run = resolve(run, world_size=cluster.world_size)
    topology = topology_of(run, world_size=cluster.world_size, vocab_size=GPT2_VOCABULARY)
    page = render(
        make_plan(run, topology, vocab_size=GPT2_VOCABULARY, device=cluster.device, cluster=cluster)
    )
    assert max(map(len, page.splitlines())) <= 110
    return page


def test_a_plan_says_whether_it_fits_its_cluster():
    page = cluster_page("2x8xA100-80GB", bf16=True)
    assert "planned for  2 nodes of 8 x A100-80GB" in page and "16 processes" in page
    assert "peak         312 TFLOP/s per device in bf16" in page
    assert "memory       fits: " in page and " of the 79.20 GiB of each A100-80GB" in page
    assert "does not fit: " in cluster_page("8xA100-40GB", "large", micro_batch_size=64)
    assert "V100-32GB has none in bf16; give --fp16" in cluster_page("8xV100-32GB", bf16=True)
    assert "the processes of this launch; --cluster" in render(plan_of(config()))


def test_a_plan_knows_vocabularies_without_a_network(tmp_path):
    assert planned_vocabulary(DataConfig(tokenizer="openai-community/gpt2"))[0] == GPT2_VOCABULARY
    assert planned_vocabulary(DataConfig(tokenizer="t5-base"))[0] == LLAMA_VOCABULARY
    assert planned_vocabulary(DataConfig())[0] is None
    size, said = planned_vocabulary(DataConfig(tokenizer="nobody/has-this"))
    assert size is None and "nobody/has-this is not on this machine" in said
    with pytest.raises(UserError, match="tokenizer"):
        planned_vocabulary(DataConfig(tokenizer=str(tmp_path)))
