"""From material to HTML: the template, the style, the script and its libraries in one file."""

from __future__ import annotations

import tomllib
from datetime import datetime
from importlib import resources
from importlib.metadata import version
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedalign.compare.plan import line_name, point_title
from fedalign.compare.statistics import FEW
from fedalign.compare.tables import MARK, final_scores, paired_differences
from fedalign.report import figures, findings
from fedalign.report.figures import Json
from fedalign.report.health import ExpertFigures, budget_text, health
from fedalign.report.material import Material, Run
from fedalign.server.health import DEAD, OVERLOADED

GENERATOR = "fedalign report"
LIBRARIES = ("d3-7.9.0.min.js", "plot-0.6.17.min.js")


def render(material: Material) -> str:
    """The whole page. Whatever comes from a run is data: escaped in HTML, and JSON to the script."""
    experts = health(material)
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
        few=any(0 < count < FEW for count in figures.seed_counts(material)),
        verdicts=findings.verdicts(material),
        tables=_tables(material),
        ablations=findings.ablations(material),
        versions=findings.versions(material),
        config=_config_text(material),
        runs=[_about(material, i) for i in range(len(material.runs))],
        problems=experts.problems,
        health_note=budget_text(experts.runs) if experts.runs else "",
        dead=f"{100 * DEAD:g} %",
        overloaded=f"{OVERLOADED:g}",
        data=page_data(material, experts),
        style=_own("page.css"),
        script=_own("page.js"),
        libraries=[_own(f"vendor/{name}") for name in LIBRARIES],
    )


def page_data(material: Material, experts: ExpertFigures) -> Json:
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
        "health": experts.runs,
        "few": FEW,
        "bounds": {"dead": DEAD, "overloaded": OVERLOADED},
    }


def _title(material: Material) -> str:
    if len(material.runs) == 1:
        return f"{material.runs[0].label}: {material.name}"
    return f"{'Comparison' if material.comparison else 'Report'}: {material.name}"


def _tables(material: Material) -> list[Any]:
    tables = (final_scores(material.design, material.tabled), paired_differences(material.design, material.tabled))
    return [table for table in tables if any(lines for _, lines in table.sections)]


def _config_text(material: Material) -> str:
    """What all runs have in common: without seed and algorithm, and without what a grid varies."""
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
