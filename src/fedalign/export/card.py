"""The model card of what is exported: a README.md whose head the Hub reads.

It tells how many clients there were, never their names, and of their data the kind, the size and the classes that the
model chooses among: no text, no paths. Whoever has the run's folder finds these there. Owners of experts are named
where one has left: config.json names them too.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from string import Formatter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fedalign.config.run import Config, DataConfig
from fedalign.data.formats import FORMATS
from fedalign.files import digests
from fedalign.protocol import Metrics
from fedalign.server.health import DEAD, OVERLOADED, Round
from fedalign.server.scores import Spent, beside, is_scored, measure_of
from fedalign.units import nats, percent

if TYPE_CHECKING:
    from fedalign.export.leaving import Left

CARD = "README.md"
Form = Literal["checkpoint", "merged", "adapter"]
OWN_MODEL = "of each client's own model, not of this one"
TOGETHER = "clients' held-out examples, together"
MIXER = "mixer.safetensors"
OF_DOCSTRINGS = "that of the library that each docstring is from"
PACKAGES = ("fedalign-moe", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
MODEL = "A Mixture-of-Experts language model"
PARTITIONS = {
    "dirichlet": "dealt out by class, Dirichlet with alpha {alpha:g}",
    "files": "each client has its own",
    "iid": "dealt out at random",
    "natural": "each client has its own",
    "pathological": "dealt out, {classes} classes a client",
    "size": "dealt out at random in growing sizes ({size_growth})",
}
TUNINGS = {
    "full": "all parameters",
    "moe": "routers and experts",
    "experts": "experts",
    "router": "routers",
}
ROUTERS = {"full": "trained whole", "lora": "LoRA too", "frozen": "frozen"}
AVERAGES = {"factors": "the factors", "freeze_a": "B alone, A is frozen", "exact": "the products, cut back to the rank"}
TOKENS = 'tokenizer(prompt, return_tensors="pt").input_ids'
CHAT_TOKENS = (
    "tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
    'return_tensors="pt").input_ids'
)
HEAD = """\
{imports}

folder = "."  # {place}
{model}
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
MIXED = """\
{server}  # the global model
mixer = load_file(f"{{folder}}/{mixer}")  # a linear layer on what the global model's head reads
heard = []
server.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))


@torch.no_grad()
def log_probabilities(**inputs):
    \"\"\"Of the next token at each position: the mixer says how much of it is the global model's.\"\"\"
    heard.clear()
    theirs, own = (m.eval()(**inputs).logits.float().log_softmax(-1) for m in (server, model))
    score = heard[0].float() @ mixer["weight"].T + mixer["bias"]
    log_share = torch.nn.functional.logsigmoid
    return torch.logaddexp(log_share(score) + theirs, log_share(-score) + own)


"""
UNTOLD = {  # of the configuration: paths, names of clients, what the machines were
    "run": ("device", "threads", "workers"),
    "model": ("path", "revision"),
    "data": ("train", "test", "subset", "train_split", "test_split", "columns", "files"),
    "clients": ("limits", "only"),
}


@dataclass(frozen=True)
class Made:
    """The exported thing."""

    name: str
    form: Form
    dtype: str
    loader: str  # the class that loads it
    base: str  # a folder or a Hub id
    local_base: bool
    trust_remote_code: bool = False
    clients: int = 0  # personal models beside it
    personal: str | None = None  # the client whose model it is
    mixes: bool = False  # it is mixed with the global model by a mixer
    base_license: str | None = None  # None: unknown
    data_license: str | None = None  # None: unknown
    left: Left | None = None  # sites that took their experts back
    shared_by: Sequence[str] | None = None  # who trained what sites share; None: nothing says so, or sites own nothing

    @property
    def is_seq2seq(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return "Seq2Seq" in self.loader

    @property
    def library(self) -> str:
        """The class that loads it."""
        return "peft" if self.form == "adapter" else "transformers"

    def load(self, place: str) -> tuple[str, str]:
        """The two lines that load it from a folder or the Hub."""
        options = [repr(place)] + [f'dtype="{self.dtype}"'] * (self.form == "adapter")
        options += ["trust_remote_code=True"] * self.trust_remote_code
        return (
            f"from {self.library} import {self.loader}",
            f"model = {self.loader}.from_pretrained({', '.join(options)})",
        )

    def of_client(self, name: str, *, mixes: bool) -> Made:
        """The same for a client's own model, which lies in a folder of it."""
        return replace(self, personal=name, mixes=mixes, clients=0)


@dataclass(frozen=True)
class Trained:
    """The run that it comes from."""

    config: Config
    round: int
    best: bool
    history: Sequence[Metrics]  # up to that round
    holdings: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]  # empty: the run is not finished, and recorded none
    health: Round | None
    spent: Spent | None = None  # by noise, in all rounds, those after it and those that broke off too; None: not told
    checked: str | None = None  # how the run's own check of it with plain libraries went; None: it was not done

    @property
    def scored(self) -> Metrics:
        """The line of the last round that was scored; empty: none was."""
        return next((line for line in reversed(self.history) if is_scored(line)), {})

    @property
    def chosen(self) -> str:
        """Why it is of this round, to be put behind its number: it is the best one; empty: it is the last."""
        by = measure_of(self.scored, self.config.evaluation.best)
        return f", the best one by {by}" if self.best else ""

    @property
    def before(self) -> Metrics:
        """The same before training, as far as the same clients have scored it."""
        first = self.history[0] if self.history else {}
        return beside(first, self.scored) if is_scored(first) else {}


