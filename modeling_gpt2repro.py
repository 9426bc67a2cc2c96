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

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_gpt2repro import GPT2ReproConfig  # from a checkpoint with trust_remote_code
except ImportError:
    if __package__:  # inside a package a missing sibling is a real error
        raise
    from configuration_gpt2repro import GPT2ReproConfig  # from a checkout or the installed wheel


class ResidualProjection(nn.Linear):
    """A projection that ends on the residual path; a class of its own so that `_init_weights` can tell it apart."""


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


def halves_are_faster(query, key, attention_mask):
    """Where `halved_attention` beats PyTorch's kernel: in bf16 on a CPU, up to 256 tokens (docs/performance.md)."""
    # The lengths last, and not in an export: to compare them would fix what is to stay dynamic.
    wanted = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.compiler.is_exporting()
    return wanted and attention_mask is None and 1 < query.shape[2] == key.shape[2] <= 256


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
        self.c_proj = ResidualProjection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)  # (B, T, H, D)
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )  # each (B, H, T, D)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if self.config._attn_implementation == "sdpa" and halves_are_faster(query, key, attention_mask):
            attention = halved_attention
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, T, H, D)
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)  # (B, T, C)
        return self.resid_dropout(self.c_proj(mixed)), weights


class GPT2ReproMLP(nn.Module):
    """Two projections around a GELU: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = ResidualProjection(n_inner, config.n_embd)
        # gelu_new is the tanh approximation; the library writes it out in seven kernels, PyTorch has it as one.
        name = config.activation_function
        self.act = nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(GradientCheckpointingLayer):
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


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of N tokens without the logits of all of them at once.

    The forward walks over chunks of tokens. It turns the logits of a chunk into the chunk's share of both gradients
    and forgets them; the backward only scales. Softmax, loss and the sum of the head's gradient are fp32; matmuls run,
    and gradients wait for the backward, in the type of the hidden states.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, padded_rows, chunk, with_gradients):
        """(N, C) hidden states, (V, C) head, (N,) targets (-100: no loss) -> (), nats; `chunk` is in tokens."""
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
            loss -= (log_p.gather(1, target) * kept).sum()
            if with_gradients:  # of the logits: p - 1 at the target, p elsewhere
                grad = log_p.exp_().to(head.dtype)
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1))
                grad_hidden.append(grad @ head * kept)
                grad_head += grad.t() @ (hidden * kept)
        if with_gradients:
            ctx.weight_dtype = weight.dtype
            ctx.save_for_backward(torch.cat(grad_hidden), grad_head[:V].to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_head = ctx.saved_tensors
        grad_head = (grad_head * grad_loss[None, None]).to(ctx.weight_dtype)  # of two dimensions: the product is fp32
        return grad_hidden * grad_loss, grad_head, None, None, None, None


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What both models share: initialisation, and what the library may do with them."""

    config: GPT2ReproConfig
    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]  # noqa: RUF012 (the library's own declaration)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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
        if isinstance(module, ResidualProjection):
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
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last LayerNorm, (B, T, C).

        Pass neither a mask nor positions for packed training: attention is then causal without a mask tensor, which
        is what the flash kernels need.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; more tokens than `n_positions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        T = inputs_embeds.shape[1]
        if T > self.config.n_positions:
            raise ValueError(
                f"a sequence of {T} tokens is longer than the model's n_positions={self.config.n_positions}: "
                "shorten or split it"
            )
        packed = attention_mask is None and past_key_values is None and position_ids is None
        if packed and self.config._attn_implementation == "sdpa":
            mask = None  # sdpa is told is_causal; while compiling, the library may make a mask all the same
        else:  # from the caller's positions: an arange would materialise a mask where none is needed
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(T, device=inputs_embeds.device) + seen).unsqueeze(0)  # (1, T)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )


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
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        loss_impl: str = "plain",
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean cross-entropy in nats a token where targets are given.

        Targets are `labels` (the input ids; shifted here) or `shift_labels` (already the next tokens), both (B, T),
        -100 where no loss is taken. `num_items_in_batch` divides the summed loss instead of the number of targets.
        `skip_logits=True` returns the loss alone and pads the head to `pad_vocab_size_multiple_of` inside the matmul;
        `loss_impl="chunked"` then holds the logits of an eighth of the tokens at a time instead of all.

        Raises:
            ValueError: `skip_logits=True` without targets; an unknown `loss_impl`, or "chunked" with logits.
        """
        has_targets, chunked = labels is not None or shift_labels is not None, loss_impl == "chunked"
        if loss_impl not in ("plain", "chunked") or (chunked and not skip_logits):
            raise ValueError(f"loss_impl is {loss_impl!r}: give 'plain', or 'chunked' together with skip_logits=True")
        if skip_logits and not has_targets:
            raise ValueError("skip_logits=True returns the loss alone: give labels or shift_labels")
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
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
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),  # the library views them
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _padded_logits(self, hidden_states):
        """(B, T, C) -> (B, T, V) through a head padded with zero rows, which the returned view leaves out.

        A matmul with 50304 = 393 * 128 columns runs on full tiles, one with 50257 = 29 * 1733 does not. Values and
        gradients are those of the plain head.
        """
        weight = self.lm_head.weight  # (V, C)
        missing = -weight.shape[0] % self.config.pad_vocab_size_multiple_of
        return F.linear(hidden_states, F.pad(weight, (0, 0, 0, missing)))[..., : weight.shape[0]]

    def _chunked_loss(self, hidden_states, labels, shift_labels, num_items_in_batch):
        """(B, T, C) and targets (B, T) -> () through `ChunkedCrossEntropy`, in autocast's type where that is on.

        An eighth of the tokens at a time: few enough chunks to compile as one graph, and for each of them the head's
        gradient is read and written once. Below 512 tokens a chunk that traffic outweighs what is saved.
        """
        weight, device = self.lm_head.weight, hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(-1)  # (N,)
        loss = ChunkedCrossEntropy.apply(
            hidden_states.flatten(0, 1).to(dtype),
            weight,
            targets,
            weight.shape[0] + -weight.shape[0] % self.config.pad_vocab_size_multiple_of,
            max(512, math.ceil(len(targets) / 8)),
            torch.is_grad_enabled(),
        )
        return loss / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


GPT2ReproModel.register_for_auto_class("AutoModel")
GPT2ReproForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Only the flat module registers itself; a checkpoint's copy is found through its auto_map.
if __name__ == "modeling_gpt2repro":
    AutoModel.register(GPT2ReproConfig, GPT2ReproModel, exist_ok=True)
    AutoModelForCausalLM.register(GPT2ReproConfig, GPT2ReproForCausalLM, exist_ok=True)

__all__ = ["GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
