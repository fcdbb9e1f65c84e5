"""The vocabulary that a plan counts with: no plan downloads a tokenizer."""

from inrank_megatron.config.folders import named_path
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.errors import UserError

# Largest token id plus 1, by the last part of the hub's name.
KNOWN = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"), 50257),
    **dict.fromkeys(("t5-small", "t5-base", "t5-large"), 32100),
    **dict.fromkeys(("Llama-2-7b-hf", "Llama-2-13b-hf", "Mistral-7B-v0.1", "TinyLlama_v1.1"), 32000),
    **dict.fromkeys(("Meta-Llama-3-8B", "Llama-3.2-1B", "Llama-3.1-8B"), 128256),
    "gpt-neox-20b": 50277,
}


def planned_vocabulary(data: DataConfig) -> tuple[int | None, str]:
    """Tokens without padding, None where the run's own ``vocab_size`` decides, and where the number is from.

    Raises:
        UserError: a folder that holds no tokenizer.
    """
    name = data.tokenizer
    if name is None:
        return None, "vocab_size, of a tokenizer to be trained"
    # Imported here: the command line is checked before anything heavy is imported.
    from huggingface_hub import snapshot_download

    from inrank_megatron.data.tokenizer import FILES, load_tokenizer

    if named_path(name).is_dir() or name.startswith((".", "/", "~")):
        return load_tokenizer(name).vocab_size, f"tokenizer {name}"
    if (known := KNOWN.get(name.rpartition("/")[2])) is not None:
        return known, f"tokenizer {name}"
    try:
        folder = snapshot_download(name, allow_patterns=list(FILES), local_files_only=True)
        return load_tokenizer(folder).vocab_size, f"tokenizer {name}"
    except (OSError, ValueError, RuntimeError, UserError):
        return None, f"vocab_size, as tokenizer {name} is not on this machine"
