"""How a comparison's page begins: as a short paper does, with what was asked, found and how.

    question - answer - setup - result: one figure, one table - limits - reproduce
All tables follow. Not covered: those (report), the answer's sentences (report_findings).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nexus_ds.experiments.comparison.report_figures import draw_differences, draw_regimes
from nexus_ds.experiments.comparison.report_findings import verdict
from nexus_ds.experiments.comparison.report_tables import method_reference, methods_of, result_table
from nexus_ds.experiments.comparison.result_file import Results
from nexus_ds.experiments.comparison.seed_figures import short_count
from nexus_ds.progress import duration
from nexus_ds.report.page import Section

QUESTION = (
    "Dense models are branched off one seed, one a domain, and become one mixture of experts. Is "
    "that better than giving the same operations to one dense model, and what do other ways to "
    "make one model of the same text, or to add an expert to it, come to?"
)
RESULT = (
    "Nats per token on the validation text of the experts' domains, each contender under that of "
    "its settings which gives it the lowest mean; ± is the standard deviation over seeds. "
    "Differences are to the same seed's dense training, and below 0 a contender is better."
)


def _setup(results: Results) -> str:
    """Return what was trained on what, in sentences."""
    domains, data = results.domains, results.data
    seeds = ", ".join(str(seed) for seed in results.seeds)
    windows = data.windows or "an unknown number of"
    said = [f"One expert each for {_listed(domains.old)}."]
    if domains.pretraining:
        said.append(f"{_listed(domains.pretraining)} without an expert.")
    if domains.new:
        said.append(f"{_listed(domains.new)} added later.")
    said.append(f"Seeds {seeds}, {windows} validation windows of {data.length} tokens a domain.")
    said += _budget(results)
    return " ".join(said)


def _budget(results: Results) -> list[str]:
    row = method_reference(methods_of(results))
    if row is None or not row.compute.training_tokens:
        return []
    read = results.seed_tokens.get("")
    seed = f"The seed model has read {short_count(read)} tokens. " if read else ""
    spent = short_count(row.compute.training_tokens)
    return [f"{seed}{row.label} and its branches get {spent} tokens after that."]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _limits(results: Results) -> str:
    """Return what the result does not say."""
    row = method_reference(methods_of(results))
    size = short_count(row.compute.total) if row is not None and row.compute.total else "?"
    tuned = ""
    if results.variants:
        tuned = (
            " What is best of several settings was chosen on the text that is scored, and so "
            "looks better than it is."
        )
    return (
        f"One size ({size} parameters in all), one collection of text, "
        f"{len(results.seeds)} seeds.{tuned}"
    )


def _reproduce(results: Results, command: str) -> str:
    took = "" if results.seconds is None else f" It took {duration(results.seconds)}"
    machine = f" on {results.machine}" if took and results.machine else ""
    end = "." if took else ""
    return f"{command}\n\nWhat is there already is not made again.{took}{machine}{end}"


def opening_sections(results: Results, command: str, folder: Path) -> list[Section]:
    """Return the page's first sections; the figure is drawn into `folder`.

    Args:
        results: of a whole comparison, or of a part of it.
        command: that repeats it.
        folder: of figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts: Mapping[str, str] = {
        "Answer": "\n\n".join(verdict(results)),
        "Setup": _setup(results),
    }
    sections = [Section(title=title, text=text) for title, text in texts.items()]
    table = result_table(results)
    if table is not None:
        figure = draw_regimes(results, folder / "regimes.png")
        if figure is None:
            figure = draw_differences(results, folder / "differences.png")
        sections.append(Section(title="Result", text=RESULT, figure=figure, table=table))
    return [
        *sections,
        Section(title="Limits", text=_limits(results)),
        Section(title="Reproduce", text=_reproduce(results, command)),
    ]
