"""lm-eval on a checkpoint, its result beside the weights.

    python -m eval.lm_harness --model runs/demo/latest --tasks hellaswag,piqa
    lm_eval --model hf --model_args pretrained=runs/demo/latest,trust_remote_code=True --tasks hellaswag    # the same

The tasks and the scoring are lm-eval's own; this adds only that a checkpoint of this project needs no trust in remote
code and that the figures land in CHECKPOINT/lm_eval.json (or --output). Needs lm_eval, the extra `eval`.
"""

from pathlib import Path

from .loading import model_parser, output_file, run_command, write_json


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--tasks", required=True, help="names of lm-eval's tasks, separated by commas")
    parser.add_argument("--include-path", help="folder with task definitions of your own")
    parser.add_argument("--batch-size", type=int, default=16, help="requests a forward (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first N items of every task (default: all)")
    parser.add_argument("--output", help="JSON file (default: lm_eval.json in the checkpoint's folder)")
    arguments = parser.parse_args()
    if not arguments.output and not Path(arguments.model).is_dir():
        parser.error("--output is needed where --model is no folder to write into")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("lm-eval is not installed: pip install lm_eval") from None
    tasks, manager = arguments.tasks.split(","), TaskManager(include_path=arguments.include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}: lm_eval ls tasks lists them")
    outcome = lm_eval.simple_evaluate(
        "hf",
        model_args={
            "pretrained": arguments.model,
            "tokenizer": arguments.tokenizer,
            "dtype": arguments.dtype,
            "trust_remote_code": arguments.trust_remote_code,
            "backend": "causal",
        },
        tasks=tasks,
        task_manager=manager,
        batch_size=arguments.batch_size,
        device=arguments.device,
        limit=arguments.limit,
        log_samples=False,
    )
    if outcome is None:  # under `accelerate launch` the main process alone has it
        return
    for task, figures in outcome["results"].items():
        numbers = {name.removesuffix(",none"): value for name, value in figures.items() if isinstance(value, float)}
        print(task, *(f"{name} {value:.4f}" for name, value in numbers.items()), sep="  ")
    kept = {"results": outcome["results"], "versions": outcome["versions"], "lm_eval": lm_eval.__version__}
    write_json(output_file(arguments.output or Path(arguments.model) / "lm_eval.json"), kept)


if __name__ == "__main__":
    run_command(main)
