"""Accuracy of multiple choice as a metric of the `evaluate` library; works without a network.

    metric = evaluate.load("eval/accuracy_metric.py")
    metric.compute(predictions=[[-9.1, -7.5]], references=[1], lengths=[[12, 30]])
    # {'acc': 1.0, 'acc_stderr': None, 'acc_norm': 1.0, 'acc_norm_stderr': None, 'n': 1}

`predictions` are summed log-probabilities of the choices, `references` the right choices, `lengths` what `acc_norm`
divides by (characters, bytes or tokens of each choice).
"""

import datasets
import evaluate

from .accuracy import accuracy

NUMBERS = datasets.Sequence(datasets.Value("float64"))
FEATURES = {"predictions": NUMBERS, "references": datasets.Value("int64"), "lengths": NUMBERS}


class MultipleChoiceAccuracy(evaluate.Metric):
    """`eval.accuracy.accuracy` for programs that use `evaluate`."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of the choice with the highest log-probability, and the highest for its length.",
            citation="", inputs_description=__doc__, features=datasets.Features(FEATURES),
        )

    def _compute(self, predictions, references, lengths):
        return accuracy(predictions, references, lengths)
