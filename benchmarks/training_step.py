"""One optimizer step in every variant that `ladder` and `train_throughput` time.

A step is forward, backward, gradient clipping and AdamW over `batch_size` sequences. The loss is read at its end, as
in a training loop that logs it. Weights and tokens are random: speed does not depend on their values.
"""

import argparse
import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import Seconds, model_parser
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.train.estimates import speed_limits
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


@dataclass(frozen=True)
class Variant:
    """What can differ between two steps. The defaults are this project's model as a recipe runs it on a GPU."""

    model: str = "ours"  # or "stock", the library's GPT2LMHeadModel with its own loss
    precision: str = "bf16"  # or "fp32", "tf32"
    compile_mode: str | None = "default"  # of torch.compile; None runs eagerly
    attention: str = "sdpa"
    sdpa_backend: SDPBackend | None = None  # None: PyTorch chooses
    pad_vocab: int = 128  # rows of the head are padded to a multiple of this
    loss: str = "plain"  # or "chunked"
    fused_optimizer: bool = True


class Step:
    """A variant's optimizer step on random tokens: a call takes one step and returns the loss."""

    def __init__(self, variant: Variant, arguments: argparse.Namespace) -> None:
        self.variant, self.device = variant, torch.device(arguments.device)
        self.model = make_model(variant, arguments).to(self.device)
        if variant.compile_mode:
            self.model.compile(fullgraph=True, dynamic=False, mode=variant.compile_mode)
        if variant.fused_optimizer:
            self.optimizer = make_optimizer(self.model, Recipe())
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        size = (arguments.batch_size, arguments.seq_len + 1)
        ids = torch.randint(self.model.config.vocab_size, size, device=self.device)
        self.inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T)
        self.options = {"shift_labels": targets, "skip_logits": True, "loss_impl": variant.loss}
        if variant.model == "stock":
            self.options = {"labels": self.inputs}  # it shifts them itself

    def __call__(self) -> float:
        torch.set_float32_matmul_precision("highest" if self.variant.precision == "fp32" else "high")
        backend, bf16 = self.variant.sdpa_backend, self.variant.precision == "bf16"
        with (
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16),
            sdpa_kernel(backend) if backend else contextlib.nullcontext(),
        ):
            loss = self.model(self.inputs, use_cache=False, **self.options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def speed(self, timings: Sequence[Seconds]) -> dict:
        """Milliseconds a step (median), tokens a second, and MFU ("unknown" without a known peak)."""
        seconds = median(each.clock for each in timings)
        rate = self.inputs.numel() / seconds
        flops_per_token, peak_flops = speed_limits(self.model, self.inputs.shape[1], world_size=1)
        mfu = rate * flops_per_token / peak_flops if peak_flops else "unknown"
        return {"ms": 1000 * seconds, "tokens_per_second": rate, "mfu": mfu}

    def memory(self) -> dict[str, int]:
        """Bytes that one warm step holds at its peak above parameters, gradients and optimizer state.

        On CUDA what PyTorch has allocated. On Linux the peak of the process's resident memory, so that memory which
        oneDNN allocates counts too; the allocator's own reserve is returned first. On other systems empty.
        """
        gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            return {"above_state_bytes": torch.cuda.max_memory_allocated(self.device) - before - gradients}
        if sys.platform != "linux":
            return {}
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_bytes("VmRSS")
        self()
        return {"above_state_bytes": _status_bytes("VmHWM") - before - gradients}


def make_model(variant: Variant, arguments: argparse.Namespace) -> GPT2LMHeadModel | GPT2ReproForCausalLM:
    """The variant's model in training mode, without dropout (stock's default is 0.1, which would be more work)."""
    torch.manual_seed(0)
    shape = {**NAMED_SHAPES[arguments.model_shape], "n_positions": max(1024, arguments.seq_len)}
    if variant.model == "stock":
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        model.loss_type = "ForCausalLM"  # its default; left unnamed, a warning would break the compiled graph
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, pad_vocab_size_multiple_of=variant.pad_vocab))
    model.set_attn_implementation(variant.attention)
    return model.train()


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


HEAD = ("ms/step", "tokens/s", "MFU", "memory")


def cells(row: dict) -> list[str]:
    """The columns of HEAD for the figures of `Step.speed` and `Step.memory`."""
    mfu = row["mfu"] if isinstance(row["mfu"], str) else f"{row['mfu']:.1%}"
    memory = f"{row['above_state_bytes'] / 1e6:,.0f} MB" if "above_state_bytes" in row else ""
    return [f"{row['ms']:,.1f}", f"{row['tokens_per_second']:,.0f}", mfu, memory]


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of training steps."""
    parser, cuda = model_parser(description, rounds=10), torch.cuda.is_available()
    parser.add_argument("--batch-size", type=int, default=64 if cuda else 4, help="sequences (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=1024 if cuda else 256, help="tokens of each (%(default)s)")
    return parser
