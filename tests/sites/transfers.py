"""Transfers between real processes of Flower, some of which are killed in the middle of them.

`python -m tests.sites.transfers` kills the SuperNode, the SuperLink and the coordinator at random moments of a transfer
in each direction, ten times, and holds each run against the one that nobody disturbed. With `--keep` each is a line of
benchmarks/results/transfers.jsonl.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedalign.client.log import SiteLog
from fedalign.federation.flower.carrier import AHEAD
from fedalign.federation.flower.loopback import SUPERLINK
from tests.conftest import save_tokenizer
from tests.moe.tiny import build
from tests.sites.conftest import Command, Deployment, Run, deployed, merged, on_one_machine, settings

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from keeping import keep, keepable

SITE = "north"
PIECE_MB = 0.06  # the model has 0.17
Victim = Literal["SuperNode", "SuperLink", "coordinator"]
VICTIMS = get_args(Victim)
VERB = {"down": "piece", "up": "update"}
SMALL = 1000  # bytes, at most, of the answer to a question whether what is here is still the same


@dataclass(frozen=True)
class Kill:
    """Who is killed, once the site has answered so many pieces of a way."""

    victim: Victim
    way: str
    after: int = 1


def tables_for(model: Path) -> dict[str, Any]:
    """One site, one round, and messages that are cut."""
    return merged(
        settings(model),
        {"wire__piece_mb": PIECE_MB, "federation__min_sites": 1, "server__min_clients": 1},
    )


def answers(deployment: Deployment, run: Run, way: str) -> list[int]:
    """Bytes of each of the site's answers so far to the messages of a way."""
    key = run.path / "run-key"
    if not key.exists():
        return []
    entries = SiteLog(deployment.sites[SITE]).entries()
    return [one.bytes for one in entries if (one.run, one.verb) == (key.read_text(), VERB[way])]


def disturbed(deployment: Deployment, out: str, *kills: Kill) -> Run:
    """A run with kills, one after another, that is gone on with after each; it comes to its end."""
    with deployment.started(out) as (run, command):
        is_over = struck(deployment, run, command, kills[0])
    for kill in kills[1:]:
        with deployment.command("run", "--resume", run.path) as command:
            is_over = struck(deployment, run, command, kill)
    if not is_over:
        deployment.resume(run)
    return run


def struck(deployment: Deployment, run: Run, command: Command, kill: Kill) -> bool:
    """Kill somebody in the midst of a transfer; whether the run came to its end all the same."""
    command.wait(lambda: len(answers(deployment, run, kill.way)) >= kill.after, f"piece {kill.after} {kill.way}")
    if kill.victim == "SuperNode":
        deployment.loopback.kill(SITE)
        deployment.again(SITE)
        assert command.finish() == 0, command.said
        return True
    if kill.victim == "SuperLink":
        deployment.loopback.kill(SUPERLINK)
        deployment.loopback.start_superlink()
    else:
        assert deployment.loopback.kill_app(SUPERLINK)
    command.finish()
    return False


def compared(deployment: Deployment, run: Run, whole: Run) -> dict[str, Any]:
    """A run beside the one that nobody disturbed: is the model the same, and how many bytes were sent twice.

    Up the site counts what it sends, since replies that a SuperLink holds for a killed coordinator are lost: the
    resumed one is another run of Flower's. Down the coordinator does.
    """
    up, once = answers(deployment, run, "up"), answers(deployment, whole, "up")
    return {
        "same_model": run.model == whole.model,
        "failures": run.failures(),
        "twice_up": sum(up) - sum(once),
        "twice_down": sum(line["bytes_down"] for line in run.lines) - sum(line["bytes_down"] for line in whole.lines),
        "largest_piece": max(once),  # as the site answered it, with its head
    }


def assert_as_undisturbed(found: Mapping[str, Any]) -> None:
    """The same model; and no more came twice than the pieces that were under way."""
    assert found["same_model"]
    assert found["failures"] == []
    most = AHEAD * max(found["largest_piece"], 1e6 * PIECE_MB) + SMALL  # less than the update, or the weights
    assert found["twice_up"] <= most, found
    assert found["twice_down"] <= most, found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=10, help="of each victim and way")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--ways", nargs="+", choices=list(VERB), default=list(VERB))
    parser.add_argument("--seed", type=int, default=0)
    keepable(parser)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="fedalign-transfers-") as name:
        folder = Path(name)
        build("olmoe", vocab_size=384).save_pretrained(folder / "olmoe")
        save_tokenizer(folder / "olmoe")
        tables = tables_for(folder / "olmoe")
        here = on_one_machine(folder / "here", "in_process", tables, (SITE,))
        with deployed(folder / "deployed", tables, secure=False) as deployment:
            deployment.add(SITE, warm=True)
            deployment.wait_online()
            whole, _ = deployment.run("whole")
            assert whole.model == here.model
            for number in range(args.moments):
                for way in args.ways:
                    for victim in args.victims:
                        after = chance.randint(1, len(answers(deployment, whole, way)) - 1)
                        kill = Kill(victim, way, after)
                        run = disturbed(deployment, f"{victim}-{way}-{number}", kill)
                        found = asdict(kill) | compared(deployment, run, whole)
                        print(f"{number + 1} of {args.moments}: {found}", flush=True)
                        keep(args, __file__, found, "torch", "transformers", "flwr")
                        assert_as_undisturbed(found)


if __name__ == "__main__":
    main()
