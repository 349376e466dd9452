"""The embedded data set: which library does this docstring describe?

Real English text that lies on every machine that has this package's dependencies: the first paragraph of each
docstring, 4 to 60 words, of eight libraries. Sources are parsed, never imported. The label is the library, the
natural client the package and its first submodule (`torch.nn`). A text is in the test split when its own hash says
so: the split does not depend on the order of files, and a text keeps its split when libraries are updated.

Some texts name the library they come from (the word "pandas" in one of pandas): `python -m fedalign.data.docstrings`
prints how many. They stay, since masking words would leave text that nobody wrote; an accuracy on this
data set is a comparison between runs, not a claim about language understanding.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedalign.errors import UserError
from fedalign.files import cached

# Class name -> package; "" is the standard library.
LIBRARIES = {
    "PyTorch": "torch",
    "SymPy": "sympy",
    "Transformers": "transformers",
    "Python": "",
    "pandas": "pandas",
    "NumPy": "numpy",
    "NetworkX": "networkx",
    "Hub": "huggingface_hub",
}
ROWS = "rows.jsonl"  # the file in the cache
REVISION = 1  # raise when the same sources give other rows
SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "testing",
    "tests",
}
MIN_WORDS, MAX_WORDS = 4, 60
MIN_CLIENT = 40  # submodules with fewer texts share the client "<package>.other"
_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
_NESTED = ("body", "orelse", "handlers", "finalbody", "cases")


@dataclass(frozen=True)
class Row:
    """One text of the data set."""

    text: str
    label: str
    client: str
    split: str  # "train" or "test"


def load(split: str) -> list[Row]:
    """The rows of one split ("train" or "test"), built on first use and kept in the cache folder."""
    file = cached(f"docstrings-{fingerprint()}", _write_rows) / ROWS
    rows = [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.split == split]


def _write_rows(folder: Path) -> None:
    rows = build({label: library_folder(package) for label, package in LIBRARIES.items()})
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    (folder / ROWS).write_text(lines, encoding="utf-8")


def fingerprint() -> str:
    """Changes when a library, Python or the way of reading them changes."""
    versions = {package: importlib.metadata.version(package) for package in LIBRARIES.values() if package}
    described = json.dumps([REVISION, sys.version, versions], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def library_folder(package: str) -> Path:
    """Where a package's source lies; `UserError` if it is not installed."""
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'data.train = "docstrings": needs {package!r}, which is not installed: pip install {package}.')
    return Path(next(iter(spec.submodule_search_locations)))


def build(folders: Mapping[str, Path], processes: int | None = None) -> list[Row]:
    """All rows of the libraries at `folders` (label -> folder), in the order of libraries, paths and lines."""
    sources = [(label, folder, path) for label, folder in folders.items() for path in source_files(folder)]
    found = _scan([path for _, _, path in sources], processes or len(os.sched_getaffinity(0)))
    rows: dict[str, tuple[str, str]] = {}  # text -> label and client; the first to say it keeps it
    for (label, folder, path), texts in zip(sources, found, strict=True):
        client = client_name(folder, path)
        for text in texts:
            rows.setdefault(text, (label, client))
    sizes = Counter(client for _, client in rows.values())
    return [
        Row(text, label, client if sizes[client] >= MIN_CLIENT else f"{client.partition('.')[0]}.other", split_of(text))
        for text, (label, client) in rows.items()
    ]


def split_of(text: str) -> str:
    """Nine tenths train, one tenth test, by the text alone."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] * 10 < 256 else "train"


def client_name(folder: Path, path: Path) -> str:
    """The package and its first submodule.

    >>> client_name(Path("/site/torch"), Path("/site/torch/nn/modules/conv.py"))
    'torch.nn'
    >>> client_name(Path("/usr/lib/python3.12"), Path("/usr/lib/python3.12/asyncio/__init__.py"))
    'python.asyncio'
    """
    package = "python" if folder.name.startswith("python") else folder.name
    return f"{package}.{path.relative_to(folder).parts[0].removesuffix('.py')}"


def source_files(folder: Path) -> list[Path]:
    """Python files below a folder, without tests, vendored code and caches, in a fixed order."""
    return [
        path for path in sorted(folder.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1])
    ]


def first_paragraphs(source: bytes) -> list[str]:
    """The texts of one source file, in the order of lines; none if it is not valid Python."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's code
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    texts = (clean(docstring) for docstring in _docstrings(tree))
    return [text for text in texts if MIN_WORDS <= len(text.split()) <= MAX_WORDS]


def clean(docstring: str) -> str:
    r"""The first paragraph on one line, without reST roles and double backticks.

    >>> clean("Return a :class:`~torch.Tensor` of ``n`` zeros,\n   on a device.\n\nMore.")
    'Return a torch.Tensor of n zeros, on a device.'
    """
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return " ".join(_ROLE.sub(r"\1", paragraph).replace("``", "").split())


def names_own_library(row: Row) -> bool:
    """Whether the text holds its label or its package's name as a word."""
    names = {row.label.lower(), LIBRARIES[row.label] or "python"}
    return not names.isdisjoint(re.findall(r"[a-z_]+", row.text.lower()))


def _docstrings(node: ast.AST) -> Iterator[str]:
    # Only statements are visited: docstrings never lie inside expressions, which are most of a tree.
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for name in _NESTED:
        children = getattr(node, name, None)
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child)


def _scan(paths: Sequence[Path], processes: int) -> list[list[str]]:
    """The texts of each file, from child interpreters.

    Not a multiprocessing pool: forking a process that runs torch's threads is unsafe, and spawning one runs the
    caller's main module again.
    """
    command = [sys.executable, "-m", "fedalign.data.docstrings", "--scan"]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(processes)
    ]
    for i, child in enumerate(children):
        assert child.stdin is not None
        child.stdin.write(json.dumps([str(path) for path in paths[i::processes]]))
        child.stdin.close()
    found: list[list[str]] = [[] for _ in paths]
    for i, child in enumerate(children):
        assert child.stdout is not None
        with child.stdout as stdout:
            found[i::processes] = json.loads(stdout.read())
        child.wait()
    return found


def _scan_child(names: Iterable[str]) -> list[list[str]]:
    gc.disable()  # trees are freed by reference counts; the collector would double the time
    return [first_paragraphs(Path(name).read_bytes()) for name in names]


def _describe() -> None:
    for split in ("train", "test"):
        rows = load(split)
        total, named = Counter(row.label for row in rows), Counter(row.label for row in rows if names_own_library(row))
        print(f"{split}: {len(rows)} texts, {len({row.client for row in rows})} clients")
        for label in LIBRARIES:
            print(f"  {label:12} {total[label]:6}  names itself: {named[label] / max(1, total[label]):.1%}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--scan"]:
        json.dump(_scan_child(json.load(sys.stdin)), sys.stdout)
    else:
        _describe()
