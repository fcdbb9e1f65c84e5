"""A sample of what a run has learnt to write: its continuation of the first validation text."""

import json
from pathlib import Path

from inrank_megatron.data.token_file import TokenFile
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.evaluation.models import find_model
from inrank_megatron.generation.generate import Sampling, continuations, new_tokens, prompt_ids
from inrank_megatron.interop.core.options import Options
from inrank_megatron.reporting.files import SAMPLE, write_atomically

MOST_PARAMETERS = 150_000_000  # of which a CPU makes the text within seconds
PROMPT_TOKENS, NEW_TOKENS = 32, 64


def write_sample(run_dir: Path, valid: TokenFile | None, *, parameters: int) -> str | None:
    """Write ``sample.json``, from the checkpoint that ``tools/generate.py`` takes, on the CPU.

    Args:
        parameters: of the model.

    Returns:
        Why there is none, if there is none; it never raises, as the run is complete without.
    """
    if valid is None:
        return "no validation text to begin with"
    if parameters > MOST_PARAMETERS:
        return f"not made of more than {MOST_PARAMETERS / 1e6:.0f} M parameters"
    try:
        record = _sample(run_dir, valid)
        write_atomically(run_dir / SAMPLE, json.dumps(record, indent=1).encode())
    except Exception as error:
        return f"could not be made ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def _sample(run_dir: Path, valid: TokenFile) -> dict:
    model, sampling = find_model(str(run_dir), Options()), Sampling()
    tokenizer = load_tokenizer(model.tokenizer)
    prompt = _beginning(valid, tokenizer)
    ids = prompt_ids(prompt, tokenizer)
    room = new_tokens(None, prompt=len(ids), positions=model.positions)
    [row] = continuations(
        model.pretrained().eval(),
        ids,
        tokens=min(NEW_TOKENS, room),
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        sampling=sampling,
    )
    start = len(tokenizer.decode(ids))
    text = tokenizer.decode(ids + row)[start:]
    return {"step": model.step, "prompt": prompt, "text": text, "seed": sampling.seed, **sampling.options}


def _beginning(valid: TokenFile, tokenizer: Tokenizer) -> str:
    """The first words of the first validation document, complete ones."""
    ids = valid.tokens(0, min(PROMPT_TOKENS, valid.num_tokens)).tolist()
    if ids[: len(tokenizer.before)] == tokenizer.before:  # which `prompt_ids` puts there again
        ids = ids[len(tokenizer.before) :]
    if tokenizer.eod in ids:
        return tokenizer.decode(ids[: ids.index(tokenizer.eod)])
    text = tokenizer.decode(ids)
    words = text.rstrip().rsplit(maxsplit=1)
    return words[0] if len(words) == 2 and text == text.rstrip() else text.rstrip()
