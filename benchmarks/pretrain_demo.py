"""Pretrain the demo's base model from nothing and write the file that the package ships.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_demo.py     # 13 to 25 minutes on one core

A small OLMoE (Muennighoff et al. 2024, arXiv 2409.02060) is trained as a language model on the training texts of
the embedded data set: texts alone, separated by an end token; labels are not seen. The load-balancing loss of the
Switch Transformer (arXiv 2101.03961) keeps all experts alive. Prints the machine, versions, seed, losses on unseen
test texts and how tokens spread over experts. What is shipped: seed 0, 1,600 steps, 4.04 nats a token on test texts
(log of the vocabulary: 8.32); each expert gets 9 to 18 % of its layer's tokens.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from fedalign import demo
from fedalign.data import docstrings

PAD, END = "<|pad|>", "<|end|>"
VOCABULARY = 4096
SEQUENCE = 128  # tokens of a packed training sequence
BATCH = 16  # sequences of a step
BALANCE = 0.02  # coefficient of the load-balancing loss
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the words that name classes are repeated until each, with its leading space, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = [f" {label}" for label in docstrings.LIBRARIES]
    tokenizer.train_from_iterator([*texts, *names * 1000], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    wrapped.chat_template = CHAT_TEMPLATE
    assert all(len(wrapped(name)["input_ids"]) == 1 for name in names)
    return wrapped


def new_model(tokenizer: PreTrainedTokenizerFast, vocabulary: int = VOCABULARY, hidden: int = 96) -> OlmoeForCausalLM:
    """The architecture: 4 layers, 8 experts, top-2, by default about 2 million parameters."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Tensor]:
    """Batches [BATCH, SEQUENCE] without end: texts in a new order each time through, joined by the end token."""
    ids_by_text = tokenizer(texts)["input_ids"]
    buffer: list[int] = []
    while True:
        rng.shuffle(ids_by_text)
        for ids in ids_by_text:
            buffer += [*ids, tokenizer.eos_token_id]
            if len(buffer) >= BATCH * SEQUENCE:
                yield torch.tensor(buffer[: BATCH * SEQUENCE]).view(BATCH, SEQUENCE)
                buffer = buffer[BATCH * SEQUENCE :]


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def next_token_loss(logits_B_S_V: Tensor, ids_B_S: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, nats."""
    return torch.nn.functional.cross_entropy(logits_B_S_V[:, :-1].flatten(0, 1), ids_B_S[:, 1:].flatten())


def balance(router_logits: Sequence[Tensor], topk: int) -> Tensor:
    """The Switch load-balancing loss, layer by layer (1 if balanced).

    The loss that transformers returns pools all layers, which leaves experts dead in one layer and busy in another.
    """
    losses = []
    for logits_T_E in router_logits:
        prob_T_E = logits_T_E.float().softmax(-1)
        experts = prob_T_E.shape[-1]
        share_E = prob_T_E.topk(topk).indices.flatten().bincount(minlength=experts) / (len(prob_T_E) * topk)
        losses.append(experts * (share_E * prob_T_E.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def validation(model: OlmoeForCausalLM, batches: list[Tensor]) -> tuple[float, Tensor]:
    """Loss in nats per token on unseen texts, and each layer's share of tokens by expert [L, E]."""
    model.eval()
    losses, counts_L_E = [], torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for ids in batches:
        output = model(input_ids=ids, output_router_logits=True)
        losses.append(next_token_loss(output.logits, ids).item())
        for layer, logits_T_E in enumerate(output.router_logits):
            chosen = logits_T_E.topk(model.config.num_experts_per_tok).indices
            counts_L_E[layer] += chosen.flatten().bincount(minlength=model.config.num_experts)
    model.train()
    return sum(losses) / len(losses), counts_L_E / counts_L_E.sum(1, keepdim=True)


def optimizer_of(model: OlmoeForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    """Weight decay on matrices."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def pretrain(
    model: OlmoeForCausalLM, train: Iterator[Tensor], unseen: list[Tensor], steps: int, learning_rate: float
) -> None:
    """AdamW on next-token and balancing loss."""
    optimizer = optimizer_of(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, steps // 20))
    topk = model.config.num_experts_per_tok
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids = next(train)
        output = model(input_ids=ids, output_router_logits=True)
        loss = next_token_loss(output.logits, ids) + BALANCE * balance(output.router_logits, topk)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            unseen_loss, share_L_E = validation(model, unseen)
            print(
                f"step {step}/{steps}, {time.perf_counter() - started:.0f} s: test loss {unseen_loss:.4f} nats/token, "
                f"least used expert {share_L_E.min():.3f}, most {share_L_E.max():.3f} of its layer's tokens",
                flush=True,
            )


def main() -> None:
    """Train, ship, check the shipped file, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=demo.SHIPPED, help="folder for the shipped files")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), seed {args.seed}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    texts = [row.text for row in docstrings.load("train")]
    tokenizer = train_tokenizer(texts)
    unseen_texts = [row.text for row in docstrings.load("test")]
    unseen = [ids for ids, _ in zip(packed(unseen_texts, tokenizer, random.Random(0)), range(24), strict=False)]
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(texts):,} texts")
    pretrain(model, packed(texts, tokenizer, random.Random(args.seed)), unseen, args.steps, args.learning_rate)

    before = validation(model, unseen)[0]
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with tempfile.TemporaryDirectory() as folder:
        shipped = OlmoeForCausalLM.from_pretrained(demo.unpack(args.out, Path(folder)))
    after = validation(shipped, unseen)[0]
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"test loss trained {before:.4f}, as shipped {after:.4f} nats/token; {size / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
