"""Speed and memory of the streaming sum, against a plain memory copy in the same run.

GB/s counts the bytes of the updates as they travel, once: a 500 MB update that is summed in 0.05 s makes 10 GB/s, and
so does a 500 MB tensor copied in 0.05 s. The sum moves more than the copy for each of those bytes: it reads the update
twice (all of a group is checked before any of it is added), reads the sum and writes it (16 bytes a float32 value; a
copy moves 8). `add` is the bare `sum.add_(update)` without any check. All three run alternately; ratios are to the
copy, taken pair by pair.

`--busy` starts as many processes that only count as there are processors, so that no thread ever has a core to itself:
what threads lose that wait for each other is seen there.

All clients send the same few buffers, so that peak memory measures the sum and not the data. Each number of clients has
a process of its own: a process never forgets its peak.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics as stats
import subprocess
import sys
import time

import torch
from torch import Tensor

from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack
from fedalign.protocol import SHARED, Layout, Packed, ParameterGroup, Plan, Update, WireDtype
from keeping import keep, keepable


def layout_of(megabytes: int, layers: int, experts: int) -> Layout:
    """A float32 model of the given size: a tenth of it shared, router rows of 1,024 values, the rest experts."""
    values = megabytes * 1_000_000 // 4
    cells = layers * experts
    size = {"shared": values // 10, "gate": 1024, "expert": (values - values // 10) // cells - 1024}
    return Layout(layers, experts, {group: size.get(group.kind, 0) for group in Layout(layers, experts, {}).groups})


def payload(layout: Layout, dtype: WireDtype, seed: int) -> tuple[dict[ParameterGroup, Packed], Tensor]:
    """One client's update and the norms it claims."""
    generator = torch.Generator().manual_seed(seed)
    groups, norms = {}, []
    for group in layout.groups:
        values = torch.randn(layout.sizes[group], generator=generator)
        if layout.sizes[group]:
            groups[group] = pack(values, dtype, seed)
        norms.append(float(values.norm()))
    return groups, torch.tensor(norms)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(args: argparse.Namespace, clients: int) -> str:
    """One row of the table."""
    torch.set_num_threads(args.threads)
    layout = layout_of(args.megabytes, args.layers, args.experts)
    payloads = [payload(layout, args.dtype, args.seed + i) for i in range(2)]
    names = tuple(f"client-{c}" for c in range(clients))
    plan = Plan(names, torch.full((clients, len(layout.groups)), 1 / clients))
    nbytes = sum(packed.nbytes for packed in payloads[0][0].values())
    source = torch.ones(nbytes // 4)
    copy = source.clone()
    total = StreamingSum(layout, plan, {n: payloads[c % 2][1] for c, n in enumerate(names)}, args.dtype)
    sums, copies, adds = [], [], []
    for c, name in enumerate(names):
        start = time.perf_counter()
        failure = total.add(Update(name, 1, payloads[c % 2][0]))
        middle = time.perf_counter()
        copy.copy_(source)
        sums.append(nbytes / 1e9 / (middle - start))
        end = time.perf_counter()
        copy.add_(source, alpha=0.5)
        adds.append(nbytes / 1e9 / (time.perf_counter() - end))
        copies.append(nbytes / 1e9 / (end - middle))
        if failure is not None:
            raise SystemExit(str(failure))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    old = {group: torch.zeros(size) for group, size in layout.sizes.items()}
    new = total.result(old)
    expected = sum(payloads[c % 2][0][SHARED].values[:1].double() for c in range(clients)) / clients
    if args.dtype == "float32" and not torch.allclose(new[SHARED][:1].double(), torch.as_tensor(expected), atol=1e-6):
        raise SystemExit("the sum is wrong")
    # the first update meets a sum that has no memory yet: it stays out of the median, and is in the whole
    ratios = sorted(s / c for s, c in zip(sums[1:], copies[1:], strict=True))
    bare = stats.median(a / c for a, c in zip(adds[1:], copies[1:], strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    spread = f"{low:.2f}-{high:.2f}"
    overall = nbytes * clients / 1e9 / sum(nbytes / 1e9 / s for s in sums)
    found = {
        "clients": clients,
        "gb_s": {"sum": stats.median(sums[1:]), "copy": stats.median(copies[1:]), "overall": overall},
        "ratio": {"median": stats.median(ratios), "p10": low, "p90": high, "add": bare},
        "peak_mib": peak / 2**20,
    }
    keep(args, __file__, found, "torch")
    return (
        f"{clients:>7}{nbytes / 1e6:>11.0f}{stats.median(sums[1:]):>10.1f}{stats.median(copies[1:]):>11.1f}"
        f"{stats.median(ratios):>8.2f}{spread:>13}{bare:>7.2f}{overall:>13.1f}{peak / 2**20:>10,.0f} MiB"
    )


def main() -> None:
    """Print a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--megabytes", type=int, default=500, help="size of the model in float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", action="store_true", help="keep every processor at work meanwhile")
    keepable(parser)
    parser.add_argument("--row", action="store_true", help="print one bare row (what the script calls itself with)")
    args = parser.parse_args()
    if args.row:
        print(measure(args, args.clients[0]))
        return
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, seed {args.seed}")
    busy = f", {processors()} other processes at work" if args.busy else ""
    print(
        f"{args.megabytes} MB float32 model, {args.layers} layers x {args.experts} experts, sent as {args.dtype}{busy}"
    )
    print(
        "clients  MB/client  sum GB/s  copy GB/s   ratio   p10-p90    add   overall GB/s   peak memory of the process"
    )
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy * processors())]
    try:
        for clients in args.clients:
            subprocess.run([sys.executable, *sys.argv, "--row", "--clients", str(clients)], check=True)
    finally:
        for process in spinning:
            process.kill()


if __name__ == "__main__":
    main()
