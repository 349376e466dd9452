"""Files, folders and hub data sets as rows."""

from __future__ import annotations

import bz2
import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

from fedalign.config.run import AUTO, FileConfig, with_fields
from fedalign.data import docstrings
from fedalign.errors import UserError, unknown

if TYPE_CHECKING:
    from fedalign.config.run import DataConfig


Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NOTHING = ("na", "n/a", "nan", "none", "null", "<na>")  # words that tables of other tools write for an empty cell
LONGEST_CELL = 2**31 - 1  # characters; Python's csv allows 131,072 unless told otherwise
DAMAGED = (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError)
WHOLE = re.compile(r"(-?[0-9]+)(?:\.0*)?")
SHOWN, NAMED = 20, 10  # classes that a notice names; lines that cannot be read
log = logging.getLogger("fedalign")


@functools.cache
def say(line: str) -> None:
    """Tell the user, once, what is left out and what was settled."""
    log.warning(line)


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    """The content of a .zst file, whole in memory. Python's own libraries read none before 3.14."""
    import pyarrow

    assert mode == "rb"
    with pyarrow.input_stream(path, compression="zstd") as stream:
        return io.BytesIO(stream.read())


PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


class BadRowError(UserError):
    """A row that cannot be read as its kind asks; the message names it."""

    def __init__(self, row: Row, problem: str) -> None:
        super().__init__(f"{row.where}: {problem}")
        self.row = row


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, so that an error can say so."""

    values: Mapping[str, Any]
    source: str
    number: int
    file: str = ""
    kind: str = ""  # what [data.files] says of its file; "": data.kind
    template: str | None = None  # the same; None: data.template, for rows of data.kind

    @property
    def where(self) -> str:
        """File and number, for the user."""
        return f"{self.source}, {counted(Path(self.source))} {self.number}"

    def fail(self, problem: str) -> NoReturn:
        """Raise a `UserError` that names this row."""
        raise BadRowError(self, problem)

    def get(self, column: str) -> Any:
        """A column's value; an error lists the columns that are there."""
        if column not in self.values:
            there = ", ".join(self.values) or "none"
            self.fail(f"no column {column!r}. There are: {there}. Say which one to read under [data.columns].")
        if is_missing(self.values[column]):
            self.fail(f'column {column!r} is empty. Fill it, or leave such rows out: data.on_bad_row = "skip".')
        return self.values[column]

    def text(self, column: str, may_be_empty: bool = False) -> str:
        """A column that must hold text, with something in it if it may not be empty."""
        if may_be_empty and column in self.values and is_missing(self.values[column]):
            return ""
        value = self.get(column)
        if not isinstance(value, str):
            self.fail(f"{column} = {value!r}: must be text, not {type(value).__name__}.")
        if not value.strip() and not may_be_empty:
            self.fail(f'column {column!r} is empty. Fill it, or leave such rows out: data.on_bad_row = "skip".')
        return value.strip()


def counted(file: Path) -> str:
    """The unit of a row's number: lines of a .jsonl, blank ones too, as an editor counts them; else rows."""
    return "line" if _type(file)[0] == ".jsonl" else "row"


