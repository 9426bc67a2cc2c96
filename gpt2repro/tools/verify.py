"""Verify the project against the released GPT-2 124M: convert it and measure it; exit code 1 where a figure is off.

    python -m gpt2repro.tools.verify                                                          # needs the network
    python -m gpt2repro.tools.verify --model gpt2-folder --data hellaswag_val.jsonl

Compares the conversion's logits with stock GPT-2's, and HellaSwag in both styles with the published 29.55 % and
31.14 %; prints a sample. It takes minutes on one GPU and hours on a CPU.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.verify(__doc__, None))

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import GPT2LMHeadModel

from gpt2repro.eval.flags import hellaswag
from gpt2repro.eval.loading import load_model
from gpt2repro.eval.multiple_choice import run_task
from gpt2repro.eval.sample import sample
from gpt2repro.hub.convert import convert
from gpt2repro.hub.loading import from_pretrained, load_tokenizer
from gpt2repro.hub.upload import hub_is_reachable
from gpt2repro.tools.report import GPT2_HELLASWAG

TOLERANCE = 0.1  # percentage points, about ten of HellaSwag's 10,042 items
TEXT = "GPT-2 is a language model that was trained to predict the next word of forty gigabytes of text."


def check_hellaswag(acc_norm: dict[str, float]) -> None:
    """Raise ValueError for scores (percent, by style) that differ from the released GPT-2 124M's by over TOLERANCE."""
    if not all(abs(acc_norm[style] - published) <= TOLERANCE for style, published in GPT2_HELLASWAG.items()):
        scores = [f"{style} {acc_norm[style]:.2f} % (GPT-2 124M: {published:.2f} %)"
                  for style, published in GPT2_HELLASWAG.items()]  # fmt: skip
        raise ValueError(f"HellaSwag's acc_norm is off by more than {TOLERANCE} points: {', '.join(scores)}")


@torch.no_grad()
def largest_difference(stock: str, ours: str) -> float:
    """The largest difference of two checkpoints' logits on TEXT, in float64, where rounding does not count."""
    input_ids = torch.tensor([load_tokenizer(stock)(TEXT)["input_ids"]])
    expected = from_pretrained(GPT2LMHeadModel, stock, dtype=torch.float64).eval()(input_ids).logits
    model, _ = load_model(ours, dtype="float64", device="cpu")
    return (model(input_ids).logits - expected).abs().max().item()


def main(argv: list[str] | None = None) -> int:
    arguments = flags.verify(__doc__, argv)

    def work() -> None:
        if not (Path(arguments.model).is_dir() and arguments.data) and not hub_is_reachable():
            raise ValueError("the Hub does not answer: use a machine with a network, or give --model DIR --data FILE")
        with TemporaryDirectory() as folder:
            ours = str(Path(folder) / "gpt2-repro")
            print(f"{arguments.model}: {convert(arguments.model, ours, to='gpt2repro'):,} parameters")
            difference = largest_difference(arguments.model, ours)
            print(f"largest difference of logits: {difference:.1e}")
            if not difference < 1e-5:
                raise ValueError(f"the logits differ from stock GPT-2's by {difference:.1e}: expected less than 1e-5")
            print(sample(*load_model(ours), TEXT[:27], num_samples=1, max_new_tokens=12)[0])
            acc_norm, data = {}, ["--data", arguments.data] if arguments.data else []
            for style in GPT2_HELLASWAG:
                scoring = hellaswag(None, ["--model", ours, "--style", style, *data])
                acc_norm[style] = 100 * run_task(scoring, "hellaswag")["acc_norm"]
        check_hellaswag(acc_norm)
        print("GPT-2 124M as published")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
