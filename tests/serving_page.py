"""Write docs/serving.md out of the table of programs that `nexus-ds export` goes by:
`PYTHONPATH=. python tests/serving_page.py`. tests/test_serving_page.py holds the page to this, and
runs its commands.
"""

import re
from pathlib import Path

from family_page import pinned, table

from nexus_ds.serving.targets import TARGETS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
MODEL = "moe/extended"
SEEN = {
    "run": "run: compared with transformers 5",
    "read": "read: its loader and model were",
}


def facts(rules):
    """Return rules or notes as one cell."""
    return "; ".join(f"{rule.what}: it {rule.why}" for rule in rules) or "none"


def forms(target):
    """Return the forms that a program takes."""
    return ", ".join(f"`{form}`" for form in target.forms)


def stock():
    """Return the row of what needs no export."""
    version = pinned("requirements.txt", "transformers")
    works = "every form; `nexus_*` after `import nexus_ds.hf`"
    return ["transformers 5", version, "run: by every test", works, "as it is", "none", "none"]


def row(target):
    """Return a program's row."""
    return [
        target.program,
        target.version,
        SEEN[target.seen],
        forms(target),
        f"`--for {target.name}`: {target.writes}",
        facts(target.rules),
        facts(target.notes),
    ]


def commands(target):
    """Return what to type for a program: the export, and what starts it."""
    out = f"served/{target.name}"
    export = f"nexus-ds export --checkpoint {MODEL} --for {target.name} --out {out}"
    started = re.sub(r"\bDIR\b", out, target.command)
    if target.command.startswith("Auto"):
        # of Python, in an environment that has that version
        started = f'python -c "from transformers import AutoModelForCausalLM; {started}"'
    return f"```bash\n{export}\n{started}\n```"


def page():
    """Return docs/serving.md."""
    targets = list(TARGETS.values())
    header = ["program", "version", "looked at", "forms", "export", "refused", "to know"]
    blocks = []
    for target in targets:
        blocks.append(f"**{target.program}** {target.version}\n\n{commands(target)}")
    typed = "\n\n".join(blocks)
    return f"""# Serving a mixture

Made by `tests/serving_page.py` out of `nexus_ds/serving/targets.py`, the table by which
`nexus-ds export` writes and refuses; don't edit it here.

A finished checkpoint is a directory that transformers 5 loads as it is. Other programs want
something beside it, or compute something else in silence: `nexus-ds export` writes what a program
reads, reads it again, and refuses by name what that version gets wrong. Which form a family's
mixture has says [another page](families.md); how to train it elsewhere and bring it back,
[one more](finetuning.md).

## Which program takes what

{table(header, [stock(), *map(row, targets)])}

## transformers 5

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{MODEL}")
tokenizer = AutoTokenizer.from_pretrained("{MODEL}")
tokens = tokenizer("The first thing", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))
```

## The others

{typed}

## Routers that read a running mean

With `router.input=context` a router reads the mean of all that its layer has read so far (form
`nexus_moe`). In vLLM it is an attention whose queries are zeros: all its logits are equal, so it
averages what stands in its cache. Prompts in pieces, batches, shared prefixes and windows of the
layer's own attention are right by that.

* In fp32 all 200 greedy tokens of ten prompts, of 1 to 200 tokens in one batch, were those of
  transformers, with windows too; log-probabilities differed by 1.2e-4 at most. So were 60 of 60 on
  two ranks (`--tensor-parallel-size 2`). `make test-serving` holds the first of these.
* It needs nexus_ds beside vLLM. The cache grows by two vectors of the hidden size a token and
  layer: five times as large as that of a model with four queries a key.
* No stock form was found. Calls of routers were searched for in vLLM 0.32.0 (40 files with experts)
  and transformers 5.23 (77): each reads its own token. Zaya's reads besides what the router of the
  layer before gave, some of DeepSeek-V4's the token's number. llama.cpp, SGLang and Ollama were not
  looked through; the export refuses it there.
* Queries of zeros would fit into stock attention. But what that adds to the hidden state comes to
  the router under one RMS norm with all else, and no stock router subtracts a mean: the rows would
  score another vector.

## Without any of them

`nexus-ds generate` runs any checkpoint, dense or a mixture, also one that is larger than memory:

```bash
nexus-ds generate --checkpoint {MODEL} "The first thing"
nexus-ds generate --checkpoint {MODEL} "The first thing" --temperature 0.8 --top-p 0.9 --seed 1
nexus-ds generate --checkpoint {MODEL} "The first thing" --show-routing --html routing.html
nexus-ds generate --checkpoint {MODEL} --prompts prompts.jsonl --batch 16 --json
nexus-ds generate --checkpoint {MODEL} --chat "What is a mixture of experts?"
```

* Text comes token by token. `--show-routing` gives each token the colour of its expert; in a file,
  or with `NO_COLOR` set, its mark. A token has an expert in every layer: shown is the one that most
  layers chose first, with `--layer` that of one layer. The page of `--html` has all of them.
* `--prompts` takes a prompt a line, or JSON lines with `prompt` or `messages`. A prompt's text is
  the same in any batch; its draws have the seed of `--seed` plus its number, from 0.
* A prompt begins as a document did in training; `--no-bos` is for models trained with
  `data.bos=false`.
* `--chat` and `messages` need a tokenizer with a chat template.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
