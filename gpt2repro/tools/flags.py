"""The flags of this package's commands. They import no heavy library, so `--help` and a wrong flag answer at once.

Each function takes the command's description and its words (None: those of the process) and returns what they say.
"""

from argparse import Namespace

from gpt2repro.command import Parser
from gpt2repro.data.shards import FORMATS
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_parser import parse_recipe


def app(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("model", help="checkpoint folder or Hub id of a causal language model")
    parser.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: %(default)s)")
    return parser.parse_args(argv)


def doctor(description: str | None, argv: list[str] | None) -> tuple[Recipe, Namespace]:
    """The recipe and the doctor's own flags."""
    parser = Parser(description)
    parser.add_argument("recipe", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--processes", type=int, default=1, help="how many will train (default: %(default)s)")
    parser.add_argument("--sharded", action="store_true", help="each of them holds a part of every tensor (FSDP2)")
    parser.add_argument("--dollars-per-hour", type=float, help="price of one process's device")
    arguments, fields = parser.parse_known_args(argv)
    path = vars(arguments).pop("recipe")
    return parse_recipe(["--recipe", path, *fields], default=path), arguments


def inspect(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="prepared dataset, checkpoint folder or Hub id")
    parser.add_argument("--verify", action="store_true", help="recompute every recorded sha256")
    parser.add_argument("--output", "--histogram", metavar="PNG", help="draw document lengths, or position embeddings")
    parser.add_argument("--format", default="auto", choices=FORMATS, help="of foreign shards, where it cannot be told")
    parser.add_argument("--tokenizer", help="of foreign shards or of a model without one: a folder or a Hub id")
    return parser.parse_args(argv)


def report(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("runs", nargs="*", help="folders of runs")
    parser.add_argument("--output", help="write the picture to this PNG file")
    parser.add_argument("--html", help="write one page to this file")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="print a table of the runs")
    parser.add_argument("--results", nargs="+", default=[], metavar="JSON", help="print a table of result files")
    parser.add_argument("--schedule", metavar="RECIPE", help="draw the learning rate of this recipe instead of runs")
    arguments = parser.parse_args(argv)
    of_runs = arguments.runs or arguments.html or arguments.compare
    if arguments.schedule or arguments.results:
        alone = not of_runs and not (arguments.schedule and arguments.results)
        complete = alone and (arguments.output or arguments.results)
    else:
        complete = arguments.compare or (arguments.runs and (arguments.output or arguments.html))
    if not complete:
        parser.error(
            "give runs with --output or --html, or --compare RUN RUN, or --results JSON JSON, or --schedule RECIPE "
            "--output PNG"
        )
    return arguments


def scaling(description: str | None, argv: list[str] | None) -> tuple[Recipe | None, Namespace]:
    """The recipe (None: compare with published figures) and the command's own flags."""
    parser = Parser(description)
    parser.add_argument("recipe", nargs="?", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--published", action="store_true", help="print published step times beside the prediction")
    parser.add_argument("--card", default="H100", choices=["A100", "H100", "H200"], help="(default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[2**power for power in range(10)], help="numbers of them"
    )
    parser.add_argument("--efficiency", type=float, help="matmul FLOP/s of a step / the card's peak, 0 to 1")
    parser.add_argument("--gradients", default="fp32", choices=["fp32", "bf16"], help="reduced by DDP (%(default)s)")
    parser.add_argument("--dollars-per-hour", type=float, help="price of one card")
    arguments, fields = parser.parse_known_args(argv)
    mixed = arguments.published and (fields or arguments != parser.parse_args(["--published"]))
    if mixed or not (arguments.published or arguments.recipe):
        parser.error("give a recipe, or --published alone")
    path = vars(arguments).pop("recipe")
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        parser.error(f"--efficiency is {arguments.efficiency}: give a share of the peak, above 0 and at most 1")
    if min(arguments.gpus) < 1:
        parser.error(f"--gpus has {min(arguments.gpus)}: give numbers of 1 and more")
    return parse_recipe(["--recipe", path, *fields], default=path) if path else None, arguments


def sweep(description: str | None, argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """The sweep's own flags, and the recipe's fields as words."""
    parser = Parser(description)
    parser.add_argument("recipe", help="the recipe's YAML; every field of it is also a flag")
    parser.add_argument("--set", action="append", required=True, metavar="FIELD=VALUES", help="values with commas")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--halve", action="store_true", help="after every seed, keep the better half of settings")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    arguments, fields = parser.parse_known_args(argv)
    parse_recipe(["--recipe", arguments.recipe, *fields], default=arguments.recipe)
    return arguments, fields


def verify(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("--model", default="openai-community/gpt2", help="stock GPT-2 124M (default: %(default)s)")
    parser.add_argument("--data", help="JSONL file of HellaSwag's validation items (default: the Hub's)")
    return parser.parse_args(argv)
