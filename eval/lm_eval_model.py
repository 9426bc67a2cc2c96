"""Our scorer as a model of lm-eval, `gpt2repro-fast`: lm-eval's tasks, tokens and figures, in fewer forwards.

    python -m eval.lm_eval_model --model gpt2repro-fast --model_args pretrained=M --tasks hellaswag,mmlu

has all options of lm-eval's own command, which has no plugins. It takes every model that lm-eval's `hf` takes, and
generates text with that code. A forward of log-likelihoods takes as many tokens as fill it; lm-eval's batch size is
that of generation alone. Log-probabilities are float32 whatever the model's dtype.
"""

import sys

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import modeling_gpt2repro  # noqa: F401 (the import registers our classes with the Auto classes)
from gpt2repro.hub.loading import check_finite

from .scoring import Sequences, score_items

NAME = "gpt2repro-fast"


@register_model(NAME)
class FastLM(HFLM):
    """lm-eval's `hf` model with our scores.

    Raises:
        ValueError: an encoder-decoder, which has no tokens before a continuation, or weights that are not finite.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        check_finite(self.model.name_or_path, self.model)
        if self.backend != "causal":
            raise ValueError(f"{NAME} takes causal language models, not {self.backend} ones: use lm-eval's hf")

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """For every (texts, context, targets) in tokens: the log-likelihood, and whether greedy decoding gives it."""
        items = []
        for _, context, targets in requests:
            if not 1 <= len(targets) <= self.max_length:
                raise ValueError(f"a continuation has {len(targets)} tokens: the model takes 1 to {self.max_length}")
            inputs = [*context, *targets][-(self.max_length + 1) : -1]
            items.append(Sequences([inputs], [targets], [1.0], 0, False))
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            results = score_items(self.model, items, progress=not disable_tqdm and self.rank == 0)
        results.sort(key=lambda result: result["index"])
        return [(result["scores"][0], result["prediction"] == 0) for result in results]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of every text, in windows as lm-eval cuts them; every window of every text at once."""
        shape = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        texts = [get_rolling_token_windows(self.tok_encode(request.args[0]), **shape) for request in requests]
        windows = [[(None, *make_disjoint_window(window)) for window in text] for text in texts]
        flat = [window for own in windows for window in own]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        return [sum(next(scores)[0] for _ in own) for own in windows]


if __name__ == "__main__":
    sys.exit(cli_evaluate())
