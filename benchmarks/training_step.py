"""One optimizer step as a user runs it, in every variant that the ladder and the comparison time.

A step is forward, backward, gradient clipping and AdamW over `batch_size` sequences; the loss is read at its end, as a
loop that logs it does. Weights are random: speed does not depend on their values. Steps of several variants are
timed in turns within one process, so that whatever else the machine does falls on all of them alike.
"""

import argparse
import contextlib
import ctypes
import gc
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import __version__ as transformers_version

from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.training.arguments import Recipe
from gpt2repro.training.launch import use_huge_pages
from gpt2repro.training.metrics import flops_per_token, peak_flops
from gpt2repro.training.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM

Step = Callable[[], float]


@dataclass(frozen=True)
class Variant:
    """What can differ between two steps. The defaults are this project's model as a recipe runs it on a GPU."""

    model: str = "ours"  # or "stock", the library's GPT2LMHeadModel with its own loss
    precision: str = "bf16"  # or "fp32", "tf32"
    compile_mode: str | None = "default"  # of torch.compile; None runs eagerly
    attention: str = "sdpa"
    pad_vocab: int = 128  # rows of the head are padded to a multiple of this
    loss: str = "plain"  # or "chunked"
    fused_optimizer: bool = True
    recompute: bool = False  # gradient checkpointing
    sdpa_backend: str | None = None  # a name of torch.nn.attention.SDPBackend; None leaves PyTorch the choice


def make_model(variant: Variant, shape: dict[str, int], device: torch.device) -> torch.nn.Module:
    """The variant's model in training mode without dropout (stock's default of 0.1 would be other work)."""
    torch.manual_seed(0)
    if variant.model == "stock":
        config = GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # the loss that it takes anyway; unnamed, a warning breaks its graph
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, pad_vocab_size_multiple_of=variant.pad_vocab))
    model.set_attn_implementation(variant.attention)
    if variant.recompute:
        model.gradient_checkpointing_enable()
    return model.train().to(device)


def make_step(variant: Variant, *, shape: dict[str, int], batch_size: int, seq_len: int, device: torch.device) -> Step:
    """A function that takes one optimizer step of the variant on random tokens and returns the loss."""
    model = make_model(variant, shape, device)
    if variant.compile_mode:
        model.compile(fullgraph=True, dynamic=False, mode=variant.compile_mode)
    if variant.fused_optimizer:
        optimizer = make_optimizer(model, Recipe())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(model.config.vocab_size, (batch_size, seq_len + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if variant.model == "stock":
        asked = {"labels": inputs}  # it shifts them itself
    else:
        asked = {"shift_labels": targets, "skip_logits": True, "loss_impl": variant.loss}

    def step() -> float:
        torch.set_float32_matmul_precision("highest" if variant.precision == "fp32" else "high")
        with contextlib.ExitStack() as stack:
            if variant.precision == "bf16":
                stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if variant.sdpa_backend:
                backend = getattr(torch.nn.attention.SDPBackend, variant.sdpa_backend)
                stack.enter_context(torch.nn.attention.sdpa_kernel(backend))
            loss = model(inputs, use_cache=False, **asked).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step.model = model  # type: ignore[attr-defined]
    return step


class Seconds(NamedTuple):
    """What one step took. On a machine with other work the processor's time is the steadier figure of a CPU's step."""

    clock: float
    processor: float


def time_in_turns(steps: dict[str, Step], *, rounds: int, warmup: int = 3) -> dict[str, list[Seconds]]:
    """`rounds` timings of every step, A B C A B C …; the loss is read inside, so nothing is left running."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            clock, processor = time.perf_counter(), time.process_time()
            step()
            seconds[name].append(Seconds(time.perf_counter() - clock, time.process_time() - processor))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def step_memory(step: Step, device: torch.device) -> dict[str, int]:
    """Bytes that one warm step holds at its peak above parameters, gradients and optimizer state.

    On CUDA what PyTorch has allocated. On Linux the high-water mark of the process's resident memory, so that what
    oneDNN takes for itself counts too; the allocator's own reserve is handed back before. Elsewhere empty.
    """
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters())  # type: ignore[attr-defined]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status_bytes("VmRSS")
        step()
        peak = _status_bytes("VmHWM")
    else:
        return {}
    return {"above_state": peak - before - gradients}


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def machine(device: torch.device) -> dict:
    """Commit, hardware and versions: what every result names."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    cuda = device.type == "cuda"
    return {
        "commit": commit or "unknown",
        "hardware": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "cuda": torch.version.cuda if cuda else None,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return f"{found[1].strip() if found else platform.machine()}, {torch.get_num_threads()} threads"


def speed(seconds: float, *, shape: dict[str, int], tokens: int, seq_len: int, device: torch.device) -> dict:
    """Tokens a second, model TFLOP/s, and the share of the card's peak ("unknown" for a card not in the table)."""
    with torch.device("meta"):
        config = GPT2ReproConfig(**shape)
        n_parameters = GPT2ReproForCausalLM(config).num_parameters()
    flops = flops_per_token(
        n_parameters=n_parameters, n_positions=config.n_positions, n_layer=config.n_layer, n_embd=config.n_embd,
        seq_len=seq_len,
    )  # fmt: skip
    rate, peak = tokens / seconds, peak_flops(device)
    return {
        "ms": 1000 * seconds,
        "tokens_per_second": rate,
        "tflops": rate * flops / 1e12,
        "mfu": rate * flops / peak if peak else "unknown",
    }


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that takes training steps."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shape", default="gpt2", choices=list(NAMED_SHAPES))
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: 64 on CUDA, 4 elsewhere)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: 1024 on CUDA, 256 elsewhere)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each variant")
    parser.add_argument("--json", help="write the figures to this file")


def resolve_sizes(arguments: argparse.Namespace) -> tuple[torch.device, dict[str, int], int, int]:
    """Device, model shape, batch size and sequence length of a command line; tunes the process for its device."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if device.type == "cpu":
        use_huge_pages()
    batch_size = arguments.batch_size or (64 if cuda else 4)
    shape = {"n_positions": 1024, **NAMED_SHAPES[arguments.model_shape]}
    seq_len = arguments.seq_len or min(1024 if cuda else 256, shape["n_positions"])
    if seq_len > shape["n_positions"]:
        raise ValueError(f"--seq-len {seq_len} is longer than the shape's {shape['n_positions']} positions: lower it")
    return device, shape, batch_size, seq_len
