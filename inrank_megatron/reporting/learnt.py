"""Whether a run has learnt anything, in words for somebody who sees its figures for the first time."""

import textwrap

from inrank_megatron.reporting.recorded import recorded_dense
from inrank_megatron.reporting.run import Run
from inrank_megatron.reporting.tables import number, share


def tells_of_words(word_perplexity: float | None, vocab_size: int | None) -> bool:
    """Whether word-level perplexity says something: a word is then easier to guess than a token by chance.

    It is a convention of WikiText, whose text is split into words. On other text, or of a young model, it is
    a number of thousands or millions that compares with nothing.
    """
    return word_perplexity is not None and vocab_size is not None and word_perplexity < vocab_size


def verdict(run: Run) -> str:
    """``it has learnt: ...``, or what there is to say instead; empty before the first evaluation."""
    record = run.last_evaluation("valid")
    if record is None or record.get("perplexity") is None:
        return ""
    perplexity, scale = record["perplexity"], yardsticks(run)
    begins = {None: "", True: "it has learnt: ", False: "it has learnt little yet: "}[has_learnt(run)]
    return f"{begins}validation perplexity {number(perplexity)}" + (f" ({scale})" if scale else "")


def has_learnt(run: Run) -> bool | None:
    """Whether it predicts better than the frequencies of tokens do; None where one of them is not known."""
    record, unigram = run.last_evaluation("valid"), (run.summary.get("unigram_perplexity") or {}).get("valid")
    if record is None or record.get("perplexity") is None or unigram is None:
        return None
    return record["perplexity"] < unigram


def yardsticks(run: Run) -> str:
    """What perplexity is without a model: ``unigram 749, uniform 4,096``."""
    known = {
        "unigram": (run.summary.get("unigram_perplexity") or {}).get("valid"),
        "uniform": run.summary.get("vocab_size"),
    }
    return ", ".join(f"{name} {number(value)}" for name, value in known.items() if value is not None)


def size(run: Run) -> str:
    """``62% of the dense model's parameters, mean rank 12.1``; empty for a dense run."""
    parts = []
    if run.ranks:
        if part := share(run.last_cost("parameters"), (run.summary.get("parameters") or {}).get("dense")):
            parts.append(f"{part.split()[0]} of the dense model's parameters")
        ranks = [records[-1]["rank"] for records in run.ranks_by_layer().values()]
        parts.append(f"mean rank {sum(ranks) / len(ranks):.1f}")
    return ", ".join(parts)


def beside_dense(run: Run) -> str:
    """``a recorded dense run of the same settings ended at ...``; empty if there is none."""
    record = recorded_dense(run)
    if record is None:
        return ""
    reached = number(record["perplexity"]["valid"])
    return f"a recorded dense run of the same settings ended at validation perplexity {reached}"


def sample_lines(run: Run, *, width: int) -> list[str]:
    """What the model was given, and on further lines what it wrote, line ends as spaces."""
    if not run.sample:
        return []
    prompt, text = (" ".join(str(run.sample.get(name, "")).split()) for name in ("prompt", "text"))
    given = textwrap.shorten(prompt[::-1], width - 20, placeholder="...")[::-1]
    return [f' after "{given}":', *textwrap.wrap(text or "(nothing)", width)]
