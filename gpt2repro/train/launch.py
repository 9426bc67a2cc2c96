"""What the launcher asked for, what the device can, and what the recipe says: one answer, or an error that names both.

An explicit recipe value holds. `auto` takes what `accelerate launch` asks for (a flag's or a yaml's), else the best
that the device has. Accelerate's own default `no` is no asking.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils import logging as transformers_logging

from gpt2repro.recipe import Recipe
from gpt2repro.train.devices import best_device, choices

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt, from its malloc.h


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, after checking that the launcher started what it was asked for.

    Raises:
        ValueError: several processes asked for and one started; a launcher that contradicts the recipe; a tracker
            that is not installed (Accelerate would leave it out with a warning); averages of shards before torch 2.13.
    """
    device = torch.device(best_device())
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, but starts none of them.
    several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if several and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one (it does so for --cpu): "
            "use --config_file accelerate_configs/cpu_2proc.yaml, or torchrun --nproc_per_node 2"
        )
    for tracker in recipe.log_with:
        if tracker not in map(str, get_available_trackers()):
            raise ValueError(f"log_with is {tracker}, which is not installed: pip install {tracker}, or leave it out")
    if device.type == "cpu":
        reuse_memory()
    precision = _mixed_precision(recipe, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        dynamo_backend="no",  # the script compiles the raw model itself, before prepare
        fsdp_plugin=_sharding(precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # Beyond the watchdog's minutes, which NCCL's own ten would always come before.
            InitProcessGroupKwargs(timeout=timedelta(minutes=max(60.0, 2 * recipe.watchdog_minutes))),
        ],
    )
    if precision == "fp16" and device.type == "cpu":  # where Accelerate would compute in fp32 without a word
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"{world_size} processes were asked for and {accelerator.num_processes} is what this one sees: "
            "start them with accelerate launch --config_file accelerate_configs/….yaml, or torchrun"
        )
    plain = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if not (plain or accelerator.is_fsdp2):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}: DDP and FSDP2 are supported; use "
            "accelerate_configs/ddp_8gpu.yaml or fsdp2_8gpu.yaml"
        )
    # Before 2.13, FSDP2 keeps a gathered head after a forward that computes the loss without logits, until the next
    # backward. The averages of the head and the embedding would not be in it.
    if accelerator.is_fsdp2 and recipe.ema_decay and torch.__version__ < "2.13":
        raise ValueError(
            f"ema_decay is {recipe.ema_decay} on sharded processes with torch {torch.__version__}, which measures the "
            "averaged weights wrongly: use torch 2.13 or newer, or ema_decay 0"
        )
    asked = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
    derived = recipe.accumulation_steps(world_size)
    if asked not in (1, derived):
        raise ValueError(
            f"the launcher asks for gradient_accumulation_steps={asked}, the recipe's batch gives {derived}: "
            "leave it out of the launcher's configuration, or change global_batch_tokens or micro_batch_size"
        )
    accelerator.gradient_accumulation_steps = 1  # the loop divides by its own; Accelerate must not divide again
    transformers_logging.disable_progress_bar()  # a bar for every file of every checkpoint
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return accelerator


def reuse_memory() -> None:
    """Spare a CPU most page faults of a step, which allocates and frees gigabytes.

    PyTorch asks Linux for 2 MB pages, unless the environment says otherwise: it reads the variable at its first
    allocation, so this must come before any tensor. glibc keeps freed memory for the next step; by default it gives
    large blocks back at once and gets them anew, zeroed and page by page (docs/performance.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks


def loss_form(recipe: Recipe, device: torch.device) -> str:
    """The form of the loss, plain or chunked: the recipe's word, else the device's choice."""
    return choices(device).loss_impl if recipe.loss_impl == "auto" else recipe.loss_impl


def compile_in_place(model: Any, recipe: Recipe, accelerator: Accelerator) -> bool:
    """Compile the network where the recipe or the launcher asks for it, before `prepare`; returns whether it did.

    In place: one graph, clean state-dict keys, and no_sync keeps working. DDPOptimizer would split the graph at every
    bucket. FSDP2 gathers between the blocks, so there each block is a graph.
    """
    if not compile_wanted(recipe, accelerator.device):
        return False
    remove_cut_binaries()
    torch._dynamo.config.optimize_ddp = False
    for part in model.transformer.h if accelerator.is_fsdp2 else [model]:
        part.compile(fullgraph=True, dynamic=False, mode=recipe.compile_mode)
    return True


def remove_cut_binaries() -> None:
    """Delete compiled files that are cut off from the compiler's cache, on which every later start would fail.

    A kill during compilation leaves them. One that is a few seconds old may still be written by another process.
    """
    for file in Path(cache_dir()).rglob("*.so"):
        with contextlib.suppress(OSError):  # another process deletes it too
            if time.time() - file.stat().st_mtime > 5 and not _is_whole(file):
                file.unlink()


def _is_whole(binary: Path) -> bool:
    """Whether a compiled file has the size that its ELF header gives: the table of its sections comes last.

    Other formats than Linux's have content or not.
    """
    with binary.open("rb") as file:
        header = file.read(64)
    if sys.platform != "linux" or len(header) < 64:
        return len(header) == 64
    (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<2H", header, 58)
    return header.startswith(b"\x7fELF") and binary.stat().st_size >= offset + size * count


def compile_wanted(recipe: Recipe, device: torch.device) -> bool:
    """Whether to compile: the recipe's word, else the launcher's, else the device's choice."""
    asked = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if asked not in ("no", "inductor"):
        raise ValueError(f"the launcher asks for dynamo_backend={asked}: only inductor is supported")
    if recipe.compile == "false" and asked == "inductor":
        raise ValueError(
            "compile is false in the recipe, the launcher asks for dynamo_backend=inductor: change one of them"
        )
    if recipe.compile == "auto":
        return asked == "inductor" or choices(device).compile
    return recipe.compile == "true"


def _sharding(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What the launcher says of FSDP, but with gradients summed and kept in fp32 as DDP does (Accelerate: in bf16)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if precision == "fp16":
        raise ValueError("fp16 with FSDP2 is not supported: use DDP, or cards with bf16")
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=bf16 if precision == "bf16" else None)


def _mixed_precision(recipe: Recipe, device: torch.device) -> str:
    asked, wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), recipe.mixed_precision
    if asked not in ("no", "fp16", "bf16"):
        raise ValueError(f"the launcher asks for mixed_precision={asked}: ask for bf16, fp16 or no")
    if "no" != asked != wanted != "auto":
        raise ValueError(
            f"mixed_precision is {wanted} in the recipe, the launcher asks for {asked}: change one of them"
        )
    if wanted == "auto":
        wanted = asked if asked != "no" else choices(device).mixed_precision
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"mixed_precision is bf16, which {torch.cuda.get_device_name(device)} only emulates: give auto "
            f"({choices(device).mixed_precision} on this card) and leave it out of the launcher's configuration"
        )
    return wanted
