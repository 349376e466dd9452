"""Write the regimes of the evidence as jsonl files, from a folder of public data sets.

    python benchmarks/evidence/data.py DATA --out runs/evidence/data

DATA holds a folder a data set, with parquet files: ag_news, banking77, clinc150, dolly15k, gsm8k, hellaswag, mmlu; and
tokenizers/bpe8192.json. Each regime becomes a folder with train.jsonl and test.jsonl; `client` is who owns a row where
that is natural, `task` what the row is about. A run draws its own examples from these pools by its seed.

    label_skew   AG News topics; compare deals them out by Dirichlet          (iid: the same files, dealt evenly)
    domain       CLINC150 intents, a client a domain
    subjects     MMLU, subjects of one field are a client; trains on part of the test questions
    tasks        AG News topics, BANKING77 intents, Dolly categories: a client has mostly one of them
    activities   HellaSwag endings, a client has the activities dealt to it

Texts are cut at a word so that they hold at most --characters. Intents answer by one word of their name that is a
single token and that no other has; those without are left out. Test rows are of the sets' test parts (HellaSwag:
validation; Dolly: a tenth of its training part, whose own test part has 80 rows), and a text that is also a training
text is left out. pretraining.jsonl has texts without their labels, of training parts alone (MMLU: validation and dev);
some of each set are marked as unseen, to measure on. A third of the texts of sets that are classified end in a label
drawn at random: a model learns how an answer looks, not which is right. instructions.jsonl has labelled rows: an eighth
of the classified sets' training parts, by a checksum of the text, which no regime draws from.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from tokenizers import Tokenizer

Row = dict[str, Any]

TOPICS = ("world", "sports", "business", "technology")  # one token each
CLIENTS = 10
FIELDS = {  # MMLU's subjects, by words in their names; the first line that fits takes it
    "medicine": ("medic", "anatomy", "clinical", "nutrition", "virology", "aging", "sexuality"),
    "biology": ("biology", "genetics"),
    "physics": ("physics", "astronomy", "engineering", "chemistry"),
    "mathematics": ("math", "algebra", "statistics", "logic", "econometrics"),
    "computing": ("computer", "machine_learning", "security"),
    "law": ("law", "jurisprudence", "policy", "politics"),
    "history": ("history", "geography", "prehistory", "facts"),
    "business": ("business", "economics", "accounting", "management", "marketing", "relations"),
    "mind": ("psychology", "sociology", "philosophy", "moral", "religions"),
    "other": ("",),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; examples of a pool, not of a run."""

    train: int
    test: int
    characters: int
    intents: int  # of a domain, and half of BANKING77's
    pretraining: int  # texts of each set
    unseen: int  # of them, to measure on
    seed: int


@dataclass(frozen=True)
class Sources:
    """The public data sets."""

    folder: Path

    def rows(self, name: str) -> list[Row]:
        """All rows of `ag_news/train` and the like."""
        rows: list[Row] = pyarrow.parquet.read_table(self.folder / f"{name}.parquet").to_pylist()
        return rows

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that decides which words are one token."""
        return self.folder / "tokenizers" / "bpe8192.json"


@dataclass(frozen=True)
class Regime:
    """Rows to train on and to test on."""

    train: list[Row]
    test: list[Row]


def cut(text: str, characters: int) -> str:
    """The first words that fit.

    >>> cut("one two  three", 8)
    'one two'
    """
    words = " ".join(text.split())
    return words if len(words) <= characters else words[: characters + 1].rpartition(" ")[0] or words[:characters]


def short_names(names: Iterable[str], single: Callable[[str], bool]) -> dict[str, str]:
    """For each name its longest word that is a single token and not taken; names without one are left out.

    >>> short_names(["card_lost", "card_stolen", "card"], lambda word: word != "stolen")
    {'card': 'card', 'card_lost': 'lost'}
    """
    chosen: dict[str, str] = {}
    for name in sorted(names):
        words = sorted(name.lower().replace("?", "").split("_"), key=lambda word: (-len(word), word))
        for word in words:
            if len(word) > 2 and word not in chosen.values() and single(word):
                chosen[name] = word
                break
    return chosen


def drawn(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """At most `count` rows in random order."""
    return rng.sample(rows, min(count, len(rows)))


def balanced(rows: Sequence[Row], key: str, count: int, rng: random.Random) -> list[Row]:
    """At most `count` rows, equally many of each value of `key` as far as there are."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    found = [row for name in sorted(groups) for row in drawn(groups[name], -(-count // len(groups)), rng)]
    return drawn(found, count, rng)


