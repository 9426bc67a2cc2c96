"""Accuracy of multiple choice as a metric of the `evaluate` library; works without a network.

    metric = evaluate.load("eval/accuracy_metric.py")
    metric.compute(predictions=[[-9.1, -7.5]], references=[1], lengths=[[12, 30]])
    # {'acc': 1.0, 'acc_stderr': None, 'acc_norm': 1.0, 'acc_norm_stderr': None, 'n': 1}

`predictions` are summed log-probabilities of the choices, `references` the right choices, `lengths` what `acc_norm`
divides by (characters, bytes or tokens of each choice).
"""

import datasets
import evaluate

from .multiple_choice import accuracy


class MultipleChoiceAccuracy(evaluate.Metric):
    """The figures of `eval.multiple_choice.accuracy`, for everything that speaks `evaluate`."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of the likeliest choice, and of the likeliest for its length.",
            citation="",
            inputs_description=__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "lengths": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references, lengths):
        return accuracy(predictions, references, lengths)
