"""Masked sums: bytes, seconds and memory of one client beside its training, and what 16 bits leave of the sum.

    python benchmarks/masked.py                 # both tables
    python benchmarks/masked.py --only cost --peers 9 --megabytes 100

**Cost.** One client of 1 + PEERS conceals a whole round: its counts, with the heights of each block, then its update,
by the code that a round runs. The update lies in memory. Seconds are medians of REPEATS; both parts have the hash of
the update, under which a mask is used once. Memory is the peak above the update, a process a row; it grows with the
largest group, 2 bytes a value. Bytes are compared with int8 unmasked, which has a scale for each 256 values, and with
float32.
`sum` is the server's: it adds one client's message.

**Error.** Bits of signal: log2 of the sum's root mean square over that of its error. Clients' updates have nothing in
common, which is the smallest sum. *even*: normal values; *uneven*: each block's scale is another (log-normal, a factor
of e up or down); *one row*: of each block one client alone trained 64 values of 4,096. Limits: the group's norm, which
no value can exceed, one a group; the largest value of any client, one a group; 8 root mean squares of a block, of the
sum of clients' squares; and the largest height of a block, which rounds use. In brackets: values beyond their limit, of
those that moved.
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fedalign.client.memory import ClientMemory
from fedalign.federation.masked_site import MaskedSite, Terms
from fedalign.federation.masks import Masks, Once, fresh_key, public_key
from fedalign.maths.fixed_point import BLOCK, LEVELS, MOST_CLIENTS, decode, encode, heights, limits
from fedalign.maths.rounding import packed_nbytes
from fedalign.protocol import LOSS, Concealed, Layout, ParameterGroup, Shares, Statistics, Totals
from keeping import keep, keepable
from watching import machine

LAYERS, EXPERTS = 4, 16
KINDS = ("even", "uneven", "one row")
LIMITS = ("norm", "largest of group", "8 rms of block", "height of block")


class Site(MaskedSite):
    """A client whose update lies in memory."""

    update: dict[ParameterGroup, Tensor]

    def _update(self, round: int) -> dict[ParameterGroup, Tensor]:
        return {group: values for group, values in self.update.items() if len(values)}


def layout_of(values: int) -> Layout:
    """A tenth of the values shared, the rest in experts."""
    cells = LAYERS * EXPERTS
    size = {"shared": values // 10, "expert": (values - values // 10) // cells}
    return Layout(LAYERS, EXPERTS, {group: size.get(group.kind, 0) for group in Layout(LAYERS, EXPERTS, {}).groups})


def site_of(layout: Layout, peers: int) -> tuple[Site, tuple[str, ...]]:
    """A client with an update, and the names of all."""
    among = tuple(f"site-{number:03}" for number in range(peers + 1))
    terms = Terms(layout, Shares(), 3, {LOSS}, seed=0, settings="")
    once = Once(among[0], "benchmark", 3, MOST_CLIENTS)
    site = Site(among[0], ClientMemory(Path()), terms, Masks(among[0], once.run, once.key, 3), once)
    site.masks.meet({name: public_key(fresh_key()) for name in among[1:]})
    generator = torch.Generator().manual_seed(0)
    site.update = {
        group: torch.empty(size).normal_(0, 1e-3, generator=generator) for group, size in layout.sizes.items()
    }
    return site, among


def report_of(layout: Layout, round: int) -> Statistics:
    """A round's report of a client whose algorithm asks for examples alone."""
    none, cells = torch.empty(0), torch.ones(layout.layers, layout.experts)
    return Statistics(
        "site-000", round, 100, 1000, 10, 1e-3, 1.0, cells, cells, torch.ones(len(layout.groups)),
        none, none, none, none, none, none,
    )  # fmt: skip


