"""What a run needs of a card's memory, by arithmetic, before its first step.

The activations are counted tensor by tensor (below) and a test compares them with what autograd really keeps; the
peak of the loss, the allocator's losses and what a compiler saves are not, so take the sum for a good guess.
"""

import os
from dataclasses import replace
from typing import Any

import torch

from gpt2repro.training.arguments import Recipe

LOGITS_PEAK = 10  # bytes a logit at the loss's peak: bf16, its fp32 copy and the fp32 log-softmax (2 + 4 + 4)
LOSS_CHUNKS = 8  # `loss_impl: chunked` holds the logits of an eighth of the tokens
USABLE = 0.9  # of the card; the rest is the CUDA context's and the allocator's


def memory_estimate(
    recipe: Recipe, config: Any, *, n_parameters: int, bf16: bool, chunked_loss: bool, shards: int = 1
) -> dict[str, int]:
    """Bytes on one card by purpose, for the recipe's micro batches; `config` is the model's, `shards` are FSDP2's.

    Kept for the backward of a block, in bytes a token and channel, with bf16 autocast (fp32 in brackets): the residual
    stream before each LayerNorm 4 + 4 (4 + 4), the LayerNorms' outputs 2 + 2 (4 + 4), q, k, v 6 (12), attention's
    output 2 (4), the MLP's hidden layer before and after its GELU 8 + 8 (16 + 16). Recomputing keeps the first 4. What
    attention keeps of its weights where it is written out (bf16 on a CPU, up to 256 tokens) is not counted.
    """
    tokens, layers, channels = recipe.micro_batch_size * recipe.seq_len, config.n_layer, config.n_embd
    per_block = 4 if recipe.gradient_checkpointing else 36 if bf16 else 64
    block = (36 if bf16 else 64) if recipe.gradient_checkpointing else 0  # the one that is being recomputed
    # Of the blocks' matrices Muon keeps one moment, AdamW keeps two of everything.
    matrices = 12 * layers * channels**2 if recipe.optimizer == "muon" else 0
    logits = LOGITS_PEAK * config.vocab_size * tokens // (LOSS_CHUNKS if chunked_loss else 1)
    return {
        "parameters": 4 * n_parameters // shards,
        "gradients": 4 * n_parameters // shards,
        "optimizer": (8 * n_parameters - 4 * matrices) // shards,
        "bf16 copies": 2 * n_parameters // shards if bf16 else 0,
        "activations": (layers * per_block + block + 8) * channels * tokens,
        # with the head's gradient and bf16 copy
        "logits": logits + (6 * config.vocab_size * channels if chunked_loss else 0),
    }


def memory_report(recipe: Recipe, config: Any, device: torch.device, *, processes: int, **details: Any) -> str:
    """One line: what the run needs by `memory_estimate`, what the device has, and the largest micro batch that fits.

    `details` are `memory_estimate`'s. Micro batch sizes that do not divide a process's share of the global batch are
    left out.
    """
    memory = device_memory_bytes(device)

    def needed(micro_batch_size: int) -> int:
        return sum(memory_estimate(replace(recipe, micro_batch_size=micro_batch_size), config, **details).values())

    sequences = recipe.global_batch_tokens // (recipe.seq_len * processes)
    fitting = [size for size in range(1, sequences + 1)
               if sequences % size == 0 and needed(size) <= USABLE * memory]  # fmt: skip
    advice = f"micro_batch_size up to {fitting[-1]} should fit" if fitting else "no micro_batch_size should fit"
    if recipe.micro_batch_size not in fitting:
        advice = f"it may not fit: {advice}"
    parts = memory_estimate(recipe, config, **details)
    spoken = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    return f"memory: about {sum(parts.values()) / 1e9:.2f} of {memory / 1e9:.1f} GB ({spoken}); {advice}"


def device_memory_bytes(device: torch.device) -> int:
    """The card's memory; on a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
