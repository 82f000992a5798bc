"""The README as a user reads it: its blocks run in order on tiny models of a user's own, its words
are looked up."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences
from launch import clean_environment
from safetensors.torch import load_file, save_file

from nexus_ds.__main__ import VERBS, build_parser, main
from nexus_ds.checkpoint.cards import read_card
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.config import get_key, load_config, read_recipe
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.settings import Config

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
TINY = [
    "data.sequence_length=16",
    "training.tokens=0",
    "training.steps=4",
    "training.batch_size=2",
    "training.eval_windows=2",
    "training.save_every=2",
    "training.lr=1e-3",
]
WORDS = {
    "law": "court judge claim appeal clause statute party ruling",
    "code": "loop array index stack branch merge pointer cache",
    "medicine": "heart blood nerve fever dose virus tissue organ",
}
# of an instruct-like branch
CHAT = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
KINDS = [
    ("Llama", True, torch.float32),
    ("Mistral", False, torch.bfloat16),
    ("Qwen2", True, torch.bfloat16),
]
COMMANDS = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]
[STOCK] = re.findall(r"```python\n(.*?)```", README, re.S)
BRANCH, OWN = ([c for c in lines if not c.startswith("source ")] for lines in COMMANDS[1:])
INLINE = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", README)]

pytestmark = pytest.mark.timeout(1800)  # of the whole block, on a busy machine


def new_seed(family, tied, dtype, out):
    """Save a random model of a family with a byte-level tokenizer: 2 layers, hidden 16."""
    import transformers

    train_tokenizer(
        (text for domain in WORDS for text in sentences(domain, 20, 0, WORDS)), 320, out
    )
    vocabulary = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).save_pretrained(out)


def new_branch(seed, out, number):
    """Save a model that has moved away from the seed, as training would do it."""
    shutil.copytree(seed, out)
    generator = torch.Generator().manual_seed(number)
    tensors = load_file(out / "model.safetensors")
    moved = {
        name: t + 0.02 * torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in tensors.items()
    }
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})


def new_text(root):
    """Write <domain>/{train,validation}.jsonl for each domain."""
    for index, domain in enumerate(WORDS):
        (root / domain).mkdir(parents=True)
        for split, count in (("train", 60), ("validation", 30)):
            lines = [json.dumps({"text": text}) for text in sentences(domain, count, index, WORDS)]
            (root / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def typed(command):
    """Run a command of the README as it stands, training cut short; return what it printed."""
    words = shlex.split(command)
    if words[0] == "nexus-ds":  # in this process, which has the libraries
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(words[1:]) == 0, command
        return said.getvalue()
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:], *TINY],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def check_next(printed):
    """Assert that a next command was printed, and that it could be typed here."""
    commands = re.findall(r"^(?:\S+ )?next: (.*)$", printed, re.M)
    assert commands
    for words in map(shlex.split, commands):
        if words[0] == "nexus-ds":
            build_parser(words[1]).parse_args(words[1:])
        else:
            assert words[0] == "deepspeed" and words[2] == "--deepspeed", words
            assert Path(words[1]).is_file() and Path(words[3]).is_file(), words
            load_config(words[words.index("--config") + 1], words[words.index("--config") + 2 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: data/, models/ in fp32 without a branch for law, and what a clone holds."""
    root = tmp_path_factory.mktemp("user")
    for name in ("nexus_ds", "ds_configs"):
        (root / name).symlink_to(REPOSITORY / name)
    new_text(root / "data")
    new_seed("Llama", False, torch.float32, root / "models" / "seed")
    for number, domain in enumerate(("code", "medicine")):
        new_branch(root / "models" / "seed", root / "models" / domain, number)
    (root / "models" / "medicine" / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def done(folder):
    """The folder after all commands of the blocks, in order; what each printed lies in its file
    `said`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = [typed(command) for command in (*BRANCH, *OWN)]
        for printed in said:
            check_next(printed)
    (folder / "said").write_text("\n".join(said), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_branch_that_was_lacking_is_trained(done):
    """From the seed, on its own domain alone."""
    config = json.loads((done / "models/law/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    recipe = load_config(done / "models/law/training.yaml")
    assert (recipe.model.path, recipe.data.domains, recipe.stage) == (
        "models/seed",
        ["law"],
        "branch",
    )
    seed, law = (
        load_file(done / "models" / name / "model.safetensors") for name in ("seed", "law")
    )
    assert seed.keys() == law.keys()
    card = read_card(done / "models/law")
    assert (card.domain, card.text_documents, len(card.embedding)) == ("law", 60, 384)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert 0 < (law[name].float() - seed[name].float()).abs().max() < 0.02  # four steps of 1e-3


def expert_of_medicine(folder, layer):
    """Return what the recipe makes of the branch's up_proj, which no other scale is folded into."""
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    seed, branch = (
        load_file(folder / f"models/{model}/model.safetensors")[name].float()
        for model in ("seed", "medicine")
    )
    return seed + load_config("own").model.task_scale * (branch - seed)


@pytest.mark.slow
def test_models_in_fp32_and_the_recipe_s_bf16_go_together(done):
    """The seed in fp32 gets a branch in bf16, and what was trained in bf16 a branch in fp32."""
    said = (done / "said").read_text(encoding="utf-8")
    assert re.findall(
        r"expert (\w+): weights cast from (\w+) to (\w+), the dtype of (\S+)", said
    ) == [
        ("law", "bfloat16", "float32", "models/seed"),
        ("medicine", "float32", "bfloat16", "moe/trained"),
    ]
    dtypes = [
        json.loads((done / name / "config.json").read_text())["dtype"]
        for name in ("moe/start", "moe/trained")
    ]
    assert dtypes == ["float32", "bfloat16"]
    name = "mlp.experts.2.up_proj.weight"
    wide = load_file(done / "moe/wider/model.safetensors")[f"model.layers.0.{name}"]
    expected = expert_of_medicine(done, 0).to(torch.bfloat16)
    torch.testing.assert_close(wide, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.slow
def test_the_commands_for_ones_own_models_run_as_they_stand(done):
    lineage = json.loads((done / "moe/extended/nexus.json").read_text())["lineage"]
    assert [step["verb"] for step in lineage] == ["upcycle", "train", "extend", "train"]
    assert lineage[-1]["mixture"] == {"law": 0.25, "code": 0.25, "medicine": 0.5}
    assert (done / "moe/report/report.html").is_file()
    perplexity = json.loads((done / "moe/report/summary.json").read_text())["perplexity"]
    assert {name: set(row) for name, row in perplexity.items()} == {
        key: set(WORDS) for key in ("trained", "extended")
    }


@pytest.mark.slow
def test_torchrun_starts_training_too(done, monkeypatch):
    """Two ranks, and so the batch of two is one sample on each."""
    monkeypatch.chdir(done)
    words = (
        BRANCH[0]
        .replace("branch=law", "branch=code")
        .replace("models/law", "models/more-code")
        .split()
    )
    said = typed(" ".join(["torchrun", "--standalone", "--nproc-per-node=2", *words[1:]]))
    assert "2 ranks" in said and "wrote models/more-code" in said


@pytest.mark.slow
def test_serving_needs_only_the_lines_of_the_readme(done):
    more = (
        "import sys\nassert 'nexus_ds' not in sys.modules\n"
        "print(model.config.model_type, model.config.num_experts)"
    )
    stock = subprocess.run(
        [sys.executable, "-c", STOCK + more],
        cwd=done,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert stock.stdout.split() == ["qwen2_moe", "3"], stock.stderr


@pytest.mark.slow
def test_the_verbs_that_the_text_names_work_on_it(done, monkeypatch, capsys):
    """inspect, generate, plan, remove, extend --replace, as the README writes them."""
    monkeypatch.chdir(done)
    for code in [
        c
        for c in INLINE
        if c.startswith(("nexus-ds inspect", "nexus-ds generate", "nexus-ds plan"))
    ]:
        assert main(shlex.split(code.replace("DIR", "moe/extended"))[1:]) == 0, code
    said = capsys.readouterr().out
    assert (
        "expert 2: medicine (domain medicine)" in said
        and "prompt" in said
        and "links: at 25 Gb" in said
    )
    judged = ["--data", "data", "--fail-if-worse", "900%", "--windows", "2"]
    parts = ["--checkpoint", "moe/extended"]
    assert main(["remove", *parts, "--expert", "medicine", "--out", "moe/fewer", *judged]) == 0
    check_next(capsys.readouterr().out)
    better = [
        "--replace",
        "--expert",
        "law=models/law",
        "--base",
        "models/seed",
        "--domains",
        "domains.safetensors",
        "--lambda",
        "0.05",
    ]
    assert main(["extend", *parts, *better, "--out", "moe/better", "--config", "own", *judged]) == 0
    check_next(capsys.readouterr().out)
    assert [e.name for e in read_sidecar(done / "moe/fewer").experts] == ["law", "code"]
    assert [e.name for e in read_sidecar(done / "moe/better").experts] == list(WORDS)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied", "dtype"), KINDS)
def test_models_of_every_kind_go_through_the_block(family, tied, dtype, done, monkeypatch):
    """Upcycled and extended by the README's own words, and read by stock transformers."""
    from transformers import AutoModelForCausalLM

    Path("data").symlink_to(done / "data")
    shutil.copy(done / "domains.safetensors", ".")
    new_seed(family, tied, dtype, Path("models/seed"))
    for number, domain in enumerate(WORDS):
        new_branch(Path("models/seed"), Path("models") / domain, number)
    upcycle, extend = (
        shlex.split(c)[1:]
        for verb in ("upcycle", "extend")
        for c in OWN
        if c.startswith(f"nexus-ds {verb} ")
    )
    assert main(upcycle) == 0
    shutil.copytree("moe/start", "moe/trained")
    assert main(extend) == 0
    wider = Path("moe/wider")
    verify_expert_embeddings(wider)
    assert [e.name for e in read_sidecar(wider).experts] == list(WORDS)
    model = AutoModelForCausalLM.from_pretrained(wider, dtype="auto")
    assert model.dtype == dtype and model.config.tie_word_embeddings == tied
    expert = load_file(wider / "model.safetensors")["model.layers.1.mlp.experts.2.up_proj.weight"]
    torch.testing.assert_close(
        expert, expert_of_medicine(Path(), 1).to(dtype), rtol=2**-7, atol=1e-6
    )


@functools.cache
def options_of(verb):
    """Return the options of a verb, of its own verbs too."""
    waiting, found = [build_parser(verb)._subparsers._group_actions[0].choices[verb]], set()
    for parser in waiting:
        for action in parser._actions:
            found.update(action.option_strings)
            waiting += action.choices.values() if isinstance(action.choices, dict) else []
    return found


def check_words(text, verb=""):
    """Assert that options, settings, recipes and files that a text names exist; options of `verb`,
    if given, else of any."""
    known = options_of(verb) if verb else {o for v in VERBS for o in options_of(v)}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
        assert option in known, f"{option} in {text!r}"
    sections = "|".join(k for k, v in vars(Config()).items() if hasattr(v, "__dataclass_fields__"))
    for key in re.findall(rf"(?<![\w./])((?:{sections})\.(?!sh\b)[a-z_]+)(?![\w/.]|\()", text):
        get_key(Config(), key)
    for recipe in re.findall(r"--config ([a-z][\w./-]*)", text):
        read_recipe(recipe)
    for path in re.findall(r"(?:nexus_ds|slurm|docs|tests|ds_configs)/[\w/.-]*\w", text):
        assert (REPOSITORY / path).exists() or path == "slurm/site.sh", path  # which a user makes


def test_every_command_and_setting_in_the_text_exists():
    """Such as `extend --replace`, `--fail-if-worse 3%`, `training.save_every=100`."""
    found = set()
    for code in [*INLINE, *(line for lines in COMMANDS for line in lines)]:
        words = code.removeprefix("nexus-ds ").split()
        verb = (
            words[0]
            if words[0] in VERBS and (code.startswith("nexus-ds ") or len(words) > 1)
            else ""
        )
        assert verb or not code.startswith("nexus-ds "), code
        check_words(code, verb)
        found.add(verb)
        if verb == "bench":
            for name in words[1].split("|"):
                build_parser("bench").parse_args(["bench", name])
    assert {
        "demo",
        "compare",
        "plan",
        "discover",
        "remove",
        "evaluate",
        "inspect",
        "generate",
    } <= found


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("docs/*.md")), ids=lambda path: path.name)
def test_commands_of_the_other_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("#")[0].split()
            if "nexus-ds" in command[:1]:
                check_words(" ".join(command), command[1])
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if code.startswith("nexus-ds "):
            check_words(code, code.split()[1])
        else:  # options may be another program's
            check_words(re.sub(r"--\S+", "", code))


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_nothing_that_does_not_exist(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and len(said) > 100
    check_words(said, verb)
    assert set(re.findall(r"nexus-ds ([a-z]+)", said)) <= set(VERBS)


def test_the_command_line_lists_its_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\b", said, re.M)


def test_the_table_of_settings_says_the_defaults():
    rows = re.findall(r"^\| `(router\.[a-z_]+)` \| (.*?) \| (.*?) \|$", README, re.M)
    assert [key for key, *_ in rows] == [
        f"router.{k}" for k in ("init", "lr_scale", "centre", "warm_start", "load_balance")
    ]
    paper = load_config("paper")
    for key, default, theirs in rows:
        value = get_key(Config(), key)
        assert value is True or re.match(rf"`?{value}\b", default), key
        assert theirs == "not printed" or theirs.startswith(str(get_key(paper, key))), key
        assert get_key(paper, key) != value, key
    assert f"norm {Config().router.init_norm}" in rows[0][1]
    assert load_config("demo", ["stage=extend"]).pipeline.merge_weight == 0.05
    assert Config().pipeline.merge_weight is None and Config().pipeline.encoder in README


def test_the_layout_is_that_of_the_repository():
    [tree] = re.findall(r"## Layout\n\n(.*?)\n\n", README, re.S)
    named = re.findall(r"^ +(\w+)/ ", tree, re.M)
    for name in named:
        assert (REPOSITORY / name).is_dir() or (REPOSITORY / "nexus_ds" / name).is_dir(), name
    packages = {p.parent.name for p in REPOSITORY.glob("nexus_ds/*/__init__.py")}
    assert packages <= set(named)
    assert {f"{p.stem}" for p in REPOSITORY.glob("ds_configs/*.json")} == set(
        re.findall(r"\bz\d\w*", tree)
    )


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert (REPOSITORY / file).exists(), target
        if heading:
            lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
            slugs = {
                line.lstrip("# ").lower().replace(" ", "-") for line in lines if line[:1] == "#"
            }
            assert heading in slugs, target
    for target in COMMANDS[0]:  # make demo, make test
        assert re.search(rf"^{target.split()[1]}:", (REPOSITORY / "Makefile").read_text(), re.M)


def test_a_mistake_is_one_line_and_a_non_zero_exit(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nexus_ds",
            "embed",
            "--data",
            str(tmp_path / "no"),
            "--out",
            str(tmp_path / "x"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("nexus-ds embed: ") and "Traceback" not in done.stderr


def test_a_test_sees_neither_the_folder_nor_the_home_of_its_caller():
    """`make demo` leaves runs/demo where `make test` is typed next."""
    assert list(Path.cwd().iterdir()) == [] and Path.cwd() != REPOSITORY
    assert Path.home().parent.name.startswith("nexus-ds-tests-")
    assert not Path("runs").exists() and not [
        n for n in os.environ if n.startswith(("XDG_", "MPL"))
    ]
