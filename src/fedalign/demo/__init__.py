"""The demo's base model: a small OLMoE, shipped in bfloat16, unpacked once to an ordinary Hugging Face folder.

`benchmarks/pretrain_demo.py` made the files in `model/` and makes them again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from fedalign.files import cached

SHIPPED = Path(__file__).parent / "model"
DEMO = Path(__file__).parent / "demo.toml"  # the configuration behind `fedalign run demo`


def model_folder() -> Path:
    """The float32 folder that plain `AutoModelForCausalLM` and `AutoTokenizer` load; unpacked on first use."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SHIPPED.iterdir()))).hexdigest()[:12]
    return cached(f"demo-{digest}", lambda folder: unpack(SHIPPED, folder))


def unpack(shipped: Path, folder: Path) -> Path:
    """Write the model of `shipped` to `folder`, an existing one, with its weights in float32."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - imports torch, which a path does not need

    for source in shipped.iterdir():
        if source.suffix != ".safetensors":
            shutil.copyfile(source, folder / source.name)
    weights = load_file(shipped / "model.safetensors")
    save_file({name: w.float() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((shipped / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    return folder
