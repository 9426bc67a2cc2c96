"""Check a run before it starts: a line for each check, with the measured value and what was expected.

    python -m gpt2repro.tools.doctor recipes/gpt2-124m-10b.yaml [--processes 8 [--sharded]] [--dollars-per-hour 2.5]

Every field of the recipe is also a flag. The command reads the prepared dataset, builds the model, takes the run's own
step (its loss form, compilation and precision) on one device, and saves and loads a checkpoint in a temporary folder
beside `output_dir`; no file stays. Exit codes: 0 every check passed, 1 one failed or an error, 2 wrong usage.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.doctor(__doc__, None))

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from gpt2repro.data.mixture import MixtureOrder
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.published import is_published
from gpt2repro.data.shards import Dataset
from gpt2repro.data.training_data import TrainingData, open_recipe_dataset, preparation_command
from gpt2repro.hub.convert import load_as_gpt2repro
from gpt2repro.hub.initial import initial_model, take_shape
from gpt2repro.recipe import Recipe
from gpt2repro.run.checkpoints import load_checkpoint, save_checkpoint
from gpt2repro.train.devices import description
from gpt2repro.train.estimates import USABLE, device_memory_bytes, memory_estimate, speed_limits, tokens_per_second
from gpt2repro.train.first_step import check_first_step
from gpt2repro.train.launch import compile_in_place, loss_form, start_accelerator
from gpt2repro.train.optimizer import make_optimizer
from gpt2repro.train.schedule import lr_at
from train_accelerate import micro_steps

OVERFIT_STEPS = 100
NEW_TOKENS = 16  # generated with and without the cache
STATE_BYTES = 12  # of a parameter in a checkpoint: fp32 weight and two moments (Muon keeps one)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    value: str
    expected: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:<18} {self.value}  (expected: {self.expected})"


def examine(
    recipe: Recipe, *, processes: int = 1, sharded: bool = False, dollars_per_hour: float | None = None
) -> Iterator[Check]:
    """Every check of a recipe on this machine, the cheap ones first; `sharded` processes hold a part of every tensor.

    Raises:
        ValueError: the recipe or the dataset cannot be used at all.
    """
    # ---- the recipe and the data ---------------------------------------------------------------------------
    recipe.check(world_size=processes)
    recipe = take_shape(recipe, world_size=processes)
    if recipe.source and not (is_published(recipe.dataset_dir[0]) or Path(recipe.dataset_dir[0]).exists()):
        raise ValueError(f"there is no {recipe.dataset_dir[0]}; make it first: {preparation_command(recipe)}")
    accelerator = start_accelerator(recipe)
    device, loss_impl = accelerator.device, loss_form(recipe, accelerator.device)
    data = TrainingData(recipe, open_recipe_dataset(recipe), accelerator)
    yield Check("device", True, description(device), "what auto chooses on it, docs/devices.md")
    order = data.loader.order
    yield check_shuffled(order.orders[0] if isinstance(order, MixtureOrder) else order)
    yield check_warmup(recipe)

    # ---- the model, its weights and its memory -------------------------------------------------------------
    raw = initial_model(recipe, vocab_size=data.vocab_size, eot_id=data.eot_id).eval()
    n_parameters = raw.num_parameters()
    yield check_learning_rate(recipe, n_parameters)
    if recipe.init_from:
        prompt = torch.from_numpy(data.loader.stream.read(0, 8).astype(np.int64))[None]
        yield check_cache(load_as_gpt2repro(recipe.init_from, vocab_size=data.vocab_size), prompt)
    else:
        yield check_init(raw, residual=False)
        yield check_init(raw, residual=True)
    tied = raw.lm_head.weight is raw.transformer.wte.weight
    yield Check("tied head", tied, "one tensor" if tied else "two tensors", "the head is the token embedding")
    output_dir = Path(recipe.output_dir).absolute()
    parent = next(folder for folder in (output_dir, *output_dir.parents) if folder.is_dir())
    yield check_disk(recipe, n_parameters, free_bytes=shutil.disk_usage(parent).free)
    parts = memory_estimate(
        recipe, raw.config, n_parameters=n_parameters, bf16=accelerator.mixed_precision != "no",
        chunked_loss=loss_impl == "chunked", shards=processes if sharded else 1,
    )  # fmt: skip
    need, usable = sum(parts.values()) / 1e9, USABLE * device_memory_bytes(device) / 1e9
    yield Check("memory", need <= usable, f"about {need:.1f} GB for this micro_batch_size", f"at most {usable:.1f} GB")
    yield check_shards(data.dataset)

    # ---- the run's own step --------------------------------------------------------------------------------
    scale = 1024.0 if accelerator.scaler else 1.0
    if accelerator.scaler:  # fp16, with a scale at which no gradient overflows
        accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    model = accelerator.prepare(raw)  # the run's precision
    batch = data.loader.first_batch(0)
    few = {name: part[:4] for name, part in batch.items()}

    def backward(micro_batches: list, loss_impl: str = loss_impl) -> torch.Tensor:
        return micro_steps(accelerator, model, micro_batches, len(micro_batches), loss_impl)

    yield check_labels(model, few["input_ids"], few["shift_labels"])
    yield check_initial_loss(backward([few]).item(), raw.config, init_from=recipe.init_from)
    norm = clip_grad_norm_(model.parameters(), math.inf).item() / scale
    yield Check("gradient norm", 0.05 <= norm <= 100, f"{norm:.3f}", "0.05 to 100")

    compiled = compile_in_place(raw, recipe, accelerator)
    raw.train()
    agrees, value = True, ""
    try:
        value = check_first_step(accelerator, raw, backward, batch, loss_impl=loss_impl, compiled=compiled)
    except ValueError as error:
        agrees, value = False, str(error)
    yield Check("first step", agrees, value.removeprefix("first step: "), "as in eager fp32")

    speed = tokens_per_second(backward, batch)
    flops, peak = speed_limits(raw, recipe.seq_len, world_size=1)
    mfu = speed * flops / peak if peak else None
    yield check_speed(recipe, speed, processes=processes, mfu=mfu, dollars=dollars_per_hour)

    # ---- a few updates, and a checkpoint of them -----------------------------------------------------------
    tuned = replace(recipe, learning_rate=known_rate(n_parameters), muon_learning_rate=None)
    optimizer = make_optimizer(model, tuned)
    small = {name: part[:, :32].contiguous() for name, part in few.items()}

    def backward_small() -> torch.Tensor:
        loss = backward([small])
        for parameter in model.parameters():
            parameter.grad /= scale
        return loss

    with torch.compiler.set_stance("force_eager"):
        yield check_overfit(raw.eval(), optimizer, backward_small)
    saving = {"tokenizer": data.tokenizer, "accelerator": accelerator}
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as folder:
        yield check_rehearsal(tuned, raw, optimizer, folder=Path(folder), **saving)


# ---- the data ----------------------------------------------------------------------------------------------


def check_shards(dataset: Dataset) -> Check:
    """Shards and tokenizer have the recorded sha256; foreign formats record none."""
    try:
        damaged = dataset.verify()
    except ValueError as error:
        return Check("dataset hashes", True, f"not compared: {error}", "recorded sha256")
    return Check("dataset hashes", not damaged, "; ".join(damaged) or "all as recorded", "recorded sha256")


def check_shuffled(order: WindowOrder) -> Check:
    """Consecutive windows of the training order are not consecutive in the text."""
    starts = order.starts(0, min(order.windows_per_epoch, 4096))
    following = np.mean(np.diff(starts) == order.seq_len) if len(starts) > 1 else 0.0
    return Check("shuffling", bool(following < 0.1), f"{following:.1%} of windows follow the one before", "below 10 %")


# ---- the recipe --------------------------------------------------------------------------------------------


def known_rate(n_parameters: int) -> float:
    """The GPT-3 paper's learning rate for a size, within 50 %: 6e-4 at 125M, then as N^-0.32 (its table 2.1)."""
    return 6e-4 * (n_parameters / 125e6) ** -0.32


