"""Sites behind Flower: who is there and fits, what they are asked, and what becomes of those that do not answer.

A site is asked for a `Hello` when its node first appears; one whose model, tokenizer, layout or protocol differs is
refused with the reason. From then on a silent, dead or late site costs its share of a round, never the round. Every
fault has a name: see `faults`.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedalign.config.run import FederationConfig
from fedalign.errors import UserError
from fedalign.federation.flower.carrier import NOTHING, Cargo, Carrier, read
from fedalign.federation.flower.link import Link, Reply
from fedalign.federation.flower.programs import register_command
from fedalign.federation.flower.talks import Ask, Talks
from fedalign.federation.masks import is_public_key
from fedalign.federation.messages import VERBS, Parcel
from fedalign.protocol import (
    PROTOCOL,
    Accumulator,
    Broadcast,
    Evaluation,
    Failure,
    Hello,
    Moved,
    Request,
    Stage,
    Start,
    Statistics,
    Update,
    summed,
)

log = logging.getLogger("fedalign")

UNHEARD = "A site that stays so is busy with another run, or its SuperNode has to be started again."
MOST = 10**15  # examples of a site whose labels are counted: sums over sites are sent on as 64 bits
MASK_KEY, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("([0-9a-f]{2}){0,160}")
FAREWELL = 30.0  # seconds in which sites may hear that the run is complete


@dataclass(frozen=True)
class Agreement:
    """The facts that every site must have in common with the coordinator; hashes as in `Hello`."""

    architecture: str
    tokenizer: str
    chat_template: str
    layers: int
    experts: int
    weights: str | None  # None: what most of the first sites have
    labels: int = 0  # of which a site that consents tells how many examples each has
    masked: bool = False  # whether what leaves sites is concealed
    only: Sequence[str] = ()  # names of those that take part; empty: all

    def refusal(self, hello: Hello) -> str | None:
        """Why a site may not take part, or None."""
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this is {PROTOCOL}: install the same version"
        if self.only and hello.client not in self.only:
            return f"it takes no part in this run: clients.only = {', '.join(self.only)}"
        for name, its, mine in (
            ("MoE layout differs", _layout(hello.layers, hello.experts), _layout(self.layers, self.experts)),
            ("model architecture differs", hello.architecture, self.architecture),
            ("model weights differ", hello.weights, self.weights),
            ("tokenizer differs", hello.tokenizer, self.tokenizer),
            ("chat template differs", hello.chat_template, self.chat_template),
        ):
            if mine not in (None, its):
                return f"its {name}: {its:.24}, the coordinator's is {mine:.24}"
        return self._labels_refusal(hello) or self._mask_refusal(hello)

    def _mask_refusal(self, hello: Hello) -> str | None:
        """Why a site's mask key is none; that it is whose it says sites check themselves."""
        if not self.masked:
            return None
        key, signature = hello.mask_key, hello.mask_signature
        if not MASK_KEY.fullmatch(key) or not SIGNATURE.fullmatch(signature):
            return f"its mask key {key!r:.24} or the signature of it is none"
        if not is_public_key(bytes.fromhex(key)):
            return f"its mask key {key!r:.24} is no X25519 public key"
        return "it tells how many examples it has, in a masked run" if hello.examples or hello.held_out else None

    def _labels_refusal(self, hello: Hello) -> str | None:
        """Why a site's counts of labels cannot be: it has no more of them than examples, and tells them if it says."""
        count = self.labels if hello.token_counts else 0
        if len(hello.labels) != count:
            return f"it tells {len(hello.labels)} counts of labels, expected {count}"
        if hello.labels and (min(hello.labels) < 0 or not sum(hello.labels) <= hello.examples <= MOST):
            return f"its counts of labels are none that {hello.examples} examples can have"
        return None


@dataclass
class Site:
    """The facts known of an accepted site."""

    hello: Hello
    node: int
    missed: int = 0  # rounds in a row
    left_out: bool = False  # for good


@dataclass(frozen=True)
class Late:
    """A message whose reply did not come in time."""

    site: str
    stage: Stage
    round: int
    asked: float


@dataclass(frozen=True)
class Refusal:
    """Why a node may not take part, as long as all these nodes are connected."""

    reason: str
    among: frozenset[int]


@dataclass
class Door:
    """Nodes on their way in."""

    asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # message id -> node, when
    refused: dict[int, Refusal] = field(default_factory=dict)  # by node


