"""A site: one organisation that keeps its data, and what it lets the coordinator's configuration decide.

The coordinator decides how to train (algorithm, learning rate, task, template, wire); the site decides what is its own:
where its data and its copy of the model lie, what its columns are called, which device it uses, and its limits.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedalign.config.run import (
    AUTO,
    CHAT_TEMPLATES,
    KINDS,
    Address,
    Certificates,
    ClientLimits,
    Columns,
    Config,
    Count,
    DataConfig,
    Delimiter,
    Device,
    Encoding,
    FileConfig,
    MinExamples,
    MinTokens,
    OwnColumns,
    Part,
    Positive,
    Section,
    Threads,
    key,
    with_fields,
)
from fedalign.config.toml import checked, explained, read_tables
from fedalign.errors import UserError
from fedalign.files import folder_name, write_private
from fedalign.protocol import Consent, is_name

FILE = "site.toml"
TOGETHER = ({"text", "label"}, {"prompt", "response"}, {"question", "choices", "answer"})  # parts of one kind of row
HUB_ID = re.compile(r"(?!.*(\.\.|--))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
NODE_KEY = re.compile(r"ecdsa-sha2-nistp(256|384|521) [A-Za-z0-9+/=.]+", re.ASCII)
HEAD = """\
# A site: what this organisation decides itself. The coordinator decides how to train.
# Check it, from this folder: fedalign doctor --site .

"""


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError("must be 1 to 64 printable characters.")
    return text


def _node_key(text: str) -> str:
    if not NODE_KEY.match(text):
        raise ValueError("must be the line of a site's key.pub: ecdsa-sha2-nistp384 and its text.")
    return text


SiteName = Annotated[str, AfterValidator(_name)]
NodeKey = Annotated[str, AfterValidator(_node_key)]


class SiteColumns(Columns):
    """Names of the columns in your files. If one is named here, nobody can have others read but those that go with it.

    These are text and label; prompt and response; question, choices and answer. `client` is never read.
    """

    writes_what_is_set: ClassVar[bool] = True

    @property
    def read(self) -> Columns:
        """The same for a run; if some are named, each other part has a name that no column has."""
        named = {"client", *self.model_fields_set}
        named |= {role for roles in TOGETHER if named & roles for role in roles}
        others = [role for role in type(self).model_fields if self.model_fields_set and role not in named]
        return self.model_copy(update={role: f"{role}: named by no site.toml" for role in others})


class SiteFile(Section):
    """One of your files, by its name: where it differs from [data]."""

    delimiter: Delimiter | None = key(None, "csv: what parts its cells", examples=[";"])
    encoding: Encoding | None = key(None, "of its text", examples=["cp1252"])
    columns: OwnColumns = key({}, "what is called otherwise in it", examples=[{"text": "note"}])


class SiteData(Section):
    """It never leaves this organisation."""

    train: str = Field(description="a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub id")
    delimiter: Delimiter = AUTO
    encoding: Encoding = AUTO
    subset: str | None = key(None, "the configuration of a hub data set", examples=["main"])
    train_split: str = key("train", "of a hub data set, or of a folder: the file or subfolder to train on")
    test_split: str = key("test", "the one that is never read")
    columns: SiteColumns = SiteColumns()
    files: dict[str, SiteFile] = key({}, "", examples=[{"north.csv": SiteFile()}])

    @property
    def own(self) -> dict[str, Any]:
        """Keys of a run's [data] that this site alone decides, but for where its files lie."""
        return {
            "test": None,
            "subset": self.subset,
            "train_split": self.train_split,
            "test_split": self.test_split,
            "columns": self.columns.read,
            "delimiter": self.delimiter,
            "encoding": self.encoding,
            "files": {name: FileConfig(**vars(file)) for name, file in self.files.items()},
        }


class SiteModel(Section):
    """The model: the one that the coordinator names on the hub, unless this site has its own."""

    path: str | None = key(None, "this site's own copy", examples=["/models/OLMoE-1B-7B"])
    revision: str | None = key(None, "of path, if that is a hub id; it is never the coordinator's", examples=["main"])
    trust_remote_code: bool = key(
        False, "run the code that comes with path, which has to be given; the coordinator cannot set this"
    )

    @model_validator(mode="after")
    def _name_whose_code_runs(self) -> SiteModel:
        if self.trust_remote_code and self.path is None:
            raise PydanticCustomError("whose", "trust_remote_code needs path, or the coordinator names whose code runs")
        if self.revision and self.path is None:
            raise PydanticCustomError("whose", "revision is of path, and none is given")
        return self


