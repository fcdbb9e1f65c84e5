"""Growth and switch on live training: which values and moments change, and which must not."""

import functools
from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_map_only

from inrank_megatron.lowrank.linalg import oracle
from tests.contract.cases import CHECK
from tests.contract.changes import (
    around_growth,
    around_merge,
    around_switch,
    beyond_use,
    first_step_of_new_columns,
    first_updates,
    spectra,
    starts,
)
from tests.contract.layouts import LAYOUTS
from tests.contract.probes import check_after
from tests.contract.setups import GROWTHS, SETUPS, Setup
from tests.harness import run_ranks


def each(checks: str) -> list:
    """Setup and check, for all of a field of ``SETUPS``."""
    return [
        pytest.param(
            setup, check, id=f"{setup}-{check if isinstance(check, str) else '-'.join(map(str, check))}"
        )
        for setup in SETUPS
        for check in getattr(setup, checks)
    ]


def is_factor(name: str) -> bool:
    return name.endswith((".U", ".V"))


def assert_same(before: dict, after: dict, name: str) -> None:
    for key in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(before[name][key], after[name][key]), f"{key} of {name}"


@pytest.mark.parametrize(
    ("name", "layout", "settings"),
    [
        ("inrank-efficient-patience", "TP2 SP", {"bf16": True}),
        ("llama-inrank-efficient", "DP2", {"bf16": True, "zero_stage": 3}),
        ("inrank-kaiming", "DP2", {"fp16": True, "zero_stage": 2, "initial_loss_scale": 256.0}),
    ],
    ids=str,
)
def test_unused_columns_stay_zero(name, layout, settings):
    """Through weight decay, growth, moments that are filled and products that are absorbed: in half precision
    products run over some of them.
    """
    for result in run_ranks(beyond_use, LAYOUTS[layout].world_size, name, LAYOUTS[layout], settings, 5):
        first, *_, last = result["active"]
        assert first and any(last[layer] > first[layer] and last[layer] % 8 for layer in first)
        assert result["largest"] == 0.0


def test_initial_factors_match_the_gradient_or_the_truncated_weights():
    """Gradient directions that descend, W0 as it is or less their product; the best factors of the initial
    matrix.
    """
    results = {
        layout: run_ranks(starts, LAYOUTS[layout].world_size, LAYOUTS[layout])[0]
        for layout in ("TP1 DP1", "DP2", "TP2 SP DP2")
    }
    gradients = results["TP1 DP1"]["gradients"]
    for result in results.values():
        for layer, gradient in gradients.items():
            initial = result["initial"][layer].double()
            w, u, v = (result["inrank"][f"{layer}.{leaf}"].double() for leaf in ("weight", "U", "V"))
            k = int(u.any(dim=0).sum())
            assert k == 10
            assert not v[k:].any()
            squares = 0.01 * torch.eye(k, dtype=torch.float64)  # columns of norm 0.1
            torch.testing.assert_close(u[:, :k].t() @ u[:, :k], squares, rtol=0, atol=1e-6)
            torch.testing.assert_close(v[:k] @ v[:k].t(), squares, rtol=0, atol=1e-6)
            # A step along U V lowers the linear loss <G, W> by the leading singular values, and none lowers
            # it more.
            descent, s = -(gradient * (u @ v)).sum(), torch.linalg.svdvals(gradient)
            torch.testing.assert_close(descent, 0.01 * s[:k].sum(), rtol=1e-4, atol=0)
            torch.testing.assert_close(w, initial, rtol=0, atol=1e-7)
            absorbed = {leaf: result["absorbed"][f"{layer}.{leaf}"].double() for leaf in ("weight", "U", "V")}
            assert torch.equal(absorbed["U"], u)
            assert torch.equal(absorbed["V"], v)
            torch.testing.assert_close(absorbed["weight"] + u @ v, initial, rtol=0, atol=1e-7)
            u, v = (result["random"][f"{layer}.{leaf}"].double() for leaf in ("U", "V"))
            for norms in (u[:, :k].norm(dim=0), v[:k].norm(dim=1)):
                torch.testing.assert_close(norms, torch.full_like(norms, 0.1), rtol=1e-5, atol=0)
            u, v = (result["fixed-rank"][f"{layer}.{leaf}"].double() for leaf in ("U", "V"))
            best = torch.mm(*oracle.truncate(initial, u.shape[1]))
            torch.testing.assert_close(u @ v, best, rtol=0, atol=1e-6 * float(best.norm()))


