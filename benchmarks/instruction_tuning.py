"""Federated instruction tuning of a real pretrained model on one CPU thread: upcycled SmolLM2, four sites, Dolly.

    OMP_NUM_THREADS=1 python benchmarks/instruction_tuning.py DOLLY --out runs/instruction-tuning    # 8 minutes

DOLLY is a folder with train.parquet and test.parquet: the 15,011 rows of Dolly (Conover et al. 2023, CC BY-SA 3.0) with
columns instruction, context, response, category and client; each client holds a few categories, as FedIT dealt them
(Zhang et al. 2023, arXiv 2305.05644). First the model is made (`base_model.py`), and must say word for word what the
dense one says, greedily. Then the machinery of `fedalign run` tunes it on short examples of some of the clients: LoRA,
a bfloat16 base, FedAlign-MoE. Printed is the perplexity on test rows, which no client has and which are of all
categories alike, and on what each client held out itself, before and after each round. `--set` changes any key.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from base_model import add_recipe, dense_weights, make, recipe_of
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.federation.in_process import prepare
from fedalign.moe.load import quiet
from fedalign.moe.upcycle import DenseSource, load_dense
from fedalign.protocol import Layout, Plan, Statistics
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import RunFolder
from fedalign.server.run import execute

PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for staying healthy.",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "Which of these are fruits: apple, carrot, banana, potato?",
)


def main() -> None:
    """Make, compare, tune, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dolly", type=Path, metavar="DOLLY")
    parser.add_argument("--out", type=Path, default=Path("runs/instruction-tuning"))
    parser.add_argument("--clients", default="0,1,2,3", help="which of the ten")
    parser.add_argument("--examples", type=int, default=48, help="of each client, drawn by the seed")
    parser.add_argument("--test-examples", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=160, help="longer examples are left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="set_")
    parser.add_argument("--threads", type=int, default=1)
    add_recipe(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {version('peft')}, seed {arguments.seed}",
        flush=True,
    )
    model = arguments.out / "start"
    shutil.rmtree(arguments.out, ignore_errors=True)
    make(model, recipe_of(arguments))
    compare_with_dense(model)
    write_data(arguments, model)
    overrides = [
        f"run.seed={arguments.seed}",
        f"run.rounds={arguments.rounds}",
        f"run.threads={arguments.threads}",
        f'model.path="{model}"',
        f'data.train="{arguments.out / "train.jsonl"}"',
        f'data.test="{arguments.out / "test.jsonl"}"',
        "data.kind=chat",
        "clients.partition=natural",
        "clients.min_examples=4",
        "training.batch_examples=4",
        "training.learning_rate=5e-4",
        "training.precision=bfloat16",
        "tuning.kind=lora",
        "tuning.dtype=bfloat16",
        "algorithm.name=fedalign_paper",
        "tracking.loggers=[]",
    ]
    tune(load_config(None, [*overrides, *arguments.set_]), arguments.out / "run")


def compare_with_dense(folder: Path, new_tokens: int = 40) -> None:
    """Stop unless the model in `folder` continues every prompt as the dense one does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        answers(model, tokenizer, new_tokens)
        for model in (load_dense(DenseSource.find(str(dense_weights()))), AutoModelForCausalLM.from_pretrained(folder))
    ]
    for prompt, dense, sparse in zip(PROMPTS, *texts, strict=True):
        if dense != sparse:
            raise SystemExit(f"{prompt!r}: the dense model says {dense!r}, the upcycled one {sparse!r}")
        print(f"both say to {prompt!r}: {dense!r}", flush=True)


def answers(model: PreTrainedModel, tokenizer: Any, new_tokens: int) -> list[str]:
    """What a model says to each prompt, greedily."""
    said = []
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.eval().generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        said.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def write_data(arguments: argparse.Namespace, model: Path) -> None:
    """Short examples of the chosen clients, and of the test rows, as chats."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    clients = [int(client) for client in arguments.clients.split(",")]
    train: list[dict[str, Any]] = []
    rows = pyarrow.parquet.read_table(arguments.dolly / "train.parquet").to_pylist()
    for client in clients:
        mine = [row for row in rows if row["client"] == client]
        train += drawn(mine, arguments.examples, arguments, tokenizer)
    rows = pyarrow.parquet.read_table(arguments.dolly / "test.parquet").to_pylist()
    test = drawn(rows, arguments.test_examples, arguments, tokenizer)
    for name, lines in (("train", train), ("test", test)):
        path = arguments.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(train)} examples of {len(clients)} clients to train and hold out, {len(test)} to test", flush=True)


def drawn(
    rows: Sequence[dict[str, Any]], count: int, arguments: argparse.Namespace, tokenizer: Any
) -> list[dict[str, Any]]:
    """At most `count` rows that are short enough, in an order drawn by the seed."""
    order = random.Random(arguments.seed).sample(range(len(rows)), len(rows))
    short: list[dict[str, Any]] = []
    for index in order:
        row = rows[index]
        prompt = f"{row['instruction']}\n\n{row['context']}" if row["context"] else row["instruction"]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["response"]}]
        if len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]) <= arguments.max_tokens:
            short.append({"messages": messages, "client": f"client-{row['client']:02d}", "category": row["category"]})
        if len(short) == count:
            break
    return short


class Perplexities:
    """Prints a line a round."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        """Nothing to say."""

    def planned(self, round: int, reports: Sequence[Statistics], plan: Plan, layout: Layout) -> None:
        """Say what the clients learnt from."""
        tokens = {report.client: report.tokens for report in reports}
        print(f"round {round}: tokens {tokens}, {time.perf_counter() - self.started:.0f} s so far", flush=True)

    def completed(self, state: ServerState, improved: bool) -> None:
        """Say the perplexities."""
        metrics = state.history[-1]
        own = {name: f"{math.exp(loss):.2f}" for name, loss in metrics.get("client_losses_nats", {}).items()}
        print(f"after round {state.round}: perplexity {metrics['perplexity']:.3f} on the test rows, held out {own}")


def tune(config: Config, out: Path) -> None:
    """The run itself."""
    folder = RunFolder(out)
    folder.begin(config)
    prepared = prepare(config, folder.clients)
    moe = prepared.bench.moe
    sizes = {
        name: f"{len(c.train)} examples, {sum(e.tokens for e in c.train)} tokens"
        for name, c in prepared.clients.items()
    }
    total, trained = sum(p.numel() for p in moe.model.parameters()), sum(moe.layout.sizes.values())
    print(
        f"{config.algorithm.name}, {config.tuning.kind}: {trained:,} of {total:,} values trained; {sizes}", flush=True
    )
    started, busy = time.perf_counter(), time.process_time()
    summary = execute(prepared, folder, Perplexities())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{summary['rounds']} rounds in {time.perf_counter() - started:.0f} s, {time.process_time() - busy:.0f} s of "
        f"CPU; sent up {summary['bytes_up'] / 1e6:.1f} MB; peak memory of all this {peak:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
