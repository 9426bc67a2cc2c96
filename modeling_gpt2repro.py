"""GPT-2 from scratch as a Transformers model: the network, its initialisation, its loss.

    from modeling_gpt2repro import GPT2ReproForCausalLM
    model = GPT2ReproForCausalLM(GPT2ReproConfig())           # 124,439,808 parameters
    loss = model(input_ids, shift_labels=targets, use_cache=False, skip_logits=True).loss

State-dict keys are those of the stock `GPT2LMHeadModel`; where stock has a `Conv1D` stands an `nn.Linear`, so four
weights a layer are transposed in conversion (gpt2repro/hub/convert.py). This file and the configuration travel into
every checkpoint: no import of anything else of the project, and none inside a function.

Shapes: B sequences, T tokens each, C = n_embd channels, H = n_head heads of D = C / H channels, V = vocab_size.
"""

import math
import warnings
from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel, modeling_layers
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_gpt2repro import GPT2ReproConfig  # from a checkpoint with trust_remote_code
except ImportError:
    if __package__:  # inside a package a missing sibling is a real error
        raise
    from configuration_gpt2repro import GPT2ReproConfig  # from a checkout or the installed wheel


# The library's name for the key-value cache, in outputs and in layers: "past_key_values" before 5.24, "cache" since.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
# Keywords that `forward` passes on to the attention functions and to the library's output capturing. It refuses all
# others: an unknown name that is swallowed is an argument that was renamed or mistyped.
CONTINUOUS_BATCHING = {"max_seqlen_q", "max_seqlen_k", "read_index", "write_index", "block_table", "logits_indices",
                       "logits_processor_args"}  # fmt: skip
PASSED_ON = {*TransformersKwargs.__optional_keys__, *CONTINUOUS_BATCHING, "debug_io", "debug_io_dir", "prune_layers"}
PASSED_ON -= {"output_router_logits", "position_ids", "seq_idx"}


