"""A look into the weights of a checkpoint: position embeddings, how alike positions are, and weight histograms.

    python -m gpt2repro.tools.inspect_model --model runs/demo/latest --output weights.png
    python -m gpt2repro.tools.inspect_model --model openai-community/gpt2 --output gpt2.png --json gpt2.json

A model that was trained long has position embeddings that are smooth along the positions; noise is what it started
from. The picture shows the table, single channels as curves, the cosine similarity of all pairs of positions and the
distribution of the weights by kind; the numbers go to standard output.
"""

from pathlib import Path

import torch

from gpt2repro.eval.loading import load_from, model_parser, output_file, run_command, write_json

CHANNELS = (0.2, 0.5, 0.8)  # which channels are drawn as curves, as places between the first and the last
BINS = 61  # of a histogram
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


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
    """All matrices of a kind as one flat tensor; the kind is the end of the name, e.g. `attn.c_proj` in all blocks."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            kind = ".".join(name.removesuffix(".weight").removeprefix("transformer.").split(".")[-2:])
            groups.setdefault(kind, []).append(parameter.detach().float().flatten().cpu())
    return {kind: torch.cat(tensors) for kind, tensors in groups.items()}


def measure(model) -> dict:
    """The numbers of the picture."""
    weights = {
        kind: {"std": values.std().item(), "largest": values.abs().max().item(), "count": values.numel()}
        for kind, values in weights_by_kind(model).items()
    }
    table, positions = position_table(model), None
    if table is not None:
        positions = {
            "shape": list(table.shape),
            "roughness_median": roughness(table).median().item(),
            "neighbour_similarity_mean": similarity(table).diagonal(1).mean().item(),
        }
    return {"position_embedding": positions, "weights": weights}


def draw_weights(model, png: str | Path, *, title: str = "") -> None:
    """Write the picture: four panels, or the histograms alone for a model without a position table."""
    from matplotlib.figure import Figure

    table = position_table(model)
    figure = Figure(figsize=(7, 5) if table is None else (13, 10), dpi=120, layout="constrained")
    figure.suptitle(title)
    if table is None:
        _draw_histograms(figure.subplots(), model)
    else:
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # inches
        picture, curves, cosines, histograms = figure.subplots(2, 2).flatten()
        _draw_table(picture, table, "position embeddings", bound=3 * table.std().item())
        picture.set(xlabel="channel", ylabel="position")
        _draw_channels(curves, table)
        _draw_table(cosines, similarity(table), "cosine similarity of positions", bound=1)
        cosines.set(xlabel="position", ylabel="position")
        _draw_histograms(histograms, model)
    figure.savefig(png)


def _draw_table(panel, table: torch.Tensor, title: str, *, bound: float) -> None:
    image = panel.imshow(table, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    panel.set_title(title)
    panel.figure.colorbar(image, ax=panel)


def _draw_channels(panel, table: torch.Tensor) -> None:
    for place in CHANNELS:
        channel = int(place * table.shape[1])
        panel.plot(table[:, channel], linewidth=0.9, label=f"channel {channel}")
    median = roughness(table).median()
    panel.set(title=f"channels over positions: roughness {median:.3f}, noise is 1", xlabel="position")
    panel.legend(frameon=False, fontsize=8)
    panel.grid(alpha=0.25)


def _draw_histograms(panel, model) -> None:
    for kind, values in weights_by_kind(model).items():
        reach = 5 * values.std().item()
        density, edges = torch.histogram(values, BINS, range=(-reach, reach), density=True)
        panel.plot((edges[:-1] + edges[1:]) / 2, density, linewidth=1.2, label=f"{kind}, std {values.std():.3f}")
    panel.set(title="weights by kind", xlabel="value", ylabel="density", yscale="log")
    panel.legend(frameon=False, fontsize=8)
    panel.grid(alpha=0.25)


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--output", required=True, help="write the picture to this PNG file")
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    model, _ = load_from(arguments)
    numbers = measure(model)
    if positions := numbers["position_embedding"]:
        shape, rough, cosine = positions.values()
        print(f"position embedding {shape}: roughness {rough:.3f} (noise is 1), neighbours' cosine {cosine:.3f}")
    else:
        print("position embedding: none (the model has no learned table)")
    for kind, figures in numbers["weights"].items():
        print(f"{kind}: std {figures['std']:.4f}, largest {figures['largest']:.3f}, {figures['count']:,} weights")
    draw_weights(model, output_file(arguments.output), title=arguments.model)
    if arguments.json:
        write_json(output_file(arguments.json), numbers)


if __name__ == "__main__":
    run_command(main)
