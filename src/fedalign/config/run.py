"""Every knob of a run: TOML in, frozen models out. An error names the key, the value and the choices.

``examples/every_key.toml`` documents each key; a test keeps it complete. ``[algorithm]`` holds a name and that
algorithm's own options, so a new algorithm brings its knobs with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedalign.algorithms import make, options
from fedalign.errors import UserError, unknown
from fedalign.maths.server_step import ServerOptimizer
from fedalign.protocol import Algorithm, WireDtype

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
TRACKERS = ("tensorboard", "mlflow", "wandb")  # libraries that `server.trackers` knows


class Section(BaseModel):
    """A table of the TOML file: immutable, and no key is ever ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """`[run]`."""

    seed: Count = 0
    rounds: Positive = 10
    device: str = "auto"  # auto: cuda if there is one, else cpu; split: layers over all GPUs
    check: bool = True  # at the end: does model/ load in plain libraries, and compute the same
    threads: Count = 0  # CPU threads of torch; 0 leaves torch's own choice


class ModelConfig(Section):
    """`[model]`: any Hugging Face MoE model; "demo" is the small OLMoE that comes with the package."""

    path: str = "demo"
    revision: str | None = None
    trust_remote_code: bool = False
    weights_hash: str | None = None  # `fedalign doctor` prints it; given: other weights are refused


class Columns(Section):
    """`[data.columns]`: what the columns of the user's file are called."""

    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    client: str = "client"


class DataConfig(Section):
    """`[data]`: "docstrings" (embedded), a file, a folder of files, or a hub id."""

    train: str = "docstrings"
    test: str | None = None  # None: the source's own test split if it has one
    kind: Literal["classification", "instruction", "chat", "multiple_choice", "text"] = "classification"
    subset: str | None = None  # a hub data set's configuration name
    train_split: str = "train"
    test_split: str = "test"
    columns: Columns = Columns()
    labels: Annotated[
        tuple[str, ...], Field(strict=False)
    ] = ()  # names of the classes; needed where the label column holds integers
    template: str | None = None  # a prompt with {column} fields; None: the kind's default
    max_train: Count = 0  # examples drawn at random; 0: all
    max_test: Count = 0
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the training examples that nobody trains on
    max_length: Count = 0  # tokens of one example; 0: what the model allows
    too_long: Literal["error", "truncate", "drop"] = "error"


class ClientLimits(Section):
    """`[clients.limits.NAME]`: what a small client can do; 0: as everybody."""

    top_k: Count = 0  # experts a token is sent to
    max_experts: Count = 0  # experts of a layer that it trains: those that its own data uses most
    rank: Count = 0  # lora with average = "exact": it trains the strongest components alone


class ClientsConfig(Section):
    """`[clients]`: how many there are and what each of them holds."""

    count: Positive = 10
    partition: Literal["dirichlet", "iid", "pathological", "size", "natural", "files"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0)] = 0.1  # dirichlet: small is skewed
    classes: Positive = 2  # pathological: classes a client holds
    size_growth: Literal["linear", "square", "exponential"] = "linear"  # size: examples by client index
    min_examples: Positive = 10
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1  # each client's own test part
    sample: Share = 1.0  # share of the clients asked each round
    limits: dict[str, ClientLimits] = {}


class TrainingConfig(Section):
    """`[training]`: one client's local step."""

    epochs: Positive = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    batch_tokens: Positive = 2048  # tokens of a batch, padding included
    batch_examples: Positive = 16  # and at most so many examples
    accumulate: Positive = 1  # batches an optimizer step
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    balance_coefficient: Annotated[float, Field(ge=0)] = 0.0  # of the Switch load-balancing loss
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; weights and routers stay float32
    keep_optimizer: bool = False  # carry the optimizer's state to the client's next round