def is_missing(value: object) -> bool:
    """None, and what tables write for it: a number that is none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def names_in(rows: Sequence[Row], column: str) -> list[str]:
    """A column of names, such as labels or clients, the same from every type of file; "" where it is empty.

    Composed and decomposed letters are one; where all are whole numbers, 1, 1.0 and "1.0" are "1".
    """
    values = (row.values.get(column) for row in rows)
    texts = ["" if is_missing(value) else unicodedata.normalize("NFC", str(value)).strip() for value in values]
    numbers = [WHOLE.fullmatch(text) for text in texts]
    if all(number or not text for number, text in zip(numbers, texts, strict=True)):
        return [number[1] if number else "" for number in numbers]
    return texts


def shortened(value: object, limit: int = 120) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[:limit] + "..."


# --------------------------------------------------------------------------------------------------------- sources


def read_rows(source: str, data: DataConfig, split: Split, flaws: list[str] | None = None) -> Iterator[Row]:
    """The raw rows of one split; `flaws` as of `read_file`."""
    path = Path(source).expanduser()
    if source == "docstrings":
        for i, row in enumerate(docstrings.load(split), 1):
            yield Row({"text": row.text, "label": row.label, "client": row.client}, source, i)
    elif path.is_dir():
        files = split_files(path, data, split, source)
        stems = Counter(map(stem, files))
        for file in files:
            yield from read_file(file, data, stem(file) if stems[stem(file)] == 1 else file.name, flaws)
    elif path.is_file():
        if split == "train" or source == data.test:
            yield from read_file(path, data, stem(path), flaws)
    elif _type(path)[0] in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data.{split} = {source!r}: no such file or folder.")
    else:
        yield from read_hub(source, data, split)


def check_names(data: DataConfig) -> None:
    """Each file that [data.files] names is one of the training or the test data.

    Raises:
        UserError: One is not.
    """
    for name in data.files:
        there = {file.name for source in (data.train, data.test) for file in _every_file(source)}
        if not there:
            raise UserError(
                f"data.files = {name!r}: data.train = {data.train!r} is no file or folder of such in {Path.cwd()}."
            )
        if name not in there:
            raise unknown("data.files", name, there)


def _every_file(source: str | None) -> list[Path]:
    """The data files of a source, in all its splits."""
    path = Path(source or "docstrings").expanduser()
    folders = [path, *path.iterdir()] if path.is_dir() else []
    return [path] if path.is_file() else [file for folder in folders for file in _data_files(folder)]


def stem(path: Path) -> str:
    """The name of a file without what tells its type.

    >>> stem(Path("rome.2024.JSONL.gz"))
    'rome.2024'
    """
    return path.name[: len(path.name) - len("".join(_type(path)))]


def _type(path: Path) -> tuple[str, str]:
    """The suffix that tells what a file holds, and that of its compression, in small letters."""
    kind, last = ["", "", *(suffix.lower() for suffix in path.suffixes)][-2:]
    return (kind, last) if last in PACKED else (last, "")


def split_files(folder: Path, data: DataConfig, split: Split, source: str) -> list[Path]:
    """The files of one split of a folder, in the order of their names; what belongs to no split is named.

    A split is the subfolder of its name, the file of its name, or that file in numbered parts. Training is otherwise
    every file that is not of the test split, whatever it is called.
    """
    every = _data_files(folder)
    parts: dict[Split, list[Path]] = {
        "train": _data_files(folder / data.train_split) or _parts_of(every, data.train_split),
        "test": _data_files(folder / data.test_split) or _parts_of(every, data.test_split),
    }
    if split == "train" and not parts["train"]:
        parts["train"] = [file for file in every if file not in parts["test"]]
    if split == "test" and not parts["test"] and source == data.test:
        parts["test"] = every
    if split == "test" and source != data.test:
        return parts["test"]
    read = {file for part in parts if part == split or data.test in (None, source) for file in parts[part]}
    _name_left_out(folder, f"data.{split} = {source!r}", read)
    if not parts[split]:
        raise UserError(
            f"data.{split} = {source!r}: the folder holds no data file. Choose one of: {', '.join(SUFFIXES)}."
        )
    return parts[split]


def _data_files(folder: Path) -> list[Path]:
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in inside if _type(p)[0] in SUFFIXES and p.name[0] != "." and p.is_file())


def _parts_of(files: Sequence[Path], split: str) -> list[Path]:
    """`train.csv`, and shards such as `train-00000-of-00002.parquet`; `train-station.csv` is something else."""
    name = re.compile(rf"{re.escape(split)}(-[0-9]+(-of-[0-9]+)?)?")
    return [file for file in files if name.fullmatch(stem(file))]


def _name_left_out(folder: Path, source: str, read: set[Path]) -> None:
    """Say which entries of a folder are in no split: hidden ones, other types, and data files beside named splits."""
    folders = {file.parent for file in read} | {folder}
    left = sorted(p for f in folders for p in f.iterdir() if p not in read | folders)
    if left:
        shown = ", ".join(str(p.relative_to(folder)) + ("/" if p.is_dir() else "") for p in left[:10])
        say(f"{source}: left out: {shown}{f' and {len(left) - 10} more' if len(left) > 10 else ''}")


def read_file(path: Path, data: DataConfig, name: str, flaws: list[str] | None = None) -> Iterator[Row]:
    """Rows of one file, whose client is called `name`.

    Args:
        path: the file.
        data: how it is written, and whether lines that are no object are left out (`on_bad_row`).
        name: the client.
        flaws: takes each line that is no object, and why, in place of an error or a notice.

    Raises:
        UserError: The file cannot be read, or has no rows, or one that is no object.
    """
    kind, packed = _type(path)
    if kind not in READERS:
        raise UserError(f"{path}: files of type {kind!r} are not read. Choose one of: {', '.join(SUFFIXES)}.")
    own = data.files.get(path.name, FileConfig())
    renamed = _renamed(own.columns, data)
    template = own.template and with_fields(own.template, lambda column: renamed.get(column, column))
    number, unread, some, doubtful = 0, list[str](), False, Counter[str]()
    try:
        with PACKED.get(packed, open)(path, "rb") as content:
            classes = _settled(_classes_of_parquet(content, path) if kind == ".parquet" else {}, data)
            encoding = "" if kind == ".parquet" else _encoding(content, own.encoding or data.encoding, path)
            written = Written(path, encoding, own.delimiter or data.delimiter, data.on_bad_row == "skip")
            for number, values in enumerate(READERS[kind](content, written), 1):
                if values is BLANK:
                    continue
                row = Row({}, str(path), number, name, own.kind or "", template)
                if not isinstance(values, Mapping):
                    unread.append(f"{row.where}: {_why_no_row(values)}")
                    if flaws is None and data.on_bad_row == "error":
                        raise UserError(unread[0])
                    continue
                some = True
                row = _named(replace(row, values=_with_names(values, renamed) if renamed else values), classes)
                label = row.values.get(data.columns.label)
                if isinstance(label, str) and label.strip().lower() in NOTHING and label.strip() not in data.labels:
                    doubtful[label.strip()] += 1
                yield row
    except DAMAGED as error:
        after = f"after {counted(path)} {number}"
        raise UserError(f"{path}, {after}: not readable as {kind[1:]}{packed}: {error}") from None
    if doubtful:
        told = ", ".join(f"{word!r} ({count:,})" for word, count in doubtful.items())
        say(f"{path}: {told} in column {data.columns.label!r} is a class of that name. If it means none, empty it")
    if flaws is not None:
        flaws += unread
    elif unread:
        first = "; ".join(unread[:NAMED])
        say(f"{path}: {len(unread):,} {counted(path)}s that cannot be read are left out: {first}")
    if not some:
        why = f"no {counted(path)} can be read: {unread[0]}" if unread else "the file holds no rows."
        raise UserError(f"{path}: {why} Give a file with at least one.")


def _why_no_row(values: object) -> str:
    if isinstance(values, json.JSONDecodeError):
        return f"not readable as JSON: {values.msg} (column {values.colno})."
    if isinstance(values, NoRowError):
        return f"{values}."
    if isinstance(values, Exception):
        return f"not readable as JSON: {values}."
    return f"{shortened(values)}: must be an object with named columns."


def read_lines(path: Path, data: DataConfig) -> list[str]:
    """Lines of a file of bare text, empty ones left out; one that cannot be read is an error."""
    own = data.files.get(path.name, FileConfig())
    try:
        with path.open("rb") as content:
            encoding = _encoding(content, own.encoding or data.encoding, path)
            content.seek(0)
            text = content.read().decode(encoding)
    except DAMAGED as error:
        raise UserError(f"{path}: not readable as text: {error}") from None
    return [line for line in text.splitlines() if line.strip()]


# ---------------------------------------------------------------------------------------- columns called otherwise


def own_names(path: Path, data: DataConfig) -> dict[str, str]:
    """Columns as `read_file` calls them -> what the file itself calls them, where [data.files] says so."""
    own = data.files.get(path.name, FileConfig())
    return {new: column for column, new in _renamed(own.columns, data).items()}


def _renamed(own: Mapping[str, str], data: DataConfig) -> dict[str, str]:
    """Columns of a file -> what they are called everywhere else.

    A column that bears the name of another role's steps aside: nothing is read as what it is not.
    """
    names = {column: getattr(data.columns, role) or role for role, column in own.items()}
    aside = {taken: f"{taken} (other)" for taken in names.values() if taken not in names}
    return {column: new for column, new in {**aside, **names}.items() if column != new}


def _with_names(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    return {renamed.get(column, column): value for column, value in values.items()}


# ----------------------------------------------------------------------------------------------------- text of files


@dataclass(frozen=True)
class Written:
    """How a file is written."""

    path: Path
    encoding: str  # "": it holds no text
    delimiter: str  # of a csv
    skip: bool = False  # whether a row that cannot be read is left out, and the others are read


def written_as(path: Path) -> Written:
    """How a file is written, as it is guessed where nobody says it; what holds no text or cells has no such thing."""
    kind, packed = _type(path)
    if kind not in READERS or kind == ".parquet":
        return Written(path, "", "")
    with PACKED.get(packed, open)(path, "rb") as content:
        found = Written(path, _encoding(content, AUTO, path), AUTO if READERS[kind] is _read_csv else "")
        if not found.delimiter:
            return found
        with _text(content, found, newline="") as lines:
            return replace(found, delimiter=_delimiter(_header(lines), found))


MARKS = (  # the longer before those that they begin with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK = 2**20  # bytes
BLANK = object()  # a line that holds nothing


class NoRowError(ValueError):
    """A row that cannot be read, in a file of which others can."""


def _encoding(content: IO[bytes], said: str, path: Path) -> str:
    """The encoding of a text file: by its byte order mark, or as the user says, or the first that fits.

    Told where the user names another one than the file has, and where it is guessed.
    """
    first = content.read(4)
    content.seek(0)
    mark, marked = next(((mark, encoding) for mark, encoding in MARKS if first.startswith(mark)), (b"", ""))
    if marked:
        if said != AUTO and mark.decode(said, "replace").strip("\ufeff"):
            say(f"{path}: its byte order mark says {marked.removesuffix('-sig')}, and so it is read: not as {said!r}")
        return marked
    if said != AUTO:
        is_utf_8 = codecs.lookup(said).name in ("utf-8", "utf-8-sig")
        if not is_utf_8 and _fits(content, "utf-8") and not _fits(content, "ascii"):
            say(
                f"{path}: is read as {said!r}, but its letters are valid UTF-8. If `fedalign data` shows Ã¼ for "
                'ü, set its encoding = "utf-8" (data.encoding, or that of the file under [data.files])'
            )
        return "utf-8-sig" if is_utf_8 else said
    encoding = next((name for name in ("utf-8", "cp1252") if _fits(content, name)), "")
    if not encoding:
        raise UserError(
            f"{path}: neither UTF-8 nor Windows-1252, or with zero bytes in it, as UTF-16 has. Name its encoding in "
            "data.encoding, such as utf-16, cp1250, shift_jis."
        )
    if encoding == "cp1252":
        say(
            f"{path}: is not UTF-8 and is read as Windows-1252. If letters look wrong in `fedalign data`, name another "
            "encoding in data.encoding"
        )
    return encoding


def _fits(content: IO[bytes], encoding: str) -> bool:
    """Whether all of it decodes, to text without the character 0: UTF-16 without its mark is full of them."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in iter(lambda: content.read(CHUNK), b""):
            if "\0" in decoder.decode(chunk):
                return False
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    finally:
        content.seek(0)
    return True


