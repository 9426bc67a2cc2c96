"""What would go wrong in a run, before it does: a line for each check, with what was found and what was expected.

    python -m gpt2repro.tools.doctor recipes/gpt2-124m-10b.yaml [--processes 8 [--sharded]] [--dollars-per-hour 2.5]

Every field of the recipe is also a flag. Reads the prepared dataset, builds the model, takes a few steps on one
device in the run's own precision, and saves and loads a checkpoint in a temporary folder beside `output_dir`; nothing
of it stays. Exit codes: 0 every check passed, 1 one did not, or there was an error that is explained, 2 wrong usage.
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.command import UsageError
from gpt2repro.data.loader import TrainLoader
from gpt2repro.data.order import WindowOrder
from gpt2repro.data.shards import Dataset, load_tokenizer, open_dataset, tokenizer_sha256
from gpt2repro.data.training_data import open_recipe_dataset, preparation_command
from gpt2repro.eval.loading import run_command
from gpt2repro.hub.convert import initial_model, recompute_activations
from gpt2repro.recipe import Recipe, parse_recipe
from gpt2repro.run.checkpoints import load_checkpoint, save_checkpoint
from gpt2repro.train.estimates import USABLE, device_memory_bytes, flops_per_token, memory_estimate, peak_flops
from gpt2repro.train.launch import compile_wanted, loss_form, start_accelerator
from gpt2repro.train.optimizer import make_optimizer
from gpt2repro.train.schedule import lr_at
from modeling_gpt2repro import GPT2ReproForCausalLM

OVERFIT_STEPS = 100
STATE_BYTES = 12  # a parameter's in a checkpoint: fp32 weight and two moments (Muon keeps one)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    value: str
    expected: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:<18} {self.value}  (expected: {self.expected})"


# ---- the data ----------------------------------------------------------------------------------------------


def prepared_dataset(recipe: Recipe) -> Dataset:
    """The recipe's dataset; ValueError with the whole command that makes it where it is missing."""
    folder = recipe.dataset_dir[0]
    if recipe.source and not Path(folder).exists():
        raise ValueError(f"there is no dataset in {folder} to look into; make it first: {preparation_command(recipe)}")
    return open_dataset(list(recipe.dataset_dir), format=recipe.dataset_format, tokenizer=recipe.tokenizer)


def check_tokenizer(recipe: Recipe, dataset: Dataset) -> Check:
    """The tokenizer beside the tokens, and the recipe's where it can be compared, are the one that made them."""
    found = tokenizer_sha256(load_tokenizer(str(dataset.tokenizer)))
    passed, value = found == dataset.tokenizer_sha256, f"sha256 {found[:12]}"
    try:
        open_recipe_dataset(recipe)
    except ValueError as error:
        passed, value = False, str(error)
    return Check("tokenizer", passed, value, f"sha256 {dataset.tokenizer_sha256[:12]}")


def check_shards(dataset: Dataset) -> Check:
    """Shards and tokenizer have the sha256 that was recorded of them; foreign formats record none."""
    try:
        damaged = dataset.verify()
    except ValueError as error:
        return Check("dataset hashes", True, f"not compared: {error}", "recorded sha256")
    return Check("dataset hashes", not damaged, "; ".join(damaged) or "all as recorded", "recorded sha256")


def check_shuffled(order: WindowOrder) -> Check:
    """Windows that are trained after one another do not follow one another in the text."""
    starts = order.starts(0, min(order.windows_per_epoch, 4096))
    following = np.mean(np.diff(starts) == order.seq_len) if len(starts) > 1 else 0.0
    return Check("shuffling", bool(following < 0.1), f"{following:.1%} of windows follow the one before", "below 10 %")


# ---- the model ---------------------------------------------------------------------------------------------


