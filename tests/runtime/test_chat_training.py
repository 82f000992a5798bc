"""Training on chats in real ranks: the mean over the answers of a whole batch, however it is cut,
beside plain PyTorch."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DOMAINS, WORDS, make_nexus, sentences
from launch import finish, start_ranks
from safetensors.torch import load_file
from test_chat_scores import TEMPLATE
from test_train import settings
from transformers import AutoModelForCausalLM

from nexus_ds.config import load_config
from nexus_ds.data.corpora import open_source
from nexus_ds.data.mixture import Sampler, domain_weights
from nexus_ds.data.preparation import tokenised
from nexus_ds.errors import DataError
from nexus_ds.runtime.loop import read_data

TRAIN = Path(__file__).parents[2] / "nexus_ds" / "train.py"
STEPS, BATCH, LENGTH = 3, 8, 16


def questions(domain, seed):
    """Return chats whose answers are of very different lengths: a mean over passes would show."""
    lines = [text.split(". ") for text in sentences(domain, 40, seed)]
    for number, parts in enumerate(lines):
        turns = parts[:2] if number % 3 else parts[:6]
        yield [
            {"role": ("user", "assistant")[turn % 2], "content": part}
            for turn, part in enumerate(turns)
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir):
    """A mixture, a dense model and chats of three domains, one of them plain text."""
    root = tmp_path_factory.mktemp("chats")
    shutil.copytree(dense_dir, root / "dense")
    make_nexus(root / "nexus")
    for model in ("dense", "nexus"):
        (root / model / "chat_template.jinja").write_text(TEMPLATE)
    for index, domain in enumerate(DOMAINS):
        (root / "text" / domain).mkdir(parents=True)
        for offset, split in enumerate(("train", "validation")):
            rows = [{"messages": chat} for chat in questions(domain, 10 * index + offset)]
            if domain == "gamma":
                rows = [{"text": text} for text in sentences(domain, 20, offset)]
            lines = [json.dumps(row) for row in rows]
            (root / "text" / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    assert "proof" in WORDS["beta"]
    return root


def words_for(root, model, out, *more):
    common = [
        "data.chat=true",
        f"data.cache={root / 'tokens'}",
        f"training.steps={STEPS}",
        f"training.batch_size={BATCH}",
        f"data.sequence_length={LENGTH}",
        "training.log_every=1",
        "training.weight_decay=0",
        "training.warmup=0",
        "training.schedule=constant",
        "router.load_balance=0",
    ]
    return settings(root / model, root / "text", out, *common, *more)


def trained(root, model, out, ranks, micro, *more, stage=2):
    (root / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    words = words_for(root, model, root / out, f"training.micro_batch_size={micro}", *more)
    ds = ["--deepspeed", root / "ds.json", "--config", "demo"]
    log = finish(start_ranks([TRAIN, *ds, *words], ranks))
    lines = (root / f"{out}.training" / "metrics.jsonl").read_text().splitlines()
    return log, [json.loads(line) for line in lines]


def reference(root):
    """Return loss and gradient norm of the first step of the dense model, in plain PyTorch."""
    config = load_config("demo", words_for(root, "dense", root / "unused"))
    data = config.data
    files = tokenised(data, open_source(data.path), data.domains, "train", root / "dense")
    weights = domain_weights(data, {name: file.tokens for name, file in files.items()})
    sampler = Sampler(files, weights, LENGTH, config.seed)
    marked = torch.stack([torch.from_numpy(sampler[i].tokens) for i in range(BATCH)])
    ids = torch.where(marked < 0, ~marked, marked)
    targets = torch.where(marked < 0, -100, marked)[:, 1:]
    model = AutoModelForCausalLM.from_pretrained(root / "dense").train()
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    counts = (targets >= 0).sum(1)
    assert counts.min() < counts.max(), "windows have as many answers: nothing would be shown"
    return float(loss.detach()), math.sqrt(squares)


def steps(records):
    return [record for record in records if record["kind"] == "train"]


def apart(root, start, first, second):
    """Return how far two models are apart, over how far the first went from its start."""
    files = [load_file(root / name / "model.safetensors") for name in (start, first, second)]
    start, a, b = (torch.cat([file[name].flatten() for name in files[1]]) for file in files)
    return float((a - b).norm() / (a - start).norm())


@pytest.mark.slow
def test_a_dense_model_learns_the_mean_over_all_answers_of_a_batch(made):
    log, whole = trained(made, "dense", "whole", 1, BATCH)
    assert "alpha: " in log and " training tokens are answers or text" in log
    _, cut = trained(made, "dense", "cut", 2, 2)
    loss, norm = reference(made)
    for records in (whole, cut):
        first = steps(records)[0]
        assert first["loss"] == pytest.approx(loss, rel=1e-5)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for a, b in zip(steps(whole), steps(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["domain_loss"] == pytest.approx(b["domain_loss"], rel=1e-5)
    assert apart(made, "dense", "whole", "cut") < 1e-3
    found = [record for record in whole if record["kind"] == "validation"]
    assert found[-1]["loss"]["alpha"] < found[0]["loss"]["alpha"]


@pytest.mark.slow
def test_a_mixture_learns_the_same_however_it_is_cut_and_resumed(made):
    trained(made, "nexus", "one", 1, BATCH)
    words = ("parallel.expert=2", "training.save_every=2")
    trained(made, "nexus", "two", 2, 2, *words, stage=3)
    assert apart(made, "nexus", "one", "two") < 1e-3
    shutil.copytree(made / "two", made / "straight")
    shutil.rmtree(made / "two")
    shutil.rmtree(made / "two.training" / "states" / f"step_{STEPS}")
    log, _ = trained(made, "nexus", "two", 2, 2, *words, stage=3)
    assert "resumed after step 2" in log and apart(made, "nexus", "straight", "two") == 0
    # what a reader takes for plain text does not go on with a run of chats
    words = (*words, "data.chat=false", "data.domains=[gamma]", "data.validation_domains=[gamma]")
    shutil.rmtree(made / "two")
    with pytest.raises(AssertionError, match="the training state at step 3 belongs to another"):
        trained(made, "nexus", "two", 2, 2, *words, stage=3)


@pytest.mark.slow
def test_the_commands_of_the_page_train_a_branch_and_a_mixture(made, tmp_path):
    shutil.copytree(made / "dense", tmp_path / "models" / "seed")
    shutil.copytree(made / "nexus", tmp_path / "moe" / "start")
    shutil.copytree(made / "text", tmp_path / "chats")
    shutil.copytree(made / "text" / "alpha", tmp_path / "chats" / "law")
    page = (TRAIN.parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", page, re.S)[1]
    short = ["training.tokens=0", "training.steps=2", "training.eval_windows=4", "model.dtype=fp32"]
    short += ["training.batch_size=2", f"data.sequence_length={LENGTH}", "pipeline.card=false"]
    short += ["training.backbone_lr_scale=0"]
    for line in block.splitlines():
        words = ["-m", "nexus_ds", *shlex.split(line)[1:], *short]
        assert "answers or text" in finish(start_ranks(words, 1, cwd=tmp_path))
    found = [
        json.loads((tmp_path / out / "config.json").read_text())
        for out in ("models/law", "moe/chat")
    ]
    assert [config["model_type"] for config in found] == ["llama", "qwen2_moe"]
    # in DeepSpeed's own groups, too, a rate of 0 leaves every bit of the backbone
    for start, out in (("models/seed", "models/law"), ("moe/start", "moe/chat")):
        before, after = (load_file(tmp_path / at / "model.safetensors") for at in (start, out))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all(".mlp." in name for name in moved), out
    # the template goes along, so that the branch can become an expert that talks
    assert (tmp_path / "models" / "law" / "chat_template.jinja").read_text() == TEMPLATE


def test_windows_without_an_answer_are_refused(made, alone, tmp_path):
    folder = shutil.copytree(made / "text", tmp_path / "text")
    chat = [{"role": "user", "content": "root " * 200}, {"role": "assistant", "content": "lemma"}]
    (folder / "alpha" / "validation.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    words = words_for(made, "nexus", tmp_path / "out", f"data.path={folder}")
    config = load_config("demo", words)
    with pytest.raises(DataError, match="alpha: no token of an answer in its 4 validation windows"):
        read_data(config, Path(config.model.tokenizer))
