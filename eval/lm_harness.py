"""lm-eval on a checkpoint, with its results beside the weights.

    python -m eval.lm_harness --model runs/demo/latest --tasks hellaswag,piqa
    lm_eval --model hf --model_args pretrained=runs/demo/latest,trust_remote_code=True --tasks hellaswag    # the same

The tasks and the scoring are lm-eval's own. With --fast this project's scorer gives the log-likelihoods: what requests
share is computed once, and in float32 they equal those of lm-eval's `hf`. This command needs no trust in the code
beside the weights of this project, and writes CHECKPOINT/lm_eval.json (or --output). Needs lm_eval, the extra `eval`.
"""

from gpt2repro import command

from . import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.lm_harness(__doc__, None))

import argparse
import sys
from pathlib import Path

from .loading import best_device, load_from
from .output import check_output, measured, write_results


def _evaluate(arguments: argparse.Namespace) -> None:
    output = arguments.output or str(Path(arguments.model) / "lm_eval.json")
    check_output(output)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed ({error}): pip install lm_eval") from None
    tasks, manager = arguments.tasks.split(","), TaskManager(include_path=arguments.include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}: lm_eval ls tasks lists them")
    identity = measured(load_from(arguments)[0], arguments.model)  # lm-eval would also score damaged or NaN weights
    options = {name: getattr(arguments, name) for name in ("tokenizer", "dtype", "trust_remote_code")}
    model = "hf"
    if arguments.fast:
        from .lm_eval_model import NAME as model  # the import registers it
    outcome = lm_eval.simple_evaluate(
        model, model_args={"pretrained": arguments.model, "backend": "causal", **options}, tasks=tasks,
        task_manager=manager, batch_size=arguments.batch_size, device=arguments.device or best_device(),
        limit=arguments.limit, log_samples=False,
    )
    if outcome is None:  # under `accelerate launch` only the main process has it
        return
    print(make_table(outcome))
    figures = {"results": outcome["results"], "versions": outcome["versions"], "lm_eval": lm_eval.__version__}
    write_results(output, {**identity, **figures, "lm_eval_model": model})


def main(argv: list[str] | None = None) -> int:
    arguments = flags.lm_harness(__doc__, argv)
    return command.run(lambda: _evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())
