"""lm-eval on a checkpoint, its result beside the weights.

    python -m eval.lm_harness --model runs/demo/latest --tasks hellaswag,piqa
    lm_eval --model hf --model_args pretrained=runs/demo/latest,trust_remote_code=True --tasks hellaswag    # the same

The tasks and the scoring are lm-eval's own; this adds only that a checkpoint of this project needs no trust in remote
code and that the figures land in CHECKPOINT/lm_eval.json (or --output). Needs lm_eval, the extra `eval`.
"""

from pathlib import Path

from eval.loading import load_from, max_positions, model_parser, run_command, write_json


def evaluate_with_lm_eval(
    model, tokenizer, tasks: list[str], *, batch_size: int = 16, limit: int | None = None, **more
):
    """The `results` of `lm_eval.simple_evaluate` and the versions of its tasks; `more` goes to it as it is.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError("lm-eval is not installed: pip install lm_eval") from None
    harness_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        max_length=max_positions(model),
    )
    outcome = lm_eval.simple_evaluate(harness_model, tasks=tasks, limit=limit, log_samples=False, **more)
    return {"results": outcome["results"], "versions": outcome["versions"], "lm_eval": lm_eval.__version__}


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--tasks", required=True, help="names of lm-eval's tasks, separated by commas")
    parser.add_argument("--include-path", help="folder with task definitions of your own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first N items of every task")
    parser.add_argument("--output", help="JSON file (default: lm_eval.json in the checkpoint's folder)")
    arguments = parser.parse_args()
    if not arguments.output and not Path(arguments.model).is_dir():
        parser.error("--output is needed where --model is no folder to write into")
    model, tokenizer = load_from(arguments)
    more = {}
    if arguments.include_path:
        from lm_eval.tasks import TaskManager

        more["task_manager"] = TaskManager(include_path=arguments.include_path)
    tasks = arguments.tasks.split(",")
    outcome = evaluate_with_lm_eval(
        model, tokenizer, tasks, batch_size=arguments.batch_size, limit=arguments.limit, **more
    )
    for task, figures in outcome["results"].items():
        numbers = {name.removesuffix(",none"): value for name, value in figures.items() if isinstance(value, float)}
        print(task, *(f"{name} {value:.4f}" for name, value in numbers.items()), sep="  ")
    write_json(arguments.output or Path(arguments.model) / "lm_eval.json", outcome)


if __name__ == "__main__":
    run_command(main)