def cost(args: argparse.Namespace, peers: int) -> str:
    """A row."""
    layout = layout_of(args.megabytes * 1_000_000 // 4)
    values = sum(layout.sizes.values())
    site, among = site_of(layout, peers)
    groups = [group for group, size in layout.sizes.items() if size]
    peak, counting, concealing, adding, nbytes = peak_bytes(), [], [], [], 0
    for round in range(1, args.repeats + 1):
        start = time.perf_counter()
        counted = site.count(report_of(layout, round), "broadcast", among)
        counting.append(time.perf_counter() - start)
        totals, concealing_s, adding_s, nbytes = Totals(round, among, dict(site.counts)), 0.0, 0.0, counted.nbytes
        messages = site.conceal(totals, among, groups)
        while True:
            start = time.perf_counter()
            message = next(messages, None)
            concealing_s += time.perf_counter() - start
            if message is None:
                break
            nbytes += message.nbytes
            adding_s += added(message)
        concealing.append(concealing_s)
        adding.append(adding_s)
    above = peak_bytes() - peak
    whole = stats.median(a + b for a, b in zip(counting, concealing, strict=True))
    int8 = sum(packed_nbytes(size, "int8") for size in layout.sizes.values())
    found = {
        "peers": peers,
        "values": values,
        "bytes": nbytes,
        "seconds": {"counts": counting, "update": concealing, "sum": adding},
        "peak_mib_above": above / 2**20,
    }
    keep(args, __file__, found, "torch", "cryptography")
    return (
        f"| {peers} | {values:,} | {nbytes / 1e6:.1f} | {nbytes / values:.3f} | {nbytes / int8:.2f} | "
        f"{nbytes / (4 * values):.2f} | {stats.median(counting):.2f} | {stats.median(concealing):.2f} | {whole:.2f} | "
        f"{stats.median(adding):.3f} | {above / 2**20:,.0f} |"
    )


def added(message: Concealed) -> float:
    """Seconds that the server takes to add a message to a sum."""
    sums = {name: torch.zeros_like(residues) for name, residues in message.residues.items()}
    start = time.perf_counter()
    for name, residues in message.residues.items():
        sums[name] += residues
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def updates(kind: str, size: int, clients: int) -> Iterator[Tensor]:
    """Of each client, one after another, the same each time."""
    scale = torch.empty(-(-size // BLOCK)).log_normal_(0, 1, generator=torch.Generator().manual_seed(1))
    for client in range(clients):
        values = torch.empty(size).normal_(0, 1e-3, generator=torch.Generator().manual_seed(100 + client))
        if kind == "uneven":
            values *= scale.repeat_interleave(BLOCK)[:size]
        if kind == "one row":
            values *= (torch.arange(size) % BLOCK < 64) if client == 0 else 0
        yield values


def error(kind: str, size: int, clients: int, rule: str) -> tuple[float, float]:
    """Bits of signal, and the share of values that were clipped."""
    limit_B = limit_of(rule, lambda: updates(kind, size, clients))
    total, exact, clipped = torch.zeros(size, dtype=torch.int16), torch.zeros(size, dtype=torch.float64), 0
    weight = torch.tensor(1 / clients).expand(size)
    for client, update in enumerate(updates(kind, size, clients)):
        residues, cut = encode(update * weight, weight, limit_B, seed=client)
        total += residues
        clipped += cut
        exact += (update * weight).double()
    off = decode(total, limit_B).double().sub_(exact).norm()
    moved = size * clients if kind != "one row" else size * 64 / BLOCK
    return math.log2(float(exact.norm() / off)), clipped / moved


def limit_of(rule: str, every: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Limit of each block by a rule."""
    if rule == "height of block":
        return limits(torch.stack([heights(update) for update in every()]).amax(0))
    if rule == "8 rms of block":
        squares = [torch.stack([b.double().square().mean() for b in update.split(BLOCK)]) for update in every()]
        return 8 * torch.stack(squares).sum(0).sqrt()
    norm = rule == "norm"
    most = max(float(update.double().norm() if norm else update.abs().amax()) for update in every())
    most *= 1 + 1e-6  # weight times value is rounded
    return torch.full((-(-len(next(every())) // BLOCK),), most, dtype=torch.float64)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["cost", "error"])
    parser.add_argument("--peers", type=int, nargs="+", default=[9, 49])
    parser.add_argument("--megabytes", type=int, default=100, help="size of the update in float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 25_000_000])
    parser.add_argument("--clients", type=int, nargs="+", default=[10])
    keepable(parser)
    parser.add_argument("--row", action="store_true", help="print one bare row (what the script calls itself with)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        print(cost(args, args.peers[0]))
        return
    print(f"{machine('torch', 'cryptography')}, {args.threads} threads\n")
    if args.only != "error":
        print(
            "| peers | values | MB up | bytes/value | to int8 | to float32 | counts, s | update, s | both, s | sum, s "
            "| MiB |"
        )
        print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
        for peers in args.peers:
            subprocess.run([sys.executable, *sys.argv, "--row", "--peers", str(peers)], check=True)
        print()
    if args.only != "cost":
        print(f"| values | clients | update | {' | '.join(LIMITS)} |\n|--:|--:|:--|{'--:|' * len(LIMITS)}")
        for clients in args.clients:
            for size in args.sizes:
                for kind in KINDS:
                    found = {rule: error(kind, size, clients, rule) for rule in LIMITS}
                    cells = [f"{bits:.1f}" + (f" ({share:.1%})" if share else "") for bits, share in found.values()]
                    print(f"| {size:,} | {clients} | {kind} | {' | '.join(cells)} |", flush=True)
                    row = {"sizes": [size], "clients": [clients], "update": kind, "bits_and_clipped": found}
                    keep(args, __file__, row, "torch", "cryptography")
        print(f"\n{LEVELS} steps from zero to a limit")


if __name__ == "__main__":
    main()
