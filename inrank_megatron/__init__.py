"""InRank-Megatron: incremental low-rank pre-training of language models at scale."""

from inrank_megatron.interop.huggingface.registration import register_when_imported

__version__ = "0.2.0"

register_when_imported()
