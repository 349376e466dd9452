"""Transfers between real processes of Flower, some of which are killed in the middle of them.

`python -m tests.sites.transfers` kills the SuperNode, the SuperLink and the coordinator at random moments of a transfer
in each direction, ten times, and holds each run against the one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

from fedalign.client.log import SiteLog
from fedalign.federation.flower.carrier import AHEAD
from fedalign.federation.flower.loopback import SUPERLINK
from tests.conftest import save_tokenizer
from tests.moe.tiny import build
from tests.sites.conftest import Deployment, Run, deployed, merged, on_one_machine, settings

SITE = "north"
PIECE_MB = 0.06  # the model has 0.17
Victim = Literal["SuperNode", "SuperLink", "coordinator"]
VICTIMS = get_args(Victim)
VERB = {"down": "piece", "up": "update"}


def tables_for(model: Path) -> dict[str, Any]:
    """One site, one round, and messages that are cut."""
    return merged(
        settings(model),
        {"wire__piece_mb": PIECE_MB, "federation__min_sites": 1, "server__min_clients": 1},
    )


def messages(deployment: Deployment, run: Run) -> Counter[tuple[str, int]]:
    """How often the site has answered what so far, by verb and bytes of the answer."""
    key = run.path / "run-key"
    if not key.exists():
        return Counter()
    entries = [one for one in SiteLog(deployment.sites[SITE]).entries() if one.run == key.read_text()]
    return Counter((one.verb, one.bytes) for one in entries)


def answered(deployment: Deployment, run: Run, verb: str) -> int:
    """How many messages of a kind it has answered."""
    return sum(times for (kind, _), times in messages(deployment, run).items() if kind == verb)


def disturbed(deployment: Deployment, out: str, victim: Victim, way: str, after: int) -> Run:
    """A run in which somebody is killed once the site has answered so many pieces of a way; it comes to its end."""
    with deployment.started(out) as (run, command):
        command.wait(lambda: answered(deployment, run, VERB[way]) >= after, f"piece {after} {way}")
        if victim == "SuperNode":
            deployment.loopback.kill(SITE)
            deployment.again(SITE)
            assert command.finish() == 0, command.said
            return run
        if victim == "SuperLink":
            deployment.loopback.kill(SUPERLINK)
            deployment.loopback.start_superlink()
        else:
            assert deployment.loopback.kill_app(SUPERLINK)
        command.finish()
    deployment.resume(run)
    return run


def assert_as_undisturbed(deployment: Deployment, run: Run, whole: Run) -> None:
    """The same model; and no more came twice than the pieces that were under way.

    Replies that a SuperLink holds for a killed coordinator are lost: the resumed one is another run of Flower's.
    """
    assert run.model == whole.model
    assert run.failures() == []
    for way, verb in VERB.items():
        more = answered(deployment, run, verb) - answered(deployment, whole, verb)
        assert more <= AHEAD + (way == "up"), (verb, more)  # up, one more asks whether what is here is still the same


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=10, help="of each victim and way")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--ways", nargs="+", choices=list(VERB), default=list(VERB))
    parser.add_argument("--seed", type=int, default=0)
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
                        after = chance.randint(1, answered(deployment, whole, VERB[way]) - 1)
                        run = disturbed(deployment, f"{victim}-{way}-{number}", victim, way, after)
                        assert_as_undisturbed(deployment, run, whole)
                        print(
                            f"{number + 1} of {args.moments}: {victim} killed after piece {after} {way}: as undisturbed"
                        )


if __name__ == "__main__":
    main()