def check_learning_rate(recipe: Recipe, n_parameters: int) -> Check:
    peak, known = max(recipe.learning_rate, recipe.muon_learning_rate or 0.0), known_rate(n_parameters)
    low, high = 0.0 if recipe.init_from else known / 10, known * (10 if recipe.optimizer == "muon" else 5)
    expected = f"{low:.2g} to {high:.2g}; GPT-3's rate for {n_parameters:,} parameters is about {known:.2g}"
    return Check("learning rate", low <= peak <= high, f"{peak:.2g}", expected)


def check_warmup(recipe: Recipe) -> Check:
    share = lr_at(0, recipe) / (recipe.learning_rate or math.inf)
    # The update of a matrix by Muon has the same size from the first step on.
    most = 1.0 if recipe.optimizer == "muon" else 0.5 if recipe.init_from else 0.1
    return Check("warm-up", share <= most, f"the first step has {share:.1%} of the peak", f"at most {most:.0%}")


def check_disk(recipe: Recipe, n_parameters: int, *, free_bytes: int) -> Check:
    """Room for every checkpoint that the run keeps, and one more while it is written."""
    kept = math.ceil(recipe.max_steps / recipe.save_every)
    if recipe.keep_last:
        kept = min(kept, recipe.keep_last) + (recipe.max_steps // recipe.keep_every if recipe.keep_every else 0)
    need = (kept + 1) * STATE_BYTES * n_parameters
    expected = f"{need / 1e9:.1f} GB for {kept + 1} checkpoints"
    return Check("disk", need <= free_bytes, f"{free_bytes / 1e9:.1f} GB free", expected)


# ---- the model ---------------------------------------------------------------------------------------------


def check_init(model: Any, *, residual: bool) -> Check:
    """The measured std of the initial matrices: 0.02, for residual projections 0.02 / sqrt(2 * n_layer)."""
    expected = model.config.initializer_range / (math.sqrt(2 * model.config.n_layer) if residual else 1)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and residual == ("c_proj" in name)]
    std = torch.cat([p.detach().flatten() for p in matrices]).std().item()
    name = "residual init std" if residual else "init std"
    return Check(name, abs(std / expected - 1) < 0.05, f"{std:.5f}", f"{expected:.5f} within 5 %")


