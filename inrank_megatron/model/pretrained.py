"""Weights of a dense model, read from a checkpoint by the names of the model that starts from them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.config.shapes import QKVLayout
from inrank_megatron.errors import UserError
from inrank_megatron.model.initialise import QKV_LINEAR
from inrank_megatron.model.separate_qkv import rows_of
from inrank_megatron.model.vocabulary import OF_THE_VOCABULARY, FullTensors, WithoutSpareRows


class PretrainedWeights:
    """The FP32 master weights of a checkpoint without factors; its moments are left alone.

    A model whose query, key and value are separate linears takes the rows of a fused one, and one with a
    smaller vocabulary leaves the rows that pad the other's.

    Args:
        layout: of a fused QKV of both models.
        tokenizer: the folder with the one that the weights were trained with, if there is one.
    """

    def __init__(self, checkpoint: FullTensors, *, layout: QKVLayout, tokenizer: Path | None):
        self._checkpoint, self._layout, self.tokenizer = checkpoint, layout, tokenizer
        names = checkpoint.names
        # A moment's name is that of its parameter with one word more.
        self._weights = frozenset(name for name in names if name.rpartition(".")[0] not in names)

    @property
    def folder(self) -> Path:
        """The checkpoint's."""
        return self._checkpoint.folder

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as the checkpoint has it."""
        return self._checkpoint.shape(name)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The full tensor of the parameter ``name``, FP32; :meth:`account` has compared its ``shape``."""
        source, part = self._source(name)
        [(_, tensor)] = self._checkpoint.tensors([source])
        return tensor if part is None else rows_of(tensor, part, layout=self._layout)

    def account(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor of the checkpoint has its place in the model, and the model lacks none.

        Args:
            expected: full shape of every parameter that the dense model of the run has, by name; without
                the rows that pad a vocabulary.

        Raises:
            UserError: it names the first tensors that differ, with both shapes.
        """
        for name in OF_THE_VOCABULARY[:1]:
            if name in expected:
                self._checkpoint = WithoutSpareRows(self._checkpoint, vocab_size=expected[name][0])
        here: dict[str, tuple[int, ...]] = {}
        for name, shape in expected.items():
            source, part = self._source(name)
            here[source] = shape if part is None else (self._layout.total, *shape[1:])
        there = {name: self._checkpoint.shape(name) for name in self._weights}
        if differing := differences(there, here):
            raise UserError(
                f"pretrained_checkpoint {self._checkpoint.folder}: tensors that differ from those of this "
                f"run's model: {differing}; give that run's model settings and tokenizer, or name another run"
            )

    def _source(self, name: str) -> tuple[str, str | None]:
        """The name in the checkpoint and, where the fused tensor stands for it, which part it is."""
        linear, _, leaf = name.rpartition(".")
        parent, _, part = linear.rpartition(".")
        if name not in self._weights and parent.endswith(QKV_LINEAR) and f"{parent}.{leaf}" in self._weights:
            return f"{parent}.{leaf}", part
        return name, None
