"""What vLLM makes of prompts. Arguments: the checkpoint, what is asked as JSON, a file to write.

Asked is {"prompts": [ids, ..], "new": tokens to add, "engine": settings of it}."""

import json
import sys

import numpy as np

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    # of all tokens
    "max_logprobs": -1,
    "gpu_memory_utilization": 0.05,
}


def row(said):
    """Return the log-probabilities [V] that vLLM says of one token."""
    values = np.empty(len(said), np.float32)
    for token, one in said.items():
        values[token] = one.logprob
    return values


def main():
    from safetensors.numpy import save_file
    from vllm import LLM, SamplingParams, TokensPrompt

    from nexus_ds.serving.vllm_plugin import register

    # vLLM does so by itself where the package is installed
    register()

    directory, words, out = sys.argv[1:]
    asked = json.loads(words)
    model = LLM(model=directory, **ENGINE | asked["engine"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
    greedy = {"max_tokens": asked["new"], "temperature": 0, "ignore_eos": True}
    scored = SamplingParams(**greedy, logprobs=-1, prompt_logprobs=-1)
    found = {}
    for number, answer in enumerate(model.generate(prompts, scored)):
        [added] = answer.outputs
        rows = [*answer.prompt_logprobs[1:], *added.logprobs]
        found[f"log_probs.{number}"] = np.stack([row(said) for said in rows])
        found[f"added.{number}"] = np.array(added.token_ids)
    # what is asked for scores is never taken from a cache
    for number, answer in enumerate(model.generate(prompts, SamplingParams(**greedy))):
        [added] = answer.outputs
        found[f"added_again.{number}"] = np.array(added.token_ids)
        found[f"cached.{number}"] = np.array(answer.num_cached_tokens)
    save_file(found, out)


if __name__ == "__main__":
    main()
