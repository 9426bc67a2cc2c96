"""Reports of runs: what is read, what is drawn, and that a browser shows it without asking the network."""

import html
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from gpt2repro.tools.report import compare_table, draw_curves, html_page, main, read_run, smooth


def write_record(folder, *, recipe=(), dataset=(("fingerprint", "0"),), **model):
    """The run.json of a run folder."""
    record = {"recipe": dict(recipe), "dataset": dict(dataset), "model": model, "starts": []}
    (folder / "run.json").write_text(json.dumps(record))


def write_run(folder, *, floor: float, dataset: str, hellaswag: bool = True, **recipe):
    """A run folder as the training loop leaves it, with curves that fall towards `floor`."""
    folder.mkdir(parents=True)
    recipe = {"output_dir": str(folder), "learning_rate": 6e-4, **recipe}
    write_record(folder, recipe=recipe, dataset={"source": dataset, "fingerprint": "0"})
    rows = [{"step": 0, "kind": "val", "loss": floor + 7, "tokens": 0}]
    for step in range(10, 4001, 10):
        tokens, noise = step * 524_288, 0.05 * math.sin(step * 12.9898)
        loss = floor + 7 * math.exp(-step / 400) + noise
        rows.append(
            {"step": step, "kind": "train", "loss": loss, "tokens": tokens, "tokens_per_second": 1000.0 + step}
        )
        if step % 250 == 0:
            rows.append({"step": step, "kind": "val", "loss": loss - noise, "tokens": tokens})
            score = {"acc": 0.26, "acc_norm": 0.25 + step / 80_000 + (3.05 - floor) / 10, "n": 10_042}
            if hellaswag:
                score |= {"tokens": tokens, "task": "hellaswag", "style": "completion"}
                rows.append({"step": step, "kind": "eval", **score})
            text = f"Hello <script>alert('{step}')</script> & more"
            rows.append({"step": step, "kind": "sample", "prompt": "Hello", "texts": [text]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    dataset = "HuggingFaceFW/fineweb-edu"
    return [
        write_run(tmp_path / "adamw", floor=3.05, dataset=dataset, optimizer="adamw"),
        write_run(tmp_path / "muon", floor=2.98, dataset=dataset, optimizer="muon"),
    ]


def saved_figures(monkeypatch) -> list:
    """The figures that are saved from now on."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


def figure_texts(monkeypatch, folders, png):
    """Every text that the picture shows: legends, axes, notes."""
    figures = saved_figures(monkeypatch)
    draw_curves([read_run(folder) for folder in folders], png)
    assert {panel.get_xlabel() for panel in figures[0].axes} == {"tokens"}
    return [text.get_text() for text in figures[0].findobj(Text) if text.get_text()]


def test_the_picture_has_every_curve_and_the_lines_of_the_released_models(two_runs, tmp_path, monkeypatch):
    texts = figure_texts(monkeypatch, two_runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("adamw", "muon"):
        assert {f"{name} train", f"{name} val", f"{name} hellaswag completion"} <= set(texts)
    assert "released GPT-2 124M, 3.2924" in texts
    assert "GPT-2 124M, completion style, 29.55" in texts
    assert "GPT-3 124M, 33.7" in texts


def test_core_and_bits_per_byte_of_a_run_are_in_its_curves_and_its_table(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", floor=3.05, dataset="text")
    core = {"step": 4000, "kind": "eval", "tokens": 2_097_152_000, "task": "core", "core": 0.12, "n": 500}
    val = {"step": 4000, "kind": "val", "tokens": 2_097_152_000, "loss": 3.1, "bits_per_byte": 0.98765}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in (core, val)))
    assert "run core" in figure_texts(monkeypatch, [folder], tmp_path / "curves.png")
    table = dict(compare_table([read_run(folder)]))
    assert table["core"] == "centered accuracy 0.1200 of 500" and table["last bits per byte"] == "0.9877"


def test_the_released_loss_is_drawn_for_its_own_dataset_only(tmp_path, monkeypatch):
    run = write_run(tmp_path / "shakespeare", floor=1.5, dataset="tinyshakespeare", hellaswag=False)
    texts = figure_texts(monkeypatch, [run], tmp_path / "curves.png")
    assert "shakespeare val" in texts
    assert not [text for text in texts if "GPT-" in text]


def test_a_half_written_row_is_left_out_and_a_folder_without_rows_is_named(tmp_path):
    rows = [{"step": step, "kind": "train", "loss": loss} for step, loss in [(1, 5.0), (2, 4.0), (3, None)]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_record(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "kind": "tr')
    assert [row["loss"] for row in read_run(tmp_path).losses("train")] == [5.0, 4.0]
    with pytest.raises(ValueError, match="holds no run with metrics: give the folder of a run"):
        read_run(tmp_path / "nowhere")


def test_the_table_shows_figures_and_the_settings_that_differ(two_runs):
    table = {row[0]: row[1:] for row in compare_table([read_run(folder) for folder in two_runs])}
    assert table["tokens"] == ["2,097,152,000"] * 2
    assert table["optimizer"] == ["adamw", "muon"]
    assert table["hellaswag completion"] == [
        "acc 26.00 %, acc_norm 30.00 % of 10,042",
        "acc 26.00 %, acc_norm 30.70 % of 10,042",
    ]
    assert float(table["last val loss"][0]) == pytest.approx(3.0503, abs=1e-4)
    assert "learning_rate" not in table
    assert "output_dir" not in table


def test_a_size_that_one_recipe_leaves_to_a_named_shape_is_compared_by_the_models_own(tmp_path):
    runs = [write_run(tmp_path / name, floor=3.05, dataset="x") for name in ("named", "given")]
    for folder, n_layer in zip(runs, (None, 12), strict=True):
        write_record(folder, recipe={"model": "gpt2", "n_layer": n_layer}, parameters=124_439_808, n_layer=12)
    assert "n_layer" not in {row[0] for row in compare_table([read_run(folder) for folder in runs])}


def test_the_mean_of_every_part_of_a_straight_line_is_on_it():
    steps = np.arange(519.0)
    line = smooth(np.stack([steps, 3 * steps + 1], axis=1))
    assert line.shape == (100, 2)
    assert line[:, 1] == pytest.approx(3 * line[:, 0] + 1)
    assert smooth(line[:3]) == pytest.approx(line[:3])


def test_the_command_says_what_it_writes_and_makes_its_folder(two_runs, tmp_path, capsys):
    png = tmp_path / "out" / "curves.png"
    assert main([str(two_runs[0]), "--output", str(png), "--compare", *map(str, two_runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"writing {png}" and png.is_file()
    assert lines[1].split() == ["adamw", "muon"]


def test_the_command_draws_the_learning_rate_of_a_recipe_with_muon_as_a_second_curve(tmp_path, monkeypatch):
    recipe = {"schedule": "wsd_sqrt", "optimizer": "muon", "muon_learning_rate": 0.01, "max_steps": 3000}
    (tmp_path / "muon.yaml").write_text("".join(f"{name}: {value}\n" for name, value in recipe.items()))
    figures = saved_figures(monkeypatch)
    assert main(["--schedule", str(tmp_path / "muon.yaml"), "--output", str(tmp_path / "new" / "lr.png")]) == 0
    assert (tmp_path / "new" / "lr.png").read_bytes().startswith(b"\x89PNG")
    adamw, muon = (line.get_ydata() for line in figures[0].axes[0].lines)
    assert max(adamw) == pytest.approx(6e-4) and muon == pytest.approx(adamw * 0.01 / 6e-4)


def test_what_names_no_run_and_no_recipe_is_an_error_of_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--schedule", "recipes/demo.yaml"])  # no --output
    (tmp_path / "wrong.yaml").write_text("shedule: wsd\n")
    assert main(["--schedule", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "lr.png")]) == 2
    assert "did you mean schedule?" in capsys.readouterr().err


def test_text_of_a_model_cannot_become_markup(two_runs):
    page = html_page([read_run(folder) for folder in two_runs])
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;4000&#x27;)" in page


def browse(page, folder, *, screenshot=None) -> dict:
    """Open a page in headless Chromium: what its document and its network timeline say, and a picture of it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: install Debian's package to see the page rendered")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1000,2600 --virtual-time-budget=2000"
    ).split()
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    if screenshot:
        subprocess.run(
            [chromium, *flags, f"--screenshot={screenshot}", page.as_uri()], check=True, capture_output=True
        )
    probe = page.with_name(f"probe-{page.name}")
    script = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        width: document.images[0].naturalWidth, tables: document.querySelectorAll("table").length,
        asked: performance.getEntriesByType("resource").map(entry => entry.name)
            .filter(name => !name.startsWith("data:")) }) })</script></body>"""
    probe.write_text(page.read_text().replace("</body>", script))
    dom = subprocess.run([chromium, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True).stdout
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom).group(1)))


def test_the_page_renders_in_a_browser_without_a_request(two_runs, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    command = [sys.executable, "-m", "gpt2repro.tools.report", *map(str, two_runs), "--html", str(page)]
    subprocess.run(command, check=True)
    seen = browse(page, tmp_path, screenshot=picture)
    assert seen["width"] > 1500  # 0 for a picture that does not decode
    assert seen["tables"] == 1
    assert seen["asked"] == []
    assert picture.stat().st_size > 50_000
    # The same look does notice a page that asks for something.
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("</body>", '<img src="http://example.invalid/x.png"></body>'))
    assert browse(asking, tmp_path)["asked"] == ["http://example.invalid/x.png"]
