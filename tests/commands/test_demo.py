"""The verb `demo`: what it says, and the numbers of its page about an added expert, from runs that
are written by hand."""

import argparse
import csv
import json
import math
import subprocess

import numpy as np
import pytest

from nexus_ds.commands import demo, evaluate
from nexus_ds.config import load_config
from nexus_ds.errors import DataError
from nexus_ds.evaluation.perplexity import Routing, Scores
from nexus_ds.pipeline import places, resolve
from nexus_ds.report.evaluation import write_evaluation
from nexus_ds.report.summary import Measured, Setup, summarise

DOMAINS = ["a", "b", "new"]
LOSSES = {  # of a, b, new
    "seed": (3.0, 4.0, 6.0),
    "branch a": (2.0, 5.0, 6.5),
    "branch b": (4.0, 3.0, 6.5),
    "branch new": (5.0, 5.0, 3.0),
    "plain average": (3.5, 4.5, 6.2),
    "Nexus": (2.5, 3.4, 6.0),
    demo.APPENDED: (2.6, 3.45, 5.5),
    demo.EXTENDED: (2.6, 3.5, 5.0),
}
CURVE = {0: (2.6, 3.45, 5.5), 2: (2.58, 3.47, 5.2), 4: (2.6, 3.5, 5.0)}  # by step


def measured(name, losses):
    routing = None
    if name.startswith("Nexus"):
        share = np.array([[[0.8, 0.2], [0.1, 0.9], [0.5, 0.5]]])
        routing = Routing(DOMAINS, ["a", "b"], ["a", "b"], [0], share, np.full((1, 3), 0.6))
    facts = {
        "kind": "Nexus" if routing else "dense",
        "family": "x",
        "dtype": "F32",
        "routed_experts": 2 if routing else 0,
        "parameters": {"total": 10, "active": 5},
        "tokenizer": "t",
    }
    windows = {
        d: np.array([loss - 0.01, loss + 0.01]) for d, loss in zip(DOMAINS, losses, strict=True)
    }
    return Measured(facts, Scores(windows, dict.fromkeys(DOMAINS, 8), 1.0, routing), None)


@pytest.fixture
def config(tmp_path):
    words = [
        f"pipeline.run={tmp_path / 'run'}",
        "pipeline.domains=[a, b]",
        "pipeline.new_domains=[new]",
    ]
    return resolve(load_config("demo", words))


@pytest.fixture
def summary(config):
    """The summary of a whole demo, whose evaluation and finetune log lie where the demo finds
    them."""
    where = places(config)
    where.report.mkdir(parents=True)
    setup = Setup("demo", DOMAINS, windows=2, length=4)
    models = {name: measured(name, losses) for name, losses in LOSSES.items()}
    write_evaluation(summarise(models, setup, before="Nexus"), where.report)
    log = where.extended.with_name("extended.training") / "metrics.jsonl"
    log.parent.mkdir()
    records = [{"kind": "train", "step": 1, "perplexity": {}}]
    records += [
        {
            "kind": "validation",
            "step": step,
            "perplexity": dict(zip(DOMAINS, map(math.exp, losses), strict=True)),
        }
        for step, losses in CURVE.items()
    ]
    log.write_text("\n".join(map(json.dumps, records)) + "\n")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    args = parser.parse_args(
        [f"pipeline.run={where.run}", "pipeline.domains=[a, b]", "pipeline.new_domains=[new]"]
    )
    return demo.report(config, args, 61.23)


def test_what_the_demo_says_follows_from_the_numbers(summary):
    """Old domains, mean loss: seed 3.5, plain average 4.0, Nexus 2.95, extended 3.05."""
    assert summary["findings"] == [
        f"On the upcycled domains Nexus has {1 - math.exp(-0.55):.0%} lower perplexity than the "
        "seed (which had no training on the mixture).",
        f"On the upcycled domains Nexus has {1 - math.exp(-1.05):.0%} lower perplexity than the "
        "plain average (which had no training on the mixture).",
        "85% of a domain's tokens go to its own expert (chance: 50%).",
        f"With the expert for new its perplexity is {math.exp(-1):.2f} of what it was; the older "
        f"domains rose by {math.exp(0.1) - 1:.1%} on average.",
    ]
    assert summary["seconds"] == 61.2


def test_every_column_of_the_extension(summary, config):
    """A step has 8 windows of 128 tokens."""
    curve = {
        str(step * 1024): dict(zip(DOMAINS, map(math.exp, losses), strict=True))
        for step, losses in CURVE.items()
    }
    assert summary["extension"] == {"nexus": curve}
    with (places(config).report / "figures" / "extension.csv").open(newline="") as stream:
        header, *rows = list(csv.reader(stream))
    assert header == ["finetune_tokens", *DOMAINS]
    assert [int(row[0]) for row in rows] == [0, 2048, 4096]
    for row, losses in zip(rows, CURVE.values(), strict=True):
        assert list(map(float, row[1:])) == pytest.approx(list(map(math.exp, losses)))
    page = (places(config).report / "report.html").read_text()
    table = page.split("<h2>Adding an expert")[1].split("</table>")[0]
    cells = [
        cell.split("</td>")[0] for cell in table.replace(' class="text"', "").split("<td>")[1:]
    ]
    shown = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    assert shown == [
        [
            name,
            *(
                f"{math.exp(x):.1f}" if x > math.log(100) else f"{math.exp(x):.2f}"
                for x in LOSSES[name]
            ),
        ]
        for name in ("Nexus", demo.APPENDED, demo.EXTENDED)
    ]
    assert "<h2>From Nexus to Nexus extended</h2>" in page


