"""A look into the weights of a checkpoint: position embeddings, how alike positions are, and weight histograms.

    python -m eval.inspect_model --model runs/demo/latest --output weights.png
    python -m eval.inspect_model --model openai-community/gpt2 --output gpt2.png --json gpt2.json

A model that was trained long has position embeddings that are smooth along the positions; noise is what it started
from. The picture shows the table, single channels as curves, the cosine similarity of all pairs of positions and the
distribution of the weights by kind; the numbers go to standard output.
"""

from pathlib import Path

import torch

from eval.loading import load_from, model_parser, run_command, write_json

CHANNELS = (0.2, 0.5, 0.8)  # which channels are drawn as curves, as places between the first and the last
BINS = 61  # of a histogram
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
KINDS = {"token embedding": "wte", "position embedding": "wpe", "attention": "attn", "MLP": "mlp"}


def position_table(model) -> torch.Tensor | None:
    """The learned position embeddings (n_positions, n_embd), or None for a model without such a table."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(module, torch.nn.Embedding):
            return module.weight.detach().float().cpu()
    return None


def roughness(table: torch.Tensor) -> torch.Tensor:
    """How much every channel jumps from position to position: 1 for noise, towards 0 for a smooth curve; (n_embd,).

    Half the mean squared step over the variance (von Neumann's ratio), which for independent values is 1.
    """
    steps = table.diff(dim=0).square().mean(0)
    return steps / (2 * table.var(0, correction=0)).clamp_min(1e-12)


def similarity(table: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of positions, (n_positions, n_positions)."""
    unit = torch.nn.functional.normalize(table, dim=-1)
    return unit @ unit.T


def weights_by_kind(model) -> dict[str, torch.Tensor]:
    """All matrices of each kind as one flat tensor; what fits no kind of GPT-2's names is left out."""
    groups: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        for kind, part in KINDS.items():
            if parameter.dim() == 2 and part in name.split("."):
                groups[kind].append(parameter.detach().float().flatten().cpu())
    return {kind: torch.cat(tensors) for kind, tensors in groups.items() if tensors}


def measure(model) -> dict:
    """The numbers of the picture."""
    weights = {
        kind: {"std": values.std().item(), "largest": values.abs().max().item(), "count": values.numel()}
        for kind, values in weights_by_kind(model).items()
    }
    table = position_table(model)
    if table is None:
        return {"position_embedding": None, "weights": weights}
    cosines = similarity(table)
    positions = {
        "shape": list(table.shape),
        "roughness_median": roughness(table).median().item(),
        "neighbour_similarity_mean": cosines.diagonal(1).mean().item(),
    }
    return {"position_embedding": positions, "weights": weights}


def draw_weights(model, png: str | Path, *, title: str = "") -> None:
    """Write the picture: four panels, or the histograms alone for a model without a position table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = position_table(model)
    figure = Figure(figsize=(11, 8) if table is not None else (6, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    if table is None:
        _draw_histograms(figure.subplots(), model)
    else:
        panels = figure.subplots(2, 2).flatten()
        _draw_positions(panels[0], panels[1], panels[2], table)
        _draw_histograms(panels[3], model)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def _draw_positions(picture, curves, cosines, table: torch.Tensor) -> None:
    bound = 3 * table.std().item()
    image = picture.imshow(table, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    picture.set(title="position embeddings", xlabel="channel", ylabel="position")
    picture.figure.colorbar(image, ax=picture)
    for place in CHANNELS:
        channel = int(place * table.shape[1])
        curves.plot(table[:, channel], linewidth=0.9, label=f"channel {channel}")
    median = roughness(table).median().item()
    curves.set(title=f"channels over positions (roughness {median:.3f}, noise is 1)", xlabel="position")
    curves.legend(frameon=False, fontsize=8)
    curves.grid(alpha=0.25)
    image = cosines.imshow(similarity(table), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    cosines.set(title="cosine similarity of positions", xlabel="position", ylabel="position")
    cosines.figure.colorbar(image, ax=cosines)


def _draw_histograms(panel, model) -> None:
    for kind, values in weights_by_kind(model).items():
        reach = 5 * values.std().item()
        counts = torch.histc(values, bins=BINS, min=-reach, max=reach)
        centres = torch.linspace(-reach, reach, BINS)
        density = counts / counts.sum() / (2 * reach / BINS)
        panel.plot(centres, density, linewidth=1.2, label=f"{kind}, std {values.std().item():.3f}")
    panel.set(title="weights by kind", xlabel="value", ylabel="density", yscale="log")
    panel.locator_params(axis="x", nbins=6)
    panel.legend(frameon=False, fontsize=8, loc="lower center")
    panel.grid(alpha=0.25)


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--output", required=True, help="write the picture to this PNG file")
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    model, _ = load_from(arguments)
    numbers = measure(model)
    draw_weights(model, arguments.output, title=arguments.model)
    positions = numbers["position_embedding"]
    if positions is None:
        print("position embedding: none (the model has no learned table)")
    else:
        print(
            f"position embedding: {positions['shape'][0]} x {positions['shape'][1]}, median roughness "
            f"{positions['roughness_median']:.3f} (noise is 1), neighbours' mean cosine "
            f"{positions['neighbour_similarity_mean']:.3f}"
        )
    for kind, figures in numbers["weights"].items():
        print(f"{kind}: std {figures['std']:.4f}, largest {figures['largest']:.3f}, {figures['count']:,} weights")
    if arguments.json:
        write_json(arguments.json, numbers)


if __name__ == "__main__":
    run_command(main)