@pytest.mark.parametrize(("setup", "growth"), each("growth"))
def test_growth_changes_new_columns_alone(setup, growth):
    """New columns start with a first moment of zero and a second of zero or of the others' mean. Absorbed
    into W0 they do not change the loss, else by little. All else stays to the bit.
    """
    settings = setup.settings | GROWTHS[growth]
    for result in run_ranks(around_growth, setup.layout.world_size, setup.layout, settings):
        before, after = result["before"], result["after"]
        assert before.keys() == after.keys()
        assert any(result["grown"][name] > k for name, k in result["active"].items())
        for name in before:
            if not is_factor(name):
                assert_same(before, after, name)
                continue
            layer, letter = name.rsplit(".", 1)
            old, new = result["active"][layer], result["grown"][layer]
            values = [
                (s[name][key] if letter == "U" else s[name][key].t())
                for s in (before, after)
                for key in ("master", "exp_avg", "exp_avg_sq")
            ]
            assert torch.equal(values[0][:, :old], values[3][:, :old])
            assert not values[0][:, old:].any()
            assert values[3][:, old:new].any(dim=0).all()
            assert not values[3][:, new:].any()
            assert torch.equal(values[1], values[4])
            assert values[4][:, :old].any()
            assert not values[4][:, old:].any()
            second = values[5]
            assert torch.equal(values[2][:, :old], second[:, :old])
            mean = values[2][:, :old].double().mean(dim=1, keepdim=True).expand(-1, new - old)
            expected = mean if growth == "absorbed" else torch.zeros_like(mean)
            torch.testing.assert_close(second[:, old:new].double(), expected, rtol=1e-5, atol=0)
            assert not second[:, new:].any()
        loss_before, loss_after = result["loss"]
        if growth == "default":
            assert loss_after == pytest.approx(loss_before, rel=1e-2)
            assert loss_after != loss_before
            continue
        # Half precision rounds W0, so absorbing a product moves each weight by half a unit in the last place.
        assert loss_after == pytest.approx(loss_before, rel=1e-3 if setup.half else 1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"optimizer": "cpu-adam", "offload_optimizer": True},
        {"optimizer": "apex-fused-adam"},
        pytest.param(
            {"optimizer": "fused-adam"},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a minute's compilation on a CPU"),
        ),
    ],
    ids=lambda optimizer: optimizer.get("optimizer", "adamw"),
)
def test_first_update_of_new_columns_is_at_most_the_learning_rate(optimizer):
    """Adam counts steps for all columns together. With both moments at zero its bias correction, long since
    1, leaves a first update of (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate at beta2 = 0.999.
    No entry may take more than once the rate, as none does in a run's first step.
    """
    settings = {**optimizer, "adam_beta2": 0.999, "weight_decay": 0.0}
    default, zero, zero_at_the_default_beta = (
        run_ranks(
            first_step_of_new_columns,
            1,
            LAYOUTS["TP1 DP1"],
            settings | changes,
            timeout=280,  # DeepSpeed compiles its operator
        )[0]
        for changes in ({}, {"new_column_moments": "zero"}, {"adam_beta2": 0.95})
    )
    assert default < 1.0
    assert zero == pytest.approx(3.16, rel=0.02)
    assert zero_at_the_default_beta == pytest.approx(0.447, rel=0.02)


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.multiplier], ids=str)
def test_factor_lr_multiplier_scales_updates(setup):
    """Before and after the switch. Adam's first step is the learning rate wherever there is a gradient, so
    that the largest update over it is the multiplier; after the switch the factors' Adam alone is new.
    """
    settings = setup.settings | {"weight_decay": 0.0, "factor_lr_multiplier": 4.0}
    for first, after in run_ranks(first_updates, setup.layout.world_size, setup.layout, settings):
        for name, update in first.items():
            assert update == pytest.approx(4.0 if is_factor(name) else 1.0, rel=1e-2), name
        for name, update in after.items():
            assert update == pytest.approx(4.0, rel=1e-2) if is_factor(name) else update < 1.5, name


@functools.cache
def restarts(setup: Setup) -> dict[tuple[str, float], list[dict]]:
    """By reset, of every rank: one training, which goes back to its state before each."""
    seen = run_ranks(around_merge, setup.layout.world_size, setup.layout, setup.settings, setup.restarts)
    return dict(zip(setup.restarts, zip(*seen, strict=True), strict=True))