class TuningConfig(Section):
    """`[tuning]`: which parameters are trained, and how; `rank` to `average` are for lora and qlora.

    Patterns are those of a shell (`*.self_attn.*`) over parameter names; for LoRA, over what it adapts.
    """

    kind: Literal["full", "moe", "experts", "router", "lora", "qlora"] = "full"  # moe: routers and experts
    include: Annotated[tuple[str, ...], Field(strict=False)] = ()  # of what the kind trains, only these; empty: all
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model's weights; routers and masters stay float32
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0  # adapters are scaled by alpha / rank
    targets: Annotated[tuple[Literal["attention", "experts", "shared_experts", "dense"], ...], Field(strict=False)] = (
        "attention",
        "experts",
        "shared_experts",
    )  # dense: any other linear layer of a block
    router: Literal["full", "lora", "frozen"] = "full"
    average: Literal["factors", "freeze_a", "exact"] = "factors"  # exact: of the products, cut back to the rank

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained instead of the model's own weights."""
        return self.kind in ("lora", "qlora")

    @property
    def averages_products(self) -> bool:
        """Whether adapters are averaged as the products they stand for."""
        return self.adapts and self.average == "exact"

    @property
    def loaded_dtype(self) -> str:
        """What the weights are loaded in; a base in 4 bits is computed with in bfloat16."""
        return "bfloat16" if self.kind == "qlora" else self.dtype

    @model_validator(mode="after")
    def _check(self) -> TuningConfig:
        if self.adapts and not self.targets and self.router == "frozen":
            raise UserError(
                'tuning.targets = []: with tuning.router = "frozen" nothing is trained. Choose some of: '
                'attention, experts, shared_experts, dense; or "full" or "lora" for the router.'
            )
        if self.averages_products and self.router == "lora":
            raise UserError(
                'tuning.router = "lora": its experts share a factor, and tuning.average = "exact" averages expert by '
                "expert. Choose one of: full, frozen."
            )
        return self


class StatisticsConfig(Section):
    """`[statistics]`: what a client reports before its update is asked for."""

    update_width: Positive = 256
    centroid_width: Positive = 128
    min_tokens: Positive = 32  # experts with fewer tokens are withheld ...
    min_examples: Positive = 4  # ... and those reached from fewer examples


class AlgorithmConfig(Section):
    """`[algorithm]`: a name, and the algorithm's own options (checked by the algorithm)."""

    model_config = ConfigDict(extra="allow")
    name: str = "fedalign_moe"

    @model_validator(mode="before")
    @classmethod
    def _write_defaults_out(cls, values: Any) -> Any:
        """So that a run folder repeats its run when defaults have changed."""
        if not isinstance(values, Mapping):
            return values
        named = {"name": cls.model_fields["name"].default} | dict(values)
        if not isinstance(named["name"], str):
            return values
        built = make(named["name"], {key: value for key, value in named.items() if key != "name"})
        return named | options(built)

    def build(self) -> Algorithm:
        """The algorithm itself."""
        return make(self.name, self.model_extra or {})

    @property
    def chosen(self) -> dict[str, Any]:
        """Options that are not at their defaults."""
        defaults = options(make(self.name, {}))
        return {key: value for key, value in (self.model_extra or {}).items() if value != defaults[key]}


class WireConfig(Section):
    """`[wire]`: precision of what travels; rounding happens before any engine sees it."""

    dtype: WireDtype = "float32"


class ServerConfig(Section):
    """`[server]`: when a round counts."""

    min_arrived: Share = 0.5  # share of a group's planned weight that must arrive for it to change
    min_clients: Positive = 1  # fewer usable replies than this end the run
    optimizer: ServerOptimizer = "average"  # average: the summed updates are the step
    learning_rate: Annotated[float, Field(gt=0)] = 1.0  # of the server; not used by average and fedexp
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # sgd; beta1 of adam and yogi
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99  # adam, yogi
    epsilon: Annotated[float, Field(gt=0)] = 1e-3  # adam, yogi, fedexp: degree of adaptivity
    max_norm_ratio: Annotated[float, Field(ge=0)] = 100.0  # longer than so many median updates: left out; 0: no limit


class EvaluationConfig(Section):
    """`[evaluation]`: on the global test set and on each client's own held-out part."""

    part: Literal["test", "validation"] = "test"  # what stands for the global test set
    every: Positive = 1  # rounds
    clients: bool = True
    batch_tokens: Positive = 8192
    length_normalise: bool = False  # score choices by mean instead of summed log-likelihood
    max_new_tokens: Positive = 64  # exact match by greedy generation (instruction, chat)
    generate: bool = False


