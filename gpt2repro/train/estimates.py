"""What a run needs and should reach, by arithmetic: memory, model FLOPs, and the loss of GPT-2 124M on FineWeb-Edu.

Memory: activations are counted tensor by tensor, and a test compares them with what autograd really keeps. The peak of
the loss, the allocator's losses and what a compiler saves are not counted exactly: the sum is a good guess.

Expected loss: the middle of the band is one complete public log, the validation losses of build-nanogpt's recipe
(AdamW, batches of 524,288 tokens) in log/log.txt of github.com/ashegde/build-nanoGPT. Its width comes from what is
known of other runs:

- 8 % above: in build-nanogpt's pull request 30 a sound run has 6.16 after 250 steps (the log: 5.93) and 4.15 after
  1000, one whose gradients were not synchronised 6.43 and 4.88. A public run that went wrong ended at 3.40 (the log:
  3.04), four sound ones at 3.03 to 3.09. The band ends at 3.29: all of these fall on the right side.
- 20 % below: better optimizers are meant to be faster, but a run below that has seen its validation text.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from gpt2repro.recipe import Recipe

# ---- memory ------------------------------------------------------------------------------------------------

LOGITS_PEAK = 10  # bytes a logit at the loss's peak: bf16, its fp32 copy and the fp32 log-softmax (2 + 4 + 4)
LOSS_CHUNKS = 8  # `loss_impl: chunked` holds the logits of an eighth of the tokens
TRAINING_SHARE = 0.8  # of a run's time that forward and backward take; the rest: the optimizer, validations, saves
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
    # Of the blocks' matrices Muon keeps one moment, AdamW keeps two of everything; `ema_decay` adds an average.
    matrices = 12 * layers * channels**2 if recipe.optimizer == "muon" else 0
    logits = LOGITS_PEAK * config.vocab_size * tokens // (LOSS_CHUNKS if chunked_loss else 1)
    return {
        "parameters": 4 * n_parameters // shards,
        "gradients": 4 * n_parameters // shards,
        "optimizer": ((12 if recipe.ema_decay else 8) * n_parameters - 4 * matrices) // shards,
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
    fitting = [size for size in range(1, min(sequences, 2**16) + 1)
               if sequences % size == 0 and needed(size) <= USABLE * memory]  # fmt: skip
    advice = f"micro_batch_size up to {fitting[-1]} should fit" if fitting else "no micro_batch_size should fit"
    if recipe.micro_batch_size not in fitting:
        advice = f"it may not fit: {advice}"
    parts = memory_estimate(recipe, config, **details)
    spoken = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    return f"memory: about {sum(parts.values()) / 1e9:.2f} of {memory / 1e9:.1f} GB ({spoken}); {advice}"


def device_memory_bytes(device: torch.device) -> int:
    """The card's memory; the machine's on a CPU and on a Mac, where it is one."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    return psutil.virtual_memory().total


# ---- speed -------------------------------------------------------------------------------------------------

# Dense peaks in FLOP/s of the precision that `auto` chooses (bf16; fp16 for V100 and T4), by words of the device's
# name; NVIDIA's and AMD's datasheets and whitepapers, for MI250X a half, which is a device. The more particular name
# stands first.
PEAK_FLOPS = {
    "GH200": 989.4e12,
    "H200 NVL": 835.0e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.0e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
    "L40S": 362.0e12,
    "L40": 181.0e12,
    "L4": 121.0e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71.0e12,
    "V100 PCIE": 112.0e12,
    "V100": 125.0e12,
    "T4": 65.0e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,
}
OTHER_CHIPS = {"D", "Laptop", "MIG", "Ti"}  # words that name a smaller or larger chip, or a slice of one


def flops_per_token(*, n_parameters: int, n_positions: int, n_layer: int, n_embd: int, seq_len: int) -> int:
    """Model FLOPs of forward and backward for a token: 6 (N - wpe) + 12 * n_layer * n_embd * T.

    Source: PaLM paper, appendix B. The position table is looked up, not multiplied, so it does not count; the token
    embedding does, as the tied head. GPT-2 124M at T = 1024: 855,166,464.
    """
    return 6 * (n_parameters - n_positions * n_embd) + 12 * n_layer * n_embd * seq_len


def speed_limits(model: Any, seq_len: int, *, world_size: int) -> tuple[int, float | None]:
    """Model FLOPs of a token, and the FLOP/s of all processes' devices together, None where they are not known."""
    sizes = {name: getattr(model.config, name) for name in ("n_positions", "n_layer", "n_embd")}
    peak = peak_flops(model.device)
    flops = flops_per_token(n_parameters=model.num_parameters(), seq_len=seq_len, **sizes)
    return flops, peak * world_size if peak else None