def again(config):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    words = [f"pipeline.run={places(config).run}", "pipeline.domains=[a, b]"]
    return demo.report(config, parser.parse_args([*words, "pipeline.new_domains=[new]"]), 1.0)


def without(key):
    return lambda found: {name: value for name, value in found.items() if name != key}


def of_nexus(**more):
    """Return what changes the entry of Nexus."""
    return lambda found: (
        found | {"models": found["models"] | {"Nexus": found["models"]["Nexus"] | more}}
    )


def diverged(found):
    """A change beyond all floats: an OverflowError once, found by tests/fuzz.py."""
    beyond = {name: {"a": [9e200, 1e300]} for name in LOSSES}
    return found | {"window_loss": beyond | {"Nexus": {"a": [2.0, 3.0]}}}


def test_the_evaluation_of_a_model_that_has_diverged_is_shown(summary, config):
    path = places(config).report / "summary.json"
    path.write_text(json.dumps(diverged(json.loads(path.read_text()))))
    again(config)
    assert "(+1e+306 ± inf %)" in (places(config).report / "report.html").read_text()


DAMAGES = [
    # found by tests/fuzz.py: rows shorter than their headers
    of_nexus(routing={"a": {}, "b": {}, "new": {}}),
    of_nexus(
        checkpoint={
            "kind": "x",
            "family": "x",
            "dtype": "x",
            "routed_experts": 2,
            "parameters": {"total": 1},
        }
    ),
    lambda found: found | {"warnings": ["\ud800"]},
    lambda found: found | {"measures": {"bits": {"models": {"m": {}}, "reference": {}}}},
    lambda found: [],
    without("perplexity"),
    without("models"),
    lambda found: found | {"perplexity": {"seed": {"a": "x"}}},
    lambda found: found | {"perplexity": {"seed": {"a": math.nan}}},
    lambda found: found | {"seconds": "x"},
    lambda found: found | {"domains": "a"},
    lambda found: found | {"routed_model": "nobody"},
    lambda found: found | {"window_loss": {"seed": {"a": [None]}}},
    lambda found: found | {"change": {"before": "Nexus"}},
    lambda found: found | {"models": found["models"] | {"Nexus": found["models"]["seed"]}},
    lambda found: (
        found
        | {"models": {name: m | {"share_by_layer": []} for name, m in found["models"].items()}}
    ),
]


@pytest.mark.parametrize("number", range(len(DAMAGES) + 3))
def test_a_damaged_evaluation_is_one_message(summary, config, number):
    path = places(config).report / "summary.json"
    text = path.read_bytes()
    texts = [text[:200], b"\xff" + text, b""]
    texts += [json.dumps(damage(json.loads(text))).encode() for damage in DAMAGES]
    path.write_bytes(texts[number])
    with pytest.raises(DataError) as caught:
        again(config)
    said = str(caught.value)
    mend = f"remove {path.parent}, and the same command makes it again"
    assert said.startswith(f"{path}: ")
    assert said.endswith(f"; expected what evaluate writes; {mend}")


@pytest.mark.parametrize(
    "line", [b"{", b"\xff", b"3", b'{"kind": "validation", "step": 2}', b'{"kind": 1, "step": 2}']
)
def test_a_damaged_log_is_one_message(summary, config, line):
    extended = places(config).extended
    log = extended.with_name("extended.training") / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + line)
    with pytest.raises(DataError) as caught:
        again(config)
    said = str(caught.value)
    assert said.startswith(f"{log}:5: ") and said.endswith(
        "; expected what train writes; take the line out where a later one has its step, else "
        f"remove {extended} and {extended}.training, and the same command trains it again"
    )
    log.write_bytes(b"")
    with pytest.raises(DataError, match=r"metrics.jsonl: found no validation; expected what"):
        again(config)


def test_the_evaluation_compares_what_the_headline_compares(config, monkeypatch):
    """The command as `evaluate` itself reads it."""
    given = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: given.append(command) or argparse.Namespace(returncode=0),
    )
    demo.evaluate(config)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    args = parser.parse_args(given[0][given[0].index("evaluate") + 1 :])
    assert args.before == "Nexus" and args.name[-1] == demo.EXTENDED
    assert args.name == list(LOSSES) and args.checkpoint[-1] == places(config).extended
    assert (args.domains, args.windows, args.length) == ("a,b,new", 48, 128)