class FederationConfig(Section):
    """`[federation]`: the engine that reaches the clients, and what it does about clients that fail.

    All but `engine` is for the Flower engines: "flower" is a deployment of sites that keep their own data, "simulation"
    Flower's own engine for many clients on one machine.
    """

    engine: Literal["in_process", "flower", "simulation"] = "in_process"
    superlink: str = "127.0.0.1:8000"  # where the SuperLink listens
    root_certificates: str | None = None  # PEM file that its certificate is checked with; None: no TLS, loopback only
    min_sites: Positive = 2  # connected sites without which no round begins
    wait_seconds: Positive = 600  # for them to connect, then the run stops
    timeout_seconds: Positive = 3600  # of one stage: training, handing over an update, evaluating
    late: Literal["ask_again", "leave_out"] = "ask_again"  # leave_out: until the late reply is there
    max_missed: Count = 3  # rounds in a row that a site may miss before it is left out for good; 0: any number
    in_flight: Positive = 4  # updates asked for at a time
    workers: Positive = 1  # simulation: processes that train side by side


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names that are unknown or given twice.

    Raises:
        UserError: One is.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracking.loggers", name, TRACKERS)
        if names.count(name) > 1:
            raise UserError(f"tracking.loggers = {list(names)}: {name!r} is given twice. Give each once.")


class TrackingConfig(Section):
    """`[tracking]`: who is told the numbers of each round besides the run folder."""

    loggers: Annotated[tuple[str, ...], Field(strict=False)] = ("tensorboard",)
    health: bool = True  # keep each round's routing, similarities and weights, for the report

    @model_validator(mode="before")
    @classmethod
    def _not_as_before(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "tensorboard" in values:
            raise UserError(
                'tracking.tensorboard: is now tracking.loggers. Write loggers = ["tensorboard"], or [] for none.'
            )
        return values

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        check_trackers(self.loggers)
        return self


class Config(Section):
    """One run, fully described."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    tuning: TuningConfig = TuningConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    wire: WireConfig = WireConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    federation: FederationConfig = FederationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_tuning()
        share = self.data.validation
        if self.evaluation.part == "validation" and not share:
            raise UserError(
                'evaluation.part = "validation": data.validation = 0.0 sets nothing aside. Give a share, such as 0.1.'
            )
        if share and self.federation.engine == "flower":
            raise UserError(
                f"data.validation = {share}: sites keep their data to themselves, nothing can be set aside before "
                "it is dealt. Leave it at 0.0, or choose one of: in_process, simulation for federation.engine."
            )
        return self

    def _check_tuning(self) -> None:
        """Which ways of tuning go together with what is done to updates."""
        exact = self.tuning.averages_products
        if exact and self.server.optimizer != "average":
            raise UserError(
                f'server.optimizer = "{self.server.optimizer}": with tuning.average = "exact" products are averaged, '
                "and there is no step of the factors to optimise. Choose: average."
            )
        if exact and self.training.keep_optimizer:
            raise UserError(
                'training.keep_optimizer = true: with tuning.average = "exact" a client finds other factors each round '
                "than its optimizer knew. Leave it at false, or choose one of: factors, freeze_a."
            )
        if exact and self.algorithm.build().spans_rounds:
            raise UserError(
                f'algorithm.name = "{self.algorithm.name}": sets factors of one round against those of another, which '
                'tuning.average = "exact" makes anew each round. Choose one of: factors, freeze_a.'
            )
        for name, limits in self.clients.limits.items():
            if limits.rank and not exact:
                raise UserError(
                    f"clients.limits.{name}.rank = {limits.rank}: ranks may differ only where products are averaged. "
                    'Choose tuning.kind = "lora" and tuning.average = "exact", or leave it out.'
                )
            if limits.rank > self.tuning.rank:
                raise UserError(
                    f"clients.limits.{name}.rank = {limits.rank}: at most tuning.rank = {self.tuning.rank}."
                )

    def to_toml(self) -> str:
        """The whole configuration as TOML, every key with its value; reading it back gives an equal Config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