def peak_flops(device: torch.device) -> float | None:
    """The device's dense peak in FLOP/s, or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if OTHER_CHIPS & {*words}:
        return None
    name = f" {' '.join(words)} "  # whole words: an L40 is no L4
    return next((peak for part, peak in PEAK_FLOPS.items() if f" {part} " in name), None)


def tokens_per_second(backward: Callable[[list], torch.Tensor], batch: dict[str, torch.Tensor]) -> float:
    """Throughput of forward and backward over whole micro-batches, after a few that are not timed."""
    input_ids = batch["input_ids"]
    warm, timed = (3, 10) if input_ids.is_cuda else (1, 2)
    for step in range(warm + timed):
        if step == warm:
            began = time.perf_counter()
        backward([batch]).item()  # waits for the device, as the loop does once a step
    return timed * input_ids.numel() / (time.perf_counter() - began)


def within_minutes(recipe: Recipe, speed: float, *, start_step: int = 0) -> tuple[Recipe, str]:
    """The recipe with the steps that fit into its `max_minutes`, at most `max_steps`, and a line that says so.

    speed: tokens a second of forward and backward, over all processes. start_step: where the run begins.

    Raises:
        ValueError: so few steps that the recipe contradicts itself.
    """
    tokens = TRAINING_SHARE * speed * 60 * recipe.max_minutes
    steps = min(recipe.max_steps, start_step + max(int(tokens / recipe.global_batch_tokens), 1))
    minutes = recipe.max_minutes * (steps - start_step) * recipe.global_batch_tokens / tokens
    shorter = replace(recipe, max_steps=steps, max_minutes=0.0)
    try:
        shorter.check()
    except ValueError as error:
        raise ValueError(f"max_minutes={recipe.max_minutes:g} leaves {steps} steps: {error}") from None
    return shorter, (
        f"about {speed:,.0f} tokens/s forward and backward: {steps:,} of {recipe.max_steps:,} steps, for about "
        f"{minutes:.1f} of at most {recipe.max_minutes:g} minutes"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: of the card's on CUDA, ROCm and XPU, else resident on the host."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


# ---- loss --------------------------------------------------------------------------------------------------

# (steps of 524,288 tokens, validation loss in nats a token)
LOG = ((0, 10.951), (250, 5.933), (500, 4.988), (750, 4.320), (2000, 3.594), (2500, 3.518), (5250, 3.322),
       (5750, 3.297), (10_000, 3.177), (18_750, 3.053), (19_072, 3.045))  # fmt: skip
STEP_TOKENS = 524_288
ABOVE, BELOW = 1.08, 0.80


def expected_loss(tokens: int) -> tuple[float, float]:
    """The lowest and the highest loss to expect, nats a token; after the log's 10B tokens those of its end."""

    def place(step: float) -> float:  # between the points the loss falls about evenly over this
        return math.log(step + 20)

    step = min(tokens / STEP_TOKENS, LOG[-1][0])
    after = next(index for index in range(1, len(LOG)) if LOG[index][0] >= step)
    (step_0, loss_0), (step_1, loss_1) = LOG[after - 1], LOG[after]
    middle = loss_0 + (loss_1 - loss_0) * (place(step) - place(step_0)) / (place(step_1) - place(step_0))
    return BELOW * middle, ABOVE * middle


def has_expected_loss(dataset_info: dict[str, Any], config: Any, *, init_from: str | None) -> bool:
    """Whether a run is one that the log speaks of: GPT-2 124M from scratch on FineWeb-Edu with GPT-2's vocabulary."""
    source = dataset_info.get("source") or {}
    shape = (config.n_layer, config.n_embd, config.n_positions, config.vocab_size)
    on_fineweb_edu = source.get("dataset") == "HuggingFaceFW/fineweb-edu"
    return on_fineweb_edu and shape == (12, 768, 1024, 50257) and init_from is None


def loss_warning(tokens: int, loss: float) -> str | None:
    """A line for a validation loss that leaves the band after `tokens` trained tokens; None inside it."""
    low, high = expected_loss(tokens)
    if low <= loss <= high:
        return None
    what = (
        f"the validation loss {loss:.3f} is outside of about {low:.2f} to {high:.2f}, which build-nanogpt's log lets "
        f"expect after {tokens:,} tokens (its validation text is another one)"
    )
    if loss < low:
        return f"{what}: is the validation text part of the training text?"
    return f"{what}: compare the recipe with recipes/gpt2-124m-10b.yaml, or run python -m gpt2repro.tools.doctor"
