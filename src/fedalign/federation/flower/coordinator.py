"""The coordinator: a `run.Centre` whose clients are behind Flower. It needs no GPU, no data and, mostly, no model.

Without a global test set it reads the model's configuration, not its weights: the first round starts from what a site
sends, checked against the hash that all sites agree on, and what is saved at the end is made of those values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign.client.evaluation import TestSet
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.data.encode import text_hash, tokenizer_hash
from fedalign.data.formats import FORMATS
from fedalign.errors import UserError
from fedalign.federation.flower.carrier import Cargo
from fedalign.federation.flower.link import Link
from fedalign.federation.flower.masked import MaskedFlowerFederation
from fedalign.federation.flower.sites import Agreement, FlowerFederation
from fedalign.files import damage, replacing, rounds_in
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import unpack
from fedalign.moe.load import model_path
from fedalign.moe.model import MoEModel
from fedalign.protocol import TELLING, WORDS, Layout, Weights
from fedalign.server.masked import count_residues
from fedalign.server.results import RunFolder
from fedalign.server.run import Holdings, Marked, heap_for, identity

CONSTANTS = "constants.safetensors"
DIGEST_NBYTES = 1024  # what a model's constants may be larger than all of its values: a digest of an adapter's base


@dataclass
class Coordinator:
    """Sites behind Flower, and what the server holds itself."""

    config: Config
    bench: Workbench  # its model is a skeleton unless there is a test set
    test: TestSet | None
    federation: FlowerFederation
    _saved: MoEModel | None = field(default=None, init=False)  # what a skeleton was last saved as
    constants: Path  # a folder: what a skeleton's model has besides weights, as a site sent it

    @classmethod
    def connect(cls, link: Link, config: Config, folder: RunFolder) -> Coordinator:
        """Load what the coordinator needs, and agree with the sites about the model.

        Raises:
            UserError: The configuration does not fit, or too few sites do.
        """
        bench, test = load_bench(config)
        moe = bench.moe
        if not rounds_in(folder.checkpoint):
            check_start(config, moe)
        agreement = Agreement(
            architecture=moe.fingerprint(),
            tokenizer=tokenizer_hash(bench.tokenizer),
            chat_template=text_hash(str(bench.tokenizer.chat_template or "")),
            layers=moe.layout.layers,
            experts=moe.layout.experts,
            weights=config.model.weights_hash if moe.device.type == "meta" else moe.weights_hash(),
            labels=len(config.data.labels) if config.training.loss == "label_shift" else 0,
            masked=config.privacy.masked,
            only=config.clients.only,
        )
        if config.model.weights_hash not in (None, agreement.weights):
            raise UserError(
                f"model.weights_hash = {config.model.weights_hash!r}: the coordinator's model has {agreement.weights}."
            )
        own = (*moe.model.parameters(), *moe.model.buffers())
        cargo = Cargo(
            folder=folder.transfers,
            sizes=moe.layout.sizes,
            dtype=config.wire.dtype,
            most=config.wire.piece_nbytes,
            constants=sum(tensor.nbytes for tensor in own) + DIGEST_NBYTES,
        )
        federation = FlowerFederation(link, config.federation, agreement, cargo)
        if config.privacy.masked and (shares := config.algorithm.build().shares):
            counts = count_residues(moe.layout, shares, config.tells)
            federation = MaskedFlowerFederation(link, config.federation, agreement, cargo, counts)
        federation.settle_weights()
        return cls(config, bench, test, federation, folder.checkpoint / "constants")

    @property
    def layout(self) -> Layout:
        """The model's parameter groups."""
        return self.bench.moe.layout

    def initial_weights(self, heap: Heap) -> Weights:
        """The model's own if it is loaded here, else a site's."""
        if not self._is_skeleton:
            return self.bench.weights(heap)
        start = self.federation.start()
        weights = {group: unpack(packed) for group, packed in start.weights.items()}  # mapped, or less than a piece
        constants = dict(start.constants)
        try:
            found = self.bench.moe.weights_hash_of(weights, constants, heap)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{start.client}: the weights that it sent do not fit the model: {error}") from None
        if found != self.federation.agreement.weights:
            raise UserError(f"{start.client}: sent other weights ({found[:12]}) than it announced.")
        with replacing(self.constants) as folder:
            save_file(constants, folder / CONSTANTS)
        return weights

    def evaluate(self, weights: Weights, *, generate: bool = False) -> Marked | None:
        """Score weights on the coordinator's own test set, if it has one."""
        return None if self.test is None else self.bench.marked(weights, self.test, generate=generate)

    def check_model(self, folder: Path) -> str:
        """Hold what was last saved against plain libraries; how far was looked."""
        return self.bench.check(folder, self._saved)

    def leaving(self, weights: Weights, progress: Callable[[int, int], None]) -> None:
        """Nothing: the rows to be scored on are at the sites, which score for themselves (`fedalign evaluate`)."""

    def save_model(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""
        if self._is_skeleton:
            self._saved = self.bench.moe.save_filled(weights, self._constants(), folder, self._heap())
            self.bench.tokenizer.save_pretrained(folder)
        else:
            self.bench.save(weights, folder)

    def identity(self) -> dict[str, str]:
        """Of the model's architecture and the configuration; sites may come and go."""
        return identity(self.config, self.bench.moe.fingerprint())

    def holdings(self) -> Holdings:
        """Numbers of examples, as the sites said; their labels stay with them."""
        return {
            name: {"examples": site.hello.examples, "labels": {}}
            for name, site in sorted(self.federation.sites.items())
        }

    def consents(self) -> str:
        """How many of the sites there let leave what tells their tokens or labels; empty where nothing does."""
        if self.config.federation.engine != "flower":
            return ""
        return ". ".join(filter(None, (self._rows_consented(), self._labels_consented())))

    def _labels_consented(self) -> str:
        if self.config.training.loss != "label_shift":
            return ""
        members = [self.federation.sites[name].hello for name in self.federation.members()]
        told = sum(hello.token_counts for hello in members)
        rest = f'; {len(members) - told} train as with training.loss = "plain"' if told < len(members) else ""
        return f"{told} of {len(members)} sites consent to tell how many examples each label has{rest}"

    def _rows_consented(self) -> str:
        if not any(self.layout.sizes[group] for group in WORDS):
            return ""
        members = [self.federation.sites[name].hello for name in self.federation.members()]
        rows = sum(hello.embeddings for hello in members)
        said = f"of {len(members)} sites {rows} consent to train embeddings and head"
        said += ", which stay as they were" if not rows else ""
        if not self.config.asks & TELLING:
            return said
        counts = sum(hello.embeddings and hello.token_counts for hello in members)
        said += f", {counts} to send counts of tokens"
        return said if counts else f'{said}: rows are averaged as under algorithm.vocabulary = "average"'

    def finish(self) -> None:
        """Sites forget their updates."""
        self.federation.finish()

    @property
    def _is_skeleton(self) -> bool:
        return self.bench.moe.device.type == "meta"

    def _heap(self) -> Heap:
        """Where a model with values lies."""
        return heap_for(self.config, self.layout, self.constants.parent)

    def _constants(self) -> dict[str, Tensor]:
        if problem := damage(self.constants, CONSTANTS):
            raise UserError(f"{str(self.constants)!r}: damaged ({problem}). Start anew with another --out.")
        return load_file(self.constants / CONSTANTS)


def check_start(config: Config, moe: MoEModel) -> None:
    """Refuse a start in which a lone site could say what other sites' experts are.

    Raises:
        UserError: It could: sites own experts, one site is enough, and nothing here knows the weights.
    """
    known = moe.device.type != "meta" or config.model.weights_hash is not None
    owned = config.algorithm.build().shared is not None and moe.layout.owners.keys()
    others = sorted(owned - {*config.clients.only}) if owned else []
    if others and not known and config.federation.min_sites == 1:
        raise UserError(
            f"federation.min_sites = 1: a lone site would say what the experts of {', '.join(others)} are. Set "
            "model.weights_hash, which fedalign doctor prints, or data.test: the coordinator reads weights itself then."
        )


def load_bench(config: Config) -> tuple[Workbench, TestSet | None]:
    """Model, tokenizer and test set as far as the coordinator needs them.

    Raises:
        UserError: Anything in the configuration does not fit the model.
    """
    if config.federation.engine == "simulation":
        bench = Workbench.load(config)
        return bench, bench.test_set()
    if FORMATS[config.data.kind].classes and not config.data.labels:
        raise UserError(
            "data.labels = []: sites see their own rows alone, so all classes must be named, "
            'for example data.labels = ["World", "Sports"].'
        )
    if config.data.test is not None:
        bench = Workbench.load(config)
        return bench, bench.test_set()
    skeleton = MoEModel.skeleton(
        model_path(config.model.path),
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
        dtype=config.tuning.loaded_dtype,
        tuning=config.tuning,
    )
    return Workbench.around(skeleton, config), None