def base_license(config: Config, place: str) -> str | None:
    """The licence of the base, as the card beside it names it; None: there is none, or it is not on this machine."""
    if config.model.path == "demo":
        return "apache-2.0"
    card = (
        Path(place) / CARD
        if Path(place).is_dir()
        else try_to_load_from_cache(place, CARD, revision=config.model.revision)
    )
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        about = ModelCard.load(card).data
    except Exception:  # of the file, of its text, of its YAML: nothing is known of it then
        return None
    named = about.get("license_name") or about.get("license")
    return str(named) if named else None


def write_card(folder: Path, made: Made, trained: Trained) -> None:
    """Write the card of the model in `folder`, which names the weights that it speaks of by their digests."""
    weights = digests(folder, folder.glob("*.safetensors"))
    (folder / CARD).write_text(f"{render(made, trained, weights)}\n", encoding="utf-8")


def template(name: str) -> Template:
    """The template NAME.md.jinja, which refuses names that it is not given."""
    environment = Environment(
        loader=PackageLoader("fedalign.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.md.jinja")


def render(made: Made, trained: Trained, weights: Mapping[str, str] = MappingProxyType({})) -> str:
    """The whole card; `weights`: SHA-256 of the files that hold them."""
    config = trained.config
    return template("card").render(
        head=card_data(made, trained).to_yaml().strip(),
        made=made,
        trained=trained,
        config=config,
        lead=lead(made, trained),
        snippet=snippet(made, config.data),
        rows=[*training_rows(trained), *shared_rows(made)],
        scores=score_rows(made, trained),
        weights=weights,
        routing=routing_sentences(trained),
        privacy=privacy_told(config, trained.spent),
        flags=_flags(made, trained),
        settings=public_settings(made, config),
        prompt=prompt_format(config.data),
        versions=_versions(trained),
    )


def card_data(made: Made, trained: Trained) -> ModelCardData:
    """The metadata that the Hub reads. A base that is a folder has no name there, and licences are not ours to say."""
    config = trained.config
    as_scored = (
        made.personal is None
        and made.left is None
        and config.tuning.kind != "qlora"
        and made.dtype == config.tuning.loaded_dtype
    )
    results = _results(trained) if as_scored else []
    if scored_own(config):
        results = [one for one in results if one.dataset_split != "held out"]
    tags = ["federated-learning", "mixture-of-experts", "fedalign-moe", config.algorithm.name]
    return ModelCardData(
        base_model=None if made.local_base else made.base,
        base_model_relation=None if made.local_base else "adapter" if made.form == "adapter" else "finetune",
        library_name=made.library,
        pipeline_tag=None if made.is_seq2seq else "text-generation",
        tags=[*tags, "lora"] if config.tuning.adapts else tags,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=made.name if results else None,
        eval_results=results or None,
    )


def scored_own(config: Config) -> bool:
    """Whether each client scored a model of its own, which the one for all is not."""
    algorithm = config.algorithm.build()
    return bool(algorithm.private) or algorithm.mix is not None


def _results(trained: Trained) -> list[EvalResult]:
    part = trained.config.evaluation.part
    numbers = [
        ("accuracy", "accuracy", f"global {part} set", part, None),
        ("perplexity", "perplexity", f"global {part} set", part, None),
        ("client_accuracy_mean", "accuracy", "clients' held-out examples", "held out", "mean over clients"),
        ("client_accuracy_worst", "accuracy", "clients' held-out examples", "held out", "worst client"),
    ]
    if "client_accuracies" not in trained.scored:  # masked: of no client alone
        numbers.append(("client_accuracy_weighted", "accuracy", TOGETHER, "held out", None))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="private",
            dataset_name=data,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=trained.scored[key],
        )
        for key, metric, data, split, name in numbers
        if key in trained.scored
    ]


