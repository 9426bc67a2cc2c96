"""Does all of this agree with the released GPT-2 124M? Converts it and measures it; exit code 1 where it does not.

    python -m gpt2repro.tools.verify                                              # needs the network
    python -m gpt2repro.tools.verify --model gpt2-folder --data hellaswag_val.jsonl --dataset data/fineweb-edu-10b

The logits of the conversion against those of stock GPT-2, a sample, HellaSwag in both styles against the published
29.55 % and 31.14 %, and the loss where there is something to measure it on. On one GPU minutes, on a CPU hours.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2repro.eval.loading import load_model, run_command
from gpt2repro.eval.multiple_choice import command_parser, run_task
from gpt2repro.eval.sample import sample
from gpt2repro.eval.validation import main as validate
from gpt2repro.hub.convert import convert
from gpt2repro.hub.upload import hub_is_reachable
from gpt2repro.tools.report import GPT2_HELLASWAG

TOLERANCE = 0.1  # percentage points, about ten of HellaSwag's 10,042 items
TEXT = "GPT-2 is a language model that was trained to predict the next word of forty gigabytes of text."


def check_hellaswag(acc_norm: dict[str, float]) -> None:
    """Refuse figures (percent, by style) that are off the released GPT-2 124M's by more than TOLERANCE.

    Raises:
        ValueError: names every figure, measured and published.
    """
    if not all(abs(acc_norm[style] - published) <= TOLERANCE for style, published in GPT2_HELLASWAG.items()):
        both = ", ".join(f"{style} {acc_norm[style]:.2f} % (GPT-2 124M: {published:.2f} %)"
                         for style, published in GPT2_HELLASWAG.items())  # fmt: skip
        raise ValueError(f"HellaSwag's acc_norm is off by more than {TOLERANCE} points: {both}")


@torch.no_grad()
def largest_difference(stock: str, ours: str) -> float:
    """The largest difference of two checkpoints' logits on TEXT, in float64, where rounding does not count."""
    tokenizer = AutoTokenizer.from_pretrained(stock)
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    expected = GPT2LMHeadModel.from_pretrained(stock, dtype=torch.float64).eval()(input_ids).logits
    model, _ = load_model(ours, dtype="float64", device="cpu")
    return (model(input_ids).logits - expected).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="openai-community/gpt2", help="folder or Hub id of stock GPT-2 124M (default: %(default)s)"
    )
    parser.add_argument("--data", help="JSONL file of HellaSwag's validation items (default: the Hub's)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="prepared dataset whose validation loss is measured as well")
    source.add_argument("--text", help="a text file instead")
    arguments = parser.parse_args()
    if not (Path(arguments.model).is_dir() and arguments.data) and not hub_is_reachable():
        raise ValueError("the Hub does not answer: go where there is a network, or give --model FOLDER --data FILE")
    with TemporaryDirectory() as folder:
        ours = str(Path(folder) / "gpt2-repro")
        parameters = convert(arguments.model, ours, to="gpt2repro")
        print(f"{arguments.model}: {parameters:,} parameters")
        difference = largest_difference(arguments.model, ours)
        print(f"largest difference of logits: {difference:.1e}")
        if not difference < 1e-5:
            raise ValueError(f"the conversion's logits differ from stock's by {difference:.1e}: expected below 1e-5")
        print(sample(*load_model(ours), TEXT[:27], num_samples=1, max_new_tokens=12)[0])
        acc_norm, data = {}, ["--data", arguments.data] if arguments.data else []
        for style in GPT2_HELLASWAG:
            scoring = command_parser("").parse_args(["--model", ours, "--style", style, *data])
            acc_norm[style] = 100 * run_task(scoring, "hellaswag")["acc_norm"]
        for kind, place in (("--dataset", arguments.dataset), ("--text", arguments.text)):
            if place:
                validate(["--model", ours, kind, place])
        check_hellaswag(acc_norm)
    print("GPT-2 124M as published")


if __name__ == "__main__":
    run_command(main)
