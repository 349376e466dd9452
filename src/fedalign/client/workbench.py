"""Model, tokenizer and encoder of a configuration, and a client's examples made ready for training on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedalign import parallel
from fedalign.client.answers import sheet
from fedalign.client.evaluation import Apply, TestSet, answers
from fedalign.client.losses import Labels
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.spent import HERE, Privacy, PrivacyLedger
from fedalign.client.trainer import Trainer
from fedalign.config.run import ClientLimits, Config
from fedalign.data.chat import choose_template
from fedalign.data.deal import set_aside
from fedalign.data.encode import Encoder, load_tokenizer
from fedalign.data.formats import Example, load_examples
from fedalign.data.partition import hold_out
from fedalign.errors import UserError
from fedalign.maths.hashing import derive_seed
from fedalign.maths.heap import Heap
from fedalign.moe.four_bit import need_cuda
from fedalign.moe.load import model_path, pick_device
from fedalign.moe.model import MoEModel, load_model
from fedalign.moe.rows import refuse_unlike
from fedalign.moe.saved import check_saved
from fedalign.moe.site_experts import TRAINED, trained_by
from fedalign.protocol import Evaluation, Weights


@dataclass(frozen=True)
class Workbench:
    """A loaded model and what turns text into its batches."""

    config: Config
    moe: MoEModel
    tokenizer: Any
    encoder: Encoder

    @classmethod
    def load(cls, config: Config) -> Workbench:
        """Load the configured model and tokenizer.

        Raises:
            UserError: There is no such model or device, it cannot train so, or a limit does not fit the model.
        """
        if config.run.threads_each:
            torch.set_num_threads(config.run.threads_each)
        device = pick_device(config.run.device)
        several = parallel.world() > 1 or device == parallel.SPLIT
        if device == parallel.SPLIT:
            check_splittable(config)
        elif config.tuning.kind == "qlora":
            need_cuda(device)
        moe = load_model(
            config.model.path,
            device="cpu" if several else device,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            tuning=config.tuning,
            seed=config.run.seed,
        )
        check_scoring(config, moe)
        if config.federation.engine == "in_process":  # of sites the coordinator asks what they hold
            check_hash(config, moe)
        if several:
            moe = moe.split() if device == parallel.SPLIT else moe.shard(torch.device(device))
        if config.tuning.gradient_checkpointing:
            moe.checkpoint_activations()
        return cls.around(moe, config)

    @classmethod
    def around(cls, moe: MoEModel, config: Config) -> Workbench:
        """The workbench of a model that is there, which may be a skeleton, and from now on records this run.

        Raises:
            UserError: Its owners of experts, or its tokenizer, do not fit.
        """
        check_owners(config, moe)
        setattr(moe.model.config, TRAINED, trained_by(moe.model.config.to_dict(), config.algorithm))
        tokenizer = load_tokenizer(
            model_path(config.model.path),
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
        )
        choose_template(tokenizer, config.data.chat_template)
        check_tokenizer(tokenizer, moe.model.get_input_embeddings().weight.shape[0], config.model.path)
        encoder = Encoder(
            tokenizer,
            pick_length(config, moe),
            moe.is_seq2seq,
            config.data.too_long,
            decoder_start=getattr(moe.model.config, "decoder_start_token_id", None),
            leaves_out=config.privacy.on and config.federation.engine == "flower",  # an error would tell of one row
        )
        return cls(config, moe, tokenizer, encoder)

    def trainer(self) -> Trainer:
        """The client step on this model."""
        return Trainer(self.moe, self.tokenizer, self.config.algorithm.build(), self.config)

    def weights(self, heap: Heap) -> Weights:
        """The model's values, copied to a heap group by group."""
        if self.moe.sharded:  # all processes read all of it together
            return {group: heap.keep(value.cpu()) for group, value in self.moe.read().items()}
        return {group: heap.keep(self.moe.read([group])[group].cpu()) for group in self.moe.layout.groups}

    def check_limits(self, clients: Collection[str]) -> None:
        """Refuse limits of clients that there are not, or that the model cannot keep."""
        only = self.config.clients.only
        for name, limits in self.config.clients.limits.items():
            if name not in clients and only and name not in only:
                continue  # it takes no part in this run
            if name not in clients:
                raise UserError(f"clients.limits.{name}: no such client. Choose one of: {', '.join(clients)}.")
            try:
                with self.moe.sending_to(limits.top_k):
                    pass
            except UserError as error:
                raise UserError(f"clients.limits.{name}.{error}") from None

    def client(self, name: str, examples: Sequence[Example], indices: Sequence[int], folder: Path) -> ClientData:
        """Encode the examples that `indices` names: a part to train on and a held-out part.

        With noise all are trained on: nothing is scored, and how many there are would say which others are held out.

        Raises:
            UserError: Nothing is left to train on.
        """
        seed = derive_seed(self.config.run.seed, "held out")
        fraction = 0.0 if self.config.privacy.on else self.config.clients.held_out
        kept, held = hold_out(indices, fraction, seed, name)
        limits = self.config.clients.limits.get(name, ClientLimits())
        return self.client_of(name, [examples[i] for i in kept], [examples[i] for i in held], folder, limits)

    def client_of(
        self,
        name: str,
        train: Sequence[Example],
        held_out: Sequence[Example],
        folder: Path,
        limits: ClientLimits,
        ledger: PrivacyLedger | None = None,
        run: str = HERE,
    ) -> ClientData:
        """Encode what a client trains on and what it is scored on; `ledger` and `run` are a site's, for private runs.

        Raises:
            UserError: Nothing is left to train on.
        """
        privacy = self.config.privacy.on
        encoded = self.encoder.encode(train)
        reads = self.config.training.loss != "plain"
        client = ClientData(
            name=name,
            train=encoded,
            held_out=TestSet.prepare(held_out, self.encoder),
            memory=ClientMemory(folder),
            limits=limits,
            privacy=Privacy(self.config, ledger or PrivacyLedger(folder), run, folder, name) if privacy else None,
            labels=Labels.of(train, encoded, self.encoder) if reads else None,
        )
        if not client.train and not (privacy and ledger):  # a site with noise does not tell that there is nothing
            raise UserError(
                f"client {name!r}: all of its examples are longer than {self.encoder.max_length} tokens or have no "
                'answer that could be trained. Raise data.max_length, or set data.too_long = "truncate".'
            )
        return client

    def test_set(self) -> TestSet | None:
        """The global test examples, if there are any; or the validation part in their place."""
        config = self.config
        if config.evaluation.part == "validation":
            return TestSet.prepare(set_aside(config)[1], self.encoder)
        test = load_examples(config.data.test or config.data.train, config.data, "test", config.run.seed)
        return TestSet.prepare(test, self.encoder)

    def score(self, weights: Weights, tests: TestSet | None) -> Evaluation | None:
        """Score weights on a test set, if there is one."""
        if tests is None:
            return None
        return self.marked(weights, tests)[0]

    def marked(
        self, weights: Weights, tests: TestSet, *, generate: bool = False, apply: Apply = map
    ) -> tuple[Evaluation, dict[str, Any]]:
        """The score of weights on a test set, and the `client.answers.sheet` of what they answered."""
        self.moe.write(weights)
        found = answers(self.moe, tests, self.config.evaluation, self.tokenizer, apply=apply)
        record = sheet(self.moe, tests, found, self.config, self.tokenizer, generate=generate)
        return found.score(None, len(tests)), record

    def check(self, folder: Path, skeleton: MoEModel | None = None) -> str:
        """Hold what was saved of this model, or of a filled skeleton, against plain libraries; how far was looked.

        Raises:
            UserError: It does not load there, or as another model.
        """
        model = self.config.model
        return check_saved(
            skeleton or self.moe,
            folder,
            model_path(model.path),
            dtype=self.config.tuning.loaded_dtype,
            runs=skeleton is None,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
        )

    def save(self, weights: Weights, folder: Path) -> None:
        """Write weights as an ordinary Hugging Face folder, with the tokenizer."""
        self.moe.write(weights)
        self.moe.save(folder)
        if parallel.is_first():
            self.tokenizer.save_pretrained(folder)