def residual_projection(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer that ends on the residual path, marked for `_init_weights`.

    A mark and not a subclass: quantizers such as bitsandbytes replace only modules whose type is exactly nn.Linear.
    """
    linear = nn.Linear(n_in, n_out)
    linear.is_residual_projection = True  # type: ignore[assignment]
    return linear


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: (B, H, T, D) query, (B, H, S, D) key and value -> (B, T, H, D), weights (B, H, T, S)."""
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def halved_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal attention written out, for each half of the queries: the first needs only the first half of the keys.

    (B, H, T, D) each -> (B, T, H, D), None. Scores are rounded to bf16 before the softmax, as in `eager_attention`.
    """
    T, parts = query.shape[2], []
    for first, last in ((0, T // 2), (T // 2, T)):
        scores = (query[:, :, first:last] @ key[:, :, :last].transpose(-1, -2)).float() * scaling
        future = torch.ones(last - first, last, dtype=torch.bool, device=query.device).triu(first + 1)
        weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1).to(value.dtype)
        weights = F.dropout(weights, p=dropout, training=module.training)
        parts.append(weights @ value[:, :, :last])
    return torch.cat(parts, dim=2).transpose(1, 2), None


def halves_are_faster(query, key, attention_mask, is_causal):
    """Where `halved_attention` beats PyTorch's kernel: in bf16 on a CPU, up to 256 tokens (docs/performance.md)."""
    # Lengths are compared last, and never in an export: a comparison would fix a dynamic dimension.
    wanted = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.compiler.is_exporting()
    return wanted and is_causal and attention_mask is None and 1 < query.shape[2] == key.shape[2] <= 256


def is_sdpa(config):
    return config._attn_implementation == "sdpa"


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention, computed by the kernel that `config._attn_implementation` names.

    "sdpa" is PyTorch's kernel, or `halved_attention` where that is faster.
    """

    is_causal = True

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = residual_projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        cache = kwargs.pop(CACHE, None)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)  # (B, T, H, D)
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )  # each (B, H, T, D)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        elif cache is not None:  # continuous batching before 5.24: the attention function updates the paged cache
            kwargs["cache"] = cache
        is_causal = self.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if is_sdpa(self.config) and halves_are_faster(query, key, attention_mask, is_causal):
            attention = halved_attention
        dropout = self.config.attn_pdrop if self.training else 0.0
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, D)
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)  # (B, T, C)
        return self.resid_dropout(self.c_proj(mixed)), weights


class GPT2ReproMLP(nn.Module):
    """Two projections around a GELU: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = residual_projection(n_inner, config.n_embd)
        # gelu_new is the tanh approximation; the library writes it out in seven kernels, PyTorch has it as one.
        name = config.activation_function
        self.act = nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(modeling_layers.GradientCheckpointingLayer):
    """One pre-norm transformer block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


@torch.no_grad()
def chunked_cross_entropy(hidden_states, weight, targets, *, padded_rows, chunk, with_gradients):
    """The summed cross-entropy of N tokens and its gradients, without the logits of all tokens at once.

    (N, C) hidden states, (V, C) head, (N,) targets (-100: no loss) -> (), nats; (N, C) and (V, C), or None and None.
    The logits of `chunk` tokens become the chunk's share of both gradients and are dropped. Softmax, loss and the sum
    of the head's gradient are fp32; matmuls run in the type of the hidden states, which is the type of both gradients.
    """
    V, C = weight.shape
    head = F.pad(weight.to(hidden_states.dtype), (0, 0, 0, padded_rows - V))
    loss = torch.zeros((), dtype=torch.float32, device=weight.device)
    if with_gradients:
        grad_head = torch.zeros(padded_rows, C, dtype=torch.float32, device=weight.device)
        grad_hidden = []
    for hidden, target in zip(hidden_states.split(chunk), targets.split(chunk), strict=True):
        kept, target = target.ne(-100)[:, None], target.clamp(min=0)[:, None]  # (chunk, 1)
        logits = hidden @ head.t()  # (chunk, padded_rows)
        logits[:, V:] = -math.inf
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss = loss - (log_p.gather(1, target) * kept).sum()
        if with_gradients:  # the gradient of the logits is p - 1 at the target, p elsewhere
            # Subtracted in fp32: bf16 rounds a p of 0.998 and more to 1, and the target's gradient would be zero.
            grad = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype)).to(head.dtype)
            grad_hidden.append(grad @ head * kept)
            grad_head += grad.t() @ (hidden * kept)
    if not with_gradients:
        return loss, None, None
    return loss, torch.cat(grad_hidden), grad_head[:V].to(head.dtype)


class WithGradients(torch.autograd.Function):
    """A loss () whose gradients are known: those of `hidden_states` and `weight` are the two tensors given."""

    @staticmethod
    def forward(ctx, loss, hidden_states, weight, grad_hidden, grad_weight):
        # The Function computes nothing itself. torch 2.11 compiles one that builds its output in place (`loss -= …`)
        # into a backward that returns zeros, without an error.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_loss[None, None]).to(ctx.weight_dtype)  # two dimensions: the product is fp32
        return None, grad_hidden * grad_loss, grad_weight, None, None


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What both models share: initialisation, and what the library may do with them."""

    config: GPT2ReproConfig
    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]  # noqa: RUF012 (the library's own declaration)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal(0, 0.02), zero biases, unit LayerNorms; residual projections 0.02 / sqrt(2 * n_layer).

        Source: GPT-2 paper, section 2.3: the weights of residual layers are scaled at initialisation by 1/sqrt(N), N
        the number of residual layers, of which every block has two. The library initialises only modules that own
        parameters, which is why the rule hangs on the projection and not on the block around it.
        """
        super()._init_weights(module)
        if getattr(module, "is_residual_projection", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The transformer without its head: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last LayerNorm, (B, T, C).

        Pass neither a mask nor positions for training on whole windows: attention is then causal without a mask
        tensor, which is what the flash kernels need. Positions that restart at 0 inside a row, without a mask and a
        cache, are packed texts: none sees another. `seq_idx` (B, T), a number for each text, parts them in the same
        way while positions run on. `cache` and `past_key_values` are two names of one argument.

        Raises:
            TypeError: a keyword that the model does not know.
            ValueError: both or neither of `input_ids` and `inputs_embeds`; both names of the cache; `seq_idx` with a
                mask or a cache; a position at or past `n_positions`.
        """
        if unknown := [name for name in kwargs if name not in PASSED_ON]:
            raise TypeError(
                f"GPT2Repro's forward does not know {', '.join(unknown)}: leave it out. Beside the arguments of its "
                f"signature it takes {', '.join(sorted(PASSED_ON))}"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        if past_key_values is not None:
            if CACHE == "cache" and not torch.compiler.is_compiling():
                warnings.warn("`past_key_values` is deprecated: give `cache`", FutureWarning, stacklevel=2)
            cache = past_key_values
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)
        packed = position_ids
        if seq_idx is not None:
            if attention_mask is not None or cache is not None:
                raise ValueError("seq_idx parts the texts of whole rows: give it without attention_mask and cache")
            # The library finds texts by a jump in their positions.
            packed = torch.arange(seq_idx.shape[1], device=seq_idx.device) + 2 * seq_idx
        if attention_mask is None and cache is None and packed is None and is_sdpa(self.config):
            mask = None  # sdpa is told is_causal; while compiling, the library would make a mask
        else:
            # Arguments without names, because 5.24 renames the cache. Cache and positions are the caller's: with a
            # new cache the library would not look for packed texts, with an arange it would make a needless mask.
            mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, packed)
        position_ids = self._checked_positions(position_ids, inputs_embeds, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        for block in self.h:
            hidden_states = block(
                hidden_states, attention_mask=mask, use_cache=use_cache, position_ids=position_ids, **{CACHE: cache},
                **kwargs,
            )  # fmt: skip
        hidden_states = self.ln_f(hidden_states)
        cached = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **cached)  # type: ignore[arg-type]

    def _checked_positions(self, position_ids, inputs_embeds, cache):
        """The caller's positions, or those that follow the cache: (1, T). ValueError for one past the table."""
        T, n_positions = inputs_embeds.shape[1], self.config.n_positions
        compiling = torch.compiler.is_compiling()
        seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if position_ids is None:
            tokens = T if compiling else T + seen
            if tokens > n_positions:
                raise ValueError(
                    f"a sequence of {tokens} tokens is longer than the model's n_positions={n_positions}: shorten or "
                    "split it"
                )
            position_ids = (torch.arange(T, device=inputs_embeds.device) + seen).unsqueeze(0)
        # To read positions from a GPU waits for it, so there they are read only where the length says that they may
        # be too large.
        elif not compiling and position_ids.numel() and (position_ids.device.type == "cpu" or seen + T > n_positions):
            if (last := int(position_ids.max())) >= n_positions:
                raise ValueError(
                    f"position {last} is past the model's n_positions={n_positions}: shorten or split the text, or "
                    "generate fewer tokens"
                )
        return position_ids


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head, whose weight is the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        loss_impl: str = "plain",
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean cross-entropy in nats a token where targets are given.

        Targets are `labels` (the input ids; shifted here) or `shift_labels` (already the next tokens), both (B, T),
        -100 where no loss is taken. `num_items_in_batch` divides the summed loss instead of the number of targets.
        `skip_logits=True` returns the loss alone and pads the head to `pad_vocab_size_multiple_of` inside the matmul;
        `loss_impl="chunked"` then holds the logits of an eighth of the tokens at a time instead of all.

        Raises:
            ValueError: `skip_logits=True` without targets; an unknown `loss_impl`, or "chunked" with logits; and what
                `GPT2ReproModel.forward` raises.
        """
        # Not in the signature: Trainer takes every argument there with "label" in its name for a column of the data,
        # and reports no eval_loss where one is missing.
        shift_labels = kwargs.pop("shift_labels", None)
        has_targets, chunked = labels is not None or shift_labels is not None, loss_impl == "chunked"
        if loss_impl not in ("plain", "chunked") or (chunked and not skip_logits):
            raise ValueError(f"loss_impl is {loss_impl!r}: give 'plain', or 'chunked' together with skip_logits=True")
        if skip_logits and not has_targets:
            raise ValueError("skip_logits=True returns the loss alone: give labels or shift_labels")
        outputs = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, cache=cache, **kwargs,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state
        logits = loss = None
        if skip_logits and not chunked:
            logits = self._padded_logits(hidden_states)
        elif not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
        if chunked:
            loss = self._chunked_loss(hidden_states, labels, shift_labels, num_items_in_batch)
        elif has_targets:
            if shift_labels is not None:
                shift_labels = shift_labels.contiguous()  # the library views them
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        return CausalLMOutputWithPast(
            loss=loss, logits=None if skip_logits else logits, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, **{CACHE: outputs.get(CACHE)},
        )  # fmt: skip

    def _padded_logits(self, hidden_states):
        """(B, T, C) -> (B, T, V) through a head padded with zero rows, which the returned view leaves out.

        A matmul with 50304 = 393 * 128 columns runs on full tiles, one with 50257 = 29 * 1733 does not. Values and
        gradients are those of the plain head.
        """
        weight = self.lm_head.weight  # (V, C)
        missing = -weight.shape[0] % self.config.pad_vocab_size_multiple_of
        return F.linear(hidden_states, F.pad(weight, (0, 0, 0, missing)))[..., : weight.shape[0]]

    def _chunked_loss(self, hidden_states, labels, shift_labels, num_items_in_batch):
        """(B, T, C) and targets (B, T) -> (): `chunked_cross_entropy`, in autocast's type where that is on.

        An eighth of the tokens at a time: few enough chunks to compile as one graph, and each of them reads and writes
        the head's gradient once. Below 512 tokens a chunk that traffic outweighs what is saved.
        """
        weight, device = self.lm_head.weight, hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        hidden_states = hidden_states.flatten(0, 1).to(dtype)  # (N, C)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(-1)  # (N,)
        with_gradients = torch.is_grad_enabled()
        padded_rows = weight.shape[0] + -weight.shape[0] % self.config.pad_vocab_size_multiple_of
        loss, grad_hidden, grad_weight = chunked_cross_entropy(
            hidden_states, weight, targets, padded_rows=padded_rows, chunk=max(512, math.ceil(len(targets) / 8)),
            with_gradients=with_gradients,
        )  # fmt: skip
        if with_gradients:
            loss = WithGradients.apply(loss, hidden_states, weight, grad_hidden, grad_weight)
        return loss / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


class GPT2ReproForSequenceClassification(modeling_layers.GenericForSequenceClassification, GPT2ReproPreTrainedModel):
    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(modeling_layers.GenericForTokenClassification, GPT2ReproPreTrainedModel):
    base_model_prefix = "transformer"


# The generic heads make their base model through AutoModel, so a checkpoint's copy of this file registers itself too.
for model_class, auto_class in (
    (GPT2ReproModel, modeling_auto.AutoModel),
    (GPT2ReproForCausalLM, modeling_auto.AutoModelForCausalLM),
    (GPT2ReproForSequenceClassification, modeling_auto.AutoModelForSequenceClassification),
    (GPT2ReproForTokenClassification, modeling_auto.AutoModelForTokenClassification),
):
    model_class.register_for_auto_class(auto_class.__name__)
    auto_class.register(GPT2ReproConfig, model_class, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes that this table names.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt2repro"] = "GPT2ReproForCausalLM"

__all__ = ["GPT2ReproForCausalLM", "GPT2ReproForSequenceClassification", "GPT2ReproForTokenClassification",
           "GPT2ReproModel", "GPT2ReproPreTrainedModel"]  # fmt: skip
