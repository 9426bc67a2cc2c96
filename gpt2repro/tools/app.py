"""A web page on this machine to try a model: a prompt, the settings of sampling, and the text as it is written.

    python -m gpt2repro.tools.app runs/demo/latest                      # extra `app`; then open http://127.0.0.1:7860
    python -m gpt2repro.tools.app openai-community/gpt2 --port 8000

It completes text and does not converse. The page listens on 127.0.0.1 only, brings its fonts and scripts along and
reports nothing to anyone. The same prompt, settings and seed write the same text as `python -m eval.sample`.
"""

import argparse
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from gpt2repro.eval.loading import load_model, max_positions, run_command
from gpt2repro.eval.sample import sample


def complete(
    model, tokenizer, prompt: str, *, temperature: float = 1.0, top_k: int = 50, length: int = 100, seed: int = 42
) -> Iterator[str]:
    """The prompt and what the model has written so far, again and again until `length` tokens or <|endoftext|>.

    `temperature=0` always takes the likeliest token; `top_k=0` draws from the whole vocabulary. Closing the iterator
    stops the model after its current token.

    Raises:
        ValueError: prompt and length do not fit the model.
    """
    stop = threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(max_workers=1) as executor:
        writing = executor.submit(
            sample, model, tokenizer, prompt,
            num_samples=1, max_new_tokens=length, top_k=top_k, temperature=temperature, seed=seed, streamer=streamer,
            stopping_criteria=StoppingCriteriaList(
                [lambda ids, scores, **_: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)]
            ),
        )  # fmt: skip
        writing.add_done_callback(lambda _: streamer.end())  # an error, too, ends the stream
        try:
            text = prompt
            for piece in streamer:
                text += piece
                yield text
            yield writing.result()[0]
        finally:
            stop.set()


def page(model, tokenizer, title: str):
    """The page, not launched yet.

    Raises:
        ValueError: the package gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the package gradio is missing: pip install gradio") from None

    def write(prompt, temperature, top_k, length, seed):
        settings = {"temperature": temperature, "top_k": int(top_k), "length": int(length), "seed": int(seed or 0)}
        try:
            yield from complete(model, tokenizer, prompt, **settings)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    longest = max_positions(model) - 1
    return gr.Interface(
        write,
        inputs=[
            gr.Textbox(label="Prompt", lines=3),
            gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0: the likeliest token"),
            gr.Slider(0, 200, value=50, step=1, label="Top-k", info="0: the whole vocabulary"),
            gr.Slider(1, longest, value=min(100, longest // 2), step=1, label="Length", info="new tokens"),
            gr.Number(value=42, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"),
        ],
        outputs=gr.Textbox(label="Text", lines=14),
        title=title,
        description=f"{model.num_parameters():,} parameters, {max_positions(model):,} positions",
        submit_btn="Complete",
        clear_btn=None,
        flagging_mode="never",
        analytics_enabled=False,
        show_progress="hidden",
        time_limit=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id of a causal language model")
    parser.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: %(default)s)")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    interface = page(model, tokenizer, "/".join(Path(arguments.model).parts[-2:]))
    try:
        _, url, _ = interface.launch(
            server_name="127.0.0.1", server_port=arguments.port, footer_links=[], quiet=True, prevent_thread_lock=True
        )
    except (OSError, OverflowError):
        raise ValueError(f"port {arguments.port} of 127.0.0.1 is not free: give another one with --port") from None
    print(f"{url} (Ctrl-C ends)", flush=True)
    interface.block_thread()


if __name__ == "__main__":
    run_command(main)