class FlowerFederation:
    """A `protocol.Federation` of Flower nodes.

    Args:
        link: messages over Flower's grid.
        policy: minimum of sites, timeouts, what becomes of late ones.
        agreement: what sites must have in common.
        cargo: the weights and updates that travel.
        pause: seconds between two looks at what has arrived, at most.
    """

    def __init__(
        self, link: Link, policy: FederationConfig, agreement: Agreement, cargo: Cargo, pause: float = 0.5
    ) -> None:
        self.link = link
        self.policy = policy
        self.agreement = agreement
        self.sites: dict[str, Site] = {}
        self._pause = pause
        self._door = Door()
        self._late: dict[str, Late] = {}
        self._faults: list[Failure] = []
        self._round = 0
        self._talks = Talks(link, self._node, policy.timeout_seconds, pause, self._silent)
        self._carrier = Carrier(cargo, policy.timeout_seconds, self._node, self._where)

    def tell_transfers(self, tell: Callable[[str], None]) -> None:
        """Let somebody know how transfers go: how much has moved, how fast, and how long it will take."""
        self._carrier.tell = tell

    def _node(self, name: str) -> int:
        return self.sites[name].node

    def _where(self, name: str) -> int | None:
        """The node of a site, if it is connected now; one that has come back as another is let in."""
        self._let_in()
        node = self.sites[name].node
        return node if node in set(self.link.nodes()) else None

    def members(self) -> Sequence[str]:
        """The sites that are connected and fit, by name; waits for `min_sites` of them.

        Raises:
            UserError: There are too few after `wait_seconds`.
        """
        started = time.monotonic()
        while True:
            self._let_in()
            self._hear_late()
            nodes = set(self.link.nodes())
            present = [name for name, site in sorted(self.sites.items()) if self._why_not(site, nodes) is None]
            waited = time.monotonic() - started
            knocking = any(
                asked > time.monotonic() - self.policy.wait_seconds for _, asked in self._door.asked.values()
            )
            if len(present) >= self.policy.min_sites and not knocking:
                self._faults += self._absent(nodes)
                return present
            if waited > self.policy.wait_seconds:
                raise UserError(self._too_few(present))
            time.sleep(self._pause)

    def labels(self) -> tuple[int, ...]:
        """Examples of each label at all sites that have joined and tell it."""
        return summed(site.hello.labels for site in self.sites.values())

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        """Local training at all of them at once; replies as they come, until the timeout."""
        self._begin(broadcast.round, clients)
        for name, answer in self._talks.hold(self._carrier.broadcast("train", broadcast, clients, Statistics)):
            hello = self.sites[name].hello
            reply = self._within("train", answer, hello.examples)
            if isinstance(reply, Statistics):
                self.sites[reply.client].missed = 0
                if broadcast.score and (flaw := _score_flaw(reply.held_out, hello.held_out)):
                    yield Failure(reply.client, "evaluate", flaw)
                    reply = replace(reply, held_out=0)
            else:
                self._count_missed(reply.client)
            yield reply

    def _begin(self, round: int, clients: Sequence[str]) -> None:
        """A round of these clients begins; of the others those miss it that cannot be asked."""
        self._round = round
        for absent in self._absent(set(self.link.nodes())):
            if absent.client not in clients:
                self._count_missed(absent.client)

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Evaluation | Failure]:
        """Scores of all sites that hold something out."""
        self._round = broadcast.round
        able = [client for client in clients if self.sites[client].hello.held_out]
        for name, answer in self._talks.hold(self._carrier.broadcast("evaluate", broadcast, able, Evaluation)):
            yield self._within("evaluate", answer, self.sites[name].hello.held_out)

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        """Updates in the order of `requests`, so that the sum is the same each time; a few are fetched at a time.

        What arrives is kept on disk until the round is complete: another sum of it moves nothing.
        """
        answers: dict[str, Update | Failure] = {}
        order, failures = deque(request.client for request in requests), list[Failure]()
        self._round = next((request.round for request in requests), self._round)
        for name, update in self._talks.hold(map(self._carrier.update, requests), self.policy.in_flight):
            answers[name] = update
            while order and order[0] in answers:
                answer = answers.pop(order.popleft())
                failure = answer if isinstance(answer, Failure) else accumulator.add(answer)
                failures += [failure] if failure else []
        return failures

    def moved(self, round: int) -> Moved:
        """Bytes that a round has moved so far, those before a restart included."""
        return self._carrier.ledger.of(round)

    def faults(self) -> list[Failure]:
        """Sites refused, gone, late or left out since this was last asked."""
        faults, self._faults = self._faults, []
        return list(dict.fromkeys(faults))

    def start(self) -> Start:
        """The weights that the first round starts from, of the first site that can send them.

        Raises:
            UserError: None can.
        """
        reasons = []
        for name in self.members():
            for _, answer in self._talks.hold([(name, self._carrier.start(name))]):
                if isinstance(answer, Start):
                    return answer
                reasons.append(f"{name}: {answer.reason}")
        raise UserError(f"no site could send the weights to start from: {'; '.join(reasons)}")

    def finish(self) -> None:
        """Tell the sites that the run is complete, and wait a moment for them to have heard."""
        nodes = set(self.link.nodes())
        asked = [self._ask("finish", NOTHING, name) for name, site in self.sites.items() if site.node in nodes]
        for message, since in asked:
            self._wait(message, since)
        self._carrier.forget()

    # -------------------------------------------------------------------------------------------------- membership

    def _let_in(self) -> None:
        """Greet nodes that are new, and admit or refuse those that have answered."""
        nodes = self.link.nodes()  # what is gone may have been mended when it comes back
        self._door.refused = {n: refusal for n, refusal in self._door.refused.items() if refusal.among <= set(nodes)}
        self._door.asked = {message: asked for message, asked in self._door.asked.items() if asked[0] in nodes}
        known = {site.node for site in self.sites.values()} | {node for node, _ in self._door.asked.values()}
        new = [node for node in nodes if node not in known and node not in self._door.refused]
        if new:
            now = time.monotonic()
            self._door.asked |= {message: (node, now) for message, node in self.link.ask("hello", NOTHING, new).items()}
        answers = []
        for reply in self.link.replies(list(self._door.asked)):
            node, _ = self._door.asked.pop(reply.message)
            answer = self._read("", "join", reply, Hello)
            if isinstance(answer, Hello):
                answers.append((node, answer))
            else:
                self._refuse(node, nodes.get(node) or answer.client or f"node {node}", answer.reason)
        for node, hello in sorted(answers, key=lambda answer: answer[1].client):
            self._admit(node, hello, nodes.get(node))

    def _admit(self, node: int, hello: Hello, registered: str | None) -> None:
        if (reason := self._name_refusal(hello.client, registered)) is not None:
            self._refuse(node, registered or f"node {node}", reason)
            return
        there = self.sites.get(hello.client)
        if there is not None and there.node != node and there.node in set(self.link.nodes()):
            self._refuse(node, hello.client, "another connected site has the same name", there.node)
            return
        reason = self.agreement.refusal(hello) or self._key_refusal(hello)
        if reason is not None:
            self._refuse(node, hello.client, reason)
            return
        self.sites[hello.client] = replace(there, hello=hello, node=node) if there else Site(hello, node)
        log.info("%s has joined%s", hello.client, f" with {hello.examples} examples" if hello.examples else "")

    def _key_refusal(self, hello: Hello) -> str | None:
        """Why a site may not have its mask key: it would end the round of whoever is handed both."""
        others = (site.hello for name, site in self.sites.items() if name != hello.client)
        same = next((other.client for other in others if other.mask_key == hello.mask_key != ""), None)
        return f"its mask key is that of {same}" if same else None

    def _name_refusal(self, name: str, registered: str | None) -> str | None:
        """Why a site may not be called so: who holds a key has the name that the key was registered with."""
        if registered is None:
            keyless = self.policy.engine != "flower" or self.policy.root_certificates is None
            remedy = f"it calls itself {name!r}, and its key was registered without a name: {register_command(name)}"
            return None if keyless else remedy
        return None if name == registered else f"it calls itself {name!r}, and its key was registered as {registered!r}"

    def settle_weights(self) -> str:
        """Agree on the weights that most sites have, and refuse the others; the hash that was settled on.

        Raises:
            UserError: As many sites have one as another.
        """
        if self.agreement.weights is None:
            self.members()
            counts = Counter(site.hello.weights for site in self.sites.values())
            (weights, most), *others = counts.most_common()
            if others and others[0][1] == most:
                held = "; ".join(f"{site.hello.client} has {site.hello.weights}" for site in self.sites.values())
                raise UserError(f"sites disagree about the model's weights: {held}. Set model.weights_hash to one.")
            self.agreement = replace(self.agreement, weights=weights)
            for name, site in list(self.sites.items()):
                reason = self.agreement.refusal(site.hello)
                if reason is not None:
                    del self.sites[name]
                    self._refuse(site.node, name, reason)
        return str(self.agreement.weights)

    def _refuse(self, node: int, name: str, reason: str, *because_of: int) -> None:
        log.warning("%s was refused: %s", name, reason)
        self._door.refused[node] = Refusal(f"{name}: {reason}", frozenset({node, *because_of}))
        self._faults.append(Failure(name, "join", f"refused: {reason}"))

    def _why_not(self, site: Site, nodes: set[int]) -> str | None:
        """Why a site cannot be asked now, or None."""
        if site.left_out:
            return "left out for good"
        if site.node not in nodes:
            return "not connected"
        late = [late for late in self._late.values() if late.site == site.hello.client]
        if late and self.policy.late == "leave_out":
            return f"left out until its reply of round {late[0].round} is there (federation.late)"
        return None

    def _absent(self, nodes: set[int]) -> list[Failure]:
        """Sites that belong to the run and cannot be asked now."""
        reasons = {name: self._why_not(site, nodes) for name, site in self.sites.items() if not site.left_out}
        return [Failure(name, "join", reason) for name, reason in reasons.items() if reason is not None]

    def _count_missed(self, name: str) -> None:
        """A site has missed a round; too many in a row, and it is left out."""
        site = self.sites[name]
        site.missed += 1
        if 0 < self.policy.max_missed < site.missed and not site.left_out:
            site.left_out = True
            reason = f"left out for good: missed {site.missed} rounds in a row, federation.max_missed = "
            self._faults.append(Failure(name, "join", f"{reason}{self.policy.max_missed}"))

    def _too_few(self, present: Sequence[str]) -> str:
        refused = "; ".join(refusal.reason for refusal in self._door.refused.values())
        out = ", ".join(name for name, site in self.sites.items() if site.left_out)
        unheard = len(self._door.asked)
        return (
            f"{len(present)} sites are connected and fit, federation.min_sites = {self.policy.min_sites} are needed; "
            f"waited {self.policy.wait_seconds} s (federation.wait_seconds)."
            + (f" Connected, but not heard yet: {unheard}. {UNHEARD}" if unheard else "")
            + (f" Refused: {refused}." if refused else "")
            + (f" Left out: {out}." if out else "")
            + " Run `fedalign doctor` at the sites; complete rounds are kept."
        )

    # ---------------------------------------------------------------------------------------------------- messages

    def _ask(self, verb: str, parcel: Parcel, name: str) -> tuple[str | None, float]:
        """Ask one site; None if it is not there to be asked."""
        message = next(iter(self.link.ask(verb, parcel, [self.sites[name].node])), None)
        return message, time.monotonic()

    def _within(self, stage: Stage, answer: Any, most: int) -> Any:
        """A site's answer, if it counts no more examples than it had when it joined: they are its weight."""
        if isinstance(answer, Failure) or answer.examples <= most:
            return answer
        return Failure(answer.client, stage, f"examples = {answer.examples}: when it joined it had {most}")

    def _wait(self, message: str | None, since: float) -> None:
        """Until a message was answered, or a moment has passed."""
        pause = self._pause / 8
        while message and not list(self.link.replies([message])) and time.monotonic() - since < FAREWELL:
            time.sleep(pause)
            pause = min(pause * 1.5, self._pause)

    def _silent(self, message: str, name: str, ask: Ask, asked: float) -> None:
        """Remember what was not answered in time; of a piece another will be asked for."""
        if ask.verb in ("train", "count", "conceal", "evaluate", "update"):
            self._late[message] = Late(name, VERBS[ask.verb].stage, self._round, asked)

    def _read(self, name: str, stage: Stage, reply: Reply, expected: type[Any]) -> Any:
        return read(name, stage, reply, expected, self.policy.timeout_seconds)

    def _hear_late(self) -> None:
        """Take what comes too late off the wire: it is discarded, and said."""
        for reply in self.link.replies(list(self._late)):
            late = self._late.pop(reply.message)
            seconds = time.monotonic() - late.asked
            reason = (
                f"its late reply of round {late.round} will not come: {reply.content}"
                if isinstance(reply.content, str)
                else f"its reply of round {late.round} came after {seconds:.0f} s and was discarded"
            )
            self._faults.append(Failure(late.site, late.stage, reason))


def _score_flaw(scored: int, most: int) -> str | None:
    """Why the score beside a site's statistics does not count, or None; `most` examples were held out at its hello."""
    if most and not scored:
        return "it trained and sent no score: it may have answered all that its site.toml allows (limits.evaluations)"
    return f"examples = {scored}: when it joined it had {most}" if scored > most else None


def _layout(layers: int, experts: int) -> str:
    return f"{layers} layers x {experts} experts"