def topics(sources: Sources, part: str, characters: int) -> list[Row]:
    """AG News."""
    return [
        {"text": cut(row["text"], characters), "label": TOPICS[row["label"]], "task": TOPICS[row["label"]]}
        for row in sources.rows(f"ag_news/{part}")
    ]


def label_skew(sources: Sources, sizes: Sizes, rng: random.Random) -> Regime:
    """AG News, to be dealt out by label."""
    train, test = (topics(sources, part, sizes.characters) for part in ("train", "test"))
    return Regime(balanced(free(train), "label", sizes.train, rng), balanced(test, "label", sizes.test, rng))


def domain(sources: Sources, sizes: Sizes, rng: random.Random) -> Regime:
    """CLINC150: the first intents of each domain that have a short name."""
    pools = {part: _intents(sources, sizes, part) for part in ("train", "test")}
    return Regime(
        balanced(free(pools["train"]), "label", sizes.train, rng), balanced(pools["test"], "label", sizes.test, rng)
    )


def _intents(sources: Sources, sizes: Sizes, part: str) -> list[Row]:
    known = [row for row in sources.rows("clinc150/train") if row["label"] >= 0]
    names = short_names({row["label_name"] for row in known}, single_token(sources))
    of_domain: defaultdict[str, list[str]] = defaultdict(list)
    for name, where in sorted({(row["label_name"], row["domain"]) for row in known}):
        if name in names:
            of_domain[where].append(name)
    kept = {name for intents in of_domain.values() for name in intents[: sizes.intents]}
    return [
        {
            "text": cut(row["text"], sizes.characters),
            "label": names[row["label_name"]],
            "client": row["domain"],
            "task": row["domain"],
        }
        for row in sources.rows(f"clinc150/{part}")
        if row["label_name"] in kept
    ]


