"""Text from a model, by transformers' ``generate`` with its cache of keys and values."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inrank_megatron.data.tokenizer import Tokenizer
from inrank_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DEFAULT_NEW_TOKENS = 128
# The likeliest text of a small or little-trained model repeats itself, or is line ends alone.
DEFAULT_SAMPLING = {"temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True)
class Sampling:
    """``options``: of transformers' sampling (``temperature``, ``top_k``, ``top_p``).

    ``do_sample`` False: the likeliest token each time, and ``options`` is empty.
    """

    do_sample: bool = True
    seed: int = 0
    sequences: int = 1
    options: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SAMPLING))


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt, after those that a document begins with. Where those are none, an empty prompt is
    what precedes a document: the end of another.
    """
    return tokenizer.before + tokenizer.encode(text) or [tokenizer.eod]


def new_tokens(asked: int | None, *, prompt: int, positions: int) -> int:
    """How many tokens to make after ``prompt`` tokens; None asks for as many as fit, at most 128.

    Raises:
        UserError: the model has no positions left for text, or too few.
    """
    room = positions - prompt
    if room < 1:
        raise UserError(
            f"the prompt has {prompt} tokens and the model {positions} positions, which leaves no room for "
            "text; shorten the prompt"
        )
    if asked is not None and asked > room:
        raise UserError(
            f"max_new_tokens = {asked}: after a prompt of {prompt} tokens the model's {positions} positions "
            f"have room for {room}; lower --max-new-tokens or shorten the prompt"
        )
    return min(room, DEFAULT_NEW_TOKENS) if asked is None else asked


def continuations(
    model: "PreTrainedModel",
    ids: list[int],
    *,
    tokens: int,
    eod: int,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The ids that follow ``ids``, up to ``tokens`` or to the end of the document, which is left out; only
    those below ``vocab_size``, as the rows that pad a model's vocabulary are not tokens.

    Raises:
        UserError: the model's predictions are not numbers.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    model.generation_config = GenerationConfig()  # the hub's may punish repetition or search with beams
    torch.manual_seed(sampling.seed)
    numbers = _Numbers()
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=sampling.do_sample,
            num_return_sequences=sampling.sequences,
            eos_token_id=eod,
            pad_token_id=eod,
            use_cache=True,
            logits_processor=LogitsProcessorList([numbers, _below(vocab_size)]),
            **sampling.options,
        )
        numbers.check()
        rows = found[:, len(ids) :].cpu().tolist()
    return [_before(eod, row) for row in rows]


class _Numbers:
    """The scores, and 0 in place of NaN and infinity: the likeliest of these would be an arbitrary token.

    The first token's are looked at when they come; those of the others by :meth:`check`, at the end, as each
    look makes a GPU wait.
    """

    def __init__(self) -> None:
        self._missing: Tensor | None = None

    def __call__(self, ids: "Tensor", scores: "Tensor") -> "Tensor":
        missing = ~(scores < float("inf"))
        if self._missing is None:
            self._missing = missing.any()
            self.check()
        else:
            self._missing = self._missing | missing.any()
        return scores.masked_fill(missing, 0.0)

    def check(self) -> None:
        """Raise UserError if a score was not a number."""
        if self._missing is not None and bool(self._missing):
            raise UserError(
                "the model's predictions are not numbers (NaN or infinity), as its weights are not; "
                "name another model"
            )


def _below(vocab_size: int | None):
    """The scores of ids from ``vocab_size`` on become those of what cannot be."""

    def masked(ids, scores):
        if vocab_size is not None:
            scores[:, vocab_size:] = float("-inf")
        return scores

    return masked


def _before(eod: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eod)] if eod in ids else ids
