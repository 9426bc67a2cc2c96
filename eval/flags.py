"""The flags of this folder's commands. They import no heavy library, so `--help` and a wrong flag answer at once.

Each function takes the command's description and its words (None: those of the process) and returns what they say.
"""

import argparse
from pathlib import Path

from gpt2repro.command import Parser
from gpt2repro.data.shards import FORMATS
from gpt2repro.hub.flags import add_no_verify

from .tasks import TASKS

DTYPES = ("float32", "bfloat16", "float16")


def model_parser(description: str | None) -> Parser:
    """A parser with the options that every command with a model has."""
    parser = Parser(description)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id of a causal language model")
    parser.add_argument("--tokenizer", help="folder or Hub id, where the tokenizer is not beside the model")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu, … (default: the accelerator, else cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code beside the weights")
    add_no_verify(parser)
    return parser


def _benchmark_parser(description: str | None) -> Parser:
    parser = model_parser(description)
    parser.add_argument("--data", help="JSONL file of the task's items (default: the Hub's dataset)")
    styles = "how items are rendered (default: completion for hellaswag, harness for every other task)"
    parser.add_argument("--style", choices=["completion", "harness"], help=styles)
    parser.add_argument("--limit", type=int, help="score only the first N items (default: all)")
    parser.add_argument("--batch-size", type=int, help="rows a forward (default: as fills it); changes no figure")
    parser.add_argument("--output", help="write the figures to this JSON file and the items to .jsonl beside it")
    return parser


def hellaswag(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    return _benchmark_parser(description).parse_args(argv)


def multiple_choice(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = _benchmark_parser(description)
    parser.add_argument("--task", required=True, choices=TASKS, metavar="T", help=", ".join(TASKS))
    return parser.parse_args(argv)


def core(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(description)
    parser.add_argument("--bundle", help="folder with core.yaml and eval_data/ (default: the published one)")
    parser.add_argument("--tasks", help="labels of the bundle's tasks, separated by commas (default: all)")
    parser.add_argument("--limit", type=int, help="only N rows of every task; changes their few-shot examples too")
    parser.add_argument("--batch-size", type=int, help="rows a forward (default: as fills it); changes no verdict")
    parser.add_argument("--output", help="write the figures to this JSON file and the items to .jsonl beside it")
    return parser.parse_args(argv)


def lm_harness(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(description)
    parser.add_argument("--tasks", required=True, help="names of lm-eval's tasks, separated by commas")
    parser.add_argument("--include-path", help="folder with task definitions of your own")
    parser.add_argument("--fast", action="store_true", help="score with this project's scorer, in fewer forwards")
    batch_help = "requests a forward, with --fast those of text generation alone (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=16, help=batch_help)
    parser.add_argument("--limit", type=int, help="only the first N items of every task (default: all)")
    parser.add_argument("--output", help="JSON file (default: lm_eval.json in the checkpoint's folder)")
    arguments = parser.parse_args(argv)
    if not arguments.output and not Path(arguments.model).is_dir():
        parser.error("--output is needed where --model is no folder to write into")
    return arguments


def validation(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", nargs="+", metavar="DIR", help="token shards; their validation split is measured")
    source.add_argument("--text", "--texts", nargs="+", metavar="FILE", help="text files in UTF-8, and their mean")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="--dataset: nanoGPT's .bin must be named")
    parser.add_argument("--seq-len", type=int, help="tokens of a window (default: the model's longest)")
    parser.add_argument("--stride", type=int, help="--text: new tokens of a window (default: seq-len, no overlap)")
    parser.add_argument("--max-tokens", type=int, help="--dataset: count at most this many tokens (default: all)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows a forward (default: %(default)s)")
    parser.add_argument("--output", help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.dataset and arguments.stride is not None:
        parser.error("--stride goes with --text: the windows of a prepared dataset do not overlap")
    if arguments.text and arguments.max_tokens is not None:
        parser.error("--max-tokens goes with --dataset: a text is measured to its end")
    return arguments


def sample(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(description)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--interactive", action="store_true", help="read prompts from standard input, one a line")
    parser.add_argument("--num-samples", type=int, default=4, help="texts of a prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of a text (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="most likely tokens; 0: all (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    greedy = "always the most likely token: one text"
    parser.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help=greedy)
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: %(default)s)")
    return parser.parse_args(argv)
