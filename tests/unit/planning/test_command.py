"""Plans of whole runs: what they list, refuse, choose and print."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import yaml

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.cluster_file import LATENCIES
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.devices import DEVICES, ZERO3_LAYER
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError
from inrank_megatron.planning.command import pinned_by
from tests.harness import ROOT
from tools import plan

MEDIUM = ["--config", str(ROOT / "configs" / "gpt2_medium_inrank.yaml")]
COLUMNS = {"tensor_model_parallel_size", "data_parallel_size", "zero_stage", "micro_batch_size", "phase"}
COLUMNS |= {"parameters", "memory_bytes", "step_seconds"}


def planned(*words):
    return json.loads(plan.run(plan.options([*words, "--json"])))


@pytest.fixture(scope="module")
def medium():
    return planned(*MEDIUM, "--cluster", "8xA100-40GB", "--final-rank", "286", "--rank-multiple-of", "1")


def test_rows_have_each_phase_of_each_topology(medium):
    rows = medium["rows"]
    assert set(rows[0]) > COLUMNS
    for row in rows:
        sequences = row["micro_batch_size"] * row["accumulation_steps"] * row["data_parallel_size"]
        assert sequences == 512 and row["tensor_model_parallel_size"] * row["data_parallel_size"] == 8
        assert (
            sum(value for key, value in row["memory"].items() if key != "allocator_slack")
            == (row["memory_bytes"])
        )
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
        switch = row["switch_memory"]
        assert sum(switch.values()) - switch["allocator_slack"] == row["switch_memory_bytes"]
        assert row["fits"] or max(row["memory_bytes"], row["switch_memory_bytes"]) > 20 * 2**30
    assert {row["tensor_model_parallel_size"] for row in rows} == {1, 2, 4, 8}
    assert {row["zero_stage"] for row in rows} == {0, 1, 2, 3}
    assert {row["micro_batch_size"] for row in rows if row["data_parallel_size"] == 8} == {
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    }
    assert [row["phase"] for row in rows[:2]] == ["phase 1", "phase 2"]
    assert (rows[0]["steps"], rows[1]["steps"]) == (225, 22500 - 225)
    assert rows[1]["parameters"] == 223_783_936  # the paper's 223M


def test_what_fits_comes_first_and_by_time(medium):
    hours = [row["run_hours"] for row in medium["rows"] if row["fits"]]
    assert all(later > 0.96 * earlier for earlier, later in itertools.pairwise(hours))
    assert medium["rows"][0]["fits"] and not medium["rows"][-1]["fits"]


def test_an_illegal_topology_says_why_in_one_clause(medium):
    reasons = {row["illegal"] for row in medium["illegal"]}
    assert any(
        reason.startswith("zero_stage = 0 with bf16 and tensor_model_parallel_size = 2:")
        for reason in reasons
    )
    assert "offload_optimizer with zero_stage = 0: DeepSpeed offloads what ZeRO shards" in reasons
    assert not any(";" in reason or "\n" in reason for reason in reasons)


def test_the_command_launches_the_first_topology(medium):
    words = medium["chosen"]["command"].split()
    launch = parse(words[words.index("launch/pretrain_gpt2.py") + 1 :], world_size=8)
    check(launch.config, world_size=8)
    first = medium["rows"][0]
    assert launch.config.training.micro_batch_size == first["micro_batch_size"]
    assert launch.config.parallel.zero_stage == first["zero_stage"]
    assert launch.config.training.global_batch_size == 512


def test_methods_stand_side_by_side(medium):
    methods = {row["method"]: row for row in medium["methods"]}
    assert next(iter(methods)) == "dense" and "inrank-efficient" in methods
    assert methods["inrank-efficient"]["hours"] == pytest.approx(medium["chosen"]["hours"])
    assert methods["inrank-efficient"]["hours"] < methods["dense"]["hours"]
    assert medium["break_even_rank"] == 819 and medium["most_layers"] > 24


def test_a_page_has_what_the_rows_have():
    words = [*MEDIUM, "--cluster", "2x4xH100", "--zero-stage", "1", "--no-offload-optimizer"]
    page = plan.run(plan.options([*words, "--top", "3"]))
    for part in ("allocator slack", "data: gradients, all-reduce", "rank checks", "break-even", "kWh"):
        assert part in page
    assert "deepspeed --hostfile launch/cluster/hostfile launch/pretrain_gpt2.py --config" in page
    assert max(map(len, page.splitlines()[:-1])) <= 110


def test_a_page_says_what_becomes_of_the_rank_and_what_is_not_known():
    def shown(*words):
        return plan.run(plan.options([*words, "--zero-stage", "1", "--top", "1"]))

    medium = [*MEDIUM, "--cluster", "8xH100"]
    assert "final rank   286 (as given; 320 with rank_multiple_of = 64)" in shown(
        *medium, "--final-rank", "286"
    )
    assert "final rank   320 (as given)" in shown(*medium, "--final-rank", "320")
    assert "409 (that of the parameter budget; --final-rank changes it; 448 with" in shown(*medium)
    paper = ["--config", str(ROOT / "configs" / "paper" / "gpt2_medium_inrank.yaml"), *medium[2:]]
    assert "(the largest that ranks can reach; --final-rank changes it)" in shown(*paper)
    page = shown("--inrank", "--cluster", "2xcpu", "--dry-run")
    assert "legal, memory not known; predicted" in page and " 0.0 hours" not in page
    assert re.search(r"TFLOP per device and step +0\.0[1-9]", page)
    assert "--dry-run" not in page.splitlines()[-1]  # the command is to train


def test_the_guide_has_the_defaults_of_a_cluster_file():
    text = " ".join((ROOT / "docs" / "guides" / "plan_a_run.md").read_text(encoding="utf-8").split())
    gpu, cpu = (
        {name: f"{getattr(DEVICES[device], field) * 1e6:,.0f}" for name, field in LATENCIES.items()}
        for device in ("H100", "cpu")
    )
    for name in ("operator_us", "collective_us"):
        assert f"[{gpu[name]}; `cpu`: {cpu[name]}]" in text
    assert gpu["zero3_layer_us"] == cpu["zero3_layer_us"] and f"[{gpu['zero3_layer_us']}]" in text
    assert f"assumed: {ZERO3_LAYER * 1e3:g} milliseconds for each layer" in text


def test_a_switch_that_takes_the_most_decides_what_fits():
    """Second moments of 120 wide linears; where there are replicas, few of them are there at a time."""
    wide = "--model-type llama --num-layers 60 --hidden-size 8192 --num-attention-heads 64 --vocab-size 32000"
    run = "--global-batch-size 64 --micro-batch-size 1 --train-iters 8 --switch-iters 2 --bf16 --max-rank 512"
    fixed = "--tensor-model-parallel-size 8 --zero-stage 3 --recompute-granularity full --offload-optimizer"
    words = ["--inrank", *wide.split(), *run.split(), *fixed.split(), "--sequence-parallel"]
    words += ["--matrix-optimizer", "adamw", "--factor-optimizer", "adamw", "--cluster", "8xH200"]
    first, second = planned(*words, "--final-rank", "256")["rows"]
    assert first["switch_memory_bytes"] > max(first["memory_bytes"], second["memory_bytes"])
    assert first["switch_memory"]["refactoring"] >= 120 * 4 * 8192**2
    plain = planned(*words, "--final-rank", "256", "--truncation", "plain")["rows"][0]
    assert plain["switch_memory_bytes"] < first["switch_memory_bytes"] - 30 * 2**30 * 0.9
    smaller = [word.replace("H200", "A100-80GB") for word in words]
    with pytest.raises(UserError, match=r"none of 1 topologies.*the switch would not: --truncation plain"):
        planned(*smaller, "--final-rank", "256")
    assert planned(*smaller, "--final-rank", "256", "--truncation", "plain")["rows"][0]["fits"]
    shared = planned(*words[:-1], "8x8xH200", "--final-rank", "256")["rows"][0]
    assert 3 * shared["switch_memory_bytes"] < first["switch_memory_bytes"]


def test_a_flag_keeps_its_dimension():
    assert pinned_by(["--zero_stage=2", "--no-sequence-parallel", "--lr", "1"]) == (
        "zero_stage",
        "sequence_parallel",
    )
    rows = planned("--inrank", "--cluster", "2xcpu", "--zero-stage", "2")["rows"]
    assert {row["zero_stage"] for row in rows} == {2} and {
        row["tensor_model_parallel_size"] for row in rows
    } == {1, 2}


def command_of(found):
    """The launch that the command of a plan makes, as a run checks it."""
    words = found["chosen"]["command"].split()
    first = words.index("launch/pretrain_gpt2.py") + 1
    world = found["cluster"]["nodes"] * found["cluster"]["devices"]
    launch = parse(words[first:], world_size=world)
    check(launch.config, world_size=world)
    topology = topology_of(launch.config, world_size=world)
    passthrough(launch.deepspeed_config or {}, launch.config, topology)
    return words[:first], launch


@pytest.mark.parametrize("cluster", ["2xA100-40GB", "2xcpu"])
def test_an_optimizer_of_the_host_is_planned_with_offload(cluster):
    found = planned("--inrank", "--optimizer", "cpu-adam", "--cluster", cluster)
    assert {row["offload_optimizer"] for row in found["rows"]} == {True}
    assert found["most_layers"] is None if cluster == "2xcpu" else found["most_layers"] > 4


def test_a_deepspeed_json_keeps_what_it_says(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "none"}}
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_accumulation_steps": 2}))
    found = planned("--inrank", "--deepspeed-config", str(path), "--cluster", "2xH100")
    kept = {(row["zero_stage"], row["offload_optimizer"], row["accumulation_steps"]) for row in found["rows"]}
    assert kept == {(2, False, 2)}
    assert any(
        row["illegal"].startswith("DeepSpeed JSON zero_optimization.stage = 2") for row in found["illegal"]
    )
    command_of(found)


def test_a_file_keeps_its_recomputation_and_may_divide_other_processes(tmp_path):
    """No flag of the command takes recomputation back; 4 is the size for which the file was written."""
    path = tmp_path / "run.yaml"
    settings = {"model_preset": "tiny", "train_iters": 10, "tensor_model_parallel_size": 4}
    settings |= {"recompute_granularity": "full", "global_batch_size": 8}
    path.write_text(yaml.safe_dump(settings))
    found = planned("--config", str(path), "--cluster", "2xcpu")
    assert {row["recompute_granularity"] for row in found["rows"]} == {"full"}
    command_of(found)
    path.write_text(yaml.safe_dump(settings | {"global_batch_size": None}))
    with pytest.raises(UserError, match="tensor_model_parallel_size = 4: does not divide the 2 devices"):
        planned("--config", str(path), "--cluster", "2xcpu")


def test_a_command_for_hosts_without_gpus_starts_all_their_processes():
    launcher, _ = command_of(planned("--cluster", "2x2xcpu", "--zero-stage", "1"))
    assert launcher[:5] == ["torchrun", "--nproc-per-node", "2", "--nnodes", "2"]


def test_a_plan_ends_for_any_number_of_processes_and_any_width():
    words = ["--hidden-size", "16", "--num-attention-heads", "1", "--zero-stage", "3"]
    found = planned(*words, "--micro-batch-size", "1", "--cluster", "99991x99989xH200")
    assert {row["tensor_model_parallel_size"] for row in found["rows"]} == {1}
    assert found["most_layers"] == 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "8xV100-32GB"], "V100-32GB does not compute in bf16; give --fp16"),
        (["--cluster", "8xA100"], "cluster = '8xA100': must be"),
        (["--cluster", "7xH100"], "global_batch_size = 512: must be micro_batch_size"),
        (["--cluster", "8xH100", "--dataset", "o/n"], "give --steps-per-epoch N, or --switch-iters"),
        (
            ["--cluster", "8xH100", "--final-rank", "1025"],
            "--final-rank 1025: the linears have rank 1024 at most",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    with pytest.raises(UserError) as error:
        planned(*MEDIUM, *words)
    assert message in str(error.value)


def test_a_plan_that_does_not_fit_says_what_would():
    words = ["--cluster", "1xV100-32GB", "--no-bf16", "--zero-stage", "1", "--no-offload-optimizer"]
    with pytest.raises(UserError) as error:
        planned(*MEDIUM, *words, "--num-layers", "500")
    assert "fits into the 31.70 GiB of each V100-32GB: the least is" in str(error.value)
    found = re.search(r"of this width (\d+) layers fit\)$", str(error.value))
    assert found, error.value
    planned(*MEDIUM, *words[:3], "--num-layers", found[1])
    with pytest.raises(UserError, match="none of"):
        planned(*MEDIUM, *words, "--num-layers", str(int(found[1]) + 10))
    with pytest.raises(UserError, match=r"micro_batch_size = 512.*on another topology the model fits$"):
        planned(*MEDIUM, *words, "--micro-batch-size", "512")


@pytest.mark.parametrize(
    ("cluster", "tp", "links"),
    [
        ("8xH100", 2, {"tensor": "node", "data": "node"}),
        ("2x4xH100", 2, {"tensor": "node", "data": "network"}),
        ("2x4xH100", 8, {"tensor": "network"}),
        ("2x4xH100", 1, {"data": "network"}),
    ],
)
def test_bytes_are_told_apart_by_what_they_go_over(cluster, tp, links):
    words = ["--cluster", cluster, "--tensor-model-parallel-size", str(tp), "--zero-stage", "1"]
    for row in planned(*MEDIUM, *words)["rows"]:
        expected = {"node": 0.0, "network": 0.0}
        for entry in row["sent"]:
            expected[links[entry["group"]]] += entry["sent"]
        assert row["bytes_by_link"] == pytest.approx(expected)
    shown = plan.run(plan.options([*MEDIUM, *words]))
    assert ("all within the node" in shown) == ("node" in links.values())
    assert ("all between nodes" in shown) == ("network" in links.values())


def test_a_reader_that_leaves_early_ends_a_plan_without_a_word():
    command = f"{sys.executable} tools/plan.py --cluster 2xcpu --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_measured_rates_take_the_place_of_assumed_ones():
    words = ["--inrank", "--cluster", "2xcpu", "--zero-stage", "1", "--micro-batch-size", "1", "--json"]
    rates = {"attained_tflops.fp32": 1.0, "operator_us": 1.0, "collective_us": 1.0, "link_gb_s": 50.0}
    options = plan.options([*words, "--measure"])
    measured = json.loads(plan.command.run(options, lambda config, cluster: rates))
    assert measured["cluster"]["measured"] == rates
    assumed = planned(*words[:-1])
    assert assumed["cluster"]["measured"] == {}
    for part in ("compute", "tensor_communication"):
        times = [
            {row["tensor_model_parallel_size"]: row["seconds"][part] for row in found["rows"]}
            for found in (measured, assumed)
        ]
        assert 0 < times[0][2] < times[1][2] / 5
