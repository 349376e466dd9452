"""How far a plan of many clients is from all pairs, on statistics of clients that have trained.

The demo's model and data. Each client draws a mix of classes from a Dirichlet distribution and as many examples of it,
with overlap, for all examples dealt once to 400 clients would leave each too few tokens for an expert. Each trains for
one round as in a run and reports; what it reported is kept, in `--out`, for the next call.

Compared with all pairs, cell by cell (a cell is an expert of a layer): the total variation of its column of weights,
and who is left out of it. `entries` are clients in cells.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch

from fedalign.algorithms import fedalign_moe, make
from fedalign.client.workbench import Workbench
from fedalign.config.toml import load_config
from fedalign.data.deal import split_among_clients
from fedalign.demo import DEMO
from fedalign.maths.rounding import pack
from fedalign.protocol import Algorithm, Broadcast, Layout, Reports, Statistics
from fedalign.testing import planned
from keeping import keep, keepable


def trained(args: argparse.Namespace) -> tuple[list[Statistics], Layout]:
    """The clients' reports after one round, and the model's groups."""
    widths = [f"statistics.update_width={args.update_width}", f"statistics.centroid_width={args.centroid_width}"]
    config = load_config(DEMO, [*widths, "algorithm.name=fedalign_paper", "training.batch_examples=16"])
    bench, (examples, _) = Workbench.load(config), split_among_clients(config)
    generator = torch.Generator().manual_seed(args.seed)
    labels = sorted({example.label for example in examples})
    of_label = [[i for i, example in enumerate(examples) if example.label == label] for label in labels]
    concentration = torch.full((len(labels),), args.alpha)
    torch.manual_seed(args.seed)
    trainer, reports = bench.trainer(), []
    received = {group: pack(value.cpu().clone(), "float32", 0) for group, value in bench.moe.read().items()}
    for client in range(max(args.clients)):
        mix = torch.distributions.Dirichlet(concentration).sample()
        count = int(torch.randint(args.examples // 2, 2 * args.examples, (), generator=generator))
        drawn = mix.multinomial(count, replacement=True, generator=generator).tolist()
        indices = [of_label[k][int(torch.randint(len(of_label[k]), (), generator=generator))] for k in drawn]
        with tempfile.TemporaryDirectory() as memory:
            data = bench.client(f"client-{client}", examples, indices, Path(memory))
            reports.append(trainer.train(data, Broadcast(1, received)))
    return reports, bench.moe.layout


def kept(args: argparse.Namespace) -> tuple[list[Statistics], Layout]:
    """The reports of an earlier call, or new ones."""
    name = (
        f"{max(args.clients)}-{args.update_width}-{args.centroid_width}-{args.alpha:g}-{args.examples}-{args.seed}.pt"
    )
    file = args.out / name
    if not file.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(trained(args), file)
    reports, layout = torch.load(file, weights_only=False)  # a file of this script's own
    return reports, layout


def compared(algorithm: Algorithm, seen: Reports) -> dict[str, float]:
    """The plan as it is against that of all pairs."""
    quick_C_L_E = seen.layout.split(planned(algorithm, seen).weight_C_G)[2]
    with mock.patch.object(fedalign_moe, "ALL_PAIRS", len(seen.of)):
        exact_C_L_E = seen.layout.split(planned(algorithm, seen).weight_C_G)[2]
    away_L_E = (quick_C_L_E - exact_C_L_E).abs().sum(dim=0) / 2
    out_C_L_E, same_C_L_E = exact_C_L_E == 0, (quick_C_L_E == 0) == (exact_C_L_E == 0)
    return {
        "left_out": float(out_C_L_E.float().mean()),
        "variation_mean": float(away_L_E.mean()),
        "variation_largest": float(away_L_E.max()),
        "same_entries": float(same_C_L_E.float().mean()),
        "same_cells": float(same_C_L_E.all(dim=0).float().mean()),
    }


def main() -> None:
    """Print a row for each algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[200, 400])
    parser.add_argument("--examples", type=int, default=40, help="a client's, at least half and at most twice as many")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--update-width", type=int, default=64)
    parser.add_argument("--centroid-width", type=int, default=64)
    parser.add_argument("--algorithms", nargs="+", default=["fedalign_paper", "fedalign_moe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/plan-agreement"))
    keepable(parser)
    args = parser.parse_args()
    reports, layout = kept(args)
    print(f"alpha {args.alpha:g}, {args.examples} examples, widths {args.update_width} and {args.centroid_width}")
    print("clients  algorithm       left out  total variation: mean  largest  same entries  same cells")
    for clients in args.clients:
        seen = Reports(reports[:clients], layout, clients)
        for name in args.algorithms:
            found = compared(make(name, {}), seen)
            print(
                f"{clients:>7}  {name:<15}{found['left_out']:>9.1%}{found['variation_mean']:>23.4f}"
                f"{found['variation_largest']:>9.4f}{found['same_entries']:>14.2%}{found['same_cells']:>12.1%}",
                flush=True,
            )
            keep(args, __file__, {"clients": clients, "algorithms": [name], **found}, "torch", "transformers")


if __name__ == "__main__":
    main()
