"""Checkpoints as the InRank authors' program writes them, made by hand: transformers' GPT-2, other MLPs."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from inrank_megatron.config.loading import from_flat, to_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.inspection.layers import inspect
from inrank_megatron.inspection.show import to_json
from inrank_megatron.interop.core import run
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.inrank_reference import checkpoint as reference
from tests.forked import run_forked
from tests.harness import ROOT, run_ranks
from tools.inspect_ranks import main

WIDTH, LAYERS, HEADS, VOCABULARY, LENGTH = 32, 3, 4, 90, 16
BUFFER = 4


class LowRank(nn.Module):
    """``y = B A x + bias`` over the columns in use."""

    def __init__(self, inputs: int, outputs: int, *, modes: int, allocated: int, used: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(allocated, inputs) / inputs**0.5)
        self.B = nn.Parameter(torch.randn(outputs, allocated) / allocated**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10)
        self.current_modes_tensor = nn.Parameter(torch.tensor([float(modes)]), requires_grad=False)
        self.iter_tensor = nn.Parameter(torch.tensor([130.0]), requires_grad=False)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        columns = range(self.used)
        return sum(torch.einsum("...i,i,o->...o", x, self.A[c], self.B[:, c]) for c in columns) + self.bias


class MLP(nn.Module):
    def __init__(self, modes: int, *, pruned: bool):
        super().__init__()
        most = WIDTH // 2
        size = {
            "modes": modes,
            "allocated": modes if pruned else most,
            "used": modes if pruned else modes + BUFFER,
        }
        self.fc1 = LowRank(WIDTH, 4 * WIDTH, **size)
        self.fc2 = LowRank(4 * WIDTH, WIDTH, **size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def authors_model(*, pruned: bool) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        scale_attn_by_inverse_layer_idx=True, initializer_range=0.3,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for index, block in enumerate(model.transformer.h):
        block.mlp = MLP(3 + index, pruned=pruned)
        for norm in (block.ln_1, block.ln_2):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        nn.init.normal_(block.attn.c_attn.bias, 0.0, 0.2)
    return model


def save(model: GPT2LMHeadModel, path: Path, **more) -> Path:
    """As Lightning has it: ``model`` is a part of the module that trains it; attention masks are stored."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(LAYERS):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.uint8).tril().view(1, 1, LENGTH, LENGTH)
        state[f"model.transformer.h.{layer}.attn.bias"] = mask
        state[f"model.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save({"state_dict": state, "global_step": 130, "epoch": 0, "lr_schedulers": [], **more}, path)
    return path


def described(tmp_path: Path, **changes) -> Options:
    sizes = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "seq_length": LENGTH}
    (tmp_path / "model.yaml").write_text(to_yaml(from_flat({**sizes, "train_iters": 1, **changes})))
    return Options(model_config=tmp_path / "model.yaml")


def own_logits(rank: int, world_size: int, path: str, options: Options, tokens: Tensor) -> Tensor:
    return gpt_forward(reference.open_weights(Path(path), options))(tokens)


