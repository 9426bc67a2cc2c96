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
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import Seconds, load_file, model_parser
from configuration_gpt2repro import NAMED_SHAPES, GPT2ReproConfig
from gpt2repro.recipe import Recipe
from gpt2repro.train.estimates import flops_per_token, peak_flops
from gpt2repro.train.optimizer import make_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


@dataclass(frozen=True)
class Variant:
    """What can differ between two steps. The defaults are this project's model as a recipe runs it on a GPU."""

    model: str = "ours"  # or "stock", the library's GPT2LMHeadModel with its own loss; or "nanogpt", of --nanogpt
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
        self.shape = {**NAMED_SHAPES[arguments.model_shape], "n_positions": max(1024, arguments.seq_len)}
        size = (arguments.batch_size, arguments.seq_len + 1)
        ids = torch.randint(self.shape.get("vocab_size", 50257), size, device=self.device)
        self.inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T)
        if variant.model == "nanogpt":
            self.model: nn.Module = make_nanogpt(arguments.nanogpt, self.shape, self.inputs[:1].cpu()).to(self.device)
        else:
            self.model = make_model(variant, self.shape).to(self.device)
        if variant.compile_mode:
            self.model.compile(**self.compile_options())
        if variant.model == "nanogpt":
            # Its own groups. It names the fused kernel for CUDA only; PyTorch has one for the CPU too.
            self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
        elif variant.fused_optimizer:
            self.optimizer = make_optimizer(self.model, Recipe())
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.options = {"shift_labels": targets, "use_cache": False, "skip_logits": True, "loss_impl": variant.loss}
        if variant.model == "stock":
            self.options = {"labels": self.inputs, "use_cache": False}  # it shifts them itself
        elif variant.model == "nanogpt":
            self.options = {"targets": targets}

    def compile_options(self) -> dict:
        """Of torch.compile: those of a run, for stock the same; none for nanoGPT, as in its train.py."""
        if self.variant.model == "nanogpt":
            return {}
        return {"fullgraph": True, "dynamic": False, "mode": self.variant.compile_mode}

    def how(self) -> str:
        """How the model is compiled, as the table says it."""
        options = ", ".join(f"{name}={value}" for name, value in self.compile_options().items())
        return f"  compile({options})" if self.variant.compile_mode else "  eager"

    def __call__(self) -> float:
        torch.set_float32_matmul_precision("highest" if self.variant.precision == "fp32" else "high")
        backend, bf16 = self.variant.sdpa_backend, self.variant.precision == "bf16"
        with (
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16),
            sdpa_kernel(backend) if backend else contextlib.nullcontext(),
        ):
            output = self.model(self.inputs, **self.options)
        loss = output[1] if self.variant.model == "nanogpt" else output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def speed(self, timings: Sequence[Seconds]) -> dict:
        """Milliseconds a step (median), tokens a second, and MFU ("unknown" without a known peak)."""
        seconds = median(each.clock for each in timings)
        rate = self.inputs.numel() / seconds
        sizes = {name: self.shape[name] for name in ("n_positions", "n_layer", "n_embd")}
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        flops = flops_per_token(n_parameters=n_parameters, seq_len=self.inputs.shape[1], **sizes)
        peak = peak_flops(self.device)
        mfu = rate * flops / peak if peak else "unknown"
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


def make_model(variant: Variant, shape: dict[str, int]) -> GPT2LMHeadModel | GPT2ReproForCausalLM:
    """The variant's model in training mode, without dropout (stock's default is 0.1, which would be more work)."""
    torch.manual_seed(0)
    if variant.model == "stock":
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        model.loss_type = "ForCausalLM"  # its default; left unnamed, a warning would break the compiled graph
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, pad_vocab_size_multiple_of=variant.pad_vocab))
    model.set_attn_implementation(variant.attention)
    return model.train()


def make_nanogpt(file: str, shape: dict[str, int], inputs: torch.Tensor) -> nn.Module:
    """nanoGPT's model of this shape with its own defaults (50304 rows, biases, no dropout) and the weights of ours.

    Raises:
        ValueError: no such file, or another function: with the same weights, GELU and rows the losses differ.
    """
    nanogpt = load_file(file, "nanoGPT's model.py")
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
    theirs = nanogpt.GPT(nanogpt.GPTConfig(block_size=shape["n_positions"], **sizes))
    rows = theirs.config.vocab_size
    torch.manual_seed(0)
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, vocab_size=rows, activation_function="gelu"))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = ours(inputs, shift_labels=inputs, skip_logits=True).loss.item()
        actual = theirs(inputs, targets=inputs)[1].item()
    print(f"nanoGPT's first loss {actual:.6f}, that of our model with its weights and GELU {expected:.6f}")
    if abs(actual - expected) > 1e-5 * expected:
        raise ValueError(f"{file} is another model: with the same weights its loss is {actual}, ours {expected}")
    return theirs.train()


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
