"""One optimizer step as a user runs it, in every variant that the ladder and the comparison time.

A step is forward, backward, gradient clipping and AdamW over `batch_size` sequences; the loss is read at its end, as a
loop that logs it does. Weights are random: speed does not depend on their values.
"""

import argparse
import contextlib
import ctypes
import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import command_line
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.run.metrics import flops_per_token, peak_flops
from gpt2repro.train.launch import use_huge_pages
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


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


@dataclass(frozen=True)
class Sizes:
    """What is the same for all variants of a run."""

    device: torch.device
    shape: dict[str, int]
    batch_size: int
    seq_len: int


class Step:
    """A variant's optimizer step on random tokens: a call takes it and returns the loss."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        self.variant, self.device = variant, sizes.device
        self.model = make_model(variant, sizes)
        if variant.compile_mode:
            self.model.compile(fullgraph=True, dynamic=False, mode=variant.compile_mode)
        if variant.fused_optimizer:
            self.optimizer = make_optimizer(self.model, Recipe())
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        ids = torch.randint(self.model.config.vocab_size, (sizes.batch_size, sizes.seq_len + 1), device=self.device)
        self.inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T)
        if variant.model == "stock":
            self.asked: dict = {"labels": self.inputs}  # it shifts them itself
        else:
            self.asked = {"shift_labels": targets, "skip_logits": True, "loss_impl": variant.loss}

    def __call__(self) -> float:
        torch.set_float32_matmul_precision("highest" if self.variant.precision == "fp32" else "high")
        with contextlib.ExitStack() as stack:
            if self.variant.precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            if self.variant.sdpa_backend:
                backend = getattr(torch.nn.attention.SDPBackend, self.variant.sdpa_backend)
                stack.enter_context(torch.nn.attention.sdpa_kernel(backend))
            loss = self.model(self.inputs, use_cache=False, **self.asked).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def speed(self, seconds: float) -> dict:
        """Tokens a second, model TFLOP/s, and the share of the card's peak ("unknown" for a card not in the table)."""
        config = self.model.config
        flops = flops_per_token(
            n_parameters=self.model.num_parameters(), n_positions=config.n_positions, n_layer=config.n_layer,
            n_embd=config.n_embd, seq_len=self.inputs.shape[1],
        )  # fmt: skip
        rate, peak = self.inputs.numel() / seconds, peak_flops(self.device)
        return {
            "ms": 1000 * seconds,
            "tokens_per_second": rate,
            "tflops": rate * flops / 1e12,
            "mfu": rate * flops / peak if peak else "unknown",
        }

    def memory(self) -> dict[str, int]:
        """Bytes that one warm step holds at its peak above parameters, gradients and optimizer state.

        On CUDA what PyTorch has allocated. On Linux the high-water mark of the process's resident memory, so that what
        oneDNN takes for itself counts too; the allocator's own reserve is handed back before. Elsewhere empty.
        """
        gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            peak = torch.cuda.max_memory_allocated(self.device)
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
            before = _status_bytes("VmRSS")
            self()
            peak = _status_bytes("VmHWM")
        else:
            return {}
        return {"above_state_bytes": peak - before - gradients}


def make_model(variant: Variant, sizes: Sizes) -> GPT2LMHeadModel | GPT2ReproForCausalLM:
    """The variant's model in training mode without dropout (stock's default of 0.1 would be other work)."""
    torch.manual_seed(0)
    if variant.model == "stock":
        model = GPT2LMHeadModel(GPT2Config(**sizes.shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        model.loss_type = "ForCausalLM"  # the loss that it takes anyway; unnamed, a warning breaks its graph
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes.shape, pad_vocab_size_multiple_of=variant.pad_vocab))
    model.set_attn_implementation(variant.attention)
    if variant.recompute:
        model.gradient_checkpointing_enable()
    return model.train().to(sizes.device)


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


HEAD = ("ms/step", "tokens/s", "TFLOP/s", "MFU", "memory")


def cells(row: dict) -> list[str]:
    """What a table shows of a step's speed and memory, in the order of HEAD."""
    return [
        f"{row['ms']:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tflops']:.2f}",
        row["mfu"] if isinstance(row["mfu"], str) else f"{row['mfu']:.1%}",
        f"{row['above_state_bytes'] / 1e6:,.0f} MB" if "above_state_bytes" in row else "",
    ]


def step_command_line(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark that takes training steps."""
    parser = command_line(description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shape", default="gpt2", choices=list(NAMED_SHAPES))
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: 64 on CUDA, 4 elsewhere)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: 1024 on CUDA, 256 elsewhere)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each variant")
    return parser


def resolve_sizes(arguments: argparse.Namespace) -> Sizes:
    """The sizes of a command line; tunes the process for its device."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if not cuda:
        use_huge_pages()
    shape = {"n_positions": 1024, **NAMED_SHAPES[arguments.model_shape]}
    seq_len = arguments.seq_len or min(1024 if cuda else 256, shape["n_positions"])
    if seq_len > shape["n_positions"]:
        raise ValueError(f"--seq-len {seq_len} is longer than the shape's {shape['n_positions']} positions: lower it")
    return Sizes(device, shape, arguments.batch_size or (64 if cuda else 4), seq_len)
