"""Greedy generation: this project's model beside the library's GPT-2 with the same weights and prompt.

    python -m benchmarks.generation [--batch-sizes 1 64] [--new-tokens 128] [--json F.json]

The ways take turns; tokens a second are new tokens over the whole call, prompt included, after a warm-up.
`dynamic` is `generate` as it comes, `compiled` the library's static cache with its compiled decode step. All ways must
write the same tokens in fp32; how many of them agree is part of the result, since rounding decides near ties in bf16.
"""

import argparse
from functools import partial
from statistics import median

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import command_line, finish, machine, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES
from eval.loading import run_command
from gpt2repro.hub.convert import from_stock
from gpt2repro.train.launch import use_huge_pages

PROMPT_TOKENS = 32


@torch.no_grad()
def measure(models: dict, *, batch_size: int, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Tokens a second of every way at one batch size, and the share of tokens equal to stock's."""
    prompt = torch.randint(models["stock"].config.vocab_size, (batch_size, PROMPT_TOKENS), device=device)
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default", fullgraph=False)
    config._compile_all_devices = True  # the library compiles decoding on a CPU only when told so
    kinds = {"dynamic": {}, "compiled": {"cache_implementation": "static", "compile_config": config}}

    def new_tokens(model, settings: dict) -> torch.Tensor:
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, eos_token_id=None,
            max_new_tokens=arguments.new_tokens, **settings,
        )  # fmt: skip
        return ids[:, PROMPT_TOKENS:].cpu()

    ways = {
        f"{name} {kind}": partial(new_tokens, model, settings)
        for name, model in models.items()
        for kind, settings in kinds.items()
    }
    seconds, written = time_in_turns(ways, rounds=arguments.rounds, warmup=2)
    return {
        name: {
            "tokens_per_second": batch_size * arguments.new_tokens / median(each.clock for each in values),
            "equal_tokens": (written[name] == written["stock dynamic"]).float().mean().item(),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--model-shape", default="gpt2", choices=list(NAMED_SHAPES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        use_huge_pages()
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**{"n_positions": 1024, **NAMED_SHAPES[arguments.model_shape]})).eval()
    models = {"ours": from_stock(stock), "stock": stock}
    models = {name: model.to(device, getattr(torch, arguments.dtype)) for name, model in models.items()}
    sizes = {}
    print_row("way", "batch", "tokens/s", "as stock")
    for batch_size in arguments.batch_sizes:
        sizes[batch_size] = measure(models, batch_size=batch_size, arguments=arguments, device=device)
        for name, row in sizes[batch_size].items():
            print_row(name, str(batch_size), f"{row['tokens_per_second']:,.1f}", f"{row['equal_tokens']:.1%}")
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    figures = {"benchmark": "generation", "settings": settings, "batch_sizes": sizes, "machine": machine(device)}
    finish(figures, arguments.json)


if __name__ == "__main__":
    run_command(main)
