"""Cost of holding a saved model against plain transformers, beside that of saving it, on a random OLMoE.

    OMP_NUM_THREADS=1 python benchmarks/saved_check.py           # a minute, 3 GiB

Saved once; then checked whole, as where memory holds a second copy (values, and logits of 32 tokens), and value by
value, as where it does not and at a coordinator without weights. Memory is what the peak of the process grew by.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedalign.config.run import TuningConfig
from fedalign.moe import saved
from fedalign.moe.load import quiet
from fedalign.moe.model import MoEModel
from watching import machine


def main() -> None:
    """Measure, the least memory first, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "olmoe",
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=options.experts,
        vocab_size=8192,
    )
    print(machine("torch", "transformers"))
    with tempfile.TemporaryDirectory() as place:
        base, model = Path(place) / "base", Path(place) / "model"
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        moe = MoEModel.load(base)
        print(f"{moe.nbytes / 1e6:,.0f} MB of float32, {config.num_hidden_layers} layers of {moe.experts} experts")
        print(f"{'':34}{'s':>8}{'CPU s':>8}{'more MiB':>10}  looked at")
        measure("save", lambda: moe.save(model))
        measure("check, value by value", lambda: check(moe, model, base, fits=False))
        measure("check, whole", lambda: check(moe, model, base, fits=True))
        adapted = MoEModel.load(base, tuning=TuningConfig(kind="lora"))
        measure("save, lora", lambda: adapted.save(Path(place) / "adapter"))
        measure("check, lora", lambda: check(adapted, Path(place) / "adapter", base, fits=True))


def check(moe: MoEModel, folder: Path, base: Path, *, fits: bool) -> str:
    """As at the end of a run, with so much memory."""
    saved._fits = lambda moe: fits
    return saved.check_saved(moe, folder, str(base), dtype="float32", trust_remote_code=False, revision=None)


def measure(what: str, act: Callable[[], str | None]) -> None:
    """Run it once, and print its line."""
    peak, cpu, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    told = act()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(f"{what:34}{seconds:8.1f}{cpu:8.1f}{more:10,.0f}  {told or ''}", flush=True)


if __name__ == "__main__":
    main()