def _text(content: IO[bytes], written: Written, newline: str | None = None) -> io.TextIOWrapper:
    """Its text; of a file whose bad rows are left out, a byte that is no letter is half of a character (`_unread`)."""
    errors = "surrogateescape" if written.skip else "strict"
    return io.TextIOWrapper(content, encoding=written.encoding, newline=newline, errors=errors)


def _unread(text: str, written: Written) -> NoRowError | None:
    """The flaw in a row's text, if it has one: a byte that is no letter."""
    strange = next((letter for letter in text if "\udc80" <= letter <= "\udcff"), None) if written.skip else None
    return (
        NoRowError(f"byte 0x{ord(strange) - 0xDC00:02x} is not {written.encoding.removesuffix('-sig')}")
        if strange
        else None
    )


def _loads(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_object)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object[error.start]!r} is half of a character") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has the key {_twice([key for key, _ in pairs])!r} twice")
    return found


def _twice(names: Sequence[str]) -> str:
    return next((name for name, count in Counter(names).items() if count > 1), "")


def _read_jsonl(content: IO[bytes], written: Written) -> Iterator[Any]:
    with _text(content, written) as lines:
        for line in lines:
            try:
                yield _unread(line, written) or (_loads(line) if line.strip() else BLANK)
            except (ValueError, RecursionError) as error:
                yield error


