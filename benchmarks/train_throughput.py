"""Training throughput of this project's model and of the library's GPT-2, each at its best settings, in one process.

    python -m benchmarks.train_throughput                                  # 64 x 1024 on CUDA, 4 x 256 on a CPU
    python -m benchmarks.train_throughput --batch-size 4 --seq-len 512 --memory --json memory.json
    python -m benchmarks.train_throughput --nanogpt nanoGPT/model.py       # nanoGPT's model takes part

The variants take turns, so each ratio is one of neighbouring steps; the table shows median and quartiles over the
rounds. --memory also measures what a step holds above parameters, gradients and optimizer state. nanoGPT's model is
compiled as in its train.py, has its own parameter groups and our weights; its loss must equal ours with its GELU.
"""

import argparse
import sys

from torch.nn.attention import SDPBackend

from benchmarks.measuring import compare, finish, print_row, time_in_turns
from benchmarks.training_step import HEAD, Step, Variant, cells, step_parser
from gpt2repro import command

VARIANTS = {
    "ours": Variant(),
    "ours-chunked": Variant(loss="chunked"),
    "ours-eager": Variant(compile_mode=None),
    "ours-eager-chunked": Variant(compile_mode=None, loss="chunked"),
    "ours-flash": Variant(loss="chunked", sdpa_backend=SDPBackend.FLASH_ATTENTION),
    "ours-cudnn": Variant(loss="chunked", sdpa_backend=SDPBackend.CUDNN_ATTENTION),
    "ours-max-autotune": Variant(loss="chunked", compile_mode="max-autotune-no-cudagraphs"),
    "stock": Variant(model="stock"),
    "stock-eager": Variant(model="stock", compile_mode=None),
}


def measure(arguments: argparse.Namespace) -> dict:
    """Speed, MFU and memory of every variant, and the ratios of ours to the others."""
    variants = {name: VARIANTS[name] for name in arguments.variants}
    if arguments.nanogpt:
        variants["nanogpt"] = Variant(model="nanogpt")
    steps = {name: Step(variant, arguments) for name, variant in variants.items()}
    seconds = time_in_turns(steps, rounds=arguments.rounds)
    figures = compare(seconds, amount=arguments.batch_size * arguments.seq_len, unit="tokens")
    print_row("way", *HEAD, "compiled")
    for name, row in figures["ways"].items():
        row |= steps[name].speed(seconds[name]) | (steps[name].memory() if arguments.memory else {})
        row["compiled"] = steps[name].how()
        print_row(name, *cells(row), row["compiled"])
    return {"benchmark": "train_throughput", **figures}


def main(argv: list[str] | None = None) -> int:
    parser = step_parser(__doc__)
    default = ["ours", "ours-chunked", "stock", "stock-eager"]
    parser.add_argument("--variants", nargs="+", default=default, choices=list(VARIANTS))
    parser.add_argument("--nanogpt", metavar="MODEL_PY", help="model.py of a checkout of nanoGPT, to race it too")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a step")
    arguments = parser.parse_args(argv)
    return command.run(lambda: finish(arguments, measure(arguments)))


if __name__ == "__main__":
    sys.exit(main())