class SiteLimits(ClientLimits):
    """The coordinator can ask for stricter, never for less."""

    device: Device = "auto"
    threads: Threads = 0
    batch_tokens: Count = key(0, "tokens of a batch at most; 0: what the coordinator says")
    min_tokens: MinTokens = 32
    min_examples: MinExamples = 4
    min_train: Positive = key(32, "with fewer examples to train on nothing leaves this site,")
    min_held_out: Positive = key(32, "nor with fewer that are held out to be scored on")
    held_out: Part = key(0.1, "share of the rows that is held out, at least min_held_out rows; 0: none")
    seed: Count | None = key(
        None,
        "of every draw at this site; keep it to yourself. Without it: drawn once, and kept in this folder",
        examples=[3141592653589793],
    )
    epochs: Positive = key(10, "of a round at most")
    steps: Positive = key(10_000, "of a round at most")
    rounds: Positive = key(100, "answers to a call for training at most, in one run,")
    evaluations: Positive = key(120, "and scores at most, in one run")
    all_rounds: Positive = key(1000, "the same of all runs together, for ever")
    all_evaluations: Positive = key(1000, "and of scores")
    new_tokens: Positive = key(256, "generated of an answer at most, where answers are scored by generating them")
    readings: Positive = key(
        50,
        "ways at most in which runs without noise have the rows read, of all runs together: with other labels, "
        "max_length, template. Whether all rows fit is told, which tells of single rows",
    )


class SiteConsent(Section):
    """Consent to statistics that tell which words stand in this site's texts. Without a true they never leave."""

    token_counts: bool = key(
        False,
        "send how often each token stands here, or how many examples each label has where the loss reads that; those "
        "of fewer than min_examples examples left out",
    )
    embeddings: bool = key(
        False,
        "train token embeddings and head, and send them: which rows moved shows nearly every token of this site, "
        "rare names too; without it they stay frozen here, the rest is trained, and no counts are sent",
    )

    @property
    def told(self) -> str:
        """The meaning of this consent, whatever the coordinator asks for."""
        counts = "sent if asked for" if self.token_counts else "never sent"
        if not self.embeddings:
            return (
                "embeddings and head stay frozen here, so no row of them and no count of tokens leaves; the other "
                f"weights that do can tell of texts, too; how many examples each label has is {counts}"
            )
        return (
            "embeddings and head are trained here if the coordinator has them trained: which of their rows moved shows "
            f"nearly every token of this site, rare names too; how often each stands here, and how many examples each "
            f"label has, is {counts}"
        )


class SitePrivacy(Section):
    """A budget of example-level differential privacy over all runs, counted in privacy.jsonl beside this file.

    With one, this site takes part only in runs with [privacy], and in none that overspends it; see docs/noise.md. Of
    masked sums see docs/masks.md.
    """

    epsilon_total: float | None = key(None, "that all runs together may spend, for ever", gt=0, examples=[8.0])
    delta: float = key(1e-5, "chance that it does not hold", gt=0, lt=1)
    masked: bool = key(False, "take part only in runs with masked sums: nothing else of this site is told")
    masked_min_holders: int = key(
        3, "clients of a masked sum at least; runs that allow fewer are refused", ge=2, le=10**6
    )
    node_keys: dict[SiteName, NodeKey] = key(
        {},
        "key.pub of the other sites, as each of them gave it to you: masks are made with these sites alone. Without it "
        "whose keys they are is the coordinator's word",
        examples=[{"hospital-b": "ecdsa-sha2-nistp384 AAAA..."}],
    )


class SiteLink(Section):
    """How this site reaches it."""

    superlink: Address = "127.0.0.1:8000"
    root_certificates: Certificates = None
    key: str = key("key", "this site's private key; the coordinator registers its public half, key.pub")


class SiteConfig(Section):
    """`site.toml`."""

    name: SiteName = Field(description="what the coordinator calls this site")
    data: SiteData
    model: SiteModel = SiteModel()
    limits: SiteLimits = SiteLimits()
    consent: SiteConsent = SiteConsent()
    privacy: SitePrivacy = SitePrivacy()
    coordinator: SiteLink = SiteLink()

    def to_toml(self) -> str:
        """The file that says all this, with what each key means."""
        return HEAD + explained(self)