def _read_json(content: IO[bytes], written: Written) -> Iterator[Any]:
    with _text(content, written) as text:
        values = _loads(text.read() or "[]")
    if not isinstance(values, list):
        raise ValueError("the file must hold one list of objects; for one object a line, call it .jsonl")
    yield from values


def _read_csv(content: IO[bytes], written: Written) -> Iterator[Any]:
    csv.field_size_limit(LONGEST_CELL)
    with _text(content, written, newline="") as lines:
        head = _header(lines)
        delimiter = _delimiter(head, written)
        reader = csv.DictReader(itertools.chain(head, lines), delimiter=delimiter, strict=True)
        if name := _twice(reader.fieldnames or []):
            raise ValueError(f"the header has {name!r} twice")
        while (values := _record(reader, written)) is not None:
            yield values


def _record(reader: csv.DictReader[str], written: Written) -> Mapping[str, str | None] | NoRowError | None:
    """The next row, or what is wrong with it where bad rows are left out; None: it was the last.

    After a quote that nobody closes all that follows is one row.
    """
    first = reader.reader.line_num + 1
    try:
        values = next(reader, None)
    except csv.Error as error:
        if written.skip:
            return NoRowError(f"lines {first} to {reader.reader.line_num} are not readable as csv: {error}")
        raise
    if values is None:
        return None
    if None in values:  # more cells than the header names
        told = f"line {reader.line_num} has more cells than the header, parted by {reader.reader.dialect.delimiter!r}"
        if written.skip:
            return NoRowError(told)
        raise ValueError(told)
    strange = _unread("".join(value or "" for value in values.values()), written)
    return strange or {name: value or None for name, value in values.items()}


