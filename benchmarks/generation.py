"""Generation throughput of this project's model and of the library's GPT-2, with the same weights and prompt.

    python -m benchmarks.generation [--batch-sizes 1 64] [--new-tokens 128] [--json F.json]

Greedy decoding, the ways in turns; tokens a second are new tokens over the whole call, prompt included. `dynamic` is
`generate` with its defaults, `compiled` the library's static cache with its compiled decode step. In fp32 all ways
must write the same tokens. In bf16 rounding decides near ties, so the share of equal tokens is part of the result.
"""

import argparse
import sys
from functools import partial

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import compare, finish, model_parser, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES
from gpt2repro import command
from gpt2repro.hub.convert import from_stock

PROMPT_TOKENS = 32


def measure(arguments: argparse.Namespace, batch_size: int) -> dict:
    """Tokens a second of every model and kind of cache, and the share of tokens that are those of `stock dynamic`."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**NAMED_SHAPES[arguments.model_shape])).eval()
    compiled = CompileConfig(mode="reduce-overhead" if arguments.device == "cuda" else "default", fullgraph=False)
    compiled._compile_all_devices = True  # without it the library compiles decoding on a GPU only
    caches = {"dynamic": {}, "compiled": {"cache_implementation": "static", "compile_config": compiled}}
    prompt = torch.randint(stock.config.vocab_size, (batch_size, PROMPT_TOKENS), device=arguments.device)
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": arguments.new_tokens}

    def generate(model, cache: dict) -> torch.Tensor:  # (batch_size, prompt and new tokens)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy, **cache).cpu()

    ways = {}
    for name, model in {"ours": from_stock(stock), "stock": stock}.items():
        model.to(arguments.device, getattr(torch, arguments.dtype))
        ways |= {f"{name} {kind}": partial(generate, model, cache) for kind, cache in caches.items()}
    seconds = time_in_turns(ways, rounds=arguments.rounds, warmup=2)
    print(f"batch size {batch_size}")
    figures = compare(seconds, amount=batch_size * arguments.new_tokens, unit="tokens")
    expected = ways["stock dynamic"]()[:, PROMPT_TOKENS:]
    for name, way in ways.items():
        equal = (way()[:, PROMPT_TOKENS:] == expected).float().mean().item()
        figures["ways"][name]["equal_tokens"] = equal
        print_row(name, f"{equal:.1%} of the tokens as stock dynamic")
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, rounds=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args(argv)

    def work() -> None:
        sizes = {batch_size: measure(arguments, batch_size) for batch_size in arguments.batch_sizes}
        finish(arguments, {"benchmark": "generation", "batch_sizes": sizes})

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