@dataclass(frozen=True)
class SiteFolder:
    """Where a site keeps everything: site.toml, its key, and what it remembers of runs."""

    path: Path
    config: SiteConfig

    @classmethod
    def load(cls, path: Path) -> SiteFolder:
        """Read `site.toml`, given itself or its folder.

        Raises:
            UserError: There is none, or a key or value is wrong.
        """
        file = path / FILE if path.is_dir() else path
        if not file.exists():
            raise UserError(f"site {str(path)!r}: no {FILE} there. Make one with: fedalign site init NAME --data FILE")
        return cls(file.parent.resolve(), checked(SiteConfig, read_tables(file, "site file"), f"{file}: "))

    @property
    def seed(self) -> int:
        """The seed of every draw at this site; drawn now if nobody has given one."""
        if self.config.limits.seed is not None:
            return self.config.limits.seed
        file = self.path / "seed"
        if not file.exists():
            write_private(file, f"{secrets.randbits(62)}\n".encode())
        return int(file.read_text(encoding="utf-8"))

    def memory(self, run: str) -> Path:
        """Where this site keeps its part of a run."""
        return self.path / "runs" / folder_name(run)

    def resolve(self, path: str) -> str:
        """A path of site.toml, seen from the site's folder; what is not there is left as it is (a hub id)."""
        here = self.path / Path(path).expanduser()
        return str(here) if here.exists() else path

    def supernode_command(self, port: int | None = None) -> list[str]:
        """The command that starts Flower's SuperNode for this site; `port`: of its own interface, on loopback."""
        link = self.config.coordinator
        security = (
            ["--root-certificates", self.resolve(link.root_certificates)] if link.root_certificates else ["--insecure"]
        )
        key = self.path / link.key
        return [
            "flower-supernode",
            *security,
            *(["--auth-supernode-private-key", str(key)] if key.exists() and link.root_certificates else []),
            *("--superlink", link.superlink),
            *(["--port", str(port)] if port else []),
            *("--node-config", f"site={json.dumps(str(self.path / FILE))}"),
        ]

    @property
    def consent(self) -> Consent:
        """The statistics of its tokens that this site lets leave."""
        return Consent(self.config.consent.token_counts, self.config.consent.embeddings)

    def client_limits(self, config: Config) -> ClientLimits:
        """How much of a round this site can do; its own rank where the run lets ranks differ."""
        own = self.config.limits
        rank = min(own.rank, config.tuning.rank) if config.tuning.averages_products else 0
        return ClientLimits(top_k=own.top_k, max_experts=own.max_experts, rank=rank, max_norm=own.max_norm)

    def localise(self, config: Config) -> Config:
        """The coordinator's configuration as this site runs it.

        Raises:
            UserError: It asks for what this site does not do; the message says nothing of what is here.
        """
        site, limits = self.config, self.config.limits
        self._refuse(config)
        most = limits.batch_tokens or math.inf
        return config.model_copy(
            update={
                "run": config.run.model_copy(update={"device": limits.device, "threads": limits.threads}),
                "model": config.model.model_copy(
                    update={
                        "path": self.resolve(site.model.path) if site.model.path else config.model.path,
                        "revision": site.model.revision if site.model.path else config.model.revision,
                        "trust_remote_code": site.model.trust_remote_code,
                    }
                ),
                "data": config.data.model_copy(
                    update={
                        "train": self.resolve(site.data.train),
                        "template": self._template(config.data),
                        **site.data.own,
                    }
                ),
                "clients": config.clients.model_copy(update={"held_out": limits.held_out}),
                "training": config.training.model_copy(
                    update={"batch_tokens": min(config.training.batch_tokens, most)}
                ),
                "evaluation": config.evaluation.model_copy(
                    update={
                        "batch_tokens": min(config.evaluation.batch_tokens, most),
                        "max_new_tokens": min(config.evaluation.max_new_tokens, limits.new_tokens),
                    }
                ),
                "statistics": config.statistics.model_copy(
                    update={
                        "min_tokens": max(config.statistics.min_tokens, limits.min_tokens),
                        "min_examples": max(config.statistics.min_examples, limits.min_examples),
                    }
                ),
            }
        )

    def check_masked(self, config: Config) -> None:
        """Refuse a run that tells more of this site than it allows, or sums of fewer.

        Raises:
            UserError: It does.
        """
        own, run = self.config.privacy, config.privacy
        if own.masked and not run.masked:
            raise UserError(
                "privacy.masked = false: this site takes part only in runs with masked sums ([privacy] in its "
                "site.toml). Choose true."
            )
        if run.masked and run.masked_min_holders < own.masked_min_holders:
            raise UserError(
                f"privacy.masked_min_holders = {run.masked_min_holders}: this site takes part in masked sums of "
                f"{own.masked_min_holders} or more ([privacy] in its site.toml). Choose {own.masked_min_holders}."
            )
        if run.masked and self.config.limits.max_experts:
            raise UserError(
                "privacy.masked = true: this site trains only the experts that its data uses most (limits.max_experts "
                "in its site.toml), and which they are would tell of it. It has to set 0."
            )

    def _refuse(self, config: Config) -> None:
        """Refuse settings that this site does not allow."""
        self.check_masked(config)
        limits, data = self.config.limits, config.data
        if self.config.model.path is None and not is_hub_id(config.model.path):
            raise UserError(NO_MODEL)
        if self.config.privacy.epsilon_total is not None and not config.privacy.on:
            raise UserError(
                "[privacy]: this site takes part only in runs with example-level differential privacy. Give "
                "privacy.epsilon or privacy.noise_multiplier."
            )
        if config.privacy.on and limits.device == "split":
            raise UserError(
                "[privacy]: this site spreads layers over GPUs (limits.device), which noise is not made for."
            )
        if config.privacy.on and limits.max_experts:
            raise UserError(
                "[privacy]: this site trains only the experts that its data uses most (limits.max_experts in its "
                "site.toml), and which they are would tell of it. It has to set 0."
            )
        if config.training.epochs > limits.epochs:
            raise UserError(
                f"training.epochs = {config.training.epochs}: this site trains at most {limits.epochs} epochs a round."
            )
        if 0 < data.max_train < limits.min_train:
            raise UserError(
                f"data.max_train = {data.max_train}: this site trains on {limits.min_train} examples or more. "
                "Choose 0 for all."
            )
        if data.on_bad_row == "skip":
            raise UserError(
                'data.on_bad_row = "skip": data.labels would choose among the examples of this site. Choose: error.'
            )
        if data.kind not in KINDS:
            raise UserError(
                f"data.kind = {data.kind!r}: a format of a package may read any column, and this site reads those of "
                f"its site.toml. Choose one of: {', '.join(KINDS)}."
            )
        if data.chat_template not in CHAT_TEMPLATES:
            raise UserError(
                "data.chat_template: a template is a program, and could choose among the examples of this site. Choose "
                f"one of: {', '.join(CHAT_TEMPLATES)}."
            )
        if data.too_long == "drop":
            raise UserError(
                'data.too_long = "drop": data.max_length would choose among the examples of this site. Choose one of: '
                "error, truncate."
            )

    def _template(self, data: DataConfig) -> str | None:
        """The coordinator's template over this site's columns: {column} is the one of its role, or its name here."""
        if data.template is None:
            return None
        both = self.config.data.columns.read, data.columns
        mine, theirs = (columns.model_dump(exclude={"client"}) for columns in both)
        readable: dict[str, str] = {name: name for name in mine.values()} | {
            name: mine[role] for role, name in theirs.items()
        }

        def here(name: str) -> str:
            if name not in readable or re.search("[{}:!]", readable[name]):
                raise UserError(f"data.template: {{{name}}} is no column that this site lets a template read.")
            return readable[name]

        return with_fields(data.template, here)


NO_MODEL = (
    "model.path: not a model that this site opens for others. Choose a hub id, or have the site name its own copy in "
    "site.toml ([model] path)."
)


def is_hub_id(path: str) -> bool:
    """Whether it is "demo", or written as a model on the Hub is; a folder may be called so, too.

    >>> is_hub_id("allenai/OLMoE-1B-7B-0924"), is_hub_id("/srv/private"), is_hub_id("../private"), is_hub_id("a/b/c")
    (True, False, False, False)
    """
    return HUB_ID.fullmatch(path) is not None