def loss_of(model: GPT2ReproForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    """The loss as the training loop asks for it."""
    return model(input_ids, shift_labels=targets, use_cache=False, skip_logits=True, **options).loss


def check_init(model: GPT2ReproForCausalLM, *, residual: bool) -> Check:
    """The measured spread of the initial matrices: 0.02, of residual projections 0.02 / sqrt(2 * n_layer)."""
    std = model.config.initializer_range / (math.sqrt(2 * model.config.n_layer) if residual else 1)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and residual == ("c_proj" in name)]
    found = torch.cat([p.detach().flatten() for p in matrices]).std().item()
    name = "residual init std" if residual else "init std"
    return Check(name, abs(found / std - 1) < 0.05, f"{found:.5f}", f"{std:.5f} within 5 %")


@torch.no_grad()
def check_labels(model: GPT2ReproForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor) -> Check:
    """Targets (B, T) are the inputs shifted by one, and the model does not shift them again.

    The loss is compared at the first position alone: over all of them a fresh model's is ln(vocab_size) for any
    targets, and shifted again, the first would be gone.
    """
    T = input_ids.shape[1]
    shifts = [k for k in range(min(4, T)) if torch.equal(targets[:, : T - k], input_ids[:, k:])]
    logits = model(input_ids[:, :1], use_cache=False).logits[:, 0]  # (B, V)
    by_hand = F.cross_entropy(logits.float(), targets[:, 0]).item()
    first = targets.masked_fill(torch.arange(T, device=targets.device) > 0, -100)
    apart = loss_of(model, input_ids, first).item() - by_hand
    value = f"shifted by {shifts[0] if shifts else 'something else'}, loss {apart:+.4f} from one by hand"
    # bf16 logits of a trained model are a tenth apart from kernel to kernel.
    return Check("labels", shifts[:1] == [1] and abs(apart) < 0.2, value, "shifted by 1, within 0.2")


def check_initial_loss(loss: float, config: GPT2ReproConfig, *, init_from: str | None) -> Check:
    """ln(vocab_size), plus half the variance n_embd * 0.02^2 that random logits have (log-normal mean)."""
    uniform = math.log(config.vocab_size)
    low, high = (0.0, uniform) if init_from else (uniform - 0.1, uniform + config.n_embd * 0.02**2 / 2 + 0.2)
    expected = f"{low:.2f} to {high:.2f}; ln({config.vocab_size}) is {uniform:.2f}"
    return Check("initial loss", low <= loss <= high, f"{loss:.4f}", expected)


def check_overfit(model: GPT2ReproForCausalLM, optimizer: torch.optim.Optimizer, batch: tuple) -> Check:
    """The loss on one small batch falls to a tenth; trains `model`."""
    input_ids, targets = (part[:4, :32].contiguous() for part in batch)
    losses: list[float] = []
    while len(losses) <= OVERFIT_STEPS:
        loss = loss_of(model, input_ids, targets)
        losses.append(loss.item())
        if not losses[-1] >= 0.1 * losses[0]:  # learned, or no number any more
            break
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    value = f"{losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses) - 1} steps"
    return Check("overfit one batch", losses[-1] < 0.1 * losses[0], value, f"a tenth within {OVERFIT_STEPS} steps")


# ---- the recipe --------------------------------------------------------------------------------------------


def known_rate(n_parameters: int) -> float:
    """The GPT-3 paper's learning rate for a size, to within a half: 6e-4 at 125M, as N^-0.32 (its table 2.1)."""
    return 6e-4 * (n_parameters / 125e6) ** -0.32


def check_learning_rate(recipe: Recipe, n_parameters: int) -> Check:
    peak, known = max(recipe.learning_rate, recipe.muon_learning_rate or 0.0), known_rate(n_parameters)
    low, high = 0.0 if recipe.init_from else known / 10, known * 5
    expected = f"{low:.2g} to {high:.2g}; GPT-3's rate for {n_parameters:,} parameters is about {known:.2g}"
    return Check("learning rate", low <= peak <= high, f"{peak:.2g}", expected)


