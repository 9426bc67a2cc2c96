"""Generation throughput of this project's model and of the library's GPT-2, with the same weights and prompt.

    python -m benchmarks.generation [--batch-sizes 1 16] [--new-tokens 128] [--json F.json]
    python -m benchmarks.generation --dtype float32 --llama-cpp GPT2_TOKENIZER       # llama.cpp too, package xllamacpp

Greedy decoding, the ways in turns; tokens a second are new tokens over the whole call, prompt included. `dynamic` is
`generate` with its defaults, `static` has the library's static cache, `compiled` also its compiled decode step. In
fp32 all ways must write the same tokens. In bf16 rounding decides near ties, so the share of equal tokens is part of
the result. The bound is the time to read every weight once for each step. A line says what of a compiled call is spent
outside of the model: in the library's loop, and on the prompt.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from transformers import AutoTokenizer, CompileConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import compare, fastest, finish, model_parser, print_row, time_in_turns
from configuration_gpt2repro import NAMED_SHAPES
from gpt2repro import command
from gpt2repro.hub.convert import from_stock
from gpt2repro.hub.gguf import write_gguf

PROMPT_TOKENS = 32


def measure(arguments: argparse.Namespace, batch_size: int) -> dict:
    """Tokens a second of every model and kind of cache, and the share of tokens that are those of `stock dynamic`."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**NAMED_SHAPES[arguments.model_shape])).eval()
    compiled = CompileConfig(mode="reduce-overhead" if arguments.device == "cuda" else "default", fullgraph=False)
    compiled._compile_all_devices = True  # without it the library compiles decoding on a GPU only
    static = {"cache_implementation": "static"}
    caches = {
        "dynamic": {},
        "static": {**static, "disable_compile": True},
        "compiled": {**static, "compile_config": compiled},
    }
    prompt = torch.randint(stock.config.vocab_size, (batch_size, PROMPT_TOKENS), device=arguments.device)
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": arguments.new_tokens}

    def generate(model, cache: dict) -> torch.Tensor:  # (batch_size, prompt and new tokens)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy, **cache).cpu()

    ways: dict[str, Callable] = {}
    models = {"ours": from_stock(stock), "stock": stock}
    for name, model in models.items():
        model.to(arguments.device, getattr(torch, arguments.dtype))
        ways |= {f"{name} {kind}": partial(generate, model, cache) for kind, cache in caches.items()}
    rivals = {"llama.cpp": llama_cpp(models["ours"], prompt, arguments)} if arguments.llama_cpp else {}
    seconds = time_in_turns(ways | rivals, rounds=arguments.rounds, warmup=2)
    print(f"batch size {batch_size}")
    figures = compare(seconds, amount=batch_size * arguments.new_tokens, unit="tokens")
    expected = ways["stock dynamic"]()[:, PROMPT_TOKENS:]
    for name, way in ways.items():
        equal = (way()[:, PROMPT_TOKENS:] == expected).float().mean().item()
        figures["ways"][name]["equal_tokens"] = equal
        print_row(name, f"{equal:.1%} of the tokens as stock dynamic")
    for name, model in models.items():
        outside = outside_of_the_model(model, ways[f"{name} compiled"], compiled)
        figures["ways"][f"{name} compiled"]["outside_of_the_model"] = outside
        print_row(f"{name} compiled", f"{outside:.1%} of the call outside of the compiled model")
    weights, words = sum(p.nbytes for p in stock.parameters()), torch.ones(2**26, device=arguments.device)
    bound = batch_size * words.nbytes / fastest(words.sum) / weights
    print_row("bound", f"{bound:,.0f} tokens/s: every step reads {weights / 1e6:,.0f} MB of weights")
    return {**figures, "bound_tokens_per_second": bound}


def outside_of_the_model(model, way: Callable[[], object], compiled: CompileConfig) -> float:
    """The share of a call of `generate` that is not spent in the compiled model; on CUDA kernels may overlap it."""
    inside, call = 0.0, model.get_compiled_call(compiled)

    def timed(*args, **kwargs):
        nonlocal inside
        began = time.perf_counter()
        output = call(*args, **kwargs)
        inside += time.perf_counter() - began
        return output

    began = time.perf_counter()
    with mock.patch.object(model, "get_compiled_call", lambda config: timed):
        way()
    return 1 - inside / (time.perf_counter() - began)


def llama_cpp(model, prompt: torch.Tensor, arguments: argparse.Namespace) -> Callable[[], None]:
    """The same weights and prompt in llama.cpp, on as many threads; every sequence has a slot of its own."""
    if arguments.dtype != "float32" or arguments.device != "cpu":
        raise ValueError("llama.cpp gets float32 weights on the CPU here: give --dtype float32 --device cpu")
    import xllamacpp

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(arguments.llama_cpp).save_pretrained(folder)
        write_gguf(folder, Path(folder) / "model.gguf")
        params, batch_size = xllamacpp.CommonParams(), len(prompt)
        params.model.path = f"{folder}/model.gguf"
        params.n_ctx, params.n_parallel = batch_size * (PROMPT_TOKENS + arguments.new_tokens), batch_size
        params.n_gpu_layers, params.verbosity, params.cpuparams.n_threads = 0, 0, torch.get_num_threads()
        server = xllamacpp.Server(params)
    request = {"n_predict": arguments.new_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

    def complete() -> None:
        requests = [{**request, "prompt": ids} for ids in prompt.tolist()]
        with ThreadPoolExecutor(batch_size) as pool:
            answers = list(pool.map(server.handle_completions, requests))
        written = [answer["usage"]["completion_tokens"] for answer in answers]
        if written != [arguments.new_tokens] * batch_size:
            raise ValueError(f"llama.cpp wrote {written} tokens, not {arguments.new_tokens} for each prompt")

    return complete


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, rounds=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--llama-cpp", metavar="TOKENIZER", help="race llama.cpp too; folder of GPT-2's tokenizer")
    arguments = parser.parse_args(argv)

    def work() -> None:
        sizes = {batch_size: measure(arguments, batch_size) for batch_size in arguments.batch_sizes}
        finish(arguments, {"benchmark": "generation", "batch_sizes": sizes})

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