def check_cache(model: Any, prompt: torch.Tensor) -> Check:
    """Greedy text is the same with and without the key-value cache. In fp32, where rounding does not change it."""
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": NEW_TOKENS}
    texts = [model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False)]
    same = torch.equal(*texts)
    return Check("cache", same, f"{'the same' if same else 'another'} text with the cache as without", "the same text")


@torch.no_grad()
def check_labels(model: Any, input_ids: torch.Tensor, targets: torch.Tensor) -> Check:
    """Targets (B, T) are the inputs shifted by one, and the model does not shift them again.

    Only the first position's loss is compared: over all positions a new model has ln(vocab_size) for any targets. If
    the model shifts again, the first position is lost.
    """
    T = input_ids.shape[1]
    shift = next((k for k in range(min(4, T)) if torch.equal(targets[:, : T - k], input_ids[:, k:])), None)
    logits = model(input_ids[:, :1], use_cache=False).logits[:, 0]  # (B, V)
    by_hand = F.cross_entropy(logits.float(), targets[:, 0]).item()
    first = targets.masked_fill(torch.arange(T, device=targets.device) > 0, -100)
    error = model(input_ids, shift_labels=first, use_cache=False, skip_logits=True).loss.item() - by_hand
    value = f"shifted by {'another number' if shift is None else shift}, loss {error:+.4f} from one by hand"
    # bf16 logits of a trained model differ by a tenth between kernels.
    return Check("labels", shift == 1 and abs(error) < 0.2, value, "shifted by 1, within 0.2")


def check_initial_loss(loss: float, config: Any, *, init_from: str | None) -> Check:
    """ln(vocab_size), plus half the variance n_embd * 0.02^2 that random logits have (log-normal mean).

    A text that repeats its tokens has less: with the head tied to the embedding, a token makes itself more probable.
    """
    uniform = math.log(config.vocab_size)
    low, high = (0.0, uniform) if init_from else (uniform - 0.3, uniform + config.n_embd * 0.02**2 / 2 + 0.2)
    expected = f"{low:.2f} to {high:.2f}; ln({config.vocab_size}) is {uniform:.2f}"
    return Check("initial loss", low <= loss <= high, f"{loss:.4f}", expected)


def check_overfit(model: Any, optimizer: torch.optim.Optimizer, backward: Callable[[], torch.Tensor]) -> Check:
    """The loss on one small batch falls to a tenth; trains `model`."""
    optimizer.zero_grad()
    losses = [backward().item()]
    while len(losses) <= OVERFIT_STEPS and losses[-1] >= 0.1 * losses[0]:  # a NaN ends it, too
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(backward().item())
    optimizer.zero_grad()
    value = f"{losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses) - 1} steps"
    return Check("overfit one batch", losses[-1] < 0.1 * losses[0], value, f"a tenth within {OVERFIT_STEPS} steps")


def check_rehearsal(recipe: Recipe, model: Any, optimizer: Any, *, folder: Path, **saving: Any) -> Check:
    """A checkpoint that is saved and loaded into another model and optimizer gives back every bit of both."""
    state = {"tokens": 0, "dataset_fingerprint": ""}
    path = save_checkpoint(folder, 1, model=model, optimizer=optimizer, state=state, keep_last=1, **saving)
    torch.manual_seed(recipe.seed + 1)
    other = type(model)(model.config).to(model.device)
    restored = make_optimizer(other, recipe)
    load_checkpoint(path, model=other, optimizer=restored, accelerator=saving["accelerator"])
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    pairs += [(optimizer.state[a][key], restored.state[b][key]) for a, b in pairs for key in optimizer.state[a]]
    differing = sum(not torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
    return Check("save and resume", not differing, f"{differing} of {len(pairs)} tensors differ", "the same bits")


# ---- speed -------------------------------------------------------------------------------------------------


def check_speed(recipe: Recipe, speed: float, *, processes: int, mfu: float | None, dollars: float | None) -> Check:
    """Tokens a second of one process, and the run's hours and price with `processes` of them, by arithmetic."""
    hours = recipe.max_steps * recipe.global_batch_tokens / (speed * processes) / 3600
    value = f"{speed:,.0f} tokens/s, {hours:,.2f} hours on {processes}"
    if dollars is not None:
        value += f", {hours * processes * dollars:,.2f} dollars"
    if mfu is None:
        return Check("speed", speed > 0, value, "no band: the device's peak is not known")
    return Check("speed", mfu >= 0.2, f"{value}, {mfu:.1%} MFU", "MFU of 20 % and more")


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        recipe, arguments = flags.doctor(__doc__, argv)
        failed = 0
        for check in examine(recipe, **vars(arguments)):
            print(check, flush=True)
            failed += not check.passed
        print(f"{failed} checks failed" if failed else "every check passed")
        return min(failed, 1)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