def lead(made: Made, trained: Trained) -> str:
    """A sentence or two on the nature of the model."""
    config, clients = trained.config, len(trained.holdings)
    what = "A LoRA adapter for a Mixture-of-Experts language model" if made.form == "adapter" else MODEL
    where = (
        f"across {clients} sites that kept their data"
        if config.federation.engine == "flower"
        else f"across {clients} clients, simulated on one machine"
    )
    text = f"{what}, fine-tuned {where}. {_algorithm(config)}"
    if made.personal is not None:
        return f"{text} This is the model of one of the clients: the global one, with what is personal to the client."
    return text


def _algorithm(config: Config) -> str:
    """The first line of its file: what it is, and whose."""
    about = sys.modules[type(config.algorithm.build()).__module__].__doc__ or config.algorithm.name
    return about.strip().splitlines()[0]


def _sizes(examples: Sequence[int], noised: bool = False) -> str:
    """How many examples clients have; sites whose sums are masked tell nobody.

    >>> _sizes([1200, 40]), _sizes([0, 0])
    ('1,240 in all, 40 to 1,200 a client', 'not told by any of 2 sites')
    """
    if not any(examples):
        return f"not told by any of {len(examples)} sites"
    told = ", as clients told them, with noise" if noised else ""
    return f"{sum(examples):,} in all, {min(examples):,} to {max(examples):,} a client{told}"


def training_rows(trained: Trained) -> list[tuple[str, str]]:
    """How it was trained, as names and values."""
    config, training = trained.config, trained.config.training
    examples = [int(client["examples"]) for client in trained.holdings.values()]
    rows = [
        ("algorithm", f"`{config.algorithm.name}`{_listed(config.algorithm.model_extra or {})}"),
        ("rounds", f"{trained.round} of {config.run.rounds}{trained.chosen}"),
        ("data", _data(trained)),
        ("examples to train on", _sizes(examples, config.privacy.on)),
        ("split among clients", _split(config)),
        ("clients a round", f"{100 * config.clients.sample:g} % of them"),
        ("tuning", _tuning(config)),
        ("privacy", noise_told(trained.config, trained.spent)),
        (
            "local training",
            f"epochs a round: {training.epochs}; {training.optimizer}, learning rate {training.learning_rate:g}, "
            f"{training.schedule}, at most {training.batch_examples} examples a batch",
        ),
        ("server", f"{config.server.optimizer}, updates in {config.wire.dtype}"),
        ("seed", str(config.run.seed)),
    ]
    if config.clients.limits:
        rows.append(("limits", f"{len(config.clients.limits)} clients trained less than the whole"))
    return [row for row in rows if row[1]]


def of_docstrings(config: Config) -> bool:
    """Whether clients trained on the embedded data; sites have data of their own, whatever data.train says."""
    return config.data.train == "docstrings" and config.federation.engine != "flower"


def shared_rows(made: Made) -> list[tuple[str, str]]:
    """Who trained parts that sites share, this run and others before it, where sites have experts of their own."""
    if made.shared_by is None:
        return []
    return [("what sites share", f"trained by {', '.join(made.shared_by) or 'no run'}")]


def _split(config: Config) -> str:
    at_sites = config.federation.engine == "flower"
    return PARTITIONS["files" if at_sites else config.clients.partition].format(**config.clients.model_dump())


def noise_told(config: Config, spent: Spent | None) -> str:
    """The promise of a run's noise to any single example, and its limits; empty: there was none."""
    if not config.privacy.on:
        return ""
    if config.privacy.seed is not None:
        return "noise from a seed that is written down: a study, which protects nobody"
    most = spent and spent.most(config.privacy.epsilon)
    if spent is not None and most is not None:
        cost = f"({most:.3g}, {spent.delta:g})-differential privacy"
    elif spent is not None:  # a round broke off, or a client was lost
        known = f"({spent.epsilon:.3g}, {spent.delta:g}) by what clients told, which have trained since"
        cost = f"differential privacy, {known}: each knows what it spent,"
    else:  # masked: each site alone knows
        much = config.privacy.epsilon
        by = f"noise of {config.privacy.noise_multiplier:g} a step" if much is None else f"epsilon {much:g} at most"
        cost = f"differential privacy, {by} at delta {config.privacy.delta:g}, of which each site knows what it spent,"
    return (
        f"{cost} of one example at one site, against whoever sees all that left it: Poisson sampling, each example's "
        f"gradient cut to {config.privacy.max_grad_norm:g}, noise at the site. Not covered: other runs on the same "
        "data, the choice of settings by their results, examples of the same person, and what the test set told"
    )


