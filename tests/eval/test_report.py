"""Reports of runs: what is read, what is drawn, and that a browser shows it without asking the network."""

import html
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from eval.report import compare_table, draw_curves, html_page, read_run, smooth


def write_run(folder, *, floor: float, dataset: str, hellaswag: bool = True, **recipe):
    """A run folder as the training loop leaves it, with curves that fall towards `floor`."""
    folder.mkdir(parents=True)
    info = {"recipe": {"output_dir": str(folder), "learning_rate": 6e-4, **recipe}, "dataset": {"source": dataset}}
    (folder / "run.json").write_text(json.dumps(info))
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
                rows.append({"step": step, "kind": "eval", "task": "hellaswag", "style": "completion", **score})
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


def figure_texts(monkeypatch, folders, png):
    """Every text that the picture shows: legends, axes, notes."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    draw_curves(folders, png)
    assert {panel.get_xlabel() for panel in drawn[0].axes} == {"tokens"}
    return [text.get_text() for text in drawn[0].findobj(Text) if text.get_text()]


def test_the_picture_has_every_curve_and_the_lines_of_the_released_models(two_runs, tmp_path, monkeypatch):
    texts = figure_texts(monkeypatch, two_runs, tmp_path / "out" / "curves.png")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("adamw", "muon"):
        assert {f"{name} train", f"{name} val", f"{name} hellaswag completion"} <= set(texts)
    assert "released GPT-2 124M, 3.2924" in texts
    assert "GPT-2 124M, completion style, 29.55" in texts
    assert "GPT-3 124M, 33.7" in texts


def test_the_released_loss_is_drawn_for_its_own_dataset_only(tmp_path, monkeypatch):
    run = write_run(tmp_path / "shakespeare", floor=1.5, dataset="tinyshakespeare", hellaswag=False)
    texts = figure_texts(monkeypatch, [run], tmp_path / "curves.png")
    assert "shakespeare val" in texts
    assert not [text for text in texts if "GPT-" in text]


def test_a_resumed_run_keeps_the_later_row_and_a_half_written_one_is_left_out(tmp_path):
    rows = [{"step": step, "kind": "train", "loss": loss} for step, loss in [(1, 5.0), (2, 4.0), (3, 9.0), (3, 3.0)]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "kind": "tr')
    assert read_run(tmp_path).series("train", "loss", "step") == ([1, 2, 3], [5.0, 4.0, 3.0])


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: 'nonsense'"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path / "nowhere")


def test_the_table_shows_figures_and_the_settings_that_differ(two_runs):
    table = {row[0]: row[1:] for row in compare_table([read_run(folder) for folder in two_runs])}
    assert table["tokens"] == ["2,097,152,000"] * 2
    assert table["optimizer"] == ["adamw", "muon"]
    assert table["hellaswag (completion)"] == [
        "acc 26.00 %, acc_norm 30.00 % of 10,042",
        "acc 26.00 %, acc_norm 30.70 % of 10,042",
    ]
    assert float(table["last val loss"][0]) == pytest.approx(3.0503, abs=1e-4)
    assert "learning_rate" not in table
    assert "output_dir" not in table


def test_smoothing_keeps_a_straight_line_straight():
    line = [float(value) for value in range(500)]
    assert smooth(line) == pytest.approx(line)


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
    command = [sys.executable, "-m", "eval.report", *map(str, two_runs), "--html", str(page)]
    subprocess.run(command, check=True)
    seen = browse(page, tmp_path, screenshot=picture)
    assert seen["width"] > 1500  # 0 for a picture that does not decode
    assert seen["tables"] == 3  # figures, and the settings of both runs
    assert seen["asked"] == []
    assert picture.stat().st_size > 50_000
    # The same look does notice a page that asks for something.
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("</body>", '<img src="http://example.invalid/x.png"></body>'))
    assert browse(asking, tmp_path)["asked"] == ["http://example.invalid/x.png"]