def check_tokenizer(tokenizer: Any, rows: int, path: str) -> None:
    """Refuse a tokenizer that is none, or of another model.

    Raises:
        UserError: It has no words, or a token beyond the model's `rows` of embeddings.
    """
    tokens = tokenizer.get_vocab()
    if len(tokens) <= len(set(tokenizer.all_special_tokens)):  # transformers makes up one where there are no files
        raise UserError(f"model = {path!r}: holds no tokenizer. Put the files of its tokenizer beside its weights.")
    last = max(tokens, key=lambda token: tokens[token])
    if tokens[last] >= rows:
        raise UserError(
            f"model = {path!r}: its tokenizer has token {tokens[last]} ({last!r}), its embedding rows 0 to {rows - 1}. "
            "Give it the tokenizer that it was trained with, or widen it: resize_token_embeddings."
        )


def check_hash(config: Config, moe: MoEModel) -> None:
    """Refuse other weights than the configuration names.

    Raises:
        UserError: They are others.
    """
    wanted = config.model.weights_hash
    if wanted is not None and wanted != (mine := moe.weights_hash()):
        raise UserError(
            f"model.weights_hash = {wanted!r}: the weights at model.path = {config.model.path!r} have {mine!r}. "
            "Give the model that was meant, or leave it out."
        )


