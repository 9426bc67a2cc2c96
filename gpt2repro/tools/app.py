"""A web page on this machine to try a model: a prompt, the settings of sampling, and the text as it is generated.

    python -m gpt2repro.tools.app runs/demo/latest                      # extra `app`; then open http://127.0.0.1:7860
    python -m gpt2repro.tools.app openai-community/gpt2 --port 8000

The page completes text; it is not a chat. It listens on 127.0.0.1 only, comes with its own fonts and scripts and sends
nothing to anyone. The same prompt, settings and seed give the same text as `python -m eval.sample`.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.app(__doc__, None))

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from gpt2repro.eval.loading import load_model, max_positions
from gpt2repro.eval.sample import sample

MAX_REQUEST = 200_000  # bytes; a prompt of GPT-2's 1,024 positions has about 5,000
MAX_WAITING = 8  # requests in the queue; the model answers one at a time


def complete(model: Any, tokenizer: Any, prompt: str, **settings: Any) -> Iterator[str]:
    """The prompt with what the model has generated so far, after every token; the last text is `sample`'s.

    `settings` are `sample`'s. Closing the iterator stops the model after its current token.

    Raises:
        ValueError: prompt and new tokens do not fit the model.
    """
    stop = threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    criteria = StoppingCriteriaList(
        [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
    )
    settings |= {"num_samples": 1, "streamer": streamer, "stopping_criteria": criteria}
    with ThreadPoolExecutor(max_workers=1) as executor:
        sampling = executor.submit(sample, model, tokenizer, prompt, **settings)
        sampling.add_done_callback(lambda _: streamer.end())  # after an error as well
        try:
            text = prompt
            for piece in streamer:
                text += piece
                yield text
            yield sampling.result()[0]
        finally:
            stop.set()


def page(model: Any, tokenizer: Any, title: str) -> Any:
    """The page as a Gradio interface, not launched yet; ImportError where Gradio is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("the package gradio is missing: pip install gradio") from None

    def write(prompt: str, temperature: float, top_k: float, length: float, seed: float | None) -> Iterator[str]:
        settings = {"temperature": temperature, "top_k": int(top_k), "max_new_tokens": int(length)}
        try:
            yield from complete(model, tokenizer, prompt, **settings, seed=int(seed or 0))
        except ValueError as error:
            gr.Warning(str(error))  # after gr.Error the button would stay "Stop"

    longest = max_positions(model) - 1
    inputs = [
        gr.Textbox(label="Prompt", lines=3),
        gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0: the likeliest token"),
        gr.Slider(0, 200, value=50, step=1, label="Top-k", info="0: the whole vocabulary"),
        gr.Slider(1, longest, value=min(100, longest // 2), step=1, label="Length", info="new tokens"),
        gr.Number(value=42, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"),
    ]
    description = f"{model.num_parameters():,} parameters, {max_positions(model):,} positions"
    return gr.Interface(
        write, inputs, gr.Textbox(label="Text", lines=14), title=title, description=description,
        submit_btn="Complete", clear_btn=None, flagging_mode="never", show_progress="hidden",
    ).queue(max_size=MAX_WAITING)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = flags.app(__doc__, argv)

    def work() -> None:
        model, tokenizer = load_model(arguments.model)
        interface = page(model, tokenizer, "/".join(Path(arguments.model).parts[-2:]))
        try:
            _, url, _ = interface.launch(
                server_name="127.0.0.1", server_port=arguments.port, share=False, max_file_size=1, footer_links=[],
                app_kwargs={"max_body_size": MAX_REQUEST}, quiet=True, prevent_thread_lock=True,
            )  # fmt: skip
        except (OSError, OverflowError):
            raise ValueError(
                f"port {arguments.port} of 127.0.0.1 is not free: give another one with --port"
            ) from None
        print(f"{url} (Ctrl-C ends)", flush=True)
        interface.block_thread()

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
