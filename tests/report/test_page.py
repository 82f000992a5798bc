"""The page: self-contained, everything escaped, best values bold, wrong input refused with the old
page left alone."""

import html.parser
import re

import pytest

from nexus_ds.errors import DataError
from nexus_ds.report import figures
from nexus_ds.report.page import (
    Section,
    Spread,
    Table,
    best_cells,
    format_cell,
    text_table,
    write_page,
)


def test_a_whole_number_is_a_mean_too():
    """Found by tests/fuzz.py: files hold floats that lost their points."""
    rows = [["x", Spread(3, 0.1)], ["y", 4.0]]
    assert best_cells(Table(header=["a", "b"], rows=rows, best="min")) == {(0, 1)}


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links, self.open = [], "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert(1)</script> & "q"'
    plot = figures.line_plot(
        {"a": ([1, 2], [3, 4])}, tmp_path / "a.png", title="t", xlabel="x", ylabel="y"
    )
    table = Table(header=["model", evil], rows=[[evil, 1.5]])
    write_page(
        tmp_path / "p.html", evil, evil, [Section(title=evil, text=evil, figure=plot, table=table)]
    )
    page = read(tmp_path / "p.html")
    assert "script" not in page.tags and page.text.count(evil) >= 6
    assert all(link.startswith(("data:image/png;base64,", "#s")) for link in page.links)
    assert not re.search(r"https?://", (tmp_path / "p.html").read_text())
    assert "prefers-color-scheme: dark" in (tmp_path / "p.html").read_text()


def test_paragraphs_and_figureless_sections(tmp_path):
    write_page(tmp_path / "p.html", "t", "one\n\ntwo", [Section(title="s", text="three")])
    page = read(tmp_path / "p.html")
    assert page.tags.count("p") == 3 and "img" not in page.tags


@pytest.mark.parametrize(
    ("best", "along", "bold"),
    [
        ("min", "column", {(0, 1), (1, 2)}),
        ("max", "column", {(1, 1), (0, 2)}),
        ("min", "row", {(0, 1), (1, 2)}),
        (None, "column", set()),
    ],
)
def test_best_cells(best, along, bold):
    table = Table(
        header=["m", "a", "b"], rows=[["x", 1.0, 5.0], ["y", 2.0, 1.5]], best=best, along=along
    )
    assert best_cells(table) == bold


def test_only_named_columns_are_compared_and_spreads_by_their_means():
    rows = [
        ["x", Spread(1.0, 0.1), 5.0],
        ["y", Spread(2.0, 0.0), 1.5],
        ["z", Spread(1.0004, 0.9), None],
    ]
    table = Table(header=["m", "loss", "cost"], rows=rows, best="min", only=["loss"])
    assert best_cells(table) == {(0, 1), (2, 1)}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Spread(4.6129, 0.0271), "4.613 ± 0.027"),
        (Spread(4.6129), "4.613"),
        (Spread(0.034, 0.012, signed=True), "+0.034 ± 0.012"),
        (Spread(2770.3, 71.2, 0), "2,770 ± 71"),
    ],
)
def test_spreads(value, shown):
    assert format_cell(value) == shown


def test_ties_as_shown_are_both_bold_and_gaps_are_none():
    rows = [["x", 1.001, None], ["y", 1.002, 3.0], ["z", float("nan"), "text"]]
    assert best_cells(Table(header=["m", "a", "b"], rows=rows, best="min")) == {(0, 1), (1, 1)}


def test_bold_reaches_the_page(tmp_path):
    table = Table(header=["m", "a"], rows=[["x", 1.0], ["y", 2.0]], best="min")
    write_page(tmp_path / "p.html", "t", "", [Section(title="s", table=table)])
    assert re.findall("<strong>(.*?)</strong>", (tmp_path / "p.html").read_text()) == ["1.00"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345, "12,345"),
        (0.5744, "0.57"),
        (117.31, "117.3"),
        (12345.6, "12,346"),
        (None, "–"),
        (True, "True"),
        ("a", "a"),
    ],
)
def test_format_cell(value, shown):
    assert format_cell(value) == shown


def test_text_stands_left_and_numbers_right(tmp_path):
    table = Table(header=["m", "kind", "n"], rows=[["x", "dense", 1], ["y", None, 2]])
    empty = Table(header=["m"], rows=[])
    write_page(
        tmp_path / "p.html",
        "t",
        "",
        [Section(title="s", table=table), Section(title="e", table=empty)],
    )
    heads = re.findall("<th( class=[^>]*)?>(.*?)</th>", (tmp_path / "p.html").read_text())
    assert heads == [(' class="text"', "m"), (' class="text"', "kind"), ("", "n"), ("", "m")]


def test_text_table():
    table = Table(header=["model", "a"], rows=[["seed", 1.0], ["longer name", 200]])
    assert text_table(table) == "model           a\nseed         1.00\nlonger name   200"


def test_a_name_is_no_line_of_its_own():
    table = Table(header=["model", "law\nart"], rows=[["seed\nlonger name  999", 1.0]])
    lines = text_table(table).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "law", "art"],
        ["seed", "longer", "name", "999", "1.00"],
    ]


def test_row_of_another_length(tmp_path):
    (tmp_path / "p.html").write_text("old")
    table = Table(header=["m", "a"], rows=[["x", 1.0], ["y"]])
    with pytest.raises(
        DataError, match=r"row 2 of the table has 1 cells, expected 2 as in its header \(m, a\)"
    ):
        write_page(tmp_path / "p.html", "t", "", [Section(title="s", table=table)])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("p.html", "old")]


def test_figures_that_are_missing_or_no_png(tmp_path):
    with pytest.raises(
        DataError, match=r"the figure of section 's' can't be read .* draw it before the page"
    ):
        write_page(tmp_path / "p.html", "t", "", [Section(title="s", figure=tmp_path / "none.png")])
    (tmp_path / "a.png").write_text("<svg/>")
    with pytest.raises(DataError, match="the figure of section 's' is not a PNG file"):
        write_page(tmp_path / "p.html", "t", "", [Section(title="s", figure=tmp_path / "a.png")])
