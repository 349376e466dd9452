"""A tiny model folder with a tokenizer, and small files of text: all that a whole run needs."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: no test asks the Hub, nor waits 23 s for it where there is none

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedalign.cli.main import main
from fedalign.client.memory import ClientMemory, Kept
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.maths.rounding import count, shapes_of, wire_dtype
from fedalign.protocol import Packed, ParameterGroup
from tests.moe.tiny import build, composite

# a shell that starts the tests in the background has them ignore Ctrl-C, nohup a terminal that is gone, and what they
# start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

Command = Callable[..., tuple[int, str, str]]

SUBJECTS = {
    "animals": ["the dog runs", "a cat sleeps", "the horse eats", "a bird sings", "the fish swims"],
    "weather": ["rain falls", "the sun shines", "wind blows", "snow covers hills", "clouds gather"],
    "food": ["bread is baked", "soup is hot", "we eat rice", "the apple is sweet", "tea with milk"],
}
PLACES = ["in town", "at home", "by the river", "on monday", "in the north", "every day", "once more", "near here"]


def rows() -> list[dict[str, str]]:
    """120 short texts of three classes and two owners."""
    return [
        {"text": f"{text} {place}", "label": label, "owner": "north" if i % 2 else "south"}
        for label, texts in SUBJECTS.items()
        for text in texts
        for i, place in enumerate(PLACES)
    ]


def write_jsonl(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([row["text"] + " " + row["label"] for row in rows()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def modules_of_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers puts the code that a checkpoint brings along, instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Only a machine that loses power forgets what was not flushed; a run flushes more than a hundred times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder(family, **config)`: a tiny model of that family on disk, with a tokenizer."""

    def folder_of(family: str = "olmoe", reads_pictures: bool = False, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        # the tokenizer of qwen3_5 adds a token of its own to those that are in the file
        size = 385 if family in ("qwen3_5_moe", "qwen4_exp") else 384
        make = composite if reads_pictures else build
        make(family, **{"vocab_size": size} | changes).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def olmoe(model_folder: Callable[..., Path]) -> Path:
    return model_folder("olmoe")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("texts")
    every = rows()
    write_jsonl(folder / "train.jsonl", [row for i, row in enumerate(every) if i % 4])
    write_jsonl(folder / "test.jsonl", every[::4])
    return folder


@pytest.fixture(scope="session")
def settings(olmoe: Path, texts: Path) -> list[str]:
    """Overrides for a run that takes a second or two."""
    return [
        f"model.path={olmoe}",
        f"data.train={texts / 'train.jsonl'}",
        f"data.test={texts / 'test.jsonl'}",
        "clients.count=3",
        "clients.alpha=1.0",
        "clients.min_examples=5",
        "training.learning_rate=1e-2",
        "training.epochs=2",
        "statistics.min_tokens=4",
        "run.rounds=3",
    ]


@pytest.fixture
def site_config(settings: list[str]) -> Config:
    """As a coordinator of sites has it: it names a model and the classes, and neither data nor a test set."""
    mine = [setting for setting in settings if not setting.startswith("data.")]
    labels = f"data.labels={json.dumps(sorted(SUBJECTS))}"
    return load_config(None, [*mine, labels, "data.max_train=40", "training.epochs=1", "federation.engine=flower"])


@pytest.fixture
def ward(tmp_path: Path, texts: Path, olmoe: Path) -> SiteFolder:
    """A site with 90 rows, of which it holds nine out."""
    return make_site(tmp_path / "ward", site_toml("ward 3", texts / "train.jsonl", olmoe))


def site_toml(name: str, data: Path, model: Path, limits: str = "") -> str:
    """A site that takes part though it has few rows, and whose every draw is that of run.seed = 0."""
    return (
        f'name = "{name}"\n[data]\ntrain = "{data}"\n[model]\npath = "{model}"\n'
        f"[limits]\nseed = 0\nmin_train = 4\nmin_held_out = 4\n{limits}"
    )


def make_site(folder: Path, toml: str) -> SiteFolder:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.toml").write_text(toml)
    return SiteFolder.load(folder)


def changed(config: Config, section: str, **values: Any) -> Config:
    """The configuration with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.fixture
def fedalign(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedalign", *map(str, arguments)])
        capfd.readouterr()  # what fixtures printed
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


def keep_round(memory: ClientMemory, round: int, update: Mapping[ParameterGroup, Packed], kept: Kept) -> None:
    """Keep a round as a client does that has trained."""
    sizes = ((str(group), count(packed), wire_dtype(packed)) for group, packed in update.items())
    with memory.keeping(round, (tensor for one in sizes for tensor in shapes_of(*one))) as keeping:
        for group, packed in update.items():
            keeping.put(group, packed)
        keeping.save(kept)
