"""The tests that touch the libraries, run with the oldest, the pinned and the newest releases.

    make matrix                                      # floor, pinned, newest, bare; about an hour on two cores
    python tests/matrix.py floor                     # one of them
    python tests/matrix.py overlay-floor overlay-newest      # what .ci/run adds to `make test`; needs .venv

    floor            the lowest release of every dependency that pyproject.toml allows
    pinned           constraints.txt, with Python 3.12 (.venv is usually 3.11): every test
    newest           what pip finds today, with Python 3.13: every test
    bare             the floor with nothing but what a GPU image has: no datasets, no evaluate, no matplotlib
    overlay-floor    .venv with the floor's transformers over it
    overlay-newest   .venv with the newest transformers over it

Each environment is a folder of .matrix/, made when it is needed and kept while its requirements stay the same. Takes
about 5 GB an environment, because pip's torch for Linux includes CUDA. The end is a table on standard output; `--docs`
also writes its rows into docs/compatibility.md. Exit code 1 if a test failed or an environment could not be made.
Needs Python 3.11, 3.12 and 3.13, and nothing outside the standard library.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / ".matrix"
DOCS = ROOT / "docs" / "compatibility.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

ENVIRONMENTS = {  # name: its Python
    "floor": "3.11", "pinned": "3.12", "newest": "3.13", "bare": "3.11", "overlay-floor": None, "overlay-newest": None
}  # fmt: skip
DEFAULT = ["floor", "pinned", "newest", "bare"]
# What a GPU image has: enough to train, to score and to measure speed.
BARE = ["torch", "transformers", "accelerate", "safetensors", "numpy", "pyyaml", "tqdm", "pytest"]

MODEL = ["test_model.py", "compatibility", "benchmarks/test_step.py"]
SCORES = [f"eval/test_{name}.py" for name in ("validation", "multiple_choice", "loading", "in_the_loop")]
TESTS = {
    "pinned": [""],  # every test, on another Python than .venv's
    "newest": [""],
    "bare": ["test_model.py", "benchmarks", "test_train.py", "run", *SCORES],
    "overlay-floor": [*MODEL, "test_travel.py"],
    "overlay-newest": [*MODEL, "test_travel.py"],
}
ALL_TESTS = [*MODEL, "test_train.py", "test_damage.py", "test_travel.py", "train", "run", "data", "hub", *SCORES]

VERSIONS = ["torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub"]
COLUMNS = ["environment", "Python", *VERSIONS, "passed", "failed", "skipped", "date", "command"]


# ---- environments --------------------------------------------------------------------------------------------


def run(*command, **settings) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, **settings)


def interpreter(version: str) -> str:
    """A Python of that version: one on PATH, one of pyenv, or this one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python"), sys.executable]
    for python in filter(None, found):
        done = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if done.stdout.strip() == version:
            return str(python)
    raise FileNotFoundError(f"no Python {version} on PATH or in pyenv: install one")


def floor(requirements: list[str]) -> list[str]:
    """The lowest releases that requirements of the form NAME>=VERSION allow."""
    if wrong := [line for line in requirements if not re.fullmatch(r"\w+>=[\d.]+", line)]:
        raise ValueError(f"pyproject.toml: dependencies must be NAME>=VERSION, these are not: {', '.join(wrong)}")
    return [line.replace(">=", "==") for line in requirements]


def python_of(name: str) -> Path:
    return MATRIX / name / "bin" / "python"


def requirements(name: str) -> dict:
    """What an environment is made with; while that stays the same, it is kept."""
    pins = floor(PYPROJECT["dependencies"]) if name in ("floor", "bare") else []
    if name == "pinned":
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    keys = ("dependencies", "optional-dependencies")
    return {"python": ENVIRONMENTS[name], **{key: PYPROJECT[key] for key in keys}, "pins": pins, "bare": BARE}


def make(name: str) -> None:
    """Make the environment, or leave it where its requirements are those it was made with."""
    if name == "bare":
        make("floor")
    folder, wanted = MATRIX / name, requirements(name)
    made_with, constraints = folder / "made_with.json", folder / "constraints.txt"
    if not made_with.exists() or json.loads(made_with.read_text(encoding="utf-8")) != wanted:
        run(interpreter(wanted["python"]), "-m", "venv", "--clear", folder)
        constraints.write_text("\n".join(wanted["pins"]) + "\n", encoding="utf-8")
        if name == "bare":
            strip(folder)
        else:
            install(name, "--constraint", constraints, "--editable", ".[dev]")
        made_with.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    elif name == "newest":  # what is newest changes with every release
        install(name, "--upgrade", "--upgrade-strategy", "eager", "--editable", ".[dev]")


def install(name: str, *what) -> None:
    run(python_of(name), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what)


