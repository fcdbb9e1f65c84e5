"""The table of DeepSpeed's names against the names that the installed DeepSpeed looks for."""

import copy
from types import SimpleNamespace

import pytest

from inrank_megatron.config.cli import parse
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.deepspeed_names import SECTIONS, TOP_LEVEL
from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.topology import topology_of
from inrank_megatron.engine.deepspeed_setup import check_deepspeed
from inrank_megatron.errors import UserError

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8, "train_iters": 1}
NEEDED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}


class Watched(dict):
    """A dictionary that remembers for which names it was asked."""

    def __init__(self, content, asked: set):
        super().__init__(content)
        self.asked = asked

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.asked.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def keys(self):
        return self


def asked(section: str | None, monkeypatch) -> set[str]:
    from deepspeed.runtime import config

    names: set[str] = set()
    monkeypatch.setattr(config, "copy", SimpleNamespace(copy=lambda given: given, deepcopy=copy.deepcopy))
    given = NEEDED if section is None else NEEDED | {section: Watched({"unknown": 1}, names)}
    config.DeepSpeedConfig(Watched(given, names if section is None else set()))
    return names


def test_every_name_that_deepspeed_looks_for_is_in_the_table(monkeypatch):
    refused = {"autotp_size", "sequence_parallel_size"}  # by rules of their own, wherever DeepSpeed looks
    assert TOP_LEVEL.keys() - refused == asked(None, monkeypatch) - refused


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_that_skip_unknown_names_have_those_of_the_table(section, monkeypatch):
    assert set(SECTIONS[section]) == asked(section, monkeypatch)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"gradient_cliping": 1.0}, "no such setting, did you mean gradient_clipping"),
        ({"wall_clock_breakdwon": True}, "did you mean wall_clock_breakdown"),
        (
            {"checkpoint": {"tag_validatoin": "Warn"}},
            r"checkpoint\.tag_validatoin: .* checkpoint\.tag_validation",
        ),
        (
            {"zero_optimization": {"reduce_bucket_sizee": 5}},
            "refuses its configuration: .*reduce_bucket_sizee",
        ),
        ({"gradient_predivide_factor": "x"}, "must be a float"),
        ({"prescale_gradients": 1}, "must be a bool"),
        ({"steps_per_print": "often"}, "must be a int"),
        ({"flops_profiler": [1]}, "must be an object"),
        ({"gradient_clipping": 10**400}, r"contradicts the run's clip_grad"),
    ],
    ids=str,
)
def test_what_deepspeed_would_skip_or_stumble_over_is_refused_before_anything_runs(given, reason):
    """A mistyped name at the top level was no setting at all, and nobody said so."""
    config = from_flat(SIZES)
    topology = topology_of(config, world_size=1)
    with pytest.raises(UserError, match=reason) as caught:
        extra = passthrough(given, config, topology)
        check_deepspeed(config, accumulation=topology.accumulation_steps, extra=extra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"steps_per_print": 1, "steps_per_print": 2}', "'steps_per_print' is given twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"x":' * 40 + "1" + "}" * 40, "sections deep"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (" " * 2**21, "longer than"),
    ],
    ids=["twice", "endless", "deep", "pointer", "long"],
)
def test_files_that_are_not_settings_are_refused(tmp_path, text, reason):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        parse(["--deepspeed_config", str(tmp_path / "ds.json")], world_size=1)
