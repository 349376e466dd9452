"""What experts of sites' own cost, and what a site takes along when it leaves: the numbers of docs/opting-out.md.

    python benchmarks/opting_out.py --out runs/opting-out            # goes on where it stopped
    python benchmarks/opting_out.py --out runs/opting-out --table    # writes docs/opting-out.md
    python benchmarks/opting_out.py --out runs/opting-tasks --model runs/evidence/start --clients 10 --rounds 5 \
        --rows 2000 --seeds 0 1 2 --set data.train=runs/evidence/data/tasks/train.jsonl ...   # other clients
    python benchmarks/opting_out.py --out runs/opting-tasks --table tasks                     # its part of the page
    python benchmarks/opting_out.py --out runs/a-10 runs/a-11 --table tasks                   # seeds of two folders

The demo's model gets an expert for each client (`fedalign upcycle`), and is tuned by each of ALGORITHMS as a comparison
(`fedalign compare`, one run after another), and with the same settings by low-rank experts. Of the frozen model of
`site_experts` three more things are told, of rows that clients held out: how it answers them as a whole, where a
client answers by the public experts and its own; how it answers them without each client, both as the run itself scores
them (`leaving.json`); and how many of their tokens go to whose expert.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fedalign
from fedalign.cli.upcycle import upcycle
from fedalign.client.memory import ClientData
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import as_texts, load_config
from fedalign.data.batches import batches
from fedalign.data.deal import split_among_clients
from fedalign.errors import UserError, unknown
from fedalign.files import write_text
from fedalign.moe.load import quiet
from fedalign.moe.rows import Text, look, public_text
from fedalign.server.results import RunFolder
from fedalign.units import size
from watching import machine

PAGE = Path(__file__).parents[1] / "docs" / "opting-out.md"
BEGIN, END = "<!-- {}: written by benchmarks/opting_out.py -->", "<!-- until here -->"
MATRIX = 4  # sites up to which each one's leaving has a line of its own
FROZEN = "site_experts"
ALGORITHMS = {name: f"`{name}`" for name in ("fedavg", "by_use", "fedalign_moe", FROZEN)} | {
    f"{FROZEN}:shared=average": '`site_experts`, `shared = "average"`'
}
LOW_RANK = "site_experts, low rank"
LINES = {**ALGORITHMS, LOW_RANK: "`site_experts`, low rank"}
ADAPTERS = {"tuning.kind": "lora", "tuning.targets": ["experts"]}
WRITES = "what the untrained model writes"
ABOUT, FOUND = "about.json", "found.json"

# ---------------------------------------------------------------------------------------------------------------- runs


def sites_of(args: argparse.Namespace, texts: Sequence[str]) -> list[str]:
    """Names of the clients of a run in one process, with the first seed; all seeds must have the same.

    Raises:
        UserError: They have not.
    """
    names = [sorted(split_among_clients(load_config("demo", [*texts, f"run.seed={seed}"]))[1]) for seed in args.seeds]
    if any(one != names[0] for one in names):
        raise UserError(f"--seeds {args.seeds}: clients have other names for each. Give each seed a folder of its own.")
    return names[0]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the folder must have been made by to be gone on with."""
    made = {name: getattr(args, name) for name in ("model", "clients", "seeds", "rounds", "rows", "set")}
    return made | ({"after": args.after} if args.after else {})


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Make what the folder does not hold yet; a line for each algorithm and seed, the frozen ones with what was found.

    Raises:
        UserError: The folder holds runs of other settings, no line is called so, or there is no such round.
    """
    quiet()
    (out,) = args.out
    for name in args.lines:
        if name not in LINES:
            raise unknown("--lines", name, LINES)
    if wrong := [number for number in args.after if not 0 <= number <= args.rounds]:
        raise UserError(f"--after {wrong[0]}: no such round. Choose 0 to {args.rounds}, as --rounds says.")
    out.mkdir(parents=True, exist_ok=True)
    about, base = out / ABOUT, out / "base"
    if about.exists() and (there := json.loads(about.read_text())["settings"]) != settings(args):
        raise UserError(f"--out {str(out)!r}: holds runs of {there}, not of {settings(args)}. Choose another folder.")
    write_text(about, json.dumps({"settings": settings(args), "machine": machine("torch", "transformers")}) + "\n")
    asked = {"model.path": str(base), "clients.count": args.clients, "run.rounds": args.rounds}
    texts = [*as_texts(asked | {"data.max_train": args.rows}), *args.set]
    if not base.exists():
        upcycle(args.model, base, site_experts=",".join(sites_of(args, texts)))
    low = []
    if LOW_RANK in args.lines:
        low = [row | {"algorithm": LOW_RANK} for row in compared(args, [FROZEN], texts, "low-rank", ADAPTERS)]
    lines = []
    for row in [*compared(args, [name for name in ALGORITHMS if name in args.lines], texts, "runs"), *low]:
        history = [json.loads(one) for one in (Path(row["folder"]) / "metrics.jsonl").read_text().splitlines()]
        lines.append(
            {
                "algorithm": row["algorithm"],
                "seed": row["seed"],
                "global": row["final_accuracy"],
                "own": history[-1]["client_accuracy_weighted"],
                **({"after": [scores(history[number]) for number in args.after]} if args.after else {}),
                "bytes_up": stats.fmean(line["bytes_up"] for line in history if line["round"]),
                "model_bytes": sum(
                    file.stat().st_size for file in (Path(row["folder"]) / "model").glob("*.safetensors")
                ),
                **({"frozen": frozen(Path(row["folder"]), base)} if row["algorithm"] == FROZEN else {}),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    write_text(out / FOUND, json.dumps(lines, indent=1) + "\n")
    return lines


def scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a line of metrics.jsonl."""
    return {"global": line["accuracy"], "own": line["client_accuracy_weighted"]}