def privacy_told(config: Config, spent: Spent | None) -> list[str]:
    """A sentence on how an example is hidden, and one on how a site is."""
    noise = noise_told(config, spent)
    none = "No differential privacy was used, and nothing here bounds what can be learnt about single examples from the"
    return [f"{noise[0].upper()}{noise[1:]}." if noise else f"{none} model.", _seen(config)]


def _seen(config: Config) -> str:
    """A sentence on how much of one client was seen by others."""
    if config.federation.engine != "flower":
        return "Clients were simulated on one machine, which held the data of all."
    if config.privacy.masked:
        return "Data stayed at the sites; of updates and statistics the coordinator learnt sums over sites alone."
    return (
        "Data stayed at the sites; updates and statistics of them reached the coordinator as they were, without secure "
        "aggregation."
    )


def _listed(options: Mapping[str, Any]) -> str:
    return (
        ": "
        + ", ".join(
            f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
        )
        if options
        else ""
    )


def _data(trained: Trained) -> str:
    data = trained.config.data
    classes = len(data.labels) or len({label for client in trained.holdings.values() for label in client["labels"]})
    counted = f", {classes} classes" if FORMATS[data.kind].classes and classes else ""
    source = " (docstrings of Python libraries)" if of_docstrings(trained.config) else ""
    return f"{FORMATS[data.kind].told}{counted}{source}"


def _tuning(config: Config) -> str:
    tuning = config.tuning
    if not tuning.adapts:
        return TUNINGS[tuning.kind]
    base = ", on a base in 4 bits" if tuning.kind == "qlora" else ""
    return (
        f"LoRA of rank {tuning.rank}, alpha {tuning.alpha:g}{base}, on {', '.join(tuning.targets) or 'no matrices'}; "
        f"routers: {ROUTERS[tuning.router]}; averaged: {AVERAGES[tuning.average]}"
    )


def score_rows(made: Made, trained: Trained) -> list[tuple[str, str, str]]:
    """Scores before training and after."""
    before, after = trained.before, trained.scored
    everyone = f"global {trained.config.evaluation.part} set, {after.get('test_examples', 0):,} examples"
    shares = [
        ("accuracy", f"accuracy, {everyone}"),
        ("client_accuracy_mean", "accuracy, clients' held-out examples, mean over clients"),
        ("client_accuracy_worst", "accuracy, worst client"),
        *([] if "client_accuracies" in after else [("client_accuracy_weighted", f"accuracy, {TOGETHER}")]),
        ("client_accuracy_spread", "accuracy, standard deviation over clients"),
    ]
    losses = [
        ("loss_nats", f"loss in nats a token, {everyone}"),
        ("client_loss_mean_nats", "loss in nats a token, clients' held-out examples"),
    ]
    others = f", {OWN_MODEL}" if made.personal is None and scored_own(trained.config) else ""
    whose = {key: f"{what}{others if key.startswith('client_') else ''}" for key, what in (*shares, *losses)}
    rows = [(whose[key], percent(before.get(key)), percent(after[key])) for key, _ in shares if key in after]
    rows += [(whose[key], nats(before.get(key)), nats(after[key])) for key, _ in losses if key in after]
    if made.personal is None:
        return rows
    own = [line.get("client_accuracies", {}).get(made.personal) for line in (before, after)]
    return [("accuracy, this client's held-out examples", percent(own[0]), percent(own[1])), *rows]


def routing_sentences(trained: Trained) -> list[str]:
    """How the routers and experts did in the round."""
    line = trained.history[-1] if trained.history else {}
    said = []
    if "routing_divergence_nats" in line:
        divergence = line["routing_divergence_nats"]
        said.append(
            f"Routing divergence between clients: {divergence:.4f} nats (mean over clients and layers of the "
            "Kullback-Leibler divergence of a client's mean routing from that of all)."
        )
    if trained.health is not None:
        layers, experts = trained.health.relative_load_L_E.shape
        dead, overloaded = trained.health.dead, trained.health.overloaded
        said.append(
            f"Of {layers * experts} experts ({layers} layers of {experts}) {dead} took less than {100 * DEAD:g} % of "
            f"an even share of their layer's tokens, {overloaded} more than {OVERLOADED:g} times such a share. Loads "
            "that clients withheld, of experts that few of their tokens reached, count as none."
        )
    if "experts_held_by_nobody" in line:
        said.append(f"Experts that no client used enough to speak for: {line['experts_held_by_nobody']}.")
    return said