@pytest.mark.parametrize(("setup", "restart"), each("restarts"))
def test_restart_keeps_weights_and_clears_the_stated_moments(setup, restart):
    """The effective weights stay, the stated share of the factors' moments goes, all else stays.

    The story of restarts that threw the factors away instead of adding them to the weights, and of resets
    that, asked for a share of the optimizer's state, cleared none of it (axolotl issue 1414), or could not
    reach it under ZeRO (DeepSpeed issue 5615).
    """
    reset, share = restart
    half, results = setup.half, restarts(setup)[restart]
    cleared, entries = Counter(), Counter()
    # Over the ranks of the first replica; tensor-parallel ones come first.
    for result in results[: setup.layout.tensor_parallel]:
        for name in filter(is_factor, result["before"]):
            for key in ("exp_avg", "exp_avg_sq"):
                cleared[name, key] += int((result["after"][name][key] == 0).sum())
                entries[name, key] += result["after"][name][key].numel()
    for moment, count in entries.items():
        if reset == "random":
            spread = (share * (1 - share) * count) ** 0.5
            assert cleared[moment] == pytest.approx(share * count, abs=5 * spread)
        else:
            assert cleared[moment] == (count if reset == "full" else round(share * count)), moment
    for result in results:
        before, after = result["before"], result["after"]
        assert set(result["steps"].values()) == {2 * CHECK}
        for name in before:
            if not is_factor(name):
                assert_same(before, after, name)
                continue
            assert after[name]["master"].any() == name.endswith(".V")
            for key in ("exp_avg", "exp_avg_sq"):
                old, new = before[name][key], after[name][key]
                kept = new != 0
                assert torch.equal(new[kept], old[kept])
                # An entry that loses one of its moments loses the other, see `kept_entries`.
                had = (before[name]["exp_avg"] != 0) & (before[name]["exp_avg_sq"] != 0)
                lost = [after[name][moment][had] == 0 for moment in ("exp_avg", "exp_avg_sq")]
                assert torch.equal(*lost)
                # Where this rank holds the full tensor:
                if reset == "magnitude" and key == "exp_avg_sq" and setup.layout.tensor_parallel == 1:
                    assert new[kept].abs().min() > old[~kept].abs().max()
        old, new = result["tensors"]
        for layer in {name.rsplit(".", 1)[0] for name in old if name.endswith(".U")}:
            before, after = effective_weight(old, layer), effective_weight(new, layer)
            if half:  # the sum is rounded once
                before = before.to(torch.bfloat16 if "bf16" in setup.settings else torch.float16).double()
                assert (before != after).double().mean() < 1e-3
            assert torch.sub(before, after).square().mean() < (1e-10 if half else 1e-16)
        assert result["loss"][1] == pytest.approx(result["loss"][0], rel=1e-3 if half else 1e-6)


def switched(setup: Setup, method: str, truncation: str) -> list[dict]:
    """Both sides of a switch, of every rank."""
    layout = setup.layout
    return run_ranks(around_switch, layout.world_size, layout, setup.settings, truncation, method)


@functools.cache
def switched_alone(half: bool, method: str, truncation: str) -> dict:
    """The same of one process, which sees all inputs and gradients. Copies: a tensor from another process is
    an open file here.
    """
    alone = next(one for one in SETUPS if one.layout_name == "TP1 DP1" and one.half == half)
    return tree_map_only(torch.Tensor, torch.clone, switched(alone, method, truncation)[0])


def switches(*truncations: str) -> list:
    return [param for param in each("switches") if param.values[1][1] in truncations]


@pytest.mark.parametrize(("setup", "switch"), switches("plain"))
def test_switch_truncates_and_starts_adam_anew_for_factors_alone(setup, switch):
    """What is replaced is truncated and has a fresh Adam; all else keeps value and moments to the bit."""
    method, truncation = switch
    for result in switched(setup, method, truncation):
        before, after = result["before"], result["after"]
        replaced = {f"{layer}.weight" for layer in result["ranks"]} & before.keys()
        assert bool(replaced) == (method != "inrank-efficient")
        factors = {f"{layer}.{leaf}" for layer in result["ranks"] for leaf in "UV"}
        assert after.keys() == before.keys() - replaced | factors
        assert result["steps"] == {"factors": 0, "decay": CHECK, "no_decay": CHECK}
        for name in after:
            if is_factor(name):
                assert not after[name]["exp_avg"].any()
                assert not after[name]["exp_avg_sq"].any()
            else:
                assert before[name]["exp_avg_sq"].any()
                assert_same(before, after, name)
        old, new = result["tensors"]
        for layer, rank in result["ranks"].items():
            full = effective_weight(old, layer)
            u, v = new[f"{layer}.U"].double(), new[f"{layer}.V"].double()
            assert (u.shape[1], v.shape[0]) == (rank, rank)
            a, s, b = torch.linalg.svd(full, full_matrices=False)
            best = a[:, :rank] * s[:rank] @ b[:rank]
            assert (u @ v - best).norm() < 1e-6 * best.norm()
            torch.testing.assert_close(u.square().sum(0), v.square().sum(1), rtol=1e-5, atol=0)
            assert f"{layer}.weight" not in new


