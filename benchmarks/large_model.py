"""A round of a model larger than the coordinator's memory: peak anonymous memory, stage by stage, under a limit.

The coordinator's own code runs whole: a site's start in pieces, its check against the hash, checkpoints, the broadcast
in pieces, the plan, the update in pieces, its check and sum, `model/` and the look at what was saved. One site is made
up: it draws random weights and a random update group by group, whenever it is asked for a piece of them, and keeps
nothing but which bytes it was sent. It lives in the coordinator's process, so what it needs counts, too; Flower, which
would carry the messages, does not take part.

Pieces are smaller in a small model: they grow to `--piece-mb` while they move. To compare sizes, hold them small.

The limit is of memory that belongs to no file (RssAnon and RssShmem of Linux), sampled every 20 ms. A coordinator
above it is killed at once, and the command fails. Pages of mapped files are the kernel's to take back.

Disk: about seven times `--gb` (two checkpoints in float32, and the sum, the update, then the model that is saved).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import OlmoeConfig

from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.encode import text_hash, tokenizer_hash
from fedalign.demo import model_folder
from fedalign.federation.flower.coordinator import Coordinator, load_bench
from fedalign.federation.flower.link import Reply
from fedalign.federation.flower.server_app import return_what_is_freed
from fedalign.federation.messages import Message, Parcel, decode, encode
from fedalign.federation.received import DIGESTS
from fedalign.federation.transfer import Transfer, entries_of, gaps, merged
from fedalign.files import fingerprint
from fedalign.maths.tensor_file import Range
from fedalign.protocol import (
    PROTOCOL,
    Broadcast,
    Fetch,
    Hello,
    Lacking,
    Layout,
    Offer,
    ParameterGroup,
    Piece,
    Plan,
    Start,
    Statistics,
    parse_group,
)
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from keeping import keep, keepable
from watching import anonymous, machine

SITE = "site"
BLOCK = 1 << 20  # values that are drawn at once
STAGES = "stages.jsonl"  # when the coordinator began what


class Lazily:
    """A group's values, of which a part is drawn when it is cut out."""

    def __init__(self, drawn: Drawn, group: ParameterGroup) -> None:
        self.drawn, self.group = drawn, group

    def numel(self) -> int:
        """How many there are."""
        return self.drawn.sizes[self.group]

    def __getitem__(self, part: slice) -> Tensor:
        first = part.start // BLOCK
        drawn = torch.cat([*self.drawn.blocks(self.group, first, -(-part.stop // BLOCK))])
        return drawn[part.start - first * BLOCK : part.stop - first * BLOCK]


class Drawn(Mapping[ParameterGroup, Any]):
    """Random values of every group, uniform in +-width, rounded to bfloat16; drawn anew whenever they are looked at."""

    def __init__(self, layout: Layout, seed: int, width: float, dtype: torch.dtype) -> None:
        self.sizes = dict(layout.sizes)
        self.seeds = {group: (seed, number) for number, group in enumerate(self.sizes)}
        self.width, self.dtype = width, dtype
        self.digests: dict[str, str] = {}

    def __getitem__(self, group: ParameterGroup) -> Lazily:
        return Lazily(self, group)

    def __iter__(self) -> Iterator[ParameterGroup]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def blocks(self, group: ParameterGroup, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Blocks `first` to `stop`, float32."""
        size = self.sizes[group]
        for block in range(first, -(-size // BLOCK) if stop is None else stop):
            count = min(BLOCK, size - block * BLOCK)
            draw = np.random.Generator(np.random.SFC64((*self.seeds[group], block)))
            values = torch.from_numpy(draw.random(count, dtype=np.float32)).sub_(0.5).mul_(2 * self.width)
            yield values.bfloat16().float()

    def cut(self, names: Sequence[str], start: int, nbytes: int) -> Tensor:
        """So many bytes of groups that follow one another, uint8."""
        found, at = torch.empty(nbytes, dtype=torch.uint8), -start  # where in it a group begins
        for group in map(parse_group, names):
            end, block_nbytes = at + self.sizes[group] * self.dtype.itemsize, BLOCK * self.dtype.itemsize
            begin, stop = max(at, 0), min(end, nbytes)
            if begin < stop:
                first = (begin - at) // block_nbytes
                at += first * block_nbytes
                for block in self.blocks(group, first, first - (at - stop) // block_nbytes):
                    drawn = block.to(self.dtype).view(torch.uint8)
                    here = slice(max(at, begin), min(at + len(drawn), stop))
                    found[here] = drawn[here.start - at : here.stop - at]
                    at += len(drawn)
            at = end
        return found

    def digest(self, name: str) -> str:
        """A group's."""
        if name not in self.digests:
            blocks = self.blocks(parse_group(name))
            self.digests[name] = fingerprint(b.to(self.dtype).view(torch.uint8).numpy().data for b in blocks)
        return self.digests[name]

    def norm_G(self) -> Tensor:
        """The length of each group, [G]."""
        squares = [sum(float(block.double().square().sum()) for block in self.blocks(group)) for group in self]
        return torch.tensor(squares).sqrt().float()


class MadeUp:
    """A `Link` to one site that draws what it sends."""

    def __init__(self, config: Config) -> None:
        bench, _ = load_bench(config)
        self.moe, self.config = bench.moe, config
        self.start = Drawn(self.moe.layout, 1, 0.05, torch.float32)
        self.update = Drawn(self.moe.layout, 2, 1e-3, torch.bfloat16)
        self.hello = Hello(
            client=SITE,
            protocol=PROTOCOL,
            version="made up",
            architecture=self.moe.fingerprint(),
            weights=self.moe.weights_hash_of(self.start, {}),
            tokenizer=tokenizer_hash(bench.tokenizer),
            chat_template=text_hash(str(bench.tokenizer.chat_template or "")),
            layers=self.moe.layout.layers,
            experts=self.moe.layout.experts,
            examples=100,
            held_out=0,
            token_counts=True,
            embeddings=True,
        )
        self.sizes = {str(group): size for group, size in self.moe.layout.sizes.items()}
        self.download: Transfer | None = None
        self.here: list[Range] = []
        self._waiting: dict[str, tuple[str, Parcel]] = {}
        self._number = 0

    def nodes(self) -> Mapping[int, str | None]:
        """The site's."""
        return {1: None}

    def ask(self, verb: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        """Note what is asked."""
        self._number += 1
        self._waiting[str(self._number)] = verb, parcel
        return {str(self._number): node for node in nodes}

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        """Answer."""
        for message in [one for one in messages if one in self._waiting]:
            verb, parcel = self._waiting.pop(message)
            yield Reply(message, encode(getattr(self, f"_{verb}")(parcel)))

    def _hello(self, _: Parcel) -> Message:
        return self.hello

    def _start(self, _: Parcel) -> Message:
        return Start(SITE, {}, {}, {name: f"float32[{size}]" for name, size in self.sizes.items()})

    def _update(self, parcel: Parcel) -> Message:
        fetch: Fetch = decode(parcel, Fetch)
        drawn = self.update if fetch.round else self.start
        data = drawn.cut(fetch.names, fetch.start, fetch.nbytes)
        digests = {name: drawn.digest(name) for name in fetch.names}
        return Piece(SITE, fetch.round, "", (), data, fingerprint([data.numpy().data]), digests)

    def _offer(self, parcel: Parcel) -> Message:
        offer: Offer = decode(parcel, Offer)
        entries = entries_of({name: self.sizes[name] for name in offer.digests}, "bfloat16")
        self.download = Transfer(Path(), entries, {DIGESTS: json.dumps(dict(offer.digests))})
        assert offer.digests == {name: self._of_start(name) for name in offer.digests}, "a broadcast of other weights"
        return self._lacking(offer.round)

    def _of_start(self, name: str) -> str:
        blocks = self.start.blocks(parse_group(name))
        return fingerprint(block.bfloat16().view(torch.uint8).numpy().data for block in blocks)

    def _piece(self, parcel: Parcel) -> Message:
        piece: Piece = decode(parcel, Piece)
        assert fingerprint([piece.data.numpy().data]) == piece.digest, "a damaged piece"
        edges = piece.ranges
        self.here = merged([*self.here, *zip(edges[::2], edges[1::2], strict=True)])
        return self._lacking(piece.round)

    def _lacking(self, round: int) -> Message:
        assert self.download is not None
        edges = tuple(edge for one in gaps(self.here, self.download.nbytes) for edge in one)
        return Lacking(SITE, round, self.download.identity, edges)

    def _train(self, parcel: Parcel) -> Message:
        broadcast: Broadcast = decode(parcel, Broadcast)
        layers, experts = self.hello.layers, self.hello.experts
        none = torch.zeros(0, 0)
        return Statistics(
            client=SITE,
            round=broadcast.round,
            examples=100,
            tokens=10_000,
            steps=1,
            learning_rate=self.config.training.learning_rate,
            loss=1.0,
            prob_L_E=torch.full((layers, experts), 1 / experts),
            load_L_E=torch.full((layers, experts), 10_000 * self.moe.top_k / experts).floor(),
            norm_G=self.update.norm_G(),
            margin_L_E=none,
            centroid_L_E_D=torch.zeros(0, 0, 0).half(),
            centroid_scale_L=torch.zeros(0),
            update_L_E_S=torch.zeros(0, 0, 0).half(),
            token_count_M_V=none,
            token_met_M_B=torch.zeros(0, 0, dtype=torch.uint8),
        )

    def _finish(self, _: Parcel) -> Message:
        return Lacking(SITE, 0, "", ())


class Stages:
    """An observer that notes when a stage begins, and after the round looks at three of its sums."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def note(self, stage: str) -> None:
        """One begins."""
        with self.file.open("a") as file:
            file.write(json.dumps([time.time(), stage]) + "\n")

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """`training` begins with the broadcast; `summing` once an update is here."""
        self.note({"training": "broadcast, training"}.get(stage, stage))

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """The updates are summed."""
        self.note("new weights, checkpoint")

    def completed(self, state: ServerState, improved: bool) -> None:
        """A round is over."""
        self.note("model/, its check" if state.round else "round 1")


def make_model(folder: Path, gigabytes: float) -> None:
    """A model's folder without weights: its configuration, and the demo's tokenizer."""
    shutil.copytree(model_folder(), folder)
    (folder / "model.safetensors").unlink()
    experts, hidden, width, words = min(48, max(8, int(48 * gigabytes))), 2048, 1024, 32_000
    layer = experts * (3 * hidden * width + hidden) + 4 * hidden * hidden
    config = OlmoeConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=max(1, round((gigabytes * 1e9 / 2 - 2 * words * hidden) / layer)),
        num_attention_heads=16,
        num_experts=experts,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
    )
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)


def coordinate(folder: Path, piece_mb: float) -> None:
    """The coordinator: one round, in this process, which gives back what it frees as Flower's ServerApp does."""
    return_what_is_freed()
    config = load_config(None, [f"model.path={folder / 'model'}", f"wire.piece_mb={piece_mb}", *OPTIONS])
    stages = Stages(folder / STAGES)
    stages.note("the site's hash")
    link = MadeUp(config)
    run = RunFolder(folder / "run")
    run.begin(config)
    stages.note("start, checkpoint")
    coordinator = Coordinator.connect(link, config, run)
    execute(coordinator, run, stages)
    stages.note("end")


OPTIONS = (
    "run.rounds=1",
    "data.labels=['odd', 'even']",
    "tuning.dtype=bfloat16",
    "algorithm.name=fedavg",
    "wire.dtype=bfloat16",
    "clients.held_out=0",
    "server.memory_gb=0",
    "tracking.loggers=[]",
    "federation.engine=flower",
    "federation.min_sites=1",
)


def watch(folder: Path, limit: float, piece_mb: float) -> dict[str, Any]:
    """Run the coordinator below a limit in bytes: the peak of each stage, seconds, and disk."""
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, __file__, "--piece-mb", str(piece_mb), "--coordinate", str(folder)]
    coordinator = subprocess.Popen(command)
    samples: deque[tuple[float, int]] = deque()
    disk, looked = 0, 0.0
    before = shutil.disk_usage(folder).free
    while coordinator.poll() is None:
        samples.append((time.time(), anonymous(coordinator.pid)))
        if samples[-1][1] > limit:
            coordinator.send_signal(signal.SIGKILL)
        if time.time() - looked > 1:
            disk, looked = max(disk, before - shutil.disk_usage(folder).free), time.time()
        time.sleep(0.02)
    begun = [json.loads(line) for line in (folder / STAGES).read_text().splitlines()]
    table: dict[str, list[float]] = {}
    for (since, stage), (until, _) in zip(begun, [*begun[1:], (time.time(), "")], strict=True):
        row = table.setdefault(stage, [0, 0])
        row[0] += until - since
        row[1] = max([row[1], *(size for when, size in samples if since <= when < until)])
    return {
        "code": coordinator.returncode,
        "stages": table,
        "peak": max(size for _, size in samples),
        "disk": disk,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=10.0, help="of the model in bfloat16")
    parser.add_argument("--limit-gb", type=float, default=2.0, help="of the coordinator's anonymous memory")
    parser.add_argument("--piece-mb", type=float, default=256.0, help="wire.piece_mb")
    parser.add_argument("--folder", type=Path, default=None, help="where it works; default: the system's for such")
    keepable(parser)
    parser.add_argument("--coordinate", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.coordinate is not None:
        coordinate(args.coordinate, args.piece_mb)
        return
    print(machine("torch", "transformers", "safetensors"))
    with tempfile.TemporaryDirectory(prefix="fedalign-large-", dir=args.folder) as name:
        make_model(Path(name) / "model", args.gb)
        found = watch(Path(name), args.limit_gb * 1e9, args.piece_mb)
    for stage, (seconds, peak) in found["stages"].items():
        print(f"  {stage:<28} {seconds:6.0f} s   peak {peak / 1e9:5.2f} GB anonymous")
    peak, limit = found["peak"] / 1e9, args.limit_gb
    print(f"whole: peak {peak:.2f} GB anonymous, limit {limit:g}; {found['disk'] / 1e9:.0f} GB of disk")
    keep(args, __file__, found, "torch", "transformers", "safetensors")
    if found["code"]:
        raise SystemExit(f"the coordinator ended with {found['code']}" + ": it was above the limit" * (peak > limit))


if __name__ == "__main__":
    main()
