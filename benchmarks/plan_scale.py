"""Time and memory of one aggregation plan for many clients, from synthetic statistics.

The clients fall into two roles for each expert, so that the gates have something to decide; a tenth of the experts is
not held. Each client has said all that any algorithm asks for, counts of tokens aside; beside each algorithm stand the
bytes that a client sends for it. Peak memory is that of the whole process, measured by the operating system.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics as stats
import time
from dataclasses import replace
from typing import Any

import torch

from fedalign.algorithms import ALGORITHMS, make
from fedalign.protocol import SHARED, Algorithm, Layout, Reports, Statistics, asked_shapes
from fedalign.testing import planned
from keeping import keep, keepable


def layout_of(layers: int, experts: int) -> Layout:
    """A model of the given number of layers and experts, small groups (a plan does not look at sizes)."""
    empty = Layout(layers, experts, {})
    return Layout(layers, experts, {g: 1000 if g == SHARED or g.kind == "expert" else 10 for g in empty.groups})


def report(client: int, layout: Layout, update_width: int, centroid_width: int, seed: int) -> Statistics:
    """One client's statistics: two roles for each expert, common structure plus the client's own noise."""
    common = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(seed * 1_000_003 + client + 1)
    grid = (layout.layers, layout.experts)
    role_L_E_1 = torch.randint(0, 2, (*grid, 1), generator=own)
    centroids = torch.randn(2, *grid, centroid_width, generator=common)
    updates = torch.randn(2, *grid, update_width, generator=common)
    centroid = torch.where(role_L_E_1 > 0, centroids[0], centroids[1]) + torch.randn(centroids[0].shape, generator=own)
    update = torch.where(role_L_E_1 > 0, updates[0], updates[1]) + 2 * torch.randn(updates[0].shape, generator=own)
    load_L_E = torch.randint(32, 4000, grid, generator=own) * (torch.rand(grid, generator=own) > 0.1)
    return Statistics(
        client=f"client-{client}",
        round=1,
        examples=int(torch.randint(20, 600, (), generator=own)),
        tokens=100_000,
        steps=100,
        learning_rate=1e-4,
        loss=1.0,
        prob_L_E=torch.rand(grid, generator=own).softmax(dim=-1),
        load_L_E=load_L_E.float(),
        margin_L_E=torch.rand(grid, generator=own) / 4,
        centroid_L_E_D=(centroid * (load_L_E > 0).unsqueeze(-1)).half(),
        centroid_scale_L=torch.ones(layout.layers),
        update_L_E_S=torch.nn.functional.normalize(update, dim=-1).half(),
        norm_G=torch.rand(len(layout.groups), generator=own) + 0.5,
        token_count_M_V=torch.zeros(0, 0),
        token_met_M_B=torch.zeros(0, 0, dtype=torch.uint8),
    )


def sent_bytes(report: Statistics, layout: Layout, algorithm: Algorithm) -> int:
    """What a client sends if nothing is asked for but by this algorithm."""
    widths = report.centroid_L_E_D.shape[-1], report.update_L_E_S.shape[-1]
    shapes = asked_shapes(layout, algorithm.asks, *widths)
    fields: dict[str, Any] = {name: getattr(report, name)[tuple(map(slice, shapes[name][0]))] for name in shapes}
    return replace(report, **fields).nbytes


def peak_bytes() -> int:
    """The most memory this process has had so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Print a row for each algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--update-width", type=int, default=64, help="sketch width of an expert's update")
    parser.add_argument("--centroid-width", type=int, default=64, help="sketch width of a centroid")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    every = ["fedavg", "by_use", "fedalign_moe", "fedalign_paper"]
    parser.add_argument("--algorithms", nargs="+", choices=sorted(ALGORITHMS), default=every)
    keepable(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    layout = layout_of(args.layers, args.experts)
    reports = [report(c, layout, args.update_width, args.centroid_width, args.seed) for c in range(args.clients)]
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, seed {args.seed}")
    print(f"{args.clients} clients, {args.layers} layers, {args.experts} experts")
    print(f"all statistics of one client: {reports[0].nbytes:,} bytes on the wire")
    before = peak_bytes()
    print(f"process with all statistics in memory: {before / 2**20:,.0f} MiB")
    print(
        f"algorithm      bytes of one client  seconds (median of {args.repeats})  min-max        CPU seconds  "
        "zero weights  peak above that"
    )
    seen = Reports(reports, layout, len(reports))
    for name in args.algorithms:
        algorithm = make(name, {})
        seconds, cpu = [], []
        for _ in range(args.repeats):
            start, busy = time.perf_counter(), time.process_time()
            plan = planned(algorithm, seen)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
        zero = float((layout.split(plan.weight_C_G)[2] == 0).float().mean())
        above = (peak_bytes() - before) / 2**20
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        sent = sent_bytes(reports[0], layout, algorithm)
        row = f"{name:<15}{sent:<21,}{stats.median(seconds):<22.2f} {spread:<15}{stats.median(cpu):<13.2f}"
        print(f"{row}{zero:<14.1%}{above:,.0f} MiB")
        found = {"seconds": seconds, "cpu_seconds": cpu, "bytes": sent, "zero_weights": zero, "peak_mib_above": above}
        keep(args, __file__, {"algorithms": [name], **found}, "torch")


if __name__ == "__main__":
    main()