@pytest.mark.parametrize(("setup", "switch"), switches("activation-aware", "fisher"))
def test_weighted_switch_matches_the_dense_oracle(setup, switch):
    """Every layout finds the factors that a dense oracle finds best, for inputs and gradients that one rank
    alone sees; what views show of the outputs are the oracle's energies."""
    method, truncation = switch
    alone = switched_alone(setup.half, method, truncation)
    moments, gradients = alone["moments"], alone["gradients"]
    result = alone if setup.layout.world_size == 1 else switched(setup, method, truncation)[0]
    old, new = result["tensors"]
    for layer, rank in result["ranks"].items():
        full, C, D = effective_weight(old, layer), moments[layer], gradients[layer]
        if truncation != "fisher":
            D = torch.ones_like(D)
        u, v = new[f"{layer}.U"].double(), new[f"{layer}.V"].double()
        assert (u.shape[1], v.shape[0]) == (rank, rank)
        d = D.sqrt()[:, None]
        error, best, unweighted = (
            oracle.output_error(d * full, d * (left @ right), C)
            for left, right in (
                (u, v),
                oracle.truncate_for_loss(full, C, D, rank),
                oracle.truncate_for_activations(full, C, rank)
                if truncation == "fisher"
                else oracle.truncate(full, rank),
            )
        )
        assert error < best + 1e-3 * (unweighted - best)
        torch.testing.assert_close(u.square().sum(0), v.square().sum(1), rtol=1e-5, atol=0)
        if not setup.half:
            energies = oracle.output_energies(d * full, C)
            found = torch.tensor(result["energies"][layer], dtype=torch.float64)
            torch.testing.assert_close(
                found, energies[: len(found)], rtol=1e-4, atol=1e-5 * float(energies[0])
            )


def effective_weight(tensors: dict, layer: str) -> torch.Tensor:
    """W0 + U V, or the weight of a dense linear, FP64."""
    weight = tensors[f"{layer}.weight"].double()
    if f"{layer}.U" not in tensors:
        return weight
    return weight + tensors[f"{layer}.U"].double() @ tensors[f"{layer}.V"].double()


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.spectra], ids=str)
def test_spectra_that_methods_decide_on_match_dense_ones(setup):
    """Those of dense matrices formed from the whole state, FP32 master weights in every precision. What was
    never trained is not an update: neither the first columns at the start nor columns that have just been
    added show in that spectrum.
    """
    results = run_ranks(spectra, setup.layout.world_size, setup.layout, setup.settings)
    seen = results[0]
    assert all(result["start"] == seen["start"] for result in results)
    assert all(max(values) == 0.0 for values in seen["start"]["update"].values())
    assert all(min(values) > 0.0 for values in seen["start"]["product"].values())
    for moment in ("before growth", "after growth"):
        tensors = {name: tensor.double() for name, tensor in seen[moment]["tensors"].items()}
        for layer, values in seen[moment]["update"].items():
            product, initial = (
                tensors[f"{layer}.U{index}"] @ tensors[f"{layer}.V{index}"] for index in ("", "0")
            )
            for kind, dense in (("update", product - initial), ("product", product)):
                expected = torch.linalg.svdvals(dense).tolist()
                values = seen[moment][kind][layer]
                assert values == pytest.approx(expected[: len(values)], abs=1e-8 * expected[0])
    for layer, before in seen["before growth"]["update"].items():
        after = seen["after growth"]["update"][layer][: len(before)]
        assert after == pytest.approx(before, abs=1e-8 * before[0])


@pytest.mark.parametrize("layer", ["decoder.layers.0.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc2"])
def test_non_finite_factor_stops_every_replica(layer):
    """Only the replica that decides the layer sees it; all ranks say so."""
    messages = run_ranks(check_after, 4, LAYOUTS["TP2 SP DP2"], layer)
    assert all(message.startswith(f"factor U of {layer} at step 1 holds NaN") for message in messages)
