"""Every knob of a run: TOML in, frozen models out. An error names the key, the value and the choices.

What a key means stands here, once; ``examples/every_key.toml`` and a site's ``site.toml`` are written from it
(``fedalign.config.toml``). ``[algorithm]`` holds a name and that algorithm's own options, so a new algorithm brings its
knobs with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedalign.algorithms import ALGORITHMS, make, offered, options, spans_rounds
from fedalign.errors import UserError
from fedalign.protocol import (
    HELD_OUT,
    KEEPS_ALL,
    LOSS,
    SKETCHES,
    TELLING,
    Algorithm,
    Ask,
    Robust,
    ServerOptimizer,
    WireDtype,
)

T = TypeVar("T")


def key(default: T, means: str, **more: Any) -> T:
    """A key: its default, its meaning for the reader of a file, and pydantic's own words (`gt`, `examples`, ...)."""
    field: T = Field(default, description=means, **more)
    return field


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    >>> split_address("[::1]:8000")
    ('::1', 8000)

    Raises:
        ValueError: It is not written so.
    """
    found = re.fullmatch(r"([\w.-]+|\[[\w.:%]+\]):([0-9]{1,5})", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise ValueError("must be HOST:PORT, for example coordinator.example:8000.")
    return found[1].strip("[]"), int(found[2])


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{name!r} is given twice. Give each once.")
        if not name or name != name.strip():
            raise ValueError(f"{name!r} must be a name without spaces around it.")
    return names


CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _place(text: str) -> str:
    if not text.strip() or CONTROL.search(text):
        raise ValueError("must be a path or a name, without control characters.")
    return text


def _template(text: str) -> str:
    """Anything else that Python's format strings can do reaches into objects, or fills the memory with blanks."""
    try:
        fields = [(name, more or how) for _, name, more, how in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error}. Write {{column}} for a column, {{{{ for a brace.") from None
    if not fields or any(more or not re.fullmatch(r"(?!\d+$)[^.\[\]]+", name) for name, more in fields):
        raise ValueError("must hold plain {column} fields: no format, conversion, attribute or index; {{ is a brace.")
    return text


def with_fields(template: str, called: Callable[[str], str]) -> str:
    """A template whose fields have other names.

    >>> with_fields("{{a}} {note}:", str.upper)
    '{{a}} {NOTE}:'
    """
    parts = []
    for before, name, _, _ in Formatter().parse(template):
        parts.append(before.replace("{", "{{").replace("}", "}}"))
        parts.append("" if name is None else f"{{{called(name)}}}")
    return "".join(parts)


INT64 = 2**63 - 1  # TOML knows no larger numbers
Positive = Annotated[int, Field(ge=1, le=INT64)]
Count = Annotated[int, Field(ge=0, le=INT64)]
Width = Annotated[int, Field(ge=1, le=4096)]  # beyond the width of what they stand for, nothing is gained
Seconds = Annotated[int, Field(ge=1, le=10**7)]  # a third of a year
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_once)]
Place = Annotated[str, AfterValidator(_place)]
Template = Annotated[str, AfterValidator(_template)]

Measure = Literal["accuracy", "loss"]
Loss = Literal["plain", "label_shift", "fedlc", "fedrs"]
STRENGTH: Mapping[Loss, float] = {"plain": 0.0, "label_shift": 1.0, "fedlc": 1.0, "fedrs": 0.5}  # see client.losses
FORMAT_GROUP = "fedalign.formats"  # entry points of other packages: a name for data.kind, and a function of a row
KINDS = ("chat", "multiple_choice", "instruction", "classification", "text")
SPELLINGS: dict[str, dict[str, Any]] = {  # what data.kind may say instead: a kind with the columns of a known spelling
    "alpaca": {
        "kind": "instruction",
        "template": "{instruction}\n{input}\nResponse:",
        "columns": {"prompt": "instruction", "input": "input", "response": "output"},
    },
    "sharegpt": {"kind": "chat", "columns": {"messages": "conversations"}},
    "preference": {"kind": "instruction", "columns": {"response": "chosen"}},
    "preference_chat": {"kind": "chat", "columns": {"messages": "chosen"}},
}


def _kind(name: str) -> str:
    if name not in KINDS and name not in (theirs := offered(FORMAT_GROUP)):
        choices = ", ".join((*KINDS, *SPELLINGS, *theirs))
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": choices})
    return name


def _spelt_out(values: Any) -> Any:
    """A kind with its columns and template, in place of the name of a spelling; what is given goes first."""
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        return values
    spelling = SPELLINGS.get(values["kind"])
    if spelling is None:
        return values
    given = values.get("columns", {})
    if isinstance(given, BaseModel):
        given = given.model_dump(exclude_unset=True)
    columns = {**spelling["columns"], **given} if isinstance(given, Mapping) else given
    return {**spelling, **values, "kind": spelling["kind"], "columns": columns}


def _delimiter(text: str) -> str:
    if text != AUTO and (len(text) != 1 or text in '"\r\n'):
        raise ValueError('must be "auto", or one character that is neither a quote nor a line break.')
    return text


def _encoding(name: str) -> str:
    if name != AUTO:
        try:
            "a".encode(name)
        except (LookupError, ValueError):
            raise ValueError(
                "no such encoding. Choose one of: auto, utf-8, utf-16, cp1252, or another of Python's."
            ) from None
    return name


CHAT_TEMPLATES = ("model", "chatml")


def is_template(text: str) -> bool:
    """Whether this is the text of a chat template, and no name of one."""
    return "{{" in text or "{%" in text


AUTO = "auto"
Kind = Annotated[str, AfterValidator(_kind)]
Delimiter = Annotated[
    str,
    AfterValidator(_delimiter),
    Field(description='csv: what parts the cells, such as ";" (auto: the header tells; of .tsv a tab)'),
]
Encoding = Annotated[
    str,
    AfterValidator(_encoding),
    Field(description="of text files, such as cp1252 (auto: by byte order mark, else UTF-8, else Windows-1252, told)"),
]

# Keys of two sections, here or in site.toml, that mean the same.
Device = Annotated[str, Field(description="auto (a GPU if there is one) | cpu | cuda | cuda:1 ... | split (all GPUs)")]
Threads = Annotated[int, Field(ge=0, le=1024, description="CPU threads; 0: torch's own choice")]
MinTokens = Annotated[Positive, Field(description="experts that fewer tokens reached are withheld from statistics,")]
MinExamples = Annotated[Positive, Field(description="and those reached from fewer examples")]
Address = Annotated[
    str,
    AfterValidator(lambda text: split_address(text) and text),
    Field(description="HOST:PORT where Flower's SuperLink listens"),
]
Certificates = Annotated[
    str | None,
    Field(
        description="PEM file that its certificate is checked with; without: no TLS, loopback only", examples=["ca.crt"]
    ),
]


class Section(BaseModel):
    """A table of the TOML file: immutable, and no key is ever ignored. Its docstring stands beside its name there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    writes_what_is_set: ClassVar[bool] = False  # in TOML, what nobody set stands behind a #


class RunConfig(Section):
    """How long, on what, and from which seed."""

    seed: Count = key(0, "of partition, client sampling, order of batches, rounding")
    rounds: Positive = key(10, "of training, plan and sum")
    patience: Count = key(
        0, "scored rounds, none better by evaluation.best, after which the run ends early; 0: it does not"
    )
    device: Device = "auto"
    threads: Threads = 0
    workers: Annotated[int, Field(ge=1, le=1024)] = key(
        1, "in_process: clients that train side by side, on one thread each (CPU); the results are the same"
    )
    check: bool = key(True, "at the end: does model/ load in plain transformers and peft, and compute the same")

    @property
    def threads_each(self) -> int:
        """Threads of each process; 0: torch's own choice."""
        return self.threads or int(self.workers > 1)


class ModelConfig(Section):
    """Any Hugging Face MoE model."""

    path: str = key("demo", 'a hub id, a folder, or "demo": the small OLMoE that comes with the package')
    revision: str | None = key(None, "branch, tag or commit on the hub", examples=["main"])
    trust_remote_code: bool = key(False, "run the code that comes with the model")
    weights_hash: str | None = key(None, "refuse others; `fedalign doctor` prints it", examples=["5f0c..."])


class Columns(Section):
    """Names of the columns in your files."""

    text: str = key("text", "classification, text")
    label: str = key("label", "classification")
    prompt: str = key("prompt", "instruction")
    response: str = key("response", "instruction")
    input: str = key("input", "instruction: what it is about, where data.template names it; a row may have none")
    messages: str = key("messages", "chat: a list of {role, content} or {from, value}")
    system: str = key("system", "chat: what the system says before them; a chat may have none")
    history: str = key("history", "chat: messages that stand before them and are not trained; a chat may have none")
    tools: str = key("tools", "chat: the tools that it may call; a chat may have none")
    question: str = key("question", "multiple_choice")
    choices: str = key("choices", 'multiple_choice: a list; or a column for each choice, such as "A,B,C,D"')
    answer: str = key("answer", "multiple_choice: index, letter or text of the right choice")
    client: str = key("client", 'who owns the row, for clients.partition = "natural"; not used at a site')


def _roles(columns: dict[str, str]) -> dict[str, str]:
    for role in columns:
        if role not in Columns.model_fields:
            raise ValueError(
                f"{role!r} is nothing that a column is read as. Choose of: {', '.join(Columns.model_fields)}."
            )
    for column, times in Counter(columns.values()).items():
        if times > 1 or not column:
            raise ValueError(f"each must name a column of its own, and {column!r} is named {times} times.")
    return columns


OwnColumns = Annotated[dict[str, str], AfterValidator(_roles)]


class FileConfig(Section):
    """One file, by its name: where it differs from [data]. Its columns keep the names of [data.columns] elsewhere."""

    kind: Kind | None = key(None, "what a row of it is", examples=["instruction"])
    delimiter: Delimiter | None = key(None, "csv: what parts its cells", examples=[";"])
    encoding: Encoding | None = key(None, "of its text", examples=["cp1252"])
    template: Template | None = key(None, "the prompt over its own columns", examples=["{note}\nLabel:"])
    columns: OwnColumns = key({}, "what is called otherwise in it", examples=[{"text": "note"}])

    spell_out = model_validator(mode="before")(_spelt_out)


def choice_columns(name: str) -> list[str]:
    """Columns that hold a choice each, where [data.columns] names several; empty where one column holds all.

    >>> choice_columns("A, B,C"), choice_columns("choices")
    (['A', 'B', 'C'], [])
    """
    names = [part.strip() for part in name.split(",")]
    return names if len(names) > 1 and all(names) else []


class DataConfig(Section):
    """The data, and how rows become examples."""

    train: Place = key(
        "docstrings", 'a hub id, a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or "docstrings"'
    )
    test: Place | None = key(None, "without it: the source's own test split if it has one", examples=["test.jsonl"])
    kind: Kind = key(
        "classification",
        f"what a row is: {' | '.join(KINDS)}; or how it is spelt: {' | '.join(SPELLINGS)}; or a format of an "
        "installed package",
    )
    delimiter: Delimiter = AUTO
    encoding: Encoding = AUTO
    subset: str | None = key(None, "the configuration of a hub data set", examples=["main"])
    train_split: str = key("train", "of a hub data set")
    test_split: str = key("test", "of a hub data set")
    labels: Names[str] = key((), "names of the classes; needed where labels are integers, and at sites")
    template: Template | None = key(None, "the prompt, in which {column} is that column", examples=["{text}\nLabel:"])
    chat_template: str = key("model", "of chats: the model's own | chatml | a file that holds one (Jinja)")
    max_train: Count = key(0, "examples drawn at random; 0: all")
    max_test: Count = key(0, "the same of the test set")
    validation: Part = key(0.0, "share of the training examples that nobody trains on: `compare --tune` chooses by it")
    max_length: Count = key(0, "tokens of one example; 0: what the model allows")
    too_long: Literal["error", "truncate", "drop"] = key("error", "longer ones (truncate: the prompt, from its start)")
    on_bad_row: Literal["error", "skip"] = key("error", "rows that cannot be read (skip: left out, and told)")
    columns: Columns = Columns()
    files: dict[str, FileConfig] = key({}, "", examples=[{"north.csv": FileConfig()}])

    spell_out = model_validator(mode="before")(_spelt_out)

    @property
    def has_chats(self) -> bool:
        """Whether an example may be a chat, and so several sequences."""
        kinds = {self.kind, *(file.kind for file in self.files.values() if file.kind)}
        return "chat" in kinds or not kinds <= {*KINDS}


class ClientLimits(Section):
    """Limits of a small client; 0: as everybody."""

    top_k: Count = key(0, "experts that a token is sent to in training; 0: the model's own number")
    max_experts: Count = key(0, "experts of a layer that are trained, those that its own data uses most; 0: all")
    rank: Count = key(0, 'components of adapters that are trained, with tuning.average = "exact"; 0: all')
    max_norm: float = key(0.0, "length of an update at most, before it is rounded; a longer one is cut; 0: any", ge=0)


class ClientsConfig(Section):
    """How many there are and what each of them holds."""

    count: Positive = key(10, "natural and files: as many as the data has")
    partition: Literal["dirichlet", "iid", "pathological", "size", "natural", "files"] = key(
        "dirichlet", "how rows are dealt out (natural: by a client column; files: a file each)"
    )
    alpha: float = key(0.1, "dirichlet: small is skewed, large is even", gt=0)
    classes: Positive = key(2, "pathological: classes a client holds")
    size_growth: Literal["linear", "square", "exponential"] = key("linear", "of size, in the client's index")
    min_examples: Positive = key(10, "a client with fewer is an error")
    held_out: Part = key(0.1, "share of its own examples that a client keeps for testing; 0: none")
    sample: Share = key(1.0, "share of the clients asked each round")
    only: Names[str] = key((), "names of the clients that take part, others have no part in the run; []: all of them")
    limits: dict[str, ClientLimits] = key({}, "", examples=[{"client-00": ClientLimits(top_k=1, max_experts=2)}])


class TrainingConfig(Section):
    """One client's local training."""

    epochs: Positive = key(1, "passes over the client's examples a round")
    optimizer: Literal["adamw", "sgd"] = key("adamw", "the client's")
    learning_rate: float = key(1e-4, "the client's", gt=0)
    weight_decay: float = key(0.0, "on matrices", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "of the learning rate, within a round")
    warmup_steps: Count = key(0, "in which the learning rate rises, each round")
    batch_tokens: Positive = key(2048, "tokens of a batch, padding included,")
    batch_examples: Positive = key(16, "and at most so many examples")
    accumulate: Positive = key(1, "batches an optimizer step")
    max_grad_norm: float = key(1.0, "longer gradients are clipped; 0: no clipping", ge=0)
    balance_coefficient: float = key(0.0, "of the Switch load-balancing loss", ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = key("auto", "autocast; weights and routers stay float32")
    keep_optimizer: bool = key(False, "carry the optimizer's state to the client's next round")
    loss: Loss = key(
        "plain",
        "where labels differ from client to client; classification, data.labels given (label_shift: clients tell how "
        "many examples each label has; fedlc, fedrs: nothing more leaves)",
    )
    loss_strength: float | None = key(
        None,
        "label_shift: the shift times it (1); fedlc: tau (1); fedrs: alpha of labels that are not there (0.5)",
        ge=0,
        le=100,
        examples=[0.5],
    )

    @property
    def strength(self) -> float:
        """Of the loss: as given, else its own."""
        return STRENGTH[self.loss] if self.loss_strength is None else self.loss_strength


class TuningConfig(Section):
    """Which parameters are trained, and how.

    Patterns are those of a shell (*.self_attn.*) over names of parameters; for LoRA, over what it adapts.
    """

    kind: Literal["full", "moe", "experts", "router", "lora", "qlora"] = key(
        "full", "what is trained (moe: routers and experts; qlora: on a base in 4 bits, CUDA)"
    )
    include: Names[str] = key((), 'of that only names like these, for example ["*.layers.3.*"]; empty: all')
    exclude: Names[str] = key((), "and none like these")
    dtype: Literal["float32", "bfloat16"] = key("float32", "of weights; routers, adapters and updates stay float32")
    gradient_checkpointing: bool = key(False, "compute activations twice instead of keeping them")
    rank: Width = key(8, "of adapters; from here on for lora and qlora")
    alpha: float = key(16.0, "adapters are scaled by alpha / rank", gt=0)
    targets: Names[Literal["attention", "experts", "shared_experts", "dense"]] = key(
        ("attention", "experts", "shared_experts"), "what is adapted (dense: other linear layers)"
    )
    router: Literal["full", "lora", "frozen"] = key("full", "how routers are trained")
    average: Literal["factors", "freeze_a", "exact"] = key(
        "factors", "A and B each (FedIT); B alone (FFA-LoRA); products, cut back to the rank"
    )

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
        """The dtype in which weights are loaded; a base in 4 bits is computed with in bfloat16."""
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
    """Statistics that a client reports before its update is asked for."""

    update_width: Width = key(64, "numbers that stand for an expert's update")
    centroid_width: Width = key(64, "numbers that stand for an expert's mean input")
    min_tokens: MinTokens = 32
    min_examples: MinExamples = 4


class AlgorithmConfig(Section):
    """A name, and the algorithm's own options."""

    model_config = ConfigDict(extra="allow")
    name: str = key("fedalign_moe", f"{' | '.join(ALGORITHMS)} | one that an installed package offers")

    @model_validator(mode="before")
    @classmethod
    def _write_defaults_out(cls, values: Any) -> Any:
        """So that a run folder repeats its run when defaults have changed."""
        if not isinstance(values, Mapping):
            return values
        named = {"name": cls.model_fields["name"].default} | dict(values)
        if not isinstance(named["name"], str):
            return values
        built = make(named["name"], {name: value for name, value in named.items() if name != "name"})
        return named | options(built)

    def build(self) -> Algorithm:
        """The algorithm itself."""
        return make(self.name, self.model_extra or {})

    @property
    def chosen(self) -> dict[str, Any]:
        """Options that are not at their defaults."""
        defaults = options(make(self.name, {}))
        return {name: value for name, value in (self.model_extra or {}).items() if value != defaults[name]}


class WireConfig(Section):
    """Precision of what travels; rounding happens before any engine sees it."""

    dtype: WireDtype = key("float32", "of updates, and unless `down` says otherwise of broadcasts")
    down: Literal["auto", WireDtype] = key(
        "auto",
        "of broadcasts; auto: as dtype. int8 and int4: differences to the broadcast before, whole weights in bfloat16 "
        "for whoever missed it",
    )
    error_feedback: Literal["auto", "on", "off"] = key(
        "auto", "a client adds what rounding to int8 or int4 lost to its next update; auto: of int4"
    )
    piece_mb: float = key(
        256.0, "MB of a piece at most, larger ones on a faster line; a broken connection costs one of them", gt=0
    )

    @property
    def piece_nbytes(self) -> int:
        """Bytes of a piece."""
        return max(1, int(self.piece_mb * 1e6))

    @property
    def broadcasts(self) -> WireDtype:
        """The precision in which broadcasts travel."""
        return self.dtype if self.down == "auto" else self.down

    @property
    def feeds_back(self) -> bool:
        """Whether a client keeps what rounding lost."""
        return self.dtype in {"auto": ("int4",), "on": ("int8", "int4"), "off": ()}[self.error_feedback]


class ServerConfig(Section):
    """When a round counts, and the server's own step along the summed updates."""

    min_arrived: Share = key(0.5, "share of a group's planned weight that must arrive for it to change")
    min_clients: Positive = key(1, "usable replies without which the run stops")
    optimizer: ServerOptimizer = key("average", "the step along the summed updates")
    learning_rate: float = key(1.0, "of the server: sgd, adam, yogi", gt=0)
    momentum: Part = key(0.9, "sgd; beta1 of adam and yogi")
    beta2: Part = key(0.99, "adam, yogi")
    epsilon: float = key(1e-3, "adam, yogi, fedexp: the larger, the less adaptive", gt=0)
    memory_gb: float = key(
        8.0, "of float32: what is trained, if larger, lies in mapped files in the run's folder, not in memory", ge=0
    )
    max_norm_ratio: float = key(
        100.0, "robust none: updates so many times as long as the median are left out; 0: no limit", ge=0
    )
    robust: Literal["auto", Robust] = key(
        "auto", "what one site can do to a group (auto: clip across sites, none elsewhere); docs/security.md"
    )
    max_share: Share = key(0.5, "but for robust none: no site counts for more in a group of two or more")
    max_share_ratio: float = key(3.0, "nor for more than so many times an equal share", ge=1)
    clip: float = key(1.25, "and no update of a group is longer than so many medians of its holders", gt=0)
    hostile: float = key(0.3, "share of a group's holders that trimmed_mean and krum reckon with", ge=0, lt=0.5)
    radius: float = key(1.0, "of centered_clip, in medians of the holders' norms", gt=0)

    def is_mapped(self, values: int) -> bool:
        """Whether the float32 master of so many values lies in files rather than in memory."""
        return 4 * values > self.memory_gb * 1e9


NOISED: Mapping[str, bool] = {"fedavg": False, "fedprox": False, "by_use": True}  # what noise can meet; reads loads


class PrivacyConfig(Section):
    """Noise on all that leaves a site hides each example; masks hide all but sums over sites. Off; see docs/privacy.md.

    Noise needs epsilon or noise_multiplier, and the extra `privacy`. Masks need the extra `flower`.
    """

    epsilon: float | None = key(None, "of the whole run, at each site; the noise follows", gt=0, le=100, examples=[4.0])
    noise_multiplier: float | None = key(
        None, "or the noise of a step, in lengths of max_grad_norm", ge=0.3, le=1e4, examples=[1.0]
    )
    delta: float = key(1e-5, "chance that epsilon does not hold; below 1 / examples of every site", gt=0, lt=1)
    max_grad_norm: float = key(  # near the least float32 numbers noise would be rounded away
        1.0, "an example's gradient is cut to it, in place of training.max_grad_norm", ge=1e-6, le=1e6
    )
    loads_noise: float = key(30.0, "by_use: noise of experts' loads, in shares of an example", ge=1, le=1e6)
    seed: Count | None = key(
        None, "in_process, for studies: noise that can be repeated, and so protects nobody", examples=[0]
    )

    masked: bool = key(False, "the coordinator learns sums over clients and nothing of one alone")
    masked_min_holders: int = key(
        3, "clients of a masked sum at least; experts and words that fewer have go on as under FedAvg", ge=2, le=10**6
    )

    @property
    def on(self) -> bool:
        """Whether there is any noise."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @property
    def told(self) -> str:
        """The noise, for the first lines of a run."""
        much = f"epsilon {self.epsilon:g}" if self.epsilon is not None else f"noise of {self.noise_multiplier:g} a step"
        told = f"noise at each client hides any single example: {much}, delta {self.delta:g}"
        if self.seed is None:
            return told
        return f"{told}; but privacy.seed = {self.seed} is known, so it is a study and protects nobody"

    @property
    def hidden(self) -> str:
        """The masks, for the first lines of a run."""
        return (
            f"masked sums: the server learns sums over clients alone; parts of fewer than {self.masked_min_holders} "
            "holders go on as under FedAvg. Nobody's update can be looked at: one broken client can spoil the model"
        )


class EvaluationConfig(Section):
    """On the global test set and on each client's own held-out part."""

    part: Literal["test", "validation"] = key("test", "what stands for the global test set")
    best: Measure = key(
        "accuracy",
        "what best/, run.patience and comparisons go by (accuracy: where there is none the loss; loss: where "
        "probabilities matter)",
    )
    every: Positive = key(1, "rounds")
    clients: bool = key(True, "also on each client's held-out part, before it trains on what it received")
    everyone: Count = key(
        0,
        "rounds, where clients.sample is below 1: after so many all clients score, else those that train next, and no "
        "mean is told; 0: all score before the first round and after the last",
    )
    batch_tokens: Positive = key(8192, "tokens of a batch, padding included")
    length_normalise: bool = key(False, "choices by mean instead of summed log-likelihood")
    generate: bool = key(False, "instruction and chat: exact match by greedy generation")
    max_new_tokens: Positive = key(64, "of which at most so many tokens are generated")
    leaving: Count = key(
        16,
        "of a finished model in which sites own experts: clients' held-out parts are scored once more without the "
        "experts of each owner, if there are at most so many owners",
    )
    answers: Count = key(
        10, "rows of the global test set whose text and answers the run's folder keeps, for the report"
    )


class FederationConfig(Section):
    """The engine that reaches the clients, and what it does about those that fail; all but `engine` is for Flower."""

    engine: Literal["in_process", "flower", "simulation"] = key(
        "in_process", "clients in one process; sites with their own data; Flower, on one machine"
    )
    superlink: Address = "127.0.0.1:8000"
    root_certificates: Certificates = None
    min_sites: Positive = key(2, "connected sites without which no round begins")
    wait_seconds: Seconds = key(600, "for them to connect, then the run stops")
    timeout_seconds: Seconds = key(
        3600, "of silence of a site that trains, scores or sends; a transfer may take longer"
    )
    late: Literal["ask_again", "leave_out"] = key("ask_again", "what becomes of a site that is busy with an old round")
    max_missed: Count = key(3, "rounds in a row that a site may miss; then it is left out for good; 0: any number")
    in_flight: Positive = key(4, "updates asked for at a time")
    workers: Positive = key(1, "simulation: processes that train side by side")


class TrackingConfig(Section):
    """Who is told the numbers of each round besides the run folder."""

    loggers: Names[Literal["tensorboard", "mlflow", "wandb"]] = key(
        ("tensorboard",), "any of them, or []; the last two are extras to install"
    )
    health: Literal["asked", "full", "off"] = key(
        "asked",
        "what is kept of each round for the report; full: clients send sketches for its pictures of similarity, also "
        "where the algorithm asks for none (not across sites)",
    )


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
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    federation: FederationConfig = FederationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_tuning()
        self._check_engine()
        self._check_privacy()
        self._check_masked()
        self._check_loss()
        self._check_owned()
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

    @property
    def asks(self) -> Set[Ask]:
        """Statistics that leave a client beside those that always do: for the plan, and for pictures if wanted."""
        return self.algorithm.build().asks | (SKETCHES if self.tracking.health == "full" else frozenset())

    @property
    def robust(self) -> Robust:
        """How the coordinator guards itself against one hostile or broken site."""
        if self.server.robust != "auto":
            return self.server.robust
        return "clip" if self.federation.engine == "flower" and self.algorithm.build().shared is None else "none"

    @property
    def guard(self) -> str:
        """The guard against hostile sites, for the first line of a run."""
        options = self.server
        if self.robust == "none":
            return 'server.robust = "none": a site counts for what it says'
        share = f"{100 * options.max_share:g} % or {options.max_share_ratio:g} equal shares of a group"
        bound = f"at most {share} and {options.clip:g} medians of its norms"
        if self.asks & TELLING:
            bound += "; embeddings of words that one site alone uses stay"
        if self.robust == "clip":
            return f"a site counts for {bound}"
        kept = ", for which every update of a round stays in memory" if self.robust in KEEPS_ALL else ""
        return f"{self.robust} of what sites send{kept}, each {bound}"

    @property
    def sends_loads(self) -> bool:
        """Whether a site tells which experts its tokens go to; with noise only if the algorithm reads it."""
        return not self.privacy.on or NOISED.get(self.algorithm.name, False)

    @property
    def tells(self) -> Set[str]:
        """The sums of a masked round beside those that weights are shares of, as of `protocol.count_shapes`."""
        told = {LOSS: not self.privacy.on, HELD_OUT: self.evaluation.clients}
        return {name for name, is_told in told.items() if is_told}

    def _check_owned(self) -> None:
        """Refuse what holds a site's update against others', or changes other experts than its own."""
        if (shared := self.algorithm.build().shared) is None:
            return
        name = f'with algorithm.name = "{self.algorithm.name}" nobody but its owner trains an expert'
        if self.robust != "none":
            raise UserError(
                f'server.robust = "{self.robust}": {name}, so there is nobody to hold it against. Choose one of: auto, '
                "none."
            )
        if self.server.optimizer != "average":
            raise UserError(
                f'server.optimizer = "{self.server.optimizer}": {name}, and takes it over as it is. Choose: average.'
            )
        if shared == "frozen" and self.training.loss == "label_shift":
            raise UserError(
                f'training.loss = "label_shift": {name}, and how often other sites have a label would be in it. Choose '
                "another loss."
            )
        if shared == "frozen" and self.clients.only and self.tuning.dtype != "float32":
            raise UserError(
                f'tuning.dtype = "{self.tuning.dtype}": would round what others have, where clients.only trains the '
                'experts of some. Choose "float32".'
            )
        if self.tuning.kind not in ("full", "moe", "lora"):
            raise UserError(
                f'tuning.kind = "{self.tuning.kind}": {name}, which it trains whole or by adapters, with its router '
                "row. Choose one of: full, moe, lora."
            )
        if self.tuning.adapts:
            self._check_owned_adapters(name)

    def _check_owned_adapters(self, name: str) -> None:
        """Refuse adapters that sites' own experts could not have alone."""
        tuning, frozen = self.tuning, self.algorithm.build().shared == "frozen"
        if "experts" not in tuning.targets or (frozen and set(tuning.targets) != {"experts"}):
            what = 'and with algorithm.shared = "frozen" nothing else' if frozen else "which must be among them"
            raise UserError(f'tuning.targets = {list(tuning.targets)}: {name}, {what}. Choose: ["experts"].')
        if tuning.router != "full":
            raise UserError(f'tuning.router = "{tuning.router}": {name}, and its router row whole. Choose: full.')
        if tuning.average == "exact":
            raise UserError(
                f'tuning.average = "exact": {name}, so there are no products to average. Choose one of: factors, '
                "freeze_a."
            )

    @property
    def norm_ratio(self) -> float:
        """How many times as long as the median an update may be; 0: any, where norms are clipped or not compared."""
        held = self.robust == "none" and self.algorithm.build().shared is None
        return self.server.max_norm_ratio if held else 0.0

    def _check_privacy(self) -> None:
        """Refuse what would leave a site without noise, or couples its examples."""
        privacy, name = self.privacy, self.algorithm.name
        if not privacy.on:
            if privacy.seed is not None:
                raise UserError(
                    f"privacy.seed = {privacy.seed}: there is no noise. Give privacy.epsilon, or leave it out."
                )
            return
        if privacy.epsilon is not None and privacy.noise_multiplier is not None:
            raise UserError(
                f"privacy.noise_multiplier = {privacy.noise_multiplier}: privacy.epsilon = {privacy.epsilon} decides "
                "the noise. Leave one of them out."
            )
        if privacy.seed is not None and self.federation.engine != "in_process":
            raise UserError(
                f"privacy.seed = {privacy.seed}: sites draw their noise themselves. Leave it out, or choose "
                'federation.engine = "in_process".'
            )
        if self.algorithm.build().shared is not None:
            raise UserError(
                f'algorithm.name = "{name}": with [privacy] the fit of a site\'s router row would leave without noise '
                f"(docs/noise.md). Choose one of: {', '.join(NOISED)}."
            )
        if name not in NOISED:
            raise UserError(
                f'algorithm.name = "{name}": with [privacy] its statistics would need noise of their own. Choose one '
                f"of: {', '.join(NOISED)}."
            )
        if self.asks:
            wants = f"{name} asks for {', '.join(sorted(self.asks))}"
            remedy = 'algorithm.vocabulary = "average"' if self.asks <= TELLING else "another algorithm or option"
            raise UserError(f"[privacy]: {wants}, which has no noise. Choose {remedy}.")
        if self.evaluation.clients:
            raise UserError(
                "evaluation.clients = true: with [privacy] sites send no scores. Choose false, and give a test set "
                "(data.test) to see how the model does."
            )
        if self.tuning.kind == "qlora":
            raise UserError(
                'tuning.kind = "qlora": not with [privacy]. Choose one of: full, moe, experts, router, lora.'
            )
        if self.run.device == "split":
            raise UserError('run.device = "split": not with [privacy]. Choose one GPU, or cpu.')
        for client, limits in self.clients.limits.items():
            if limits.max_experts:
                raise UserError(
                    f"clients.limits.{client}.max_experts = {limits.max_experts}: which experts they are would tell of "
                    "its data. With [privacy] choose 0."
                )

    def _check_masked(self) -> None:
        """Refuse what needs more of one client than sums over all of them."""
        if not self.privacy.masked:
            return
        algorithm, name, server = self.algorithm.build(), self.algorithm.name, self.server
        masked = "privacy.masked = true"
        if algorithm.shared is not None:
            raise UserError(
                f'algorithm.name = "{name}": the update of an expert that one client owns is a sum of one, which '
                f"{masked} cannot hide. Choose one of: by_use, fedavg, fedprox."
            )
        if algorithm.private or algorithm.mix:
            raise UserError(
                f'algorithm.name = "{name}": clients keep parts of the model, which {masked} does not sum yet. Choose '
                "one of: by_use, fedavg, fedprox."
            )
        if algorithm.shares is None:
            raise UserError(
                f'algorithm.name = "{name}": its weights, with these options, need statistics of each client, and with '
                f"{masked} there are sums alone. Choose one of: by_use, fedavg, fedprox."
            )
        if self.robust != "none":
            over_sites = f', over sites "{self.robust}"' if server.robust == "auto" else ""
            raise UserError(
                f'server.robust = "{server.robust}"{over_sites}: needs the length of each client\'s update, which '
                f'{masked} hides. Choose "none".'
            )
        if server.max_norm_ratio:
            raise UserError(
                f"server.max_norm_ratio = {server.max_norm_ratio:g}: needs the length of each client's update, which "
                f"{masked} hides: a broken client can spoil the sum. Choose 0."
            )
        if server.optimizer == "fedexp":
            raise UserError(
                f'server.optimizer = "fedexp": needs the length of each client\'s update, which {masked} hides. Choose '
                "one of: average, sgd, adam, yogi."
            )
        if self.tuning.averages_products:
            raise UserError(
                f'tuning.average = "exact": needs the factors of each client, which {masked} hides. Choose one of: '
                "factors, freeze_a."
            )
        if self.wire.dtype != "float32":
            raise UserError(
                f'wire.dtype = "{self.wire.dtype}": with {masked} updates travel in 16 bits of their own. Choose '
                '"float32", and for broadcasts wire.down.'
            )
        if self.training.loss == "label_shift":
            raise UserError(
                f'training.loss = "label_shift": needs each client\'s counts of labels, which {masked} does not sum '
                "yet. Choose one of: plain, fedlc, fedrs."
            )
        if self.tracking.health == "full":
            raise UserError(
                f'tracking.health = "full": needs sketches of each client, which {masked} hides. Choose one of: asked, '
                "off."
            )
        for client, limits in self.clients.limits.items():
            if limits.max_experts:
                raise UserError(
                    f"clients.limits.{client}.max_experts = {limits.max_experts}: which experts they are would tell of "
                    f"its data. With {masked} choose 0."
                )

    def _check_loss(self) -> None:
        """Refuse a loss that reads labels where there are none to read, or where its reading would tell of examples."""
        loss, strength = self.training.loss, self.training.loss_strength
        if loss == "plain":
            if strength is not None:
                raise UserError(
                    f'training.loss_strength = {strength}: training.loss = "plain" has none. Leave it out, or choose '
                    "one of: label_shift, fedlc, fedrs."
                )
            return
        if loss == "fedrs" and self.training.strength > 1:
            raise UserError(f'training.loss_strength = {strength}: of training.loss = "fedrs" at most 1.')
        kinds = {self.data.kind, *(file.kind for file in self.data.files.values() if file.kind)}
        if kinds != {"classification"}:
            other = ", ".join(sorted(kinds - {"classification"}))
            raise UserError(
                f'training.loss = "{loss}": reads labels, and data.kind = "{other}" has none that all share. Choose '
                "plain, or data.kind = classification."
            )
        if not self.data.labels:
            raise UserError(
                f'training.loss = "{loss}": counts labels in the order of data.labels, which is []. Name them there, '
                'for example data.labels = ["World", "Sports"].'
            )
        if self.privacy.on:
            raise UserError(
                f'training.loss = "{loss}": counts of labels have no noise, and with [privacy] each would tell of '
                "examples. Choose plain."
            )
        if self.algorithm.build().mix:
            raise UserError(
                f'training.loss = "{loss}": algorithm.name = "{self.algorithm.name}" trains a mixture of two models, '
                "which has no logits to correct. Choose plain, or another algorithm."
            )

    def _check_engine(self) -> None:
        """Refuse settings that cannot be asked of sites."""
        engine, workers = self.federation.engine, self.run.workers
        if workers > 1 and engine != "in_process":
            instead = "federation.workers does that" if engine == "simulation" else "sites have their own machines"
            raise UserError(f'run.workers = {workers}: with federation.engine = "{engine}" {instead}. Choose 1.')
        if workers > 1 and self.run.threads > 1:
            raise UserError(
                f"run.threads = {self.run.threads}: with run.workers = {workers} each worker has one thread. Leave it "
                "out, or choose run.workers = 1."
            )
        if engine == "flower" and self.tracking.health == "full":
            raise UserError(
                'tracking.health = "full": sites send what the algorithm asks for. Choose one of: asked, off.'
            )
        if engine == "flower" and self.data.chat_template not in CHAT_TEMPLATES:
            raise UserError(
                "data.chat_template: sites run no template of another's over their data. Choose one of: "
                f"{', '.join(CHAT_TEMPLATES)}."
            )
        if engine == "flower" and self.data.kind not in KINDS:
            raise UserError(
                f"data.kind = {self.data.kind!r}: a format of a package may read any column, which sites do not let "
                f"it. Choose one of: {', '.join(KINDS)}."
            )
        only, least = self.clients.only, self.federation.min_sites
        if engine != "in_process" and 0 < len(only) < least:
            raise UserError(
                f"federation.min_sites = {least}: no round would begin, since clients.only names {len(only)}. Choose "
                f"1 to {len(only)}."
            )
        if engine != "in_process" and "data" in self.asks:
            raise UserError(
                f'algorithm.name = "{self.algorithm.name}": pools the data, which sites keep to themselves. Choose '
                'federation.engine = "in_process", or another algorithm.'
            )

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
        if exact and self.robust not in ("none", "clip"):
            raise UserError(
                f'server.robust = "{self.robust}": compares values, which are factors with tuning.average = "exact". '
                "Choose one of: none, clip."
            )
        if exact and spans_rounds(self.algorithm.build()):
            raise UserError(
                f'algorithm.name = "{self.algorithm.name}": sets factors of one round against those of another, which '
                'tuning.average = "exact" makes anew each round. Choose one of: factors, freeze_a.'
            )
        if self.clients.limits and self.federation.engine == "flower":
            raise UserError(
                f"clients.limits.{next(iter(self.clients.limits))}: a site says what it can do itself, in [limits] of "
                "site.toml. Leave it out, or choose one of: in_process, simulation for federation.engine."
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