def check_warmup(recipe: Recipe) -> Check:
    share = lr_at(0, recipe) / (recipe.learning_rate or math.inf)
    most = 0.5 if recipe.init_from else 0.1
    return Check("warm-up", share <= most, f"the first step has {share:.1%} of the peak", f"at most {most:.0%}")


# ---- the machine -------------------------------------------------------------------------------------------


def check_disk(recipe: Recipe, n_parameters: int, *, free_bytes: int) -> Check:
    """Room for every checkpoint that the run keeps, and one more while it is written."""
    kept = saves = math.ceil(recipe.max_steps / recipe.save_every)
    if recipe.keep_last:
        kept = min(saves, recipe.keep_last) + (recipe.max_steps // recipe.keep_every if recipe.keep_every else 0)
    need = (kept + 1) * STATE_BYTES * n_parameters
    expected = f"{need / 1e9:.1f} GB for {kept + 1} checkpoints"
    return Check("disk", need <= free_bytes, f"{free_bytes / 1e9:.1f} GB free", expected)


def check_rehearsal(
    recipe: Recipe, model: GPT2ReproForCausalLM, optimizer: torch.optim.Optimizer, *, folder: Path, **saving
) -> Check:
    """A checkpoint that is saved and loaded into another model and optimizer gives back every bit of both."""
    state = {"tokens": 0, "dataset_fingerprint": ""}
    path = save_checkpoint(folder, 1, model=model, optimizer=optimizer, state=state, keep_last=1, **saving)
    torch.manual_seed(recipe.seed + 1)
    other = type(model)(model.config).to(model.device)
    restored = make_optimizer(other, recipe)
    load_checkpoint(path, model=other, optimizer=restored)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    pairs += [(optimizer.state[a][key], restored.state[b][key]) for a, b in pairs for key in optimizer.state[a]]
    differing = sum(not torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
    size = sum(file.stat().st_size for file in path.iterdir())
    value = f"{differing} of {len(pairs)} tensors differ, {size / 1e9:.2f} GB"
    return Check("save and resume", not differing, value, "the same bits")


def measure_speed(recipe: Recipe, model: GPT2ReproForCausalLM, batch: tuple) -> float:
    """Tokens a second of forward and backward over whole micro batches, compiled where the run would be."""
    device = batch[0].device
    model.train()
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    if compile_wanted(recipe, device):
        model.compile(fullgraph=True, dynamic=False, mode=recipe.compile_mode)
    warm, timed = (3, 10) if device.type == "cuda" else (1, 2)
    for step in range(warm + timed):
        if step == warm:
            began = time.perf_counter()
        loss = loss_of(model, *batch, loss_impl=loss_form(recipe, device))
        loss.backward()
        loss.item()  # waits for the device, as the loop does once a step
    return timed * batch[0].numel() / (time.perf_counter() - began)


def check_speed(
    recipe: Recipe, tokens_per_second: float, *, processes: int, mfu: float | None, dollars: float | None
) -> Check:
    """Tokens a second of one process, and what the run takes with `processes` of them by arithmetic."""
    hours = recipe.max_steps * recipe.global_batch_tokens / (tokens_per_second * processes) / 3600
    value = f"{tokens_per_second:,.0f} tokens/s, {hours:,.2f} hours on {processes}"
    if dollars is not None:
        value += f", {hours * processes * dollars:,.2f} dollars"
    if mfu is None:
        return Check("speed", tokens_per_second > 0, value, "no band: the device's peak is not known")
    return Check("speed", mfu >= 0.2, f"{value}, {mfu:.1%} MFU", "MFU of 20 % and more")


# ---- all of them -------------------------------------------------------------------------------------------


def examine(
    recipe: Recipe, *, processes: int = 1, sharded: bool = False, dollars_per_hour: float | None = None
) -> Iterator[Check]:
    """Every check of a recipe on this machine, the cheap ones first; `sharded` processes hold a part of every tensor.

    Raises:
        ValueError: the recipe or the dataset cannot be used at all.
    """
    recipe.check(world_size=processes)
    dataset = prepared_dataset(recipe)
    stream = dataset.split("train")
    order = WindowOrder(stream.tokens, recipe.seq_len, seed=recipe.seed, shuffle=recipe.shuffle)
    yield check_tokenizer(recipe, dataset)
    yield check_shuffled(order)
    yield check_warmup(recipe)

    accelerator = start_accelerator(recipe)
    device = accelerator.device
    raw = initial_model(recipe, vocab_size=recipe.vocab_size or dataset.vocab_size, eot_id=dataset.eot_id)
    model, config = accelerator.prepare(raw.eval()), raw.config  # the run's precision; without dropout
    n_parameters = model.num_parameters()
    yield check_learning_rate(recipe, n_parameters)
    if not recipe.init_from:
        yield check_init(model, residual=False)
        yield check_init(model, residual=True)
    tied = model.lm_head.weight is model.transformer.wte.weight
    yield Check("tied head", tied, "one tensor" if tied else "two tensors", "the head is the token embedding")
    output_dir = Path(recipe.output_dir).absolute()
    place = next(folder for folder in (output_dir, *output_dir.parents) if folder.is_dir())
    yield check_disk(recipe, n_parameters, free_bytes=shutil.disk_usage(place).free)
    parts = memory_estimate(
        recipe, config, n_parameters=n_parameters, bf16=accelerator.mixed_precision == "bf16",
        chunked_loss=loss_form(recipe, device) == "chunked", shards=processes if sharded else 1,
    )  # fmt: skip
    need, usable = sum(parts.values()) / 1e9, USABLE * device_memory_bytes(device) / 1e9
    value = f"about {need:.1f} GB for micro batches of this size"
    yield Check("memory", need <= usable, value, f"at most {usable:.1f} GB")
    yield check_shards(dataset)

    loader = TrainLoader(
        stream, order, sequences_per_step=recipe.global_batch_tokens // recipe.seq_len,
        micro_batch_size=recipe.micro_batch_size, vocab_size=config.vocab_size, device=device,
    )  # fmt: skip
    batches = loader.batches(0)
    batch = next(batches)
    batches.close()
    few = [part[:4] for part in batch]
    yield check_labels(model, *few)
    loss = loss_of(model, *few)
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), math.inf).item()
    model.zero_grad()
    yield check_initial_loss(loss.item(), config, init_from=recipe.init_from)
    yield Check("gradient norm", 0.05 <= norm <= 100, f"{norm:.3f}", "0.05 to 100")

    tuned = replace(recipe, learning_rate=known_rate(n_parameters), muon_learning_rate=None)
    optimizer = make_optimizer(model, tuned)
    yield check_overfit(model, optimizer, batch)
    saving = {"tokenizer": load_tokenizer(str(dataset.tokenizer)), "accelerator": accelerator}
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
        yield check_rehearsal(tuned, model, optimizer, folder=Path(folder), **saving)
    del optimizer

    speed, peak = measure_speed(recipe, model, batch), peak_flops(device)
    shape = {name: getattr(config, name) for name in ("n_positions", "n_layer", "n_embd")}
    flops = flops_per_token(n_parameters=n_parameters, seq_len=recipe.seq_len, **shape)
    mfu = speed * flops / peak if peak else None
    yield check_speed(recipe, speed, processes=processes, mfu=mfu, dollars=dollars_per_hour)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--processes", type=int, default=1, help="how many will train (default: %(default)s)")
    parser.add_argument("--sharded", action="store_true", help="each of them holds a part of every tensor (FSDP2)")
    parser.add_argument("--dollars-per-hour", type=float, help="price of one process's device")
    arguments, fields = parser.parse_known_args()
    settings = vars(arguments)
    path = settings.pop("recipe")
    try:
        recipe = parse_recipe(["--recipe", path, *fields], default=path)
    except UsageError as error:
        parser.error(str(error))
    failed = 0
    for check in examine(recipe, **settings):
        print(check, flush=True)
        failed += not check.passed
    print(f"{failed} checks failed" if failed else "every check passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
