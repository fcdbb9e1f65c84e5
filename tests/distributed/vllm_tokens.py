"""Greedy tokens by vLLM, with log-probabilities, as JSON: ``vllm_tokens.py EXPORT PROMPTS NEW_TOKENS``."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    small = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64, "enforce_eager": True}
    model = LLM(folder, trust_remote_code=True, dtype="float32", **small)
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)
    results = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    found = []
    for result in results:
        [output] = result.outputs
        tokens = list(output.token_ids)
        pairs = zip(tokens, output.logprobs, strict=True)
        found.append({"tokens": tokens, "logprobs": [given[token].logprob for token, given in pairs]})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