def strip(folder: Path) -> None:
    """Make `folder` a copy of the floor without the packages that a GPU image lacks; links, so it takes no space."""
    shutil.rmtree(folder / "lib")
    shutil.copytree(MATRIX / "floor" / "lib", folder / "lib", copy_function=os.link, symlinks=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    resolve = [*pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    resolve += ["--constraint", folder / "constraints.txt", *BARE]
    report = json.loads(subprocess.run(resolve, check=True, capture_output=True, text=True).stdout)
    kept = {canonical(row["metadata"]["name"]) for row in report["install"]} | {"pip", "setuptools"}
    unwanted = [row["name"] for row in json.loads(listed) if canonical(row["name"]) not in kept]
    run(*pip, "uninstall", "--quiet", "--yes", *unwanted)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def make_overlay(name: str) -> bool:
    """Make .venv with another transformers, and what that one needs, over it; False where .venv has that one."""
    folder, pinned = MATRIX / name, ROOT / ".venv" / "bin" / "python"
    if not pinned.exists():
        raise FileNotFoundError("an overlay lies over .venv, and there is none: run make .venv/.installed")
    run(pinned, "-m", "venv", "--clear", "--without-pip", folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below, above = (
        Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
        for python in (pinned, python_of(name))
    )
    # Last on the path, with its own .pth files: what lies in the overlay comes first.
    (above / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n", encoding="utf-8")
    lowest = next(line for line in floor(PYPROJECT["dependencies"]) if line.startswith("transformers=="))
    install(name, *([lowest] if name == "overlay-floor" else ["--upgrade", "transformers"]))
    return (above / "transformers").is_dir()


# ---- tests ---------------------------------------------------------------------------------------------------


def run_tests(name: str) -> dict[str, int]:
    """pytest's counts for the environment."""
    report = MATRIX / "reports" / f"{name}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    options = ["-q", "-rfE", "--continue-on-collection-errors", f"--junitxml={report}"]
    paths = [f"tests/{path}" for path in TESTS.get(name, ALL_TESTS)]
    command = [python_of(name), "-m", "pytest", *options, *paths]
    print("+", *command, flush=True)
    code = subprocess.run([str(word) for word in command], cwd=ROOT).returncode
    if code not in (0, 1):  # 1: tests failed; all others: pytest did not come to its end
        raise RuntimeError(f"pytest ended with exit code {code}")
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]
    }  # fmt: skip


def run_commands(name: str) -> dict[str, int]:
    """Thirty steps of the demonstration; on the bare image also a resumed run, two scores and the benchmarks."""
    out = MATRIX / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    train = f"train_accelerate.py --recipe recipes/demo.yaml --dataset_dir {out}/python-docs --max_steps 30"
    train += f" --eval_every 15 --sample_every 30 --save_every 15 --output_dir {out}"
    commands = [f"{train}/demo", f"-m gpt2repro.tools.report {out}/demo --output {out}/curves.png"]
    if name == "bare":
        context = {"activity_label": "Code", "ctx_a": "Return the", "ctx_b": "", "ctx": "Return the"}
        endings = ["length", "value of x", "list", "class"]
        items = [{"ind": n, **context, "endings": endings, "label": n % 4} for n in range(8)]
        (out / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        model = f"--model {out}/demo/latest"
        commands = [
            f"{train}/demo",
            f"{train}/resumed --resume {out}/demo/step-00000015",
            f"-m eval.validation {model} --dataset {out}/python-docs --output {out}/validation.json",
            f"-m eval.hellaswag {model} --data {out}/items.jsonl --output {out}/hellaswag.json",
            f"-m benchmarks.gpu_suite --tiny --minutes 2 --output {out}/bench",
        ]
    counts = {"passed": 0, "failed": 0}
    strict = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "strict")}
    for command in commands:
        words = [str(python_of(name)), *command.split()]
        print("+", *words, flush=True)
        ended = subprocess.run(words, cwd=ROOT, env=strict).returncode
        counts["passed" if ended == 0 else "failed"] += 1
    return counts


def versions(name: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].replace('-', '_'): d.version for d in reversed(list(m.distributions()))}\n"
        "print(json.dumps({'Python': platform.python_version(), **{n: found.get(n, 'none') for n in sys.argv[1:]}}))"
    )
    done = subprocess.run([python_of(name), "-c", code, *VERSIONS], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def row_of(name: str) -> dict[str, object] | None:
    """The environment's row of the table; None where there is nothing to run."""
    row = {"environment": name, "date": datetime.date.today(), "command": f"`python tests/matrix.py {name}`"}
    try:
        if name.startswith("overlay"):
            if not make_overlay(name):
                print(f"{name}: .venv has this transformers already, and its tests ran there")
                return None
        else:
            make(name)
        row |= versions(name)
        row |= run_tests(name)
        if not name.startswith("overlay"):
            for outcome, count in run_commands(name).items():
                row[outcome] += count
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", flush=True)
        row["failed"] = "could not run"
    return row


def line(cells) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def write_docs(lines: dict[str, str]) -> None:
    """Replace the rows of docs/compatibility.md that begin with these environments."""
    text = DOCS.read_text(encoding="utf-8")
    for name, new in lines.items():
        text = re.sub(rf"^\| {name} \|.*$", lambda _, new=new: new, text, flags=re.MULTILINE)
    DOCS.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=DEFAULT, help="default: " + " ".join(DEFAULT))
    parser.add_argument("--docs", action="store_true", help="write the rows into docs/compatibility.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.environments) - ENVIRONMENTS.keys():
        parser.error(f"no environment {', '.join(sorted(unknown))}: choose from {', '.join(ENVIRONMENTS)}")
    rows = [row for name in arguments.environments if (row := row_of(name))]
    lines = {row["environment"]: line(row.get(column, "") for column in COLUMNS) for row in rows}
    if rows:
        print("", line(COLUMNS), line(["---"] * len(COLUMNS)), *lines.values(), sep="\n")
    if arguments.docs:
        write_docs(lines)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