def check_scoring(config: Config, moe: MoEModel) -> None:
    """Refuse what reads probabilities of a router that shows none.

    Raises:
        UserError: The algorithm or the balancing loss does, and this model's routers score in no way that is known.
    """
    if all(layer.scoring != "unknown" for layer in moe.layers):
        return
    which = f"how {moe.family} scores experts cannot be told from its router"
    if "probabilities" in config.asks:
        raise UserError(
            f'algorithm.name = "{config.algorithm.name}": reads the probabilities of routers, but {which}. Choose one '
            "of: by_use, fedavg, fedmoe, flame."
        )
    if config.training.balance_coefficient:
        raise UserError(
            f"training.balance_coefficient = {config.training.balance_coefficient}: needs probabilities, but {which}. "
            "Choose 0."
        )


def check_owners(config: Config, moe: MoEModel) -> None:
    """Refuse an algorithm of sites' own experts where no site has one.

    Raises:
        UserError: The model names no owners, or its routers are such that none can have an expert.
    """
    if config.algorithm.build().shared is None:
        return
    if not moe.layout.owners:
        raise UserError(
            f'algorithm.name = "{config.algorithm.name}": no expert of model.path = {config.model.path!r} has an '
            "owner. Make it so: fedalign upcycle MODEL --site-experts NAME,NAME --out DIR."
        )
    refuse_unlike(moe)
    public = len(moe.layout.public)
    if public < moe.top_k:
        raise UserError(
            f"model.path = {config.model.path!r}: a token goes to {moe.top_k} experts, and {public} are public. Give a "
            f"model with at least {moe.top_k} public ones."
        )


def check_shardable(config: Config) -> None:
    """Refuse what cannot go over the processes that torchrun started.

    Raises:
        UserError: Another engine, several workers, or its tuning or algorithm needs whole parameters.
    """
    if config.federation.engine != "in_process":
        raise UserError(
            f'federation.engine = "{config.federation.engine}": torchrun starts clients in process alone. Leave '
            'torchrun out, or choose "in_process".'
        )
    if config.run.workers > 1:  # a fork would wait for forks of the other processes
        raise UserError(
            f"run.workers = {config.run.workers}: torchrun's processes train one client together. Choose 1, or leave "
            "torchrun out."
        )
    if config.tuning.adapts:
        raise UserError(
            f'tuning.kind = "{config.tuning.kind}": torchrun does not shard adapters. Leave torchrun out (lora can '
            f'take run.device = "{parallel.SPLIT}"), or choose one of: full, moe, experts, router.'
        )
    if config.algorithm.build().mix or config.algorithm.build().shared is not None:
        raise UserError(
            f'algorithm.name = "{config.algorithm.name}": needs a second model, which torchrun cannot shard. Leave '
            "torchrun out, or choose another algorithm."
        )


def check_splittable(config: Config) -> None:
    """Refuse what cannot go over several GPUs layer by layer.

    Raises:
        UserError: A 4-bit base, or an algorithm with a second model.
    """
    if config.tuning.kind == "qlora":
        raise UserError(
            f'run.device = "{parallel.SPLIT}": not for a 4-bit base. Choose tuning.kind = "lora", or one GPU.'
        )
    if config.algorithm.build().mix or config.algorithm.build().shared is not None:
        raise UserError(
            f'run.device = "{parallel.SPLIT}": algorithm.name = "{config.algorithm.name}" has a second model beside. '
            "Choose one GPU, or another algorithm."
        )


def pick_length(config: Config, moe: MoEModel) -> int:
    """The longest example in tokens: as asked, at most what the model allows."""
    asked, allowed = config.data.max_length, moe.max_length
    if asked and allowed and asked > allowed:
        raise UserError(
            f"data.max_length = {asked}: the model allows {allowed} tokens. Choose 1 to {allowed}, or 0 for all of it."
        )
    return asked or allowed or 0
