"""The checkpoint, or the model of another program, whose weights a new run starts from."""

from pathlib import Path

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.locate import CONFIG, TOKENIZER, locate
from inrank_megatron.config.folders import named_path
from inrank_megatron.config.loading import load
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import qkv_layout
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.interop.hub import local_notes
from inrank_megatron.interop.start import StartTensors, is_other_program, start_weights
from inrank_megatron.model.pretrained import PretrainedWeights
from inrank_megatron.model.vocabulary import Shapes, spare_rows

# What changes the function of the same weights and leaves every shape as it is.
SAME = (
    "model_type", "num_attention_heads", "query_groups", "head_size", "norm_epsilon", "openai_gelu",
    "rotary_base", "rope_scaling_factor",
)  # fmt: skip


def choose_pretrained(config: Config) -> tuple[Path, list[str]]:
    """The folder that ``pretrained_checkpoint`` means, a run's checkpoint, which is verified, or a model of
    another program, and messages for the user. Called on one rank.

    Raises:
        UserError: there is none, it is damaged, it holds factors, or its model is another one.
    """
    name = config.training.pretrained_checkpoint
    assert name is not None, "callers have asked"
    try:
        return (_choose_other if is_other_program(name) else _choose_run)(name, config)
    except UserError as error:
        raise UserError(f"pretrained_checkpoint: {error}") from None


def _choose_run(name: str, config: Config) -> tuple[Path, list[str]]:
    run, checkpoint, faults = locate(named_path(name))
    source, folder = load(run / CONFIG), checkpoint.folder
    if factors := checkpoint.state["engine"]["factors"]:
        raise UserError(
            f"{folder}: holds factors U, V of {len(factors)} linears (method {source.training.method}), and "
            "a new run needs dense weights; name a run of method dense"
        )
    _check_same(folder, source, config)
    notes = [f"skipped a broken checkpoint: {fault}" for fault in faults]
    step = checkpoint.state["step"]
    return folder, [
        *notes,
        f"starts from the weights of {folder}, step {step} of method {source.training.method}",
    ]


def _choose_other(name: str, config: Config) -> tuple[Path, list[str]]:
    weights = start_weights(name, config.training.pretrained_revision)
    folder, revision = Path(weights.origin), config.training.pretrained_revision
    _check_same(folder, weights.config, config)
    of = f" of {name}, revision {revision}" if revision else ""
    return folder, [*weights.notes, *local_notes(name), f"starts from the weights of {folder}{of}"]


def _check_same(folder: Path, source: Config, config: Config) -> None:
    different = [
        f"{name} {there!r} there, {here!r} here"
        for name in SAME
        if (there := getattr(source.model, name)) != (here := getattr(config.model, name))
    ]
    if different:
        raise UserError(
            f"{folder}: another model ({'; '.join(different)}), in which its weights would mean something "
            "else; give that model's settings, or name another one"
        )


def check_tokenizer(weights: Shapes, tokenizer: Tokenizer, *, own: Path | None) -> list[str]:
    """The run's tokens mean what they meant to the weights of a checkpoint, from which it starts or goes on.

    Args:
        own: the folder with the tokenizer of the weights. Runs from before they kept it are not compared.

    Returns:
        Messages for the user.

    Raises:
        UserError: the tokenizers differ, or the weights lack rows for some tokens.
    """
    folder = weights.folder
    if own is not None and own.is_dir() and not _is_same(tokenizer, own):
        raise UserError(
            f"{folder}: was trained with another tokenizer, so its token ids mean other words; give "
            f"--tokenizer {own}, or, if it was made from the text, restore that"
        )
    spare = spare_rows(weights, vocab_size=tokenizer.vocab_size)
    return [f"left out {spare} rows of the embedding, which pad its vocabulary"] if spare else []


def _is_same(tokenizer: Tokenizer, own: Path) -> bool:
    """Whether the tokenizer in the folder ``own`` gives its ids, be special tokens parsed or not."""
    identities = (load_tokenizer(str(own), parse_special_tokens=parses).identity for parses in (False, True))
    return tokenizer.identity in identities


def tokenizer_of(folder: Path) -> Path:
    """Where the run of a checkpoint's ``folder`` keeps its tokenizer."""
    return folder.resolve().parent.parent / TOKENIZER


def read_pretrained(folder: Path, config: Config) -> PretrainedWeights:
    """The weights of a folder from :func:`choose_pretrained`. Called on every rank, whose host may have a
    copy of its own of a model of the hub.
    """
    name, revision = config.training.pretrained_checkpoint, config.training.pretrained_revision
    assert name is not None, "callers have asked"
    layout = qkv_layout(config)
    try:
        if is_other_program(name):
            other = start_weights(name, revision)
            return PretrainedWeights(StartTensors(other), layout=layout, tokenizer=other.tokenizer)
        checkpoint = Checkpoint(folder, verify=False)
    except (OSError, UserError) as error:
        raise UserError(
            f"pretrained_checkpoint {folder}: cannot be read on every rank ({error}); put it where "
            "all nodes see it"
        ) from None
    return PretrainedWeights(checkpoint, layout=layout, tokenizer=tokenizer_of(folder))
