"""What a GPT-2 is made of: the fields of its configuration, their defaults, and what is refused.

    from configuration_gpt2repro import GPT2ReproConfig, NAMED_SHAPES
    config = GPT2ReproConfig(**NAMED_SHAPES["gpt2-medium"])

Field names and defaults are those of the stock `GPT2Config`, but for dropout: 0.0, because a single-epoch
pre-training run never sees a token twice. This file travels with every checkpoint, so it imports nothing of ours.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# The four released sizes (Radford et al. 2019, table 2, with the parameter counts of the released weights, tied head
# counted once), and the size of the demonstration.
NAMED_SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124,439,808
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1,557,611,200
    "demo": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256},
}


@strict
class GPT2ReproConfig(PreTrainedConfig):
    """Configuration of `GPT2ReproModel` and `GPT2ReproForCausalLM`.

    Sizes count tokens (`vocab_size`, `n_positions`), channels (`n_embd`, `n_inner`: None means 4 * n_embd) or modules
    (`n_layer`, `n_head`). `pad_vocab_size_multiple_of` pads the head inside the training matmul only (50257 -> 50304):
    parameters, logits and checkpoints keep exactly `vocab_size` rows.

    Raises:
        StrictDataclassError: a value of the wrong type, or sizes that do not fit each other (all are named at once).
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (the library's own declaration)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    pad_vocab_size_multiple_of: int = 128
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # A saved causal LM would list only itself, and AutoModel would then fail on its checkpoint.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_gpt2repro.GPT2ReproConfig",
                "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
                "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
                "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
                "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
            },
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The library would warn and go on, with random numbers for what has another shape or name.
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            advice = "python -m gpt2repro.hub.convert SRC DST --to gpt2repro converts a GPT-2"
            raise ValueError(f"this is a {kind} checkpoint, not one of {cls.model_type}: {advice}")
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Sizes that fit each other; called by `@strict` after construction."""
        errors = []
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "pad_vocab_size_multiple_of"):
            if getattr(self, name) < 1:
                errors.append(f"{name} is {getattr(self, name)}: give a number of at least 1")
        if self.n_inner is not None and self.n_inner < 1:
            errors.append(f"n_inner is {self.n_inner}: give at least 1, or None for 4 * n_embd")
        if self.n_head > 0 and self.n_embd % self.n_head:
            errors.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: change one of them")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                errors.append(f"{name} is {getattr(self, name)}: give a probability from 0.0 to below 1.0")
        if errors:
            raise ValueError("\n".join(errors))


GPT2ReproConfig.register_for_auto_class()
# Only the flat module registers itself; a checkpoint's copy is found through its auto_map.
if __name__ == "configuration_gpt2repro":
    AutoConfig.register("gpt2repro", GPT2ReproConfig, exist_ok=True)

__all__ = ["NAMED_SHAPES", "GPT2ReproConfig"]
