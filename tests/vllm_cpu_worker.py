"""What vLLM makes of a checkpoint. Arguments: the checkpoint, ids with commas, a file to write."""

import sys

import numpy as np


def main():
    from safetensors.numpy import save_file
    from vllm import LLM, SamplingParams, TokensPrompt

    from nexus_ds.serving.vllm_plugin import register

    # vLLM does so by itself where the package is installed
    register()

    directory, words, out = sys.argv[1:]
    ids = [int(word) for word in words.split(",")]
    model = LLM(
        model=directory,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        # of all tokens
        max_logprobs=-1,
        gpu_memory_utilization=0.05,
    )
    all_of_them = SamplingParams(max_tokens=1, prompt_logprobs=-1, temperature=0)
    [answer] = model.generate([TokensPrompt(prompt_token_ids=ids)], all_of_them)
    rows = []
    for row in answer.prompt_logprobs[1:]:
        values = np.empty(len(row), np.float32)
        for token, said in row.items():
            values[token] = said.logprob
        rows.append(values)
    save_file({"log_probs": np.stack(rows)}, out)


if __name__ == "__main__":
    main()
