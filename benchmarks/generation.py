"""Greedy generation: this project's model beside the library's GPT-2 with the same weights and prompt.

    python -m benchmarks.generation [--batch-sizes 1 64] [--new-tokens 128] [--json F.json]

The ways take turns; tokens a second are new tokens over the whole call, prompt included, after a warm-up.
`dynamic` is `generate` as it comes, `compiled` the library's static cache with its compiled decode step. All ways must
write the same tokens in fp32; how many of them agree is part of the result, since rounding decides near ties in bf16.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.training_step import machine
from configuration_gpt2repro import NAMED_SHAPES
from eval.loading import run_command, write_json
from gpt2repro.hub.convert import from_stock
from gpt2repro.training.launch import use_huge_pages

WAYS = ("ours dynamic", "ours compiled", "stock dynamic", "stock compiled")


@torch.no_grad()
def measure(models: dict, *, batch_size: int, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Tokens a second of every way at one batch size, and the share of tokens equal to stock's."""
    prompt = torch.randint(models["stock"].config.vocab_size, (batch_size, arguments.prompt_tokens), device=device)
    settings = {
        "attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "max_new_tokens": arguments.new_tokens,
    }  # fmt: skip
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default", fullgraph=False)
    config._compile_all_devices = True  # the library compiles decoding on a CPU only when told so
    compiled = {"cache_implementation": "static", "compile_config": config}

    def way(name: str) -> Callable[[], torch.Tensor]:
        model, kind = name.split()
        return lambda: models[model].generate(prompt, **settings, **(compiled if kind == "compiled" else {}))

    ways = {name: way(name) for name in arguments.ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for turn in range(arguments.rounds + 2):
        for name, generate in ways.items():
            began = time.perf_counter()
            outputs[name] = generate().cpu()
            if turn > 1:
                seconds[name].append(time.perf_counter() - began)
    reference = outputs.get("stock dynamic", outputs[arguments.ways[0]])
    return {
        name: {
            "tokens_per_second": batch_size * arguments.new_tokens / median(values),
            "equal_tokens": (outputs[name] == reference)[:, arguments.prompt_tokens :].float().mean().item(),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--model-shape", default="gpt2", choices=list(NAMED_SHAPES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        use_huge_pages()
    torch.manual_seed(0)
    shape = {"n_positions": 1024, **NAMED_SHAPES[arguments.model_shape]}
    stock = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    models = {"ours": from_stock(stock).eval(), "stock": stock}
    models = {name: model.to(device, getattr(torch, arguments.dtype)) for name, model in models.items()}
    sizes = {}
    print(f"{'way':18} {'batch':>6} {'tokens/s':>10} {'equal to stock':>15}")
    for batch_size in arguments.batch_sizes:
        sizes[batch_size] = measure(models, batch_size=batch_size, arguments=arguments, device=device)
        for name, row in sizes[batch_size].items():
            print(
                f"{name:18} {batch_size:6} {row['tokens_per_second']:10,.1f} {row['equal_tokens']:15.1%}", flush=True
            )
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    figures = {"benchmark": "generation", "settings": settings, "batch_sizes": sizes, "machine": machine(device)}
    print(json.dumps(figures))
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    run_command(main)
