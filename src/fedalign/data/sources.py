"""Files, folders and hub data sets as rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fedalign.data import docstrings
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.config.run import DataConfig


Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, so that an error can say so."""

    values: Mapping[str, Any]
    source: str
    number: int
    file: str = ""

    def fail(self, problem: str) -> NoReturn:
        """Raise a `UserError` that names this row."""
        raise UserError(f"{self.source}, row {self.number}: {problem}")

    def get(self, column: str) -> Any:
        """A column's value; an error lists the columns that are there."""
        if column not in self.values:
            there = ", ".join(self.values) or "none"
            self.fail(f"no column {column!r}. There are: {there}. Say which one to read under [data.columns].")
        if self.values[column] is None:
            self.fail(f"column {column!r} is empty. Fill it or leave the row out.")
        return self.values[column]

    def text(self, column: str) -> str:
        """A column that must hold text with something in it."""
        value = self.get(column)
        if not isinstance(value, str):
            self.fail(f"{column} = {value!r}: must be text, not {type(value).__name__}.")
        return value.strip() or self.fail(f"column {column!r} is empty. Fill it or leave the row out.")


def shortened(value: object, limit: int = 120) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[:limit] + "..."


# --------------------------------------------------------------------------------------------------------- sources


def read_rows(source: str, data: DataConfig, split: Split) -> Iterator[Row]:
    """The raw rows of one split."""
    path = Path(source).expanduser()
    if source == "docstrings":
        yield from (Row(asdict(r), source, i) for i, r in enumerate(docstrings.load(split), 1))
    elif path.is_dir():
        for file in split_files(path, data, split, source):
            yield from read_file(file)
    elif path.is_file():
        if split == "train" or source == data.test:
            yield from read_file(path)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data.{split} = {source!r}: no such file or folder.")
    else:
        yield from read_hub(source, data, split)


def split_files(folder: Path, data: DataConfig, split: Split, source: str) -> list[Path]:
    """The files of one split of a folder, in the order of their names."""
    names = {"train": data.train_split, "test": data.test_split}
    for candidates in (_data_files(folder / names[split]), _files_named(folder, names[split])):
        if candidates:
            return candidates
    files = _data_files(folder)
    if split == "test" and source != data.test:
        return []
    if split == "train":  # what is named after the test split is not training data
        held = set(_files_named(folder, names["test"]))
        files = [file for file in files if file not in held]
    if not files:
        raise UserError(
            f"data.{split} = {source!r}: the folder holds no data file. Choose one of: {', '.join(SUFFIXES)}."
        )
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()) if folder.is_dir() else []


def _files_named(folder: Path, split: str) -> list[Path]:
    """`train.csv`, and shards such as `train-00000-of-00002.parquet`."""
    return [p for p in _data_files(folder) if p.stem == split or p.stem.startswith(f"{split}-")]


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one file; one that cannot be read, or has none, is an error."""
    if path.suffix not in READERS:
        raise UserError(f"{path}: files of type {path.suffix!r} are not read. Choose one of: {', '.join(SUFFIXES)}.")
    number = 0
    try:
        for number, values in enumerate(READERS[path.suffix](path), 1):
            if not isinstance(values, Mapping):
                raise UserError(f"{path}, row {number}: {shortened(values)}: must be an object with named columns.")
            yield Row(values, str(path), number, path.stem)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, after row {number}: not readable as {path.suffix[1:]}: {error}") from None
    if not number:
        raise UserError(f"{path}: the file holds no rows. Give a file with at least one.")


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _read_json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8") or "[]")
    if not isinstance(content, list):
        raise ValueError("the file must hold one list of objects; for one object a line, call it .jsonl")
    yield from content


def _read_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for values in reader:
            if None in values:  # more cells than the header names
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            yield {name: value or None for name, value in values.items()}


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_hub(source: str, data: DataConfig, split: Split) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face hub; classes stored as numbers get their names."""
    import datasets
    import huggingface_hub

    name = data.train_split if split == "train" else data.test_split
    try:
        if not huggingface_hub.is_offline_mode():  # one short question, where load_dataset asks for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
        unnamed_test = split == "test" and source != data.test
        if unnamed_test and name not in datasets.get_dataset_split_names(source, data.subset):
            return  # as with files: a source without a test split has an empty one
        table = datasets.load_dataset(source, data.subset, split=name)
    except Exception as error:  # the library raises dozens of kinds for what a user can mend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.{split} = {source!r}: neither a file, a folder nor a data set that the hub gives "
            f"(split {name!r}, subset {data.subset!r}): {reason} Check the spelling and the network; without "
            "network, HF_HUB_OFFLINE=1 reads what was loaded before."
        ) from None
    classes = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel) and not (column == data.columns.label and data.labels)
    }
    for number, values in enumerate(table, 1):
        for column, names in classes.items():  # -1 stands for a label that is kept secret
            code = values[column]
            values[column] = names[code] if code is not None and code >= 0 else None
        yield Row(values, f"{source} ({name})", number)