def compared(
    args: argparse.Namespace, algorithms: Sequence[str], texts: Sequence[str], place: str, more: Mapping[str, Any] = {}
) -> list[dict[str, Any]]:
    """A line for each algorithm and seed, of runs in this place of the folder.

    Raises:
        UserError: One failed.
    """
    outcome = fedalign.compare_runs(
        "demo",
        algorithms,
        seeds=args.seeds,
        overrides=[*as_texts(more), *texts],
        out=args.out[0] / place,
        jobs=1,
        progress=False,
    )
    if outcome.failed:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
    return list(outcome.rows)


def frozen(folder: Path, base: Path) -> dict[str, Any]:
    """What the model of a run of `site_experts` is as a whole, and without each of its sites; kept beside the run."""
    kept = folder.with_name(f"{folder.name}.json")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    there = RunFolder(folder)
    if not there.leaving.exists():
        raise UserError(f"--out: {str(there.leaving)!r} is not there, as of a run of an older version. Begin anew.")
    model, config, told = there.model, there.read_config("--out"), json.loads(there.leaving.read_text())
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        clients = Clients(config, model, Path(place))
        found: dict[str, Any] = {
            "rows": {name: len(client.held_out or ()) for name, client in clients.data.items()},
            "whole": clients.accuracies(told["whole"]),
            "without": {name: clients.accuracies(scores) for name, scores in told["without"].items()},
            "reached": clients.reached(public_text(Workbench.load(_at(config, base)).moe, config.run.seed)),
        }
    write_text(kept, json.dumps(found) + "\n")
    return found


def _at(config: Config, model: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})


