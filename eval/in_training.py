"""What a run measures of its model while it trains: validation loss, benchmarks, samples."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from gpt2repro.data.training_data import TrainingData
from gpt2repro.recipe import Recipe
from gpt2repro.train.estimates import has_expected_loss, loss_warning

from .multiple_choice import evaluate_tasks, prepare_task
from .sample import sample
from .validation import bytes_per_token, loss_figures, stream_bytes, validation_loss

Row = tuple[str, dict[str, Any]]  # the kind of a row of metrics.jsonl, and its values


class Evaluation:
    """Calling it with a step and the model gives the rows that are due at that step; every process does its share.

    `averaged` is a context in which the model has its averaged weights (`ema_decay`); their loss is of kind val_ema.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, accelerator: Accelerator, *, loss_impl: str) -> None:
        self.recipe, self.data, self.accelerator, self.loss_impl = recipe, data, accelerator, loss_impl
        longest = recipe.shape()["n_positions"]
        self.token_bytes = bytes_per_token(data.tokenizer)
        self.tasks = [prepare_task(task, data.tokenizer, max_length=longest) for task in recipe.eval_tasks]

    def __call__(self, step: int, model: Any, averaged: AbstractContextManager) -> Iterator[Row]:
        recipe = self.recipe
        validate, write = (
            every and (step % every == 0 or step == recipe.max_steps)
            for every in (recipe.eval_every, recipe.sample_every)
        )
        if not (validate or write):
            return
        model.eval()
        if validate:
            yield from self._validation(step, model)
        if validate and recipe.ema_decay and step:
            with averaged:
                averaged_rows = self._losses("val_ema", step, model)
            yield from averaged_rows
        if write:
            yield from self._samples(step, model)
        model.train()

    def _validation(self, step: int, model: Any) -> Iterator[Row]:
        """The loss on the validation windows, and the benchmarks of `eval_tasks`."""
        accelerator, tokens = self.accelerator, step * self.recipe.global_batch_tokens
        rows = self._losses("val", step, model)
        yield from rows
        loss, is_mixture = rows[0][1]["loss"], len(rows) > 1
        comparable = has_expected_loss(self.data.dataset.info, model.config, init_from=self.recipe.init_from)
        if comparable and not is_mixture and (warning := loss_warning(tokens, loss)):
            yield "warning", {"text": warning, "loss": loss, "tokens": tokens}
        if self.tasks and step:
            share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
            # A sharded model runs on all processes or on none: there every process scores every item.
            share = {} if accelerator.is_fsdp2 else {**share, "gather_object": gather_object}
            with accelerator.autocast():
                for row in evaluate_tasks(model, self.tasks, **share):
                    yield "eval", {"tokens": tokens, **row}

    def _losses(self, kind: str, step: int, model: Any) -> list[Row]:
        """A row with the loss on the validation windows, over all processes; for a mixture also a row for each source.

        A mixture's loss is the mean of its sources' losses by their shares: of a text mixed as in training.
        """
        several = self.accelerator.num_processes > 1
        add = (lambda tensor: self.accelerator.reduce(tensor, "sum")) if several else None
        data, measured = self.data, []
        for source in data.sources.values():
            loss, counted = validation_loss(model, data.validation(source), reduce=add, loss_impl=self.loss_impl)
            measured.append((loss, counted, stream_bytes(self.token_bytes, source.split("val"), counted)))
        tokens = step * self.recipe.global_batch_tokens
        if len(data.sources) == 1:
            loss, counted, size = measured[0]
            return [(kind, {**loss_figures(loss, counted, size), "eval_tokens": counted, "tokens": tokens})]
        rows: list[Row] = []
        mean_loss = mean_size = 0.0  # of a token: nats and bytes
        each = zip(data.sources.items(), data.shares, measured, data.tokens_seen(step), strict=True)
        for (name, source), share, (loss, counted, size), seen in each:
            mean_loss, mean_size = mean_loss + share * loss, mean_size + share * (size or 0) / counted
            progress = {"tokens": seen, "epochs": seen / source.split("train").tokens}
            figures = {**loss_figures(loss, counted, size), "eval_tokens": counted, **progress}
            rows.append((f"{kind}_source", {"source": name, **figures}))
        total = sum(counted for _, counted, _ in measured)
        mean = {**loss_figures(mean_loss, total, mean_size * total), "eval_tokens": total, "tokens": tokens}
        return [(kind, mean), *rows]

    def _samples(self, step: int, model: Any) -> Iterator[Row]:
        """Continuations of the same prompt every time; on every process, because a sharded model needs all of them."""
        recipe = self.recipe
        texts = sample(
            model, self.data.tokenizer, recipe.sample_prompt, num_samples=recipe.num_samples,
            max_new_tokens=recipe.sample_tokens, seed=recipe.seed,
        )
        yield "sample", {"prompt": recipe.sample_prompt, "texts": texts}