def template_of(data: DataConfig) -> str | None:
    """The prompt that was trained, over the columns of a row; None: chats."""
    default = FORMATS[data.kind].prompt
    return None if default is None else data.template or default


def prompt_format(data: DataConfig) -> str:
    """The form of a prompt; empty: there are no prompts."""
    prompt = template_of(data)
    if prompt is None:
        return "Prompts go through the tokenizer's chat template."
    if data.template is not None:
        return f"A prompt is `{json.dumps(data.template, ensure_ascii=False)}`, each {{column}} the row's own."
    return f"A prompt is `{json.dumps(prompt)}`." if prompt else ""


def public_settings(made: Made, config: Config) -> str:
    """The configuration as TOML, without what is nobody else's business."""
    tables = config.model_dump(mode="json", exclude_none=True)
    for section, keys in UNTOLD.items():
        for key in keys:
            if section != "model" or made.local_base:
                tables[section].pop(key, None)
    del tables["federation"], tables["tracking"]
    return tomli_w.dumps({section: table for section, table in tables.items() if table}).strip()


def settings_of(card: str) -> str | None:
    """The settings that a card of ours holds; None: it is another's."""
    found = re.search(r"<summary>settings\.toml</summary>\s*```toml\n(.*?)\n```", card, re.DOTALL)
    return found[1] if found else None


def _flags(made: Made, trained: Trained) -> str:
    """Of the command that exports it again."""
    given = [
        " --merge" if made.form == "merged" else "",
        f" --dtype {made.dtype}" if made.dtype != trained.config.tuning.loaded_dtype else "",
        " --best" if trained.best else "",
        " --clients" if made.clients or made.personal is not None else "",
        "".join(f" --without {shlex.quote(name)}" for name in made.left.gone) if made.left is not None else "",
    ]
    return "".join(given)


def _versions(trained: Trained) -> list[tuple[str, str, str]]:
    mine = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    return [(name, trained.versions.get(name, "-"), mine.get(name, "-")) for name in {**mine, **trained.versions}]


def snippet(made: Made, data: DataConfig) -> str:
    """Code that loads it and lets it answer a prompt as it was trained, to be run where it lies."""
    first, model = made.load("folder")
    model = model.replace("'folder'", "folder")
    start = f"{_asking(data)}\ninput_ids = {TOKENS if FORMATS[data.kind].prompt is not None else CHAT_TOKENS}"
    if not made.mixes:
        end = "" if made.is_seq2seq else ", input_ids.shape[1] :"
        body = f"{start}\nanswer = model.generate(input_ids=input_ids, max_new_tokens=20)[0{end}]\n"
        body += "print(tokenizer.decode(answer, skip_special_tokens=True))"
        place = "this folder, or the model's name on the Hub"
        return HEAD.format(imports=_imports(first), place=place, model=model) + body
    server = model.replace("model =", "server =").replace("(folder", '(f"{folder}/../.."')
    inputs = "input_ids=input_ids"
    if made.is_seq2seq:
        inputs += ", decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])"
    mixed = MIXED.format(server=server, mixer=MIXER)
    body = f"{start}\nprint(tokenizer.decode(log_probabilities({inputs})[0, -1].argmax()))"
    imports = f"import torch\nfrom safetensors.torch import load_file\n{_imports(first)}"
    return HEAD.format(imports=imports, place="this folder", model=model) + mixed + body


def _asking(data: DataConfig) -> str:
    """The line that makes a prompt of something that stands for a user's own words."""
    prompt = template_of(data)
    if prompt is None:
        return 'messages = [{"role": "user", "content": "..."}]'
    names = dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name is not None)
    values = ", ".join(f'{json.dumps(name)}: "..."' for name in names)
    return f"prompt = {prompt!r}.format_map({{{values}}})" if prompt else 'prompt = "..."'


def _imports(first: str) -> str:
    if first.startswith("from transformers"):
        return f"{first}, AutoTokenizer"
    return f"{first}\nfrom transformers import AutoTokenizer"