def subjects(sources: Sources, sizes: Sizes, rng: random.Random) -> Regime:
    """MMLU's short test questions: part to train on, the rest to test on."""
    rows = [
        {
            "question": " ".join(row["question"].split()),
            "choices": [" ".join(choice.split()) for choice in row["choices"]],
            "answer": row["answer"],
            "client": field_of(row["subject"]),
            "task": row["subject"],
        }
        for row in sources.rows("mmlu/test")
        if len(row["question"]) <= sizes.characters
        and all(0 < len(choice.strip()) <= sizes.characters // 2 for choice in row["choices"])
    ]
    unique = list({row["question"]: row for row in rows}.values())
    mixed = drawn(unique, len(unique), rng)
    tests = min(sizes.test, len(mixed) // 4)
    return Regime(mixed[tests : tests + sizes.train], mixed[:tests])


def field_of(subject: str) -> str:
    """Which client a subject of MMLU goes to.

    >>> field_of("high_school_us_history"), field_of("college_medicine"), field_of("miscellaneous")
    ('history', 'medicine', 'other')
    """
    return next(name for name, words in FIELDS.items() if any(word in subject for word in words))


def tasks(sources: Sources, sizes: Sizes, rng: random.Random) -> Regime:
    """Three tasks of equal size; clients 0 to 3 have mostly AG News, 4 to 6 BANKING77, 7 to 9 Dolly's categories."""
    pools = {part: _task_pools(sources, sizes, part) for part in ("train", "test")}
    share = -(-sizes.train // len(pools["train"]))
    train = [row for pool in pools["train"].values() for row in balanced(free(pool), "label", share, rng)]
    homes = {"news": (0, 1, 2, 3), "banking": (4, 5, 6), "instructions": (7, 8, 9)}
    for row in train:
        own = rng.random() < 0.85
        row["client"] = f"client-{rng.choice(homes[row['task']]) if own else rng.randrange(CLIENTS):02d}"
    share = -(-sizes.test // len(pools["test"]))
    test = [row for pool in pools["test"].values() for row in balanced(pool, "label", share, rng)]
    return Regime(drawn(train, sizes.train, rng), drawn(test, sizes.test, rng))


def _task_pools(sources: Sources, sizes: Sizes, part: str) -> dict[str, list[Row]]:
    single = single_token(sources)
    taken = {topic.lower() for topic in TOPICS}
    categories = short_names(
        {row["category"] for row in sources.rows("dolly15k/train")}, lambda word: single(word) and word not in taken
    )
    taken |= set(categories.values())
    intents = short_names(
        {row["label_name"] for row in sources.rows("banking77/train")}, lambda word: single(word) and word not in taken
    )
    kept = dict(sorted(intents.items())[: 4 * sizes.intents])
    dolly = sources.rows("dolly15k/train")
    cut_at = len(dolly) * 9 // 10  # its own test part has 80 rows: the last tenth of the others tests here
    return {
        "news": [row | {"task": "news"} for row in topics(sources, part, sizes.characters)],
        "banking": [
            {"text": cut(row["text"], sizes.characters), "label": kept[row["label_name"]], "task": "banking"}
            for row in sources.rows(f"banking77/{part}")
            if row["label_name"] in kept
        ],
        "instructions": [
            {
                "text": cut(row["instruction"], sizes.characters),
                "label": categories[row["category"]],
                "task": "instructions",
            }
            for row in (_shuffled(dolly)[:cut_at] if part == "train" else _shuffled(dolly)[cut_at:])
            if row["category"] in categories
        ],
    }


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    """The same order each time: parts cut from it never overlap."""
    return random.Random(0).sample(rows, len(rows))


def activities(sources: Sources, sizes: Sizes, rng: random.Random) -> Regime:
    """HellaSwag's short rows: activities go to the client that has the fewest so far, the largest first."""
    rows = {part: _endings(sources, sizes, part) for part in ("train", "validation")}
    counts = Counter(row["task"] for row in rows["train"])
    held = [0] * CLIENTS
    owner: dict[str, str] = {}
    for activity, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        client = held.index(min(held))
        held[client] += count
        owner[activity] = f"client-{client:02d}"
    known = {
        part: [r | {"client": owner[r["task"]]} for r in found if r["task"] in owner] for part, found in rows.items()
    }
    return Regime(drawn(known["train"], sizes.train, rng), drawn(known["validation"], sizes.test, rng))


def _endings(sources: Sources, sizes: Sizes, part: str) -> list[Row]:
    return [
        {
            "question": row["ctx"],
            "choices": [ending.strip() for ending in row["endings"]],
            "answer": row["label"],
            "task": row["activity"],
        }
        for row in sources.rows(f"hellaswag/{part}")
        if len(row["ctx"]) <= sizes.characters
        and all(0 < len(ending.strip()) <= sizes.characters // 2 for ending in row["endings"])
    ]


REGIMES: Mapping[str, Callable[[Sources, Sizes, random.Random], Regime]] = {
    "label_skew": label_skew,
    "domain": domain,
    "subjects": subjects,
    "tasks": tasks,
    "activities": activities,
}


def pretraining(sources: Sources, sizes: Sizes) -> list[Row]:
    """Texts of each set's training part, without their labels."""
    texts = {
        "ag_news": [row["text"] for row in sources.rows("ag_news/train")],
        "banking77": [row["text"] for row in sources.rows("banking77/train")],
        "clinc150": [row["text"] for row in sources.rows("clinc150/train")],
        "dolly15k": [
            f"{row['instruction']}\n{row['response']}"
            for row in _shuffled(sources.rows("dolly15k/train"))[: 14931 * 9 // 10]
        ],
        "gsm8k": [f"{row['question']}\n{row['answer']}" for row in sources.rows("gsm8k/train")],
        "hellaswag": [f"{row['ctx']} {row['endings'][row['label']]}" for row in sources.rows("hellaswag/train")],
        "mmlu": [
            f"{row['question']} {row['choices'][row['answer']]}"
            for part in ("validation", "dev")
            for row in sources.rows(f"mmlu/{part}")
        ],
    }
    labels = _label_words(sources, sizes)
    rows: list[Row] = []
    for source, every in texts.items():
        rng = random.Random(f"{sizes.seed} {source}")
        some = rng.sample(every, min(sizes.pretraining, len(every)))
        for i, text in enumerate(some):
            known = labels.get(source, []) if i >= sizes.unseen and i % 3 == 0 else []
            ending = f"\nLabel: {rng.choice(known)}" if known else ""
            shown = cut(text, sizes.characters) if known else text
            rows.append({"source": source, "text": shown + ending, "unseen": i < sizes.unseen})
    return rows


def _label_words(sources: Sources, sizes: Sizes) -> dict[str, list[str]]:
    """What answers look like, by set: the words that regimes train on."""
    of_tasks: defaultdict[str, set[str]] = defaultdict(set)
    for task, rows in _task_pools(sources, sizes, "train").items():
        of_tasks[task] |= {row["label"] for row in rows}
    of_domains = {row["label"] for row in _intents(sources, sizes, "train")}
    return {
        "ag_news": sorted(TOPICS),
        "banking77": sorted(of_tasks["banking"]),
        "dolly15k": sorted(of_tasks["instructions"]),
        "clinc150": sorted(of_domains),
    }


def instructions(sources: Sources, sizes: Sizes) -> list[Row]:
    """Labelled rows that no regime draws from."""
    pools = {"clinc150": _intents(sources, sizes, "train"), **_task_pools(sources, sizes, "train")}
    return [
        {"source": source, "text": row["text"], "label": row["label"]}
        for source, pool in pools.items()
        for row in pool
        if reserved(row)
    ]


def reserved(row: Row) -> bool:
    """Whether a training row is for the start alone."""
    return zlib.crc32(prompt_of(row).encode()) % 8 == 0


def free(rows: Iterable[Row]) -> list[Row]:
    """What regimes may draw from."""
    return [row for row in rows if not reserved(row)]


def single_token(sources: Sources) -> Callable[[str], bool]:
    """Whether a word, with the space before it, is one token."""
    tokenizer = Tokenizer.from_file(str(sources.tokenizer_file))
    return lambda word: len(tokenizer.encode(f" {word}").ids) == 1


def prompt_of(row: Row) -> str:
    """What two rows must not share if one trains and the other tests."""
    return str(row.get("text", row.get("question"))).lower()


def apart(regime: Regime, labelled: Iterable[Row] = ()) -> Regime:
    """Without the test rows that are also training rows, or that the start knows with a label."""
    known = {prompt_of(row) for row in (*regime.train, *labelled)}
    return Regime(regime.train, [row for row in regime.test if prompt_of(row) not in known])


def write(path: Path, rows: Iterable[Row]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write everything and say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence/data"))
    parser.add_argument("--train", type=int, default=4000, help="rows of a regime's pool; a run draws from it")
    parser.add_argument("--test", type=int, default=1200)
    parser.add_argument("--characters", type=int, default=140, help="of a text")
    parser.add_argument(
        "--intents", type=int, default=5, help="of each CLINC150 domain; four times as many BANKING77's"
    )
    parser.add_argument("--pretraining", type=int, default=8000, help="texts of each data set, without labels")
    parser.add_argument("--unseen", type=int, default=100, help="of them, to measure on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    sources, out = Sources(arguments.pop("data")), Path(arguments.pop("out"))
    sizes = Sizes(**arguments)
    labelled = instructions(sources, sizes)
    write(out / "instructions.jsonl", labelled)
    print(f"instructions: {len(labelled)} rows, {dict(Counter(row['source'] for row in labelled))}")
    for name, make in REGIMES.items():
        regime = apart(make(sources, sizes, random.Random(f"{sizes.seed} {name}")), labelled)
        write(out / name / "train.jsonl", regime.train)
        write(out / name / "test.jsonl", regime.test)
        labels = len({row.get("label") for row in regime.train})
        clients = Counter(row.get("client") for row in regime.train)
        print(f"{name}: {len(regime.train)} to train on, {len(regime.test)} to test on, labels {labels}", dict(clients))
    texts = pretraining(sources, sizes)
    write(out / "pretraining.jsonl", texts)
    print(f"pretraining: {len(texts)} texts, {dict(Counter(row['source'] for row in texts))}")
    (out / "tokenizer.json").write_bytes(sources.tokenizer_file.read_bytes())


if __name__ == "__main__":
    main()
