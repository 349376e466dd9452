"""A site: one house that keeps its data, and what it lets the coordinator's configuration decide.

The coordinator decides how to train (algorithm, learning rate, task, template, wire); the site decides what is its own:
where its data and its copy of the model lie, what its columns are called, which device it uses, and its limits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from fedalign.config.run import (
    Address,
    Certificates,
    ClientLimits,
    Columns,
    Config,
    Count,
    Device,
    MinExamples,
    MinTokens,
    Section,
    Threads,
    key,
)
from fedalign.config.toml import checked, explained, read_tables
from fedalign.errors import UserError
from fedalign.files import folder_name
from fedalign.protocol import Consent

FILE = "site.toml"
HEAD = """\
# A site: what this house decides itself. How to train is the coordinator's to say.
# Look whether all is well, from this folder: fedalign doctor --site .

"""


def _name(text: str) -> str:
    if not (text.strip() and len(text) <= 64 and text.isprintable()):
        raise ValueError("must be 1 to 64 printable characters.")
    return text


class SiteData(Section):
    """It never leaves this house."""

    train: str = Field(description="a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub id")
    columns: Columns = Columns()


class SiteModel(Section):
    """What the coordinator names, unless this site has its own."""

    path: str | None = key(None, "this site's own copy", examples=["/models/OLMoE-1B-7B"])
    trust_remote_code: bool = key(False, "run the code that comes with the model; the coordinator cannot set this")


class SiteLimits(ClientLimits):
    """The coordinator can ask for stricter, never for less."""

    device: Device = "auto"
    threads: Threads = 0
    batch_tokens: Count = key(0, "tokens of a batch at most; 0: what the coordinator says")
    min_tokens: MinTokens = 32
    min_examples: MinExamples = 4


class SiteConsent(Section):
    """What tells which words stand in this site's texts. Without a true here it never leaves."""

    token_counts: bool = key(
        False, "send how often each token stands here, those of fewer than min_examples examples left out"
    )
    embeddings: bool = key(
        False,
        "train rows of embeddings and head, and send them: which rows moved shows nearly every token of this site, "
        "rare names too; without it they stay frozen here, the rest is trained, and no counts are sent",
    )

    @property
    def told(self) -> str:
        """What this means, whatever the coordinator asks for."""
        if not self.embeddings:
            return (
                "embeddings and head stay frozen here, so no row of them and no count of tokens leaves; the other "
                "weights that do can tell of texts, too"
            )
        return (
            "embeddings and head are trained here if the coordinator has them trained: which of their rows moved shows "
            f"nearly every token of this site, rare names too; how often each stands here is "
            f"{'sent if asked for' if self.token_counts else 'never sent'}"
        )


class SiteLink(Section):
    """How this site reaches it."""

    superlink: Address = "127.0.0.1:8000"
    root_certificates: Certificates = None
    key: str = key("key", "this site's private key; the coordinator registers its public half, key.pub")


class SiteConfig(Section):
    """`site.toml`."""

    name: Annotated[str, AfterValidator(_name)] = Field(description="what the coordinator calls this site")
    data: SiteData
    model: SiteModel = SiteModel()
    limits: SiteLimits = SiteLimits()
    consent: SiteConsent = SiteConsent()
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

    def memory(self, run: str) -> Path:
        """Where this site keeps its part of a run."""
        return self.path / "runs" / folder_name(run)

    def resolve(self, path: str) -> str:
        """A path of site.toml, seen from the site's folder; what is not there is left as it is (a hub id)."""
        here = self.path / Path(path).expanduser()
        return str(here) if here.exists() else path

    def supernode_command(self, port: int | None = None) -> list[str]:
        """What starts Flower's SuperNode for this site; `port`: of its own interface, on loopback."""
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
        """What this site lets leave of its tokens."""
        return Consent(self.config.consent.token_counts, self.config.consent.embeddings)

    def client_limits(self, config: Config) -> ClientLimits:
        """How much of a round this site can do; its own rank where the run lets ranks differ."""
        own = self.config.limits
        rank = min(own.rank, config.tuning.rank) if config.tuning.averages_products else 0
        return ClientLimits(top_k=own.top_k, max_experts=own.max_experts, rank=rank)

    def localise(self, config: Config) -> Config:
        """The coordinator's configuration as this site runs it."""
        site, limits = self.config, self.config.limits
        batch = config.training.batch_tokens
        return config.model_copy(
            update={
                "run": config.run.model_copy(update={"device": limits.device, "threads": limits.threads}),
                "model": config.model.model_copy(
                    update={
                        "path": self.resolve(site.model.path) if site.model.path else config.model.path,
                        "trust_remote_code": site.model.trust_remote_code,
                    }
                ),
                "data": config.data.model_copy(
                    update={"train": self.resolve(site.data.train), "columns": site.data.columns}
                ),
                "training": config.training.model_copy(
                    update={"batch_tokens": min(batch, limits.batch_tokens) if limits.batch_tokens else batch}
                ),
                "statistics": config.statistics.model_copy(
                    update={
                        "min_tokens": max(config.statistics.min_tokens, limits.min_tokens),
                        "min_examples": max(config.statistics.min_examples, limits.min_examples),
                    }
                ),
            }
        )
