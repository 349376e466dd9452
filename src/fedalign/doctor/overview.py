"""Data looked at before anything is trained on it: what is read, what is not, and what the model would see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.data.encode import Encoder
from fedalign.data.formats import FORMATS, Example, columns_read, drawn, examples_of, sift, unread_columns
from fedalign.data.partition import partition
from fedalign.data.sources import Row, check_names, is_missing, read_rows
from fedalign.doctor.data import preview
from fedalign.doctor.model import skeleton_bench
from fedalign.errors import UserError

EXAMPLES = 3
Pieces = Sequence[tuple[str, bool]]  # text, and whether the loss is on it


@dataclass(frozen=True)
class Column:
    """A column of the files."""

    filled: int  # rows in which it holds something
    is_read: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens of each example, in order, and what the model reads at most; 0: any number."""

    tokens: tuple[int, ...]
    limit: int
    too_long: tuple[str, ...]  # examples, by file and row

    def histogram(self, bars: int = 10) -> list[tuple[int, int, int]]:
        """Least and most tokens of each bar, and examples in it.

        >>> Lengths((1, 2, 3, 10), 0, ()).histogram(2)
        [(1, 5, 3), (6, 10, 1)]
        """
        low, high = min(self.tokens), max(self.tokens)
        width = -(-(high - low + 1) // bars)
        counts = Counter((length - low) // width for length in self.tokens)
        every = range((high - low) // width + 1)
        return [(low + i * width, min(high, low + (i + 1) * width - 1), counts[i]) for i in every]


@dataclass(frozen=True)
class Overview:
    """All that `fedalign data` shows."""

    source: str
    kind: str
    files: Mapping[str, int]  # rows of each
    columns: Mapping[str, Column]
    unread: tuple[str, ...]  # columns that hold something and that nothing uses
    broken: tuple[str, ...]  # rows that cannot be read, and why
    unfit: tuple[str, ...]  # files of several rows of which none can be read, and why not the first; not in `broken`
    examples: int
    taken: int  # of them, as data.max_train says
    empty: tuple[str, ...]  # examples with nothing to learn from
    classes: Mapping[str, int]
    clients: Mapping[str, int]  # examples of each; empty: they cannot be dealt out as configured
    undealt: str  # why not
    lengths: Lengths | None  # None: no model was named
    shown: tuple[Pieces, ...]  # the first examples as the model reads them


def overview(config: Config, with_model: bool = True, with_clients: bool = True) -> Overview:
    """Read the training data as a run would, but go on where a run would stop.

    Args:
        config: the run's.
        with_model: whether the model's tokenizer tells lengths and texts; its weights are not read.
        with_clients: whether examples are dealt out as the configuration says.

    Raises:
        UserError: A file cannot be read at all, or the model is not there.
    """
    data = config.data.model_copy(update={"on_bad_row": "error"})
    check_names(data)
    flaws: list[str] = []
    rows = list(read_rows(data.train, data, "train", flaws))
    if not rows:
        raise UserError(f"data.train = {data.train!r}: holds no rows.")
    kept, broken = sift(rows, data, "train")
    examples = examples_of(kept, data, "train") if kept else []
    learnt = [example for example in examples if example.answer]
    bench = skeleton_bench(config) if with_model else None
    lengths, shown = _tokenised(bench, learnt) if bench is not None and learnt else (None, ())
    taken = drawn(learnt, data, "train", config.run.seed)
    clients, undealt = _dealt(taken, config) if with_clients else ({}, "")
    files = Counter(row.source for row in rows)
    broken, unfit = _by_file(broken, files, {row.source for row in kept})
    return Overview(
        source=data.train,
        kind=data.kind,
        files=files,
        columns=_columns(rows, config),
        unread=tuple(unread_columns(rows, data)),
        broken=(*flaws, *broken),
        unfit=tuple(unfit),
        examples=len(learnt),
        taken=len(taken),
        empty=tuple(example.where for example in examples if not example.answer),
        classes=Counter(example.label for example in learnt if example.label) if FORMATS[data.kind].classes else {},
        clients=clients,
        undealt=undealt,
        lengths=lengths,
        shown=shown
        or tuple([(one.prompt, False), (one.answer, True)] for one in learnt[:EXAMPLES] if one.chat is None),
    )


def _by_file(broken: list[str], files: Mapping[str, int], read: set[str]) -> tuple[list[str], list[str]]:
    """Rows that cannot be read, but for files of which none can: a line for each of these."""
    unfit = []
    for file, count in files.items():
        own = [line for line in broken if line.startswith((f"{file}, row ", f"{file}, line "))]
        if file not in read and count > 1 and own:
            unfit.append(f"{file}: none of its {count:,} rows can be read{own[0].removeprefix(file)}")
            broken = [line for line in broken if line not in own]
    return broken, unfit


def _columns(rows: Sequence[Row], config: Config) -> dict[str, Column]:
    filled: Counter[str] = Counter()
    for row in rows:
        filled.update({str(name): int(not is_missing(value) and value != "") for name, value in row.values.items()})
    unread = set(unread_columns(rows, config.data))
    read = columns_read(rows, config.data)
    return {name: Column(count, name in read and name not in unread) for name, count in filled.items()}


def _tokenised(bench: Workbench, examples: Sequence[Example]) -> tuple[Lengths, tuple[Pieces, ...]]:
    limit = bench.encoder.max_length
    unlimited = Encoder(bench.tokenizer, 0, bench.moe.is_seq2seq, decoder_start=bench.encoder.decoder_start)
    encoded = unlimited.encode(examples)
    longest: Counter[int] = Counter()
    for one in encoded:
        longest[one.example] = max(longest[one.example], len(one.input_ids), len(one.labels))
    over = tuple(examples[i].where for i, length in longest.items() if 0 < limit < length)
    return Lengths(tuple(longest.values()), limit, over), tuple(
        preview(bench.tokenizer, one) for one in encoded[:EXAMPLES]
    )


def _dealt(examples: Sequence[Example], config: Config) -> tuple[dict[str, int], str]:
    try:
        parts = partition(examples, config.clients, config.run.seed)
    except UserError as error:
        return {}, str(error)
    return {name: len(indices) for name, indices in parts.items()}, ""
