"""InRank-Megatron: incremental low-rank pre-training of language models at scale."""

__version__ = "0.1.0"