class Clients:
    """Clients of a run with the rows that they held out, and a model that answers them.

    Args:
        config: of the run.
        model: a folder; the run's own or another one.
        folder: for what clients keep.
    """

    def __init__(self, config: Config, model: Path, folder: Path) -> None:
        self.bench = Workbench.load(_at(config, model))
        examples, parts = split_among_clients(config)
        self.data: dict[str, ClientData] = {
            name: self.bench.client(name, examples, part, folder / name) for name, part in parts.items()
        }

    def accuracies(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
        """Accuracy of each client's rows, of scores that a run has told; None: it held out none."""
        return {name: scores.get(name, {}).get("accuracy") for name in self.data}

    def reached(self, written: Sequence[Text]) -> dict[str, dict[str, list[float]]]:
        """Of each site's expert the share of tokens that it gets in each layer, by whose tokens they are."""
        moe, options = self.bench.moe, self.bench.config.training
        texts: dict[str, Iterable[Text]] = {
            name: [
                (one.inputs(), one.attention_mask_B_S)
                for one in batches(client.held_out.encoded, options.batch_tokens, options.batch_examples)
            ]
            for name, client in self.data.items()
            if client.held_out
        }
        found: dict[str, dict[str, list[float]]] = {name: {} for name in moe.layout.owners}
        for whose, text in {**texts, WRITES: written}.items():
            for seen in look(moe, text, range(moe.experts)):
                for name, experts in moe.layout.owners.items():
                    share = float(seen.load_E[list(experts)].sum()) / len(seen.last_T)
                    found[name].setdefault(whose, []).append(share)
        return found


# --------------------------------------------------------------------------------------------------------------- table


def percent(values: Iterable[float | None]) -> str:
    """The mean, and beyond one value the range.

    >>> percent([0.5]), percent([0.5, 0.25]), percent([None])
    ('50.0 %', '37.5 % (25.0 to 50.0)', '-')
    """
    there = [100 * value for value in values if value is not None]
    if not there:
        return "-"
    spread = f" ({min(there):.1f} to {max(there):.1f})" if len(there) > 1 else ""
    return f"{stats.fmean(there):.1f} %{spread}"


def weighted(scores: dict[str, float | None], rows: dict[str, int]) -> float | None:
    """Of all clients' rows together.

    >>> weighted({"a": 1.0, "b": 0.0, "c": None}, {"a": 3, "b": 1, "c": 0})
    0.75
    """
    told = {name: score for name, score in scores.items() if score is not None}
    return sum(rows[name] * score for name, score in told.items()) / sum(rows[name] for name in told) if told else None


def table(lines: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """All numbers of the page."""
    made = about["settings"]
    earlier = [*enumerate(made.get("after", ()))]
    when = [f" after {number} rounds" for _, number in earlier] + ([f" after {made['rounds']}"] if earlier else [""])
    columns = [f"{what}{after}" for after in when for what in ("global test set", "own rows")]
    head = f"| | {' | '.join(columns)} | sent up a round | weights of `model/` |\n|---|{'--:|' * (len(columns) + 2)}\n"
    body = ""
    for name, shown in LINES.items():
        here = [line for line in lines if line["algorithm"] == name]
        if not here:
            continue
        sent, whole_size = (
            size(round(stats.fmean(line[which] for line in here))) for which in ("bytes_up", "model_bytes")
        )
        places = [*([line["after"][place] for line in here] for place, _ in earlier), here]
        told = [percent(one[which] for one in place) for place in places for which in ("global", "own")]
        seeds = {line["seed"] for line in here}
        only = f" (seed {', '.join(map(str, sorted(seeds)))})" if seeds != set(made["seeds"]) else ""
        body += f"| {shown}{only} | {' | '.join(told)} | {sent} | {whole_size} |\n"
    found = [line["frozen"] for line in lines if "frozen" in line]
    several = f"Mean and range of {len(made['seeds'])} seeds. " if len(made["seeds"]) > 1 else ""
    ran = f"{several}Run on: {about['machine']}. Settings: `{json.dumps(made)}`.\n"
    if not found:
        return f"{head}{body}\n{ran}"
    names = list(found[0]["rows"])
    whole = [weighted(one["whole"], one["rows"]) for one in found]
    frozen_whole = f"{head}{body}\nThe frozen model as a whole answers own rows at {percent(whole)}."
    if len(names) > MATRIX:
        return f"{frozen_whole} What it answers before and after one of {len(names)} has left:\n\n{left(found)}\n{ran}"
    less = f"| who left | {' | '.join(f'rows of {name}' for name in names)} |\n|---|{'--:|' * len(names)}\n"
    cells: list[tuple[str, Callable[[dict[str, Any]], dict[str, float | None]]]] = [
        ("nobody", lambda one: one["whole"]),
        *((gone, lambda one, gone=gone: one["without"][gone]) for gone in names),
    ]
    for gone, scores in cells:
        less += f"| {gone} | {' | '.join(percent(scores(one)[name] for one in found) for name in names)} |\n"
    layers = range(len(found[0]["reached"][names[0]][WRITES]))
    whose = [*names, WRITES]
    reach = f"| expert of | {' | '.join(f'tokens of {name}' if name in names else name for name in whose)} |\n"
    reach += f"|---|{'---|' * len(whose)}\n"
    for owner in names:
        shares = (
            ", ".join(
                f"{100 * stats.fmean(one['reached'][owner][name][layer] for one in found):.0f}" for layer in layers
            )
            if all(name in one["reached"][owner] for one in found)
            else "-"
            for name in whose
        )
        reach += f"| {owner} | {' | '.join(shares)} |\n"
    rows = " and ".join(", ".join(str(one["rows"][name]) for name in names) for one in found)
    return (
        f"{frozen_whole} Each client's own rows by it, and after one has left:\n\n{less}\n"
        f"Rows that clients held out: {rows}. Shares of their tokens, in %, that the whole frozen model sends to a "
        f"site's expert, layer by layer:\n\n{reach}\n{ran}"
    )


def left(found: Sequence[Mapping[str, Any]]) -> str:
    """Of many sites, those that leave on average, and all others together: before and after; a value is a seed.

    >>> print(left([{"rows": {"a": 2, "b": 2}, "whole": {"a": 0.5, "b": 1.0},
    ...              "without": {"a": {"a": 0.0, "b": 1.0}, "b": {"a": 0.5, "b": 0.5}}}]))
    | | before | after | points |
    |---|--:|--:|--:|
    | rows of the site that leaves | 75.0 % | 25.0 % | -50.0 |
    | rows of all others | 75.0 % | 75.0 % | +0.0 |
    | rows of the site that loses most by another's leaving | | | +0.0 |
    <BLANKLINE>
    """
    moved: dict[str, list[tuple[float, float]]] = {"rows of the site that leaves": [], "rows of all others": []}
    most = []
    for one in found:
        whole = {name: score for name, score in one["whole"].items() if score is not None}
        without = {gone: {name: scores[name] for name in whole} for gone, scores in one["without"].items()}
        told = [(whole[name], without[name][name]) for name in whole]
        rest = [(whole[name], scores[name]) for gone, scores in without.items() for name in whole if name != gone]
        rows = [one["rows"][name] for gone in without for name in whole if name != gone]
        for values, pairs, weights in zip(moved.values(), (told, rest), (None, rows), strict=True):
            before, after = (stats.fmean(side, weights) for side in zip(*pairs, strict=True))
            values.append((before, after))
        most.append(min(after - before for before, after in rest))
    table = "| | before | after | points |\n|---|--:|--:|--:|\n"
    for name, values in moved.items():
        change = 100 * stats.fmean(after - before for before, after in values)
        sides = [percent(side) for side in zip(*values, strict=True)]
        table += f"| {name} | {sides[0]} | {sides[1]} | {change:+.1f} |\n"
    points = ", ".join(f"{100 * value:+.1f}" for value in most)
    return f"{table}| rows of the site that loses most by another's leaving | | | {points} |\n"


def write_table(args: argparse.Namespace) -> None:
    """Write the numbers of the folders into their part of the page.

    Raises:
        UserError: There is no finished run in a folder, they hold runs of other settings, or there is no such part.
    """
    lines, text, begin = [], PAGE.read_text(), BEGIN.format(args.table)
    about: dict[str, Any] = {}
    for out in args.out:
        if not (out / FOUND).exists():
            raise UserError(f"--out {str(out)!r}: no {FOUND} there. Run it without --table first.")
        lines += json.loads((out / FOUND).read_text())
        here = json.loads((out / ABOUT).read_text())
        seeds = here["settings"].pop("seeds")
        if about and here["settings"] != about["settings"]:
            raise UserError(f"--out {str(out)!r}: holds runs of {here['settings']}, not of {about['settings']}.")
        about = here | {"seeds": [*about.get("seeds", ()), *seeds]}
    about["settings"] |= {"seeds": list(dict.fromkeys(about["seeds"]))}
    if begin not in text:
        raise UserError(f"--table {args.table}: {PAGE.name} has no such part. It begins with the line {begin}")
    before, after = text.split(begin)
    after = after[after.index(END) :]
    PAGE.write_text(f"{before}{begin}\n{table(lines, about)}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or write the page's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("runs/opting-out")])
    parser.add_argument("--model", default="demo", help="that gets the experts")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--after", type=int, nargs="*", default=[], help="rounds after which scores are told too")
    parser.add_argument("--lines", nargs="+", default=list(LINES), help="of the table; all if not given")
    parser.add_argument("--rows", type=int, default=1500, help="data.max_train")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of a configuration")
    parser.add_argument("--table", nargs="?", const="demo", help="write the numbers into this part of the page")
    args = parser.parse_args(arguments)
    if len(args.out) > 1 and not args.table:
        parser.error("--out: one folder, or several with --table")
    try:
        write_table(args) if args.table else run(args)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
