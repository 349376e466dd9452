"""Pretrain the small OLMoE that the evidence starts from, with experts that visibly specialise.

    OMP_NUM_THREADS=1 python benchmarks/evidence/start.py     # after data.py; 7 minutes of one core

A language model of 3.3 million parameters, 4 layers of 8 experts, top-2, is trained on the unlabelled texts that
data.py wrote: training parts of seven data sets. Every sequence is of one set. Beside the load-balancing loss of
`pretrain_demo.py`, the mutual information of expert and data set is rewarded as in Mod-Squad (Chen et al. 2023, arXiv
2212.08066), so that experts come to have roles; `--specialise 0` leaves that to chance. That model is kept beside OUT
as OUT-language, and taken from there if it is there. Then it learns to answer from the labelled rows that no regime
draws from, so that federations do not begin at chance. Printed and kept in start.json: loss on unseen texts, accuracy
on instructions that were left out, and how specialised the experts are.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from measure import expert_counts, mean, specialisation
from torch import Tensor
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from fedalign.files import replacing

sys.path.append(str(Path(__file__).parents[1]))
from pretrain_demo import BALANCE, balance, new_model, next_token_loss, optimizer_of, rate

SEQUENCE = 96  # tokens of a packed sequence
BATCH = 16  # sequences of a step
INSTRUCTIONS = 32  # of a step


class Texts:
    """Token streams, one a data set."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.train: dict[str, list[list[int]]] = defaultdict(list)
        self.unseen: list[tuple[str, str]] = []  # set, text
        self._end = tokenizer.eos_token_id
        self._rng = random.Random(seed)
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row, ids in zip(rows, tokenizer([row["text"] for row in rows])["input_ids"], strict=True):
            if row["unseen"]:
                self.unseen.append((row["source"], row["text"]))
            else:
                self.train[row["source"]].append(ids)
        self.sets = sorted(self.train)

    @property
    def tokens(self) -> int:
        """To train on."""
        return sum(len(ids) for every in self.train.values() for ids in every)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sequences [BATCH, SEQUENCE] and the set [BATCH] of each, without end; sets by the root of their sizes."""
        streams = {name: self._stream(self.train[name]) for name in self.sets}
        weights = [sum(map(len, self.train[name])) ** 0.5 for name in self.sets]
        while True:
            chosen = self._rng.choices(range(len(self.sets)), weights, k=BATCH)
            ids = [[next(streams[self.sets[index]]) for _ in range(SEQUENCE)] for index in chosen]
            yield torch.tensor(ids), torch.tensor(chosen)

    def _stream(self, texts: list[list[int]]) -> Iterator[int]:
        while True:
            self._rng.shuffle(texts)
            for ids in texts:
                yield from ids
                yield self._end


def information(router_logits: Sequence[Tensor], set_B: Tensor) -> Tensor:
    """Mutual information of data set and expert by mean probabilities of a batch, mean over layers; differentiable."""
    set_T = set_B.repeat_interleave(SEQUENCE)
    one_hot_T_D = torch.nn.functional.one_hot(set_T).float()
    one_hot_T_D = one_hot_T_D[:, one_hot_T_D.sum(0) > 0]
    found = []
    for logits_T_E in router_logits:
        joint_D_E = one_hot_T_D.T @ logits_T_E.float().softmax(-1) / len(set_T)
        apart_D_E = joint_D_E.sum(1, keepdim=True) * joint_D_E.sum(0, keepdim=True)
        found.append((joint_D_E * (joint_D_E / apart_D_E).log()).sum())
    return torch.stack(found).mean()


def pretrain(model: OlmoeForCausalLM, texts: Texts, steps: int, learning_rate: float, specialise: float) -> None:
    """Next token, balance, and experts that tell data sets apart."""
    optimizer = optimizer_of(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, steps // 20))
    topk = model.config.num_experts_per_tok
    started = time.perf_counter()
    for step, (ids, sets) in zip(range(1, steps + 1), texts.batches(), strict=False):
        output = model(input_ids=ids, output_router_logits=True)
        task = next_token_loss(output.logits, ids)
        told = information(output.router_logits, sets)
        loss = task + BALANCE * balance(output.router_logits, topk) - specialise * told
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{steps}, {seconds:.0f} s: loss {task:.3f}, information {told:.3f} nats", flush=True)


@dataclass(frozen=True)
class Instructions:
    """Labelled rows as token ids that end in their one-token answers; a fifth to test on."""

    train: dict[str, list[list[int]]]
    test: dict[str, list[list[int]]]

    @classmethod
    def read(cls, file: Path, tokenizer: PreTrainedTokenizerFast) -> Instructions:
        """By set."""
        by_set: dict[str, list[list[int]]] = defaultdict(list)
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                prompt, answer = (
                    tokenizer(part)["input_ids"] for part in (f"{row['text']}\nLabel:", f" {row['label']}")
                )
                by_set[row["source"]].append([*prompt, *answer])
        mixed = {name: random.Random(0).sample(every, len(every)) for name, every in by_set.items()}
        return cls(
            {name: every[len(every) // 5 :] for name, every in mixed.items()},
            {name: every[: len(every) // 5] for name, every in mixed.items()},
        )


def answer_logits(model: OlmoeForCausalLM, some: Sequence[list[int]], pad: int) -> Tensor:
    """What the model expects in the place of each last token, [B, V]."""
    length = max(map(len, some)) - 1
    ids_B_S = torch.tensor([[*ids[:-1], *[pad] * (length - len(ids) + 1)] for ids in some])
    mask_B_S = torch.tensor([[int(i < len(ids) - 1) for i in range(length)] for ids in some])
    hidden_B_S_H = model.model(input_ids=ids_B_S, attention_mask=mask_B_S).last_hidden_state
    logits: Tensor = model.lm_head(hidden_B_S_H[torch.arange(len(some)), mask_B_S.sum(1) - 1])
    return logits


def instruct(model: OlmoeForCausalLM, rows: Instructions, steps: int, learning_rate: float, seed: int) -> None:
    """Answers alone, of all sets alike."""
    model.train()
    optimizer = optimizer_of(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, steps // 20))
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        some = [rng.choice(rows.train[name]) for name in rng.choices(sorted(rows.train), k=INSTRUCTIONS)]
        logits_B_V = answer_logits(model, some, model.config.pad_token_id)
        loss = torch.nn.functional.cross_entropy(logits_B_V, torch.tensor([ids[-1] for ids in some]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"instruction {step}/{steps}: loss {loss:.3f}", flush=True)


@torch.no_grad()
def answered(model: OlmoeForCausalLM, rows: Instructions) -> dict[str, float]:
    """Share of the test rows answered rightly, by set, among all words."""
    model.eval()
    found = {}
    for name, every in rows.test.items():
        right = 0
        for start in range(0, len(every), 64):
            some = every[start : start + 64]
            best_B = answer_logits(model, some, model.config.pad_token_id).argmax(1)
            right += int((best_B == torch.tensor([ids[-1] for ids in some])).sum())
        found[name] = right / len(every)
    return found


@torch.no_grad()
def unseen_loss(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Nats a token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        inputs = tokenizer(some, return_tensors="pt", padding=True, truncation=True, max_length=256)
        target_B_S = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
        logits_B_S_V = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_B_S_V.flatten(0, 1), target_B_S.flatten(), reduction="sum")
        total, count = total + loss.item(), count + int((target_B_S != -100).sum())
    return total / count


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="what data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence/start"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--instruct-steps", type=int, default=200)
    parser.add_argument("--instruct-rate", type=float, default=1e-3)
    parser.add_argument("--specialise", type=float, default=0.05, help="weight of the mutual information")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), seed {args.seed}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.data / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>"
    )
    texts = Texts(args.data / "pretraining.jsonl", tokenizer, args.seed)
    language = args.out.with_name(f"{args.out.name}-language")
    if language.exists():
        model = OlmoeForCausalLM.from_pretrained(language)
    else:
        model = new_model(tokenizer, vocabulary=len(tokenizer), hidden=128)
        print(f"{texts.tokens:,} tokens of {', '.join(texts.sets)}", flush=True)
        pretrain(model, texts, args.steps, args.learning_rate, args.specialise)
        with replacing(language) as folder:
            model.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    loss = unseen_loss(model, tokenizer, [text for _, text in texts.unseen])
    rows = Instructions.read(args.data / "instructions.jsonl", tokenizer)
    instruct(model, rows, args.instruct_steps, args.instruct_rate, args.seed)

    sets, unseen = zip(*texts.unseen, strict=True)
    counts = expert_counts(model, tokenizer, unseen)
    share_L_E = counts.sum(0) / counts.sum((0, 2))[:, None]
    about = {
        "parameters": size,
        "tokens": args.steps * BATCH * SEQUENCE,
        "unseen_loss_nats": loss,
        "answered": answered(model, rows),
        "expert_and_set_nats": specialisation(counts, sets),
        "share_of_tokens": [float(share_L_E.min()), float(share_L_E.max())],
        "specialise": args.specialise,
        "seed": args.seed,
    }
    about["expert_and_set_mean_nats"] = mean(about["expert_and_set_nats"])
    with replacing(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "start.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
