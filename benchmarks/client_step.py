"""Tokens per second of the client step, with alignment on, against a plain PyTorch loop on the same model and batches.

    python benchmarks/client_step.py
    python benchmarks/client_step.py --model demo --repeats 9 --threads 1
    python benchmarks/client_step.py --model runs/smollm2-moe --device cuda --set tuning.kind=lora --profile profile.txt

Each repeat times all variants one after another, in turn, so that a machine that slows down slows all of them; ratios
are taken within a repeat. `plain` is the same forward pass (head cut to answers), AdamW and clipping, nothing else;
`labels` is the loop of most tutorials, `model(labels=...)`. All run in the precision that the client step would choose:
bfloat16 autocast on a GPU that has it. --profile writes where the time of one epoch of the client step goes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedalign.client.fit import LocalFit, make_autocast
from fedalign.client.forward import answer_logits
from fedalign.client.memory import ClientData, ClientMemory, Kept
from fedalign.client.trainer import Trainer
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.batches import batches
from fedalign.data.encode import Encoded
from fedalign.demo import model_folder
from fedalign.maths.hashing import derive_seed
from fedalign.moe.load import pick_device
from fedalign.moe.model import MoEModel, load_model
from fedalign.protocol import Broadcast
from keeping import keep, keepable

MODELS: dict[str, Callable[[], Any]] = {
    "demo": lambda: MoEModel.load(model_folder()).model,
    "small": lambda: OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_experts=16,
            num_experts_per_tok=4,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
        )
    ),
}


def examples(count: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Prompts of 20 to 80 random tokens with a one-token answer: the shape of a classification task."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(20, 81, (1,), generator=generator))
        tokens = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        made.append(Encoded(tokens, [-100] * (length - 1) + tokens[-1:], index))
    return made


def plain(moe: MoEModel, data: list[Encoded], config: Config, with_labels: bool) -> None:
    """A training loop without anything federated."""
    options = config.training
    parameters = [p for p in moe.model.parameters() if p.requires_grad]
    autocast = make_autocast(moe.device, options.precision)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, fused=True)
    moe.model.train()
    seed = derive_seed(derive_seed(config.run.seed, 1, "client", "order"), 0)
    for batch in batches(data, options.batch_tokens, options.batch_examples, seed=seed):
        optimizer.zero_grad(set_to_none=True)
        here = batch.to(moe.device)
        with autocast():
            if with_labels:
                loss = moe.model(**here.inputs(), labels=here.labels_B_S, use_cache=False).loss
            else:
                loss = answer_logits(moe, here).nll_N.sum() / batch.answer_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        float(loss.detach())
        optimizer.step()


def federated(moe: MoEModel, data: list[Encoded], config: Config, folder: Path) -> None:
    """The same epoch by the package's client step, as in round 2: with a routing target and an own distribution."""
    client = ClientData("client", data, None, ClientMemory(folder))
    trainer = Trainer(moe, None, config.algorithm.build(), config)
    uniform_L_E = torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)
    kept = Kept(uniform_L_E)
    local = trainer._local_round(client, Broadcast(2, {}, {"target_L_E": uniform_L_E}), kept)
    LocalFit(moe, trainer.algorithm, config, client, local, 2, kept).run()


def waited_for(data: list[Encoded], moe: MoEModel, config: Config) -> list[float]:
    """Milliseconds until each batch of an epoch is on the device: what preparing them ahead could win."""
    began, options = time.perf_counter(), config.training
    ready = []
    for batch in batches(data, options.batch_tokens, options.batch_examples, seed=0):
        batch.to(moe.device)
        settle(moe)
        ready.append(1e3 * (time.perf_counter() - began))
    return ready


def settle(moe: MoEModel) -> None:
    """Wait for the GPU."""
    if moe.device.type == "cuda":
        torch.cuda.synchronize()


def profiled(moe: MoEModel, run: Callable[[], None]) -> str:
    """Where the time of one epoch goes, operation by operation."""
    gpu = moe.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        settle(moe)
    averages = profile.key_averages()
    orders = ("self_cuda_time_total", "self_cpu_time_total") if gpu else ("self_cpu_time_total",)
    return "\n".join(averages.table(sort_by=order, row_limit=25, max_name_column_width=60) for order in orders)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="both", help=f"{', '.join(MODELS)}, both, or a folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `fedalign run`")
    parser.add_argument("--profile", metavar="FILE", help="write what takes the time of the client step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    keepable(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.device = pick_device(arguments.device)
    gpu = f"{torch.cuda.get_device_name()}, " if arguments.device.startswith("cuda") else ""
    print(
        f"{gpu}{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, seed {arguments.seed}, {arguments.repeats} repeats"
    )
    for name in MODELS if arguments.model == "both" else [arguments.model]:
        measure(name, arguments)


def measure(name: str, arguments: argparse.Namespace) -> None:
    """All variants on one model."""
    torch.manual_seed(arguments.seed)
    config = load_config(None, arguments.set)
    moe = (
        MoEModel.wrap(MODELS[name](), config.tuning, device=arguments.device)
        if name in MODELS
        else load_model(name, device=arguments.device, tuning=config.tuning)
    )
    data = examples(arguments.examples, moe.model.config.vocab_size, arguments.seed)
    tokens = sum(len(example.input_ids) for example in data)
    start = {group: value.clone() for group, value in moe.read().items()}
    parameters = sum(p.numel() for p in moe.model.parameters())
    print(f"\n{name}: {parameters / 1e6:.1f}M parameters, {tokens:,} tokens an epoch")
    ready = min((waited_for(data, moe, config) for _ in range(10)), key=lambda found: found[-1])
    print(
        f"batches: the first is on the device after {ready[0]:.1f} ms, all {len(ready)} after {ready[-1]:.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:

        def client_step(algorithm: str) -> Callable[[], None]:
            chosen = load_config(None, [*arguments.set, f"algorithm.name={algorithm}"])
            return lambda: federated(moe, data, chosen, Path(folder))

        variants: dict[str, Callable[[], None]] = {
            "plain": lambda: plain(moe, data, config, with_labels=False),
            "labels": lambda: plain(moe, data, config, with_labels=True),
            "fedavg": client_step("fedavg"),
            "fedalign_paper": client_step("fedalign_paper"),
        }
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for repeat in range(arguments.repeats + 1):
            for variant, run in variants.items():
                moe.write(start)
                settle(moe)
                began = time.perf_counter()
                run()
                settle(moe)
                if repeat:  # the first warms up
                    seconds[variant].append(time.perf_counter() - began)
        if arguments.profile:
            Path(arguments.profile).write_text(profiled(moe, client_step("fedalign_paper")), encoding="utf-8")
    print(f"{'variant':14}{'tokens/s':>10}{'ratio to plain: median':>26}{'min':>8}{'max':>8}")
    for variant, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["plain"], times, strict=True)]
        print(
            f"{variant:14}{tokens / statistics.median(times):>10,.0f}{statistics.median(ratios):>26.3f}"
            f"{min(ratios):>8.3f}{max(ratios):>8.3f}"
        )
        found = {
            "model": name,
            "variant": variant,
            "tokens": tokens,
            "seconds": times,
            "ratios": ratios,
            "batches_ms": ready,
        }
        keep(arguments, __file__, found, "torch", "transformers")


if __name__ == "__main__":
    main()
