"""A site: one house that keeps its data, and what it lets the coordinator's configuration decide.

The coordinator decides how to train (algorithm, learning rate, task, template, wire); the site decides what is its own:
where its data and its copy of the model lie, what its columns are called, which device it uses, and its limits.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from fedalign.config.run import ClientLimits, Columns, Config, Count, Positive, Section
from fedalign.config.toml import explain
from fedalign.errors import UserError
from fedalign.files import folder_name

FILE = "site.toml"


class SiteData(Section):
    """`[data]` of a site."""

    train: str  # a file, a folder of files or a hub id; relative to the site's folder
    columns: Columns = Columns()


class SiteModel(Section):
    """`[model]` of a site."""

    path: str | None = None  # the site's own copy; None: what the coordinator names
    trust_remote_code: bool = False  # the coordinator cannot set this


class SiteLimits(Section):
    """`[limits]`: the coordinator can ask for stricter, never for less."""

    device: str = "auto"
    threads: Count = 0  # CPU threads of torch; 0: torch's own choice
    batch_tokens: Count = 0  # tokens of a batch at most; 0: no limit
    min_tokens: Positive = 32  # experts that fewer tokens reached are withheld from the statistics ...
    min_examples: Positive = 4  # ... and those reached from fewer examples
    top_k: Count = 0  # experts that a token is sent to in training; 0: the model's own number
    max_experts: Count = 0  # experts of a layer that are trained, those that its data uses most; 0: all
    rank: Count = 0  # components of adapters that are trained, where the run averages products; 0: all


class SiteLink(Section):
    """`[coordinator]`: how this site reaches the SuperLink."""

    superlink: str = "127.0.0.1:8000"
    root_certificates: str | None = None  # PEM file that its certificate is checked with
    key: str = "key"  # this site's private key; `key.pub` is registered by the coordinator


class SiteConfig(Section):
    """`site.toml`."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    data: SiteData
    model: SiteModel = SiteModel()
    limits: SiteLimits = SiteLimits()
    coordinator: SiteLink = SiteLink()


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
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"site {str(path)!r}: no {FILE} there. Make one with: fedalign site init NAME --data FILE"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"site file {str(file)!r}: cannot be read: {error}") from None
        try:
            return cls(file.parent.resolve(), SiteConfig.model_validate(tables))
        except ValidationError as error:
            raise UserError(
                "\n".join(f"{file}: {explain(problem, SiteConfig)}" for problem in error.errors())
            ) from None

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