def _header(lines: Iterator[str]) -> list[str]:
    """The lines of a csv's header: a name in quotes may hold line breaks."""
    head, quotes = list[str](), 0
    for line in lines:
        quotes += line.count('"')
        if line.strip() or head:
            head.append(line)
        if head and quotes % 2 == 0:
            break
    return head


def _delimiter(head: list[str], written: Written) -> str:
    """The delimiter of a csv: as the user says, or that of most cells in the header, and told if it is no comma."""
    if written.delimiter != AUTO:
        return written.delimiter
    if _type(written.path)[0] == ".tsv":
        return "\t"
    cells = {delimiter: _cells(head, delimiter) for delimiter in ",;\t|"}
    most = max(cells, key=cells.__getitem__)  # of equals the first
    if most != ",":
        say(f"{written.path}: cells are parted by {most!r}, as the header has it (data.delimiter)")
    return most


def _cells(head: list[str], delimiter: str) -> int:
    try:
        return len(next(csv.reader(head, delimiter=delimiter, strict=True), []))
    except csv.Error:  # quotes end where no cell does
        return 0


def _read_parquet(content: IO[bytes], written: Written) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(content) as file:
        if name := _twice(file.schema_arrow.names):
            raise ValueError(f"the file has a column {name!r} twice")
        for batch in file.iter_batches():
            yield from batch.to_pylist()


READERS: dict[str, Callable[[IO[bytes], Written], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
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
    features = table.features.items()
    named = {column: feature.names for column, feature in features if isinstance(feature, datasets.ClassLabel)}
    classes = _settled(named, data)
    for number, values in enumerate(table, 1):
        yield _named(Row(values, f"{source} ({name})", number), classes)


# --------------------------------------------------------------------------------- classes that are stored as numbers

Classes = Mapping[str, Sequence[str]]  # columns whose numbers stand for names, counted from 0


def _classes_of_parquet(content: IO[bytes], path: Path) -> dict[str, list[str]]:
    """The classes that Hugging Face datasets writes beside a table's schema."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(content) as file:
        written = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(written).get("info", {}).get("features", {})
        return {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: its Hugging Face metadata cannot be read ({error!r}). Write it anew.") from None


def _settled(classes: Classes, data: DataConfig) -> Classes:
    """Classes by the names that the source gives them, told to the user; labels by others that the user gives them."""
    label, given = data.columns.label, data.labels
    for column, names in classes.items():
        shown = [f"{code} {name}" for code, name in enumerate(names)]
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        say(f"numbers in {column!r} are classes that the data names: {', '.join(shown[:SHOWN])}{more}; -1 is none")
    if label in classes and len(given) == len(classes[label]) and not set(given) & set(classes[label]):
        say(f"data.labels calls the classes in {label!r}, in this order: {shortened(list(given))}")
        return {**classes, label: given}
    return classes


def _named(row: Row, classes: Classes) -> Row:
    """The row with names in place of numbers."""
    named: dict[str, str | None] = {}
    for column, names in classes.items():
        code = row.values.get(column)
        if isinstance(code, int) and code >= len(names):
            row.fail(f"{column} = {code}: the classes that {row.source} names are 0 to {len(names) - 1}.")
        if isinstance(code, int):  # -1 stands for a label that is kept secret
            named[column] = names[code] if code >= 0 else None
    return replace(row, values={**row.values, **named}) if named else row
