"""From material to HTML: the template, the style, the script and its libraries in one file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib import resources
from importlib.metadata import version
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedalign.compare.plan import line_name, point_title
from fedalign.compare.statistics import FEW
from fedalign.compare.tables import MARK, final_scores, paired_differences, rows_scored, start_line
from fedalign.report import figures, findings
from fedalign.report.answers import Sheets, sheets
from fedalign.report.figures import Json
from fedalign.report.health import ExpertFigures, budget_text, health
from fedalign.report.leaving import losses
from fedalign.report.material import Material, Run
from fedalign.report.owners import matrices
from fedalign.server.health import DEAD, OVERLOADED
from fedalign.units import percent

GENERATOR = "fedalign report"
LIBRARIES = ("d3-7.9.0.min.js", "plot-0.6.17.min.js")


def render(material: Material) -> str:
    """The whole page. Whatever comes from a run is data: escaped in HTML, and JSON to the script."""
    experts, answered = health(material), sheets(material)
    environment = Environment(
        loader=PackageLoader("fedalign.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(
        generator=GENERATOR,
        version=version("fedalign-moe"),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        mark=MARK,
        title=_title(material),
        material=material,
        facts=findings.facts(material),
        score=findings.score(material)[0],
        better=findings.score(material)[1],
        bands=_bands(figures.seed_counts(material)),
        trained=any(run.round > 0 for run in material.runs),
        several=len(material.design.choices) > 1,
        noised=any(run.cell.config.privacy.on for run in material.runs),
        verdicts=findings.verdicts(material),
        tables=_tables(material),
        ablations=findings.ablations(material),
        versions=findings.versions(material),
        config=_config_text(material),
        runs=[_about(material, i) for i in range(len(material.runs))],
        problems=experts.problems,
        answers=answered,
        owned=matrices(material),
        leaving=losses(material),
        percent=percent,
        health_note=budget_text(experts.runs) if experts.runs else "",
        dead=f"{100 * DEAD:g} %",
        overloaded=f"{OVERLOADED:g}",
        data=page_data(material, experts, answered),
        style=_own("page.css"),
        script=_own("page.js"),
        libraries=[_own(f"vendor/{name}") for name in LIBRARIES],
    )


def page_data(material: Material, experts: ExpertFigures, answered: Sheets) -> Json:
    """Everything that the script draws."""
    design = material.design
    groups = [figures.curves(material, group) for group in figures.GROUPS]
    return {
        "labels": [choice.label for choice in design.choices],
        "points": [point_title(point) for point in design.points],
        "curves": [group for group in groups if group is not None],
        "divergence": figures.curves(material, figures.DIVERGENCE),
        "uploads": figures.uploads(material),
        "clients": figures.clients(material),
        "confusions": [sheet.figure for sheet in answered.shown if sheet.figure is not None],
        "health": experts.runs,
        "few": FEW,
        "scored": rows_scored(material.tabled),
        "bounds": {"dead": DEAD, "overloaded": OVERLOADED},
    }


def _title(material: Material) -> str:
    if len(material.runs) == 1:
        return f"{material.runs[0].label}: {material.name}"
    return f"{'Comparison' if material.comparison else 'Report'}: {material.name}"


def _tables(material: Material) -> list[Any]:
    design, runs = material.design, material.tabled
    scores, differences = final_scores(design, runs), paired_differences(design, runs)
    sections = [
        (title, tuple(line for line in (start_line(design, runs, point), *lines) if line) if lines else ())
        for point, (title, lines) in zip(design.points, scores.sections, strict=True)
    ]
    title = scores.title if any(run.finished for run in material.runs) else "Scores so far"
    tables = (replace(scores, title=title, sections=tuple(sections)), differences)
    return [table for table in tables if any(lines for _, lines in table.sections)]


def _bands(counts: Sequence[int]) -> str:
    """The meaning of the bands of curves, by the seeds of each line that has several."""
    few = "reach from the lowest to the highest run, since fewer than four seeds are too few for an interval"
    whole = "are 95 % Student-t intervals"
    if not counts:
        return "Each line is a single run: nothing tells skill from chance."
    if max(counts) < FEW:
        return f"Lines are means over seeds. Bands {few}."
    if min(counts) >= FEW:
        return f"Lines are means over seeds. Bands {whole}; bands that overlap widely are no difference."
    return f"Lines are means over seeds. Bands of {FEW} seeds and more {whole}; the others {few}."


def _config_text(material: Material) -> str:
    """Settings that all runs share: without seed and algorithm, and without what a grid varies."""
    tables = tomllib.loads(material.design.base.to_toml())
    for key in ("run.seed", *material.design.grid):
        section, *rest = key.split(".")
        if len(rest) == 1:
            tables.get(section, {}).pop(rest[0], None)
    if len(material.design.choices) > 1:
        tables.pop("algorithm", None)
    return tomli_w.dumps(tables)


def _about(material: Material, index: int) -> dict[str, str]:
    run = material.runs[index]
    options = run.cell.config.algorithm.chosen
    return {
        "name": line_name(run.label, run.cell.point),
        "seed": str(run.cell.seed),
        "state": _state(run),
        "folder": str(run.folder),
        "options": ", ".join(f"{key} = {value}" for key, value in options.items()) or "defaults",
    }


def _state(run: Run) -> str:
    rounds = f"round {run.round} of {run.cell.config.run.rounds}"
    if not run.finished:
        return rounds
    return f"ended early, {rounds}: {run.stopped}" if run.stopped else "finished"


def _own(name: str) -> Markup:
    """A file of this package, trusted as it is."""
    return Markup(resources.files("fedalign.report").joinpath(name).read_text(encoding="utf-8"))
