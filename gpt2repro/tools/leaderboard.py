"""Leaderboards: the figures of several models as a table, and as a picture over their training FLOPs.

Reads the JSON of eval.validation, eval.multiple_choice, eval.hellaswag and eval.core. The training FLOPs are those of
a checkpoint that a run of this project saved.
"""

from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure

from gpt2repro.hub.figures import RESULTS, read_json
from gpt2repro.run.checkpoints import RECORD
from gpt2repro.run.folder import RunFolder
from gpt2repro.train.estimates import flops_per_token

# CORE of the released models, in nanochat's leaderboard.
GPT2_CORE = {"GPT-2 124M": 0.1139, "GPT-2 355M": 0.1849, "GPT-2 774M": 0.2146, "GPT-2 1558M": 0.2565}
FLOPS = "training FLOPs"

Board = dict[str, dict[str, float | None]]  # the figures of every model


def read_board(files: list[str]) -> Board:
    """The figures of result files, a row for each model: for the same weights, whatever their folder was called.

    Raises:
        ValueError: a file that holds no results of an evaluation, or two that hold the same figure of a model.
    """
    board: Board = {}
    names: dict[str, str] = {}
    for file in files:
        result = read_json(Path(file))
        if not any(fields <= result.keys() for fields in RESULTS):
            raise ValueError(f"{file} holds no results: give the JSON of eval.validation, eval.hellaswag or eval.core")
        model = result["model"]
        weights = result.get("weights_sha256") or f"{model} {result.get('revision')}"
        name = names.setdefault(weights, f"{model} {weights[:8]}" if model in names.values() else model)
        row = board.setdefault(name, {FLOPS: training_flops(result)})
        for figure, value in _figures(result).items():
            if figure in row:
                raise ValueError(f"{file}: another file has {figure} of {name}: give one of them")
            row[figure] = value
    return board


def _figures(result: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one file, by names that differ where the figures cannot be compared."""
    if "core" in result:
        partial = f"centered accuracy of {len(result['tasks'])} tasks, {result['n']:,} items"
        return {"CORE" if result["complete"] else partial: result["core"]}
    if "task" in result:
        metric = "acc_norm" if "acc_norm" in result else "acc"
        return {f"{result['task']} {result['style']}, {metric} in %, {result['n']:,} items": 100 * result[metric]}
    where = ", ".join(Path(name).name for name in result["measured_on"].split(", "))
    return {f"loss, {where}": result["loss"], f"bits per byte, {where}": result["bits_per_byte"]}


def training_flops(result: dict[str, Any]) -> float | None:
    """The model FLOPs of the training of a run's checkpoint; None where the weights are others, or began as others."""
    checkpoint = Path(result["model"]).resolve()
    state, record = read_json(checkpoint / RECORD), RunFolder(checkpoint.parent).record()
    weights = state.get("files", {}).get("model.safetensors", {}).get("sha256", "")
    if record is None or weights != result.get("weights_sha256") or record["recipe"]["init_from"]:
        return None
    shape = {name: record["model"][name] for name in ("n_positions", "n_layer", "n_embd")}
    seq_len, parameters = record["recipe"]["seq_len"], record["model"]["parameters"]
    return float(state["tokens"] * flops_per_token(n_parameters=parameters, seq_len=seq_len, **shape))


def board_table(board: Board) -> list[list[str]]:
    """Rows of text, the first is the header; the released GPT-2 models follow where there is a figure of CORE."""
    names = _names(board)
    if "CORE" in names:
        board = {**board, **{f"{name} (nanochat)": {"CORE": core} for name, core in GPT2_CORE.items()}}
    rows = [[model, *(_cell(name, row.get(name)) for name in names)] for model, row in board.items()]
    return [["model", *names], *rows]


def _names(board: Board) -> list[str]:
    return list(dict.fromkeys(name for row in board.values() for name in row))


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2e}" if name == FLOPS else f"{value:.2f}" if "%" in name else f"{value:.4f}"


def draw_board(board: Board, target: str | Path | BinaryIO) -> None:
    """Write a panel for each figure as a PNG; a model with unknown training FLOPs is a horizontal line."""
    names = [name for name in _names(board) if name != FLOPS]
    columns = min(len(names), 2)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(6.0 * columns, 4.0 * lines), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    known = any(row[FLOPS] for row in board.values())
    for panel, name in zip(panels, names, strict=False):
        for index, (model, row) in enumerate(board.items()):
            if (height := row.get(name)) is None:
                continue
            if row[FLOPS]:
                panel.plot(row[FLOPS], height, "o", color=f"C{index}", label=model)
            else:
                panel.axhline(height, color=f"C{index}", linewidth=1, label=f"{model} ({FLOPS} not known)")
        if name == "CORE":
            for model, core in GPT2_CORE.items():
                panel.axhline(core, color="#444444", linestyle=":", linewidth=1)
                place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                panel.annotate(f"{model}, {core}", (0.0, core), xytext=(3, 2), fontsize=7, color="#444444", **place)
        panel.set(title=name, xlabel=FLOPS)
        panel.set_xscale("log") if known else panel.set_xticks([])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    for panel in list(figure.axes)[len(names) :]:
        panel.set_visible(False)
    figure.savefig(target, format="png")
