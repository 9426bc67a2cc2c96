"""HellaSwag in the two styles that the field quotes.

    python -m eval.hellaswag --model runs/demo/latest --output hellaswag.json
    python -m eval.hellaswag --model openai-community/gpt2 --style harness --data hellaswag_val.jsonl --limit 500

style        context                                 acc_norm divides by    released GPT-2 124M (acc_norm, all 10,042)
completion   the raw `ctx`, as in build-nanogpt      the ending's tokens    29.55 %
harness      "activity: ctx", brackets taken out     its characters         31.14 %

Figures go to the JSON file, every item's scores to the .jsonl beside it. Name the style with every figure.
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.hellaswag(__doc__, None))

import sys

from .multiple_choice import benchmark_command


def main(argv: list[str] | None = None) -> int:
    return benchmark_command(flags.hellaswag(__doc__, argv), "hellaswag")


if __name__ == "__main__":
    sys.exit(main())
