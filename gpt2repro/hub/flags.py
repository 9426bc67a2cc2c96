"""The flags of this package's commands. They import no heavy library, so `--help` and a wrong flag answer at once.

Each function takes the command's description and its words (None: those of the process) and returns what they say.
"""

from argparse import Namespace
from pathlib import Path

from gpt2repro.command import Parser


def add_no_verify(parser: Parser) -> None:
    """The flag of every command that only reads a checkpoint."""
    no_verify = "do not compare the files of a run's checkpoint with their recorded sha256"
    parser.add_argument("--no-verify", dest="verify", action="store_false", help=no_verify)


def convert(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("src", help="folder, Hub id, or the .pt file of nanoGPT or build-nanogpt")
    parser.add_argument("dst", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("gpt2", "gpt2repro"), required=True)
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="where none is beside the weights; also meta.pkl")
    add_no_verify(parser)
    return parser.parse_args(argv)


def gguf(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("file", type=Path, help="file to make, e.g. model.gguf")
    add_no_verify(parser)
    return parser.parse_args(argv)


def publish(description: str | None, argv: list[str] | None) -> Namespace:
    parser = Parser(description)
    parser.add_argument("checkpoint", help="folder of a checkpoint, e.g. runs/demo/latest")
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME, or NAME for your own account")
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="make the folder that would be uploaded, and stop")
    parser.add_argument("--stock", action="store_true", help="publish the conversion to stock GPT-2")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    parser.add_argument("--license", help="for the card, e.g. mit (default: that of the weights, where known)")
    parser.add_argument("--language", help="for the card (default: en)")
    return parser.parse_args(argv)
