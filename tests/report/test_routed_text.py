"""Tokens in the colours of their experts: on a terminal, in marks, as a page."""

import html
import re

import pytest

from nexus_ds.console import CONTROL
from nexus_ds.errors import OutputExistsError
from nexus_ds.generation.continuation import Said
from nexus_ds.generation.routes import Decision
from nexus_ds.report.routed_text import (
    Coloured,
    Legend,
    Marked,
    legend_table,
    legend_text,
    write_routed_page,
)

LEGEND = Legend(["law", "code"], ["legal", "code"], [1, 3])
SAID = [
    Said(7, "The", Decision([0, 0], [0.9, 0.7]), added=False),
    Said(7, " <b>", Decision([0, 1], [0.5, 0.4])),
    Said(7, "", Decision([1, 1], [0.6, 0.6])),
    Said(7, "x\ny", Decision([1, 1], [0.6, 0.8])),
]
SGR = re.compile(r"\x1b\[[0-9;]*m")


def test_a_terminal_gets_each_token_in_one_colour():
    painter = Coloured(LEGEND)
    shown = [painter.add(said) for said in SAID]
    assert [SGR.sub("", text) for text in shown] == [said.text for said in SAID]
    styles = [set(SGR.findall(text)) - {"\x1b[0m"} for text in shown]
    assert styles[0] == styles[1] != styles[3] and len(styles[3]) == 1 and not styles[2]
    # a line's end has no colour, which would fill the line
    assert shown[3] == "\n".join(painter.add(Said(7, part, SAID[3].decision)) for part in "xy")
    assert painter.end() == ""


def test_experts_beyond_the_colours_have_a_second_mark():
    legend = Legend([str(n) for n in range(16)], [""] * 16, [0])
    painter = Coloured(legend)
    shown = [painter.add(Said(7, "x", Decision([n], [1.0]))) for n in range(16)]
    assert len(set(shown)) == 16
    assert "[4;48;5;25;" in shown[7] and "[1;4;48;5;25;" in shown[14]


def test_elsewhere_each_stretch_has_its_expert_and_mean_weight_behind_it():
    painter = Marked(LEGEND)
    shown = "".join(painter.add(said) for said in SAID) + painter.end()
    assert shown == "The <b>[law 0.65]x\ny[code 0.65]"
    assert Marked(LEGEND).end() == ""


def test_one_layers_own_decisions():
    legend = Legend(LEGEND.experts, LEGEND.domains, LEGEND.layers, layer=3)
    painter = Marked(legend)
    shown = "".join(painter.add(said) for said in SAID[:2]) + painter.end()
    assert shown == "The[law 0.70] <b>[code 0.40]"
    assert "in layer 3" in legend.title and "most of 2 layers" in LEGEND.title


def test_the_legend_counts_tokens():
    rows = legend_table(LEGEND, SAID).rows
    assert rows[0] == ["law", "legal", 2, "50%", pytest.approx(0.65)]
    assert rows[1] == ["code", "code", 2, "50%", pytest.approx(0.65)]
    assert legend_table(LEGEND, []).rows[0] == ["law", "legal", 0, "0%", None]
    plain = legend_text(LEGEND, SAID, colours=False)
    assert SGR.sub("", legend_text(LEGEND, SAID, colours=True)) == plain
    assert plain.splitlines()[0] == LEGEND.title and "legal" in plain and "\x1b" not in plain


def test_names_send_nothing_to_a_terminal_but_the_colours_do():
    legend = Legend(["law\x1b[2J", "code"], ["legal\x9b", "code"], [1, 3])
    painter = Marked(legend)
    marked = "".join(painter.add(said) for said in SAID) + painter.end()
    coloured = legend_text(legend, SAID, colours=True)
    for shown in (marked, SGR.sub("", coloured)):
        assert "law\\u001b[2J" in shown and not CONTROL.search(shown)
    assert SGR.search(coloured) and "legal\\u009b" in coloured


def test_the_page_holds_every_token_with_every_layers_choice(tmp_path):
    out = tmp_path / "page.html"
    write_routed_page(out, "a <title>", LEGEND, [SAID, SAID[:1]])
    page = out.read_text()
    spans = re.findall(r'<span class="e(\d)( given)?" title="([^"]*)">([^<]*)</span>', page)
    assert [(int(e), bool(g), html.unescape(text)) for e, g, _, text in spans] == [
        (0, True, "The"),
        (0, False, " <b>"),
        (1, False, "x\ny"),
        (0, True, "The"),
    ]
    assert spans[1][2] == "layer 1: law 0.50\nlayer 3: code 0.40"
    # a text once more for each layer
    assert re.findall(r"<summary>layer (\d)</summary>", page) == ["1", "3", "1", "3"]
    [folded] = re.findall(r"layer 3</summary>(.*?)</details>", page, re.S)[:1]
    assert re.findall(r'class="e(\d)', folded) == ["0", "1", "1"]
    assert '<span class="swatch e1">code</span>' in page
    assert "a &lt;title&gt;" in page and "<b>" not in page
    assert "default-src 'none'" in page and "http://" not in page and "<script" not in page


def test_a_page_that_is_there_stays(tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_routed_page(tmp_path / "page.html", "t", LEGEND, [SAID])
    assert (tmp_path / "page.html").read_text() == "mine"
