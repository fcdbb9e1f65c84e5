"""Models that a hub on this machine serves: what is downloaded, how often, and what is refused before."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inrank_megatron.config.cli import parse
from inrank_megatron.errors import UserError
from inrank_megatron.interop.command import run as convert
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface import factorised as hf_factorised
from inrank_megatron.interop.peft import adapters as peft
from inrank_megatron.interop.start import start_settings, start_weights
from tests.local_hub import LocalHub, local_hub
from tests.unit.interop.models import NO_NETWORK, OPTIONS, make_weights
from tools.convert_checkpoint import parse as parse_conversion

COMMIT = "c" * 40
WEIGHTS = "model.safetensors"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixture": ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
    "latent": ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-latent attention"),
    "window": ({"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16: must be None"),
    "quantised": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantised"),
}
"""What is in ``config.json``, and what is said of it."""


@pytest.fixture
def hub(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """``own/NAME`` for a model of each format, and for each of those that are refused."""
    root = tmp_path / "served" / "own"
    phase = make_weights("llama 3", "first phase, QKV separate", tokenizer=tokenizer)
    for module in (hf_dense, hf_factorised, peft):
        (root / module.NAME).mkdir(parents=True)
        module.write(phase, root / module.NAME, OPTIONS)
    for name, (settings, _) in REFUSED.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(settings))
        (root / name / WEIGHTS).write_bytes(b"never asked for")
    (root / hf_dense.NAME / "pytorch_model.bin").write_bytes(b"never asked for")
    (root / "adapter").mkdir()  # the hub has no folder with the base next to it
    for file in (root / peft.NAME).glob("adapter*"):
        shutil.copyfile(file, root / "adapter" / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with local_hub(tmp_path / "served", COMMIT) as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.endpoint)
        files = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield served


def to_run(name: str, target: Path) -> None:
    convert(parse_conversion([name, str(target), "--format", "run"]))


@pytest.mark.parametrize("kind", [hf_dense.NAME, hf_factorised.NAME])
def test_a_download_has_settings_first_and_weights_once(
    kind: str, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_run(f"own/{kind}", tmp_path / "first")
    assert hub.sent.count(WEIGHTS) == 1 and hub.sent[-1] == WEIGHTS
    assert "tokenizer.json" in hub.sent and "pytorch_model.bin" not in hub.sent
    hub.sent.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NO_NETWORK)
    to_run(f"own/{kind}", tmp_path / "again")
    assert not hub.sent


def starts_a_run(name: str, folder: Path) -> None:
    argv = ["--method", "lora", "--rank", "4", "--pretrained-checkpoint", name, "--train-iters", "5"]
    parse(argv, world_size=1, other_starts=start_settings)


def is_read(name: str, folder: Path) -> None:
    start_weights(name, None)


def is_converted(name: str, folder: Path) -> None:
    to_run(name, folder / "run")


@pytest.mark.parametrize("use", [starts_a_run, is_read, is_converted])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_can_have_is_refused_before_its_weights_are_downloaded(
    name: str, use: Callable[[str, Path], None], hub: LocalHub, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=REFUSED[name][1]) as raised:
        use(f"own/{name}", tmp_path)
    assert hub.sent == ["config.json"] and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_run_s_settings_need_no_weights(hub: LocalHub, tmp_path: Path) -> None:
    settings = start_settings(f"own/{hf_dense.NAME}", None)
    assert settings["pretrained_revision"] == COMMIT and settings["num_query_groups"] == 2
    assert WEIGHTS not in hub.sent
    assert start_weights(f"own/{hf_dense.NAME}", COMMIT).shapes and hub.sent.count(WEIGHTS) == 1


@pytest.mark.parametrize("base", [hf_dense.NAME, "quantised"])
def test_an_adapter_s_base_is_downloaded_after_it_was_looked_at(
    base: str, hub: LocalHub, tmp_path: Path
) -> None:
    file = hub.root / "own" / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"base_model_name_or_path": f"own/{base}", "revision": None}
        )
    )
    if base == "quantised":
        with pytest.raises(UserError, match="quantised weights cannot be read"):
            is_read("own/adapter", tmp_path)
        assert "adapter_model.safetensors" not in hub.sent
    else:
        assert start_weights("own/adapter", None).shapes
    assert hub.sent.count(WEIGHTS) == (base != "quantised")


def test_what_the_hub_does_not_have_is_one_line(hub: LocalHub, tmp_path: Path) -> None:
    for name, revision in (("own/absent", None), (f"own/{hf_dense.NAME}", "v2")):
        with pytest.raises(UserError, match=f"{name}: is not a folder here and cannot be loaded") as raised:
            start_settings(name, revision)
        assert "\n" not in str(raised.value) and not hub.sent