@pytest.mark.parametrize("pruned", [False, True], ids=["first stage", "pruned"])
def test_logits_match_the_authors_modules(tmp_path, pruned):
    model = authors_model(pruned=pruned)
    path = save(model, tmp_path / "last.ckpt")
    options = described(tmp_path, buffer=BUFFER)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(reference.forward(path, options)(tokens), expected, rtol=0, atol=2e-5)
    [found] = run_ranks(own_logits, 1, str(path), options, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.5

    weights = reference.open_weights(path, options)
    specs = weights.factors
    assert weights.step == 130 and not any(spec.frozen_base for spec in specs.values())
    for layer in range(LAYERS):
        spec = specs[f"decoder.layers.{layer}.mlp.linear_fc2"]
        assert spec.rank == 3 + layer and spec.active_columns == spec.rank + (0 if pruned else BUFFER)
        assert spec.final == pruned
    fc1 = model.transformer.h[1].mlp.fc1
    used = fc1.used
    assert torch.equal(weights.read("decoder.layers.1.mlp.linear_fc1.U"), fc1.B[:, :used])
    assert torch.equal(weights.read("decoder.layers.1.mlp.linear_fc1.V"), fc1.A[:used])


def test_inspection_reads_ranks(tmp_path, capsys):
    model = authors_model(pruned=False)
    path, options = save(model, tmp_path / "last.ckpt"), described(tmp_path, buffer=BUFFER)
    assert main([str(path), "--json", "--model-config", str(options.model_config)]) == 0
    found = inspect(path, options)
    assert capsys.readouterr().out == to_json(found) + "\n"
    assert (found.format, found.step, len(found.layers)) == ("reference", 130, 2 * LAYERS)
    for index, row in enumerate(found.layers):
        mlp = model.transformer.h[index // 2].mlp
        linear = mlp.fc2 if index % 2 else mlp.fc1
        assert (row.rank, row.columns) == (3 + index // 2, linear.used)
        product = linear.B[:, : linear.used] @ linear.A[: linear.used]
        expected = torch.linalg.svdvals(product.detach().double())[: linear.used]
        torch.testing.assert_close(torch.tensor(row.singular_values).double(), expected, rtol=1e-5, atol=1e-6)


def test_buffer_is_read_from_the_saved_configuration(tmp_path, monkeypatch):
    """Hydra's configurations are objects of omegaconf, which need not be installed to be read."""
    make = _omegaconf(monkeypatch)
    linear = make(
        "dictconfig", "DictConfig", _content={"buffer_modes": make("nodes", "AnyNode", _val=BUFFER)}
    )
    inner = {"mlp_cfg": make("dictconfig", "DictConfig", _content={"linear1_cfg": linear})}
    config = make(
        "dictconfig", "DictConfig", _content={"model": make("dictconfig", "DictConfig", _content=inner)}
    )
    path = save(
        authors_model(pruned=False), tmp_path / "x.ckpt", hyper_parameters=config, hparams_type=type(config)
    )
    monkeypatch.undo()
    weights = reference.open_weights(path, described(tmp_path))
    assert weights.factors["decoder.layers.0.mlp.linear_fc1"].active_columns == 3 + BUFFER


def _omegaconf(monkeypatch):
    def make(module: str, name: str, **state):
        full = f"omegaconf.{module}"
        if full not in sys.modules:
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
            monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
        if not hasattr(sys.modules[full], name):
            setattr(sys.modules[full], name, type(name, (), {"__module__": full}))
        made = getattr(sys.modules[full], name)()
        made.__dict__.update(state)
        return made

    return make


def test_conversion_gives_a_trainable_run(tmp_path):
    path = save(authors_model(pruned=True), tmp_path / "pruned.ckpt")
    described(tmp_path)
    command = [str(path), str(tmp_path / "run"), "--format", "run"]
    status, _, stderr = _convert(*command, "--model-config", str(tmp_path / "absent.yaml"))
    assert status == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1
    status, stdout, stderr = _convert(*command, "--model-config", str(tmp_path / "model.yaml"))
    assert status == 0, stderr
    assert "same model as" in stdout and "4 heads" in stderr
    weights = run.open_weights(tmp_path / "run", Options())
    assert {spec.rank for spec in weights.factors.values()} == {3, 4, 5}


def _convert(*arguments: str) -> tuple[int, str, str]:
    done = run_forked(ROOT / "tools" / "convert_checkpoint.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_missing_settings_are_asked_for(tmp_path):
    path = save(authors_model(pruned=False), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"a first stage.*give --model-config FILE with `buffer: N`"):
        reference.open_weights(path, Options())
    dense = tmp_path / "dense.ckpt"
    torch.save({"state_dict": {"model.transformer.wte.weight": torch.ones(3, 4)}}, dense)
    with pytest.raises(UserError, match="no factors A and B"):
        reference.open_weights(dense, Options())
    pruned = save(authors_model(pruned=True), tmp_path / "pruned.ckpt")
    [note] = reference.open_weights(pruned, Options()).notes
    assert "1 heads" in note and "divided by i + 1" in note
