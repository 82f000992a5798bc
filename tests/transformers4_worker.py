"""What stock transformers, of whatever version runs this, makes of checkpoints.

Arguments: a file of safetensors to write, a file of JSON to write, and the checkpoints."""

import json
import sys
from pathlib import Path

TEXTS = ("tree leaf  sum proof.", "ship<|endoftext|>wind", "<law> a  fern")
PROMPT, MORE = 20, 12
LENGTH = 48


def tokens():
    """Return a text of LENGTH ids below 29."""
    import torch

    return (torch.arange(LENGTH) * 7 % 29)[None]


def log_probs(directory):
    """Return log-probabilities: [T, V] of the text at once, [M, V] that greedy generation with a
    cache saw; and the error of the latter."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    model.eval()
    words = dict(max_new_tokens=MORE, do_sample=False, eos_token_id=None)
    words |= dict(output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        found = {"whole": model(tokens(), use_cache=False).logits[0].log_softmax(-1)}
        try:
            answer = model.generate(tokens()[:, :PROMPT], **words)
        except ValueError as error:
            return found, str(error)
    return found | {"generated": torch.cat(answer.logits).log_softmax(-1)}, None


def words(directory):
    """Return ids, texts and inputs of a tokenizer, and what a pipeline says with it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each) for each in ids],
        "inputs": list(tokenizer(TEXTS[0])),
        "padding": tokenizer.padding_side,
        "special": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
    }


def answers(directories):
    """Return tensors by name, and what else there is to say: errors, ids."""
    found, said = {}, {}
    for directory in map(Path, directories):
        try:
            if (directory / "config.json").is_file():
                tensors, error = log_probs(directory)
                found |= {f"{directory.name} {name}": tensor for name, tensor in tensors.items()}
                said[f"{directory.name} generated"] = error
            said[directory.name] = words(directory)
        # of whatever type: that it refuses is the answer
        except Exception as error:
            said[directory.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found, said


def main():
    from safetensors.torch import save_file

    found, said = answers(sys.argv[3:])
    save_file(found, sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
