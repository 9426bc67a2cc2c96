"""Text from any checkpoint: greedy or top-k sampling with a seed, for one prompt or for many.

    python -m eval.sample --model runs/demo/latest --prompt "Hello, I'm a language model,"
    python -m eval.sample --model openai-community/gpt2 --interactive

The texts, prompt included, go to standard output.
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.sample(__doc__, None))

import argparse
import sys

import torch

from .loading import load_from, max_positions


@torch.no_grad()
def sample(
    model, tokenizer, prompt: str, *, num_samples: int = 4, max_new_tokens: int = 32, top_k: int = 50,
    temperature: float = 1.0, seed: int = 42, **options,
) -> list[str]:
    """`num_samples` continuations of the prompt, each with the prompt before it.

    A text ends at <|endoftext|> or after `max_new_tokens`. An empty prompt starts a new document. `temperature=0` is
    greedy, which gives one text; `top_k=0` draws from the whole vocabulary; `options` go to `generate` as they are.
    The caller's random state stays as it is. A compiled model runs eagerly: a sequence that grows by a token a step
    would be compiled again and again.

    Raises:
        ValueError: prompt and new tokens do not fit the model, or a number out of its range.
    """
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples is {num_samples} and max_new_tokens {max_new_tokens}: give at least 1 of each")
    prompt.encode()  # refuses lone surrogates, which no tokenizer reads
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
    if len(ids) + max_new_tokens > max_positions(model):
        raise ValueError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{max_positions(model)} positions: shorten the prompt or ask for fewer tokens"
        )
    input_ids = torch.tensor([ids], device=model.device)
    if temperature:
        options |= {"top_k": top_k, "temperature": temperature, "num_return_sequences": num_samples}
    accelerators = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(accelerators), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=bool(temperature),
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **options,
        )
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def _print_samples(arguments: argparse.Namespace) -> None:
    names = ("num_samples", "max_new_tokens", "top_k", "temperature", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    model, tokenizer = load_from(arguments)
    if not arguments.interactive:
        print("\n".join(f"> {text}" for text in sample(model, tokenizer, arguments.prompt, **settings)))
        return
    print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:  # every prompt is independent of those before
        try:
            print(*sample(model, tokenizer, line.rstrip("\n"), **settings), sep="\n", flush=True)
        except ValueError as error:  # a prompt that is too long must not end the session
            command.explain(error)


def main(argv: list[str] | None = None) -> int:
    arguments = flags.sample(__doc__, argv)
    return command.run(lambda: _print_samples(arguments))


if __name__ == "__main__":
    sys.exit(main())
