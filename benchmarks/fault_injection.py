"""Fault injection: break tiny training runs in many ways, resume them, and compare each with an unbroken one.

    python -m benchmarks.fault_injection                                        # every fault, 20 times each
    python -m benchmarks.fault_injection --faults full_disk closed_terminal --times 5 --seed 1 --json F

A run has 13k parameters and 12 steps and saves every second step (breakable_run.py). After a fault the same command
is started again until the run ends. Then the last weights, the last optimizer state and every logged loss must be bit
for bit those of the unbroken run. What else is promised stands at each fault. The exit code is 1 if a promise was
broken or a start hung.
"""

import argparse
import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from huggingface_hub import constants

from benchmarks.breakable_run import FLAGS, PATIENCE, Broken, Start, TooLate, Try, content, flip_a_bit, must
from benchmarks.measuring import ROOT, benchmark_parser, finish, print_row
from gpt2repro import command
from gpt2repro.data.prepare import prepare
from gpt2repro.data.shards import open_dataset
from gpt2repro.run import metrics
from gpt2repro.run.folder import RunFolder
from gpt2repro.train import launch
from gpt2repro.train.safety import STOP_SIGNALS
from tests.hub.stub_hub import StubHub

# ---- the faults ----------------------------------------------------------------------------------------------


def killed(one: Try) -> None:
    """SIGKILL at random moments of a run: no complete checkpoint is lost."""
    for _ in range(one.faults):
        before = max(one.complete(), default="")
        start = one.start()
        one.random_moment(start)
        start.kill()
        must(max(one.complete(), default="") >= before, f"{before} was there, {one.complete()} are")
    one.resume()


def killed_in_a_save(one: Try) -> None:
    """SIGKILL a few milliseconds after a save, or the deletion of an old checkpoint, began."""
    start = one.start()
    one.moment_in_the_loop(start)
    start.wait_until(lambda: any(one.run.glob(".step-*.tmp")))
    one.random_moment(start, 0.02)
    start.kill()
    one.resume()


def killed_while_compiling(one: Try) -> None:
    """SIGKILL to a start and its compilers: the next one starts in spite of what they left in the compiler's cache."""
    in_one_process = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # others would import torch first
    settings = {"compile": "true", "eval_every": 0, "environment": in_one_process}
    for _ in range(one.faults):
        start = one.start(**settings)
        start.wait_until(lambda: list(one.folder.glob("inductor/**/*.cpp")))
        one.random_moment(start, 4.0)
        start.kill()
    one.start(**settings).end(command.DONE)
    after_kills = one.result()
    shutil.rmtree(one.run)
    one.start(**settings).end(command.DONE)
    must(after_kills == one.result(), "another result than that of a compiled run without kills")


def prepare_here(one: Try, workers: int) -> None:
    sys.modules["__main__"] = ModuleType("__main__")  # else each worker imports this module, and torch with it
    files = [str(ROOT / "docs" / "*.md")]
    prepare(source="files", files=files, tokenizer="train:512", val_tokens=2000, out=one.dataset, workers=workers)


def killed_while_preparing(one: Try) -> None:
    """SIGKILL to a preparation and its workers: the same command makes the same dataset."""
    expected = open_dataset(one.dataset).fingerprint
    shutil.rmtree(one.dataset)
    workers = one.random.choice([1, 2])
    start = Start(lambda: prepare_here(one, workers))
    one.random_moment(start, 1.0)
    start.kill()
    Start(lambda: prepare_here(one, workers)).end(0)
    must(open_dataset(one.dataset).fingerprint == expected, "another dataset")


@contextlib.contextmanager
def loopback_hub() -> Iterator[tuple[dict[str, Any], Callable[[str], bytes]]]:
    """A Hub in a process of its own: what to start a run with that pushes to it, and how to read from it."""

    def serve() -> None:
        with StubHub() as hub:
            print(json.dumps([hub.env, hub.constants]), flush=True)
            time.sleep(10 * PATIENCE)

    server = Start(serve)
    server.wait_until(lambda: "\n" in server.printed())
    environment, settings = json.loads(server.printed())

    def use_the_server() -> None:
        vars(constants).update(settings)

    def get(path: str) -> bytes:
        address = f"{environment['HF_ENDPOINT']}/{path}"
        with urlopen(Request(address, headers={"Authorization": f"Bearer {environment['HF_TOKEN']}"})) as answer:
            return answer.read()

    try:
        yield {"hub_repo_id": "me/model", "patch": use_the_server, "environment": environment}, get
    finally:
        server.kill()


def killed_while_pushing(one: Try) -> None:
    """SIGKILL during a push to a Hub on loopback: what was due is pushed at last, and nothing older after it."""
    with loopback_hub() as (settings, get):
        settings["hub_every"] = 2
        start = one.start(**settings)
        start.wait_until(lambda: any(one.run.glob(".push-*")))
        one.random_moment(start, 3.0)
        start.kill()
        one.resume(**settings)
        weights = (one.run / "latest" / "model.safetensors").read_bytes()
        must(get("me/model/resolve/main/model.safetensors") == weights, "the Hub has other weights")
        titles = [commit["title"] for commit in reversed(json.loads(get("api/models/me/model/commits/main")))]
        must(titles == sorted(titles), f"pushed in the order {titles}")


def wiped_disk(one: Try) -> None:
    """SIGKILL and an empty disk, with `hub_state` on a Hub on loopback: the newest state there is resumed from."""
    with loopback_hub() as (settings, get):
        settings["hub_state"] = "true"
        there = 0
        for _ in range(one.faults):
            start = one.start(**settings)
            one.random_moment(start, one.seconds + 4.0)
            start.kill()
            shutil.rmtree(one.run, ignore_errors=True)
            with contextlib.suppress(HTTPError):  # killed before there was a branch
                names = [entry["path"] for entry in json.loads(get("api/models/me/model/tree/state"))]
                there = max((int(name[5:13]) for name in names if name.startswith("step-") and "." in name), default=0)
        printed = one.start(**settings).end(command.DONE)
        copied = re.search(r"step (\d+) is copied from hf://me/model@state", printed)
        must(int(copied[1] if copied else 0) >= there, f"step {there} was on the Hub, but:\n{printed[-2000:]}")
        one.check()


def killed_rank(one: Try) -> None:
    """SIGKILL to one of two processes: the other ends with an explanation, and one process resumes."""
    settings = {"dropout": 0.0}  # each process draws its own masks
    one.start(**settings).end(command.DONE)
    one.expected = one.result()
    shutil.rmtree(one.run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    ranks = [one.start(environment=shared | each, **settings) for each in own]
    one.random.shuffle(ranks)
    victim, other = ranks
    one.moment_in_the_loop(other)
    victim.kill()
    other.end(command.EXPLAINED, command.DONE)
    if other.exit_code == command.DONE:  # the victim had done its part
        raise TooLate
    one.resume(**settings)


def stopped(one: Try) -> None:
    """A signal that stops a run, or its terminal that closes: the step is saved first; exit code 75."""
    how = one.random.choice(["close", *STOP_SIGNALS])
    start = one.start(terminal=True)
    one.moment_in_the_loop(start)
    if how == "close":
        os.close(start.reader)
    else:
        start.send_signal(how)
    start.end(command.STOPPED_BY_SIGNAL, command.DONE)  # done: it came at the last step
    last = max(row["step"] for row in RunFolder(one.run).rows())
    must(one.complete()[-1] == f"step-{last:08}", f"{how}: the last step is {last}, {one.complete()} are there")
    one.resume()


def closed_terminal(one: Try) -> None:
    """The terminal of a run under nohup is closed: it trains to its end."""
    start = one.start(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None, terminal=True)
    one.random_moment(start)
    os.close(start.reader)
    start.end(command.DONE)
    one.check()


def moved_folder(one: Try) -> None:
    """A run's folder is moved and another put in its place: the run continues in its own, and the other stays."""
    start, moved = one.start(), one.folder / "moved"
    one.moment_in_the_loop(start)
    one.run.rename(moved)
    one.run.mkdir()
    (one.run / "thesis.tex").write_text("mine")
    start.end(command.DONE)
    must(set(content(one.run).values()) == {b"mine"}, f"the other folder holds {list(content(one.run))}")
    shutil.rmtree(one.run)
    moved.rename(one.run)
    one.check()


def second_writer(one: Try) -> None:
    """A second start on a disk without file locks: the first one ends at its next save and destroys nothing."""

    def no_locks() -> None:
        def flock(file: Any, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock

    first = one.start(no_locks)
    one.moment_in_the_loop(first)
    first.send_signal("SIGSTOP")
    printed = one.start(no_locks).end(command.DONE)
    must("has no file locks" in printed, f"nothing is said of the locks:\n{printed}")
    first.send_signal("SIGCONT")
    first.end(command.EXPLAINED, command.DONE)  # done: it was stopped after its last save
    one.check()


def refused_while(one: Try, broken: Path, put_back: Callable[[], object]) -> None:
    """The next start must name `broken` and leave the run's folder as it is; then it is put back."""
    before = content(one.run)
    printed = one.start().end(command.EXPLAINED)
    must(broken.name in printed or str(broken.parent) in printed, f"{broken} is not named:\n{printed}")
    must(content(one.run) == before, "a refused start changed the run's folder")
    put_back()


def interrupted(one: Try) -> None:
    """Leave a run that was killed after its first checkpoint."""
    start = one.start()
    start.wait_until(one.complete)
    start.kill()


def bit_of_a_checkpoint(one: Try) -> None:
    """A flipped bit in a random file of the newest checkpoint is named, and nothing is loaded."""
    interrupted(one)
    for _ in range(one.faults):
        file = one.random.choice(sorted((one.run / one.complete()[-1]).iterdir()))
        refused_while(one, file, flip_a_bit(file, one.random))
    one.resume()


def bit_of_a_dataset(one: Try) -> None:
    """A flipped bit in a random file of the dataset is named before anything is trained on it."""
    interrupted(one)
    for _ in range(one.faults):
        files = sorted(one.dataset.iterdir())
        file = one.random.choice([path for path in files if path.name != "tokenizer_config.json"])  # decides no token
        refused_while(one, file, flip_a_bit(file, one.random))
    one.resume()


def replaced_shard(one: Try) -> None:
    """A shard of the same size with other tokens takes a shard's place between two starts."""
    interrupted(one)
    for _ in range(one.faults):
        shard = one.random.choice(sorted(one.dataset.glob("*.npy")))
        tokens, kept = np.load(shard), shutil.copy2(shard, one.folder / "kept")
        np.save(one.folder / "other.npy", np.random.default_rng(one.random.randrange(2**32)).permutation(tokens))
        shutil.copystat(shard, one.folder / "other.npy")
        os.replace(one.folder / "other.npy", shard)
        refused_while(one, shard, lambda shard=shard, kept=kept: os.replace(kept, shard))
    one.resume()


def limit_file_size(limit: int) -> None:
    """No file of this process may grow further, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_disk(one: Try) -> None:
    """A disk that is full for one of the writers of a run: one error, and the run resumes."""
    limit = int(math.exp(one.random.uniform(math.log(200), math.log(150_000))))
    one.start(lambda: limit_file_size(limit)).end(command.EXPLAINED, command.DONE)  # done: the limit was enough
    one.resume()


def full_disk_while_preparing(one: Try) -> None:
    """A disk that is full for one of the writers of a preparation: one error, and the same command ends it."""
    expected = open_dataset(one.dataset).fingerprint
    shutil.rmtree(one.dataset)
    limit = int(math.exp(one.random.uniform(math.log(200), math.log(150_000))))

    def prepare_on_it() -> int:
        limit_file_size(limit)
        return command.run(lambda: prepare_here(one, 1))

    Start(prepare_on_it).end(command.EXPLAINED, command.DONE)
    Start(lambda: prepare_here(one, 1)).end(0)
    must(open_dataset(one.dataset).fingerprint == expected, "another dataset")


def failing_tracker(one: Try) -> None:
    """A tracker that raises at its start, in one of its logs or at its end: the run says so once and ends well."""
    failing_call, errors = one.random.randrange(30), [ConnectionError, OSError, ValueError, KeyError, RuntimeError]
    error = one.random.choice(errors)
    calls = itertools.count()

    class Tracker:
        name = "wandb"

        def __init__(self, project: str, **settings: Any) -> None:
            pass

        def start(self, *arguments: Any, **values: Any) -> None:
            if next(calls) >= failing_call:
                raise error("no network")

        store_init_configuration = log = finish = start

    def use_it() -> None:
        metrics.LOGGER_TYPE_TO_CLASS["wandb"] = Tracker
        launch.get_available_trackers = lambda: ["wandb"]

    printed = one.start(use_it, log_with="wandb").end(command.DONE)
    must(printed.count("the run continues without it") <= 1, f"it is said more than once:\n{printed}")
    one.check()


def jumping_clock(one: Try) -> None:
    """The clock jumps by years while a run trains, is killed and resumes; its files are from the past and future."""
    chance = random.Random(one.random.random())

    def jump() -> None:
        now, gmtime = time.time, time.gmtime
        time.time = lambda: now() + chance.uniform(-3e8, 3e8)
        time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)

    start = one.start(jump)
    one.moment_in_the_loop(start)
    start.kill()
    for file in [*one.run.rglob("*"), *one.dataset.iterdir()]:
        os.utime(file, (time.time() + chance.uniform(-3e8, 3e8),) * 2, follow_symlinks=False)
    one.resume(patch=jump)


Fault = Callable[[Try], None]
# Each with the faults that one try injects.
FAULTS: dict[Fault, int] = {
    killed: 3, killed_in_a_save: 1, killed_while_compiling: 5, killed_while_preparing: 1, killed_while_pushing: 1,
    wiped_disk: 2, killed_rank: 1, stopped: 1, closed_terminal: 1, moved_folder: 1, second_writer: 1,
    bit_of_a_checkpoint: 5, bit_of_a_dataset: 5, replaced_shard: 5, full_disk: 1, full_disk_while_preparing: 1,
    failing_tracker: 1, jumping_clock: 1,
}  # fmt: skip


# ---- the campaign --------------------------------------------------------------------------------------------


def attempt(folder: Path, fault: Fault, number: int, seed: int, known: dict[str, Any]) -> str | None:
    """One try in a copy of the dataset; returns what went wrong, or None."""
    one = Try(folder / f"{fault.__name__}-{number}", random.Random(f"{seed}/{number}"), FAULTS[fault], **known)
    while True:
        shutil.copytree(folder / "dataset", one.dataset)
        try:
            fault(one)
            return None
        except TooLate:
            continue
        except Exception as problem:  # reported, so that the campaign goes on
            return f"try {number}: {problem if isinstance(problem, Broken) else traceback.format_exc()}"[:2000]
        finally:
            shutil.rmtree(one.folder, ignore_errors=True)


def inject_faults(arguments: argparse.Namespace, folder: Path) -> int:
    """An unbroken run, then all tries of all faults, two at a time."""
    plain = Try(folder, random.Random())
    Start(lambda: prepare_here(plain, 1)).end(0)
    plain.start().end(command.DONE)  # fills the file cache
    shutil.rmtree(plain.run)
    began = time.monotonic()
    plain.start().end(command.DONE)
    known = {"expected": plain.result(), "seconds": time.monotonic() - began}
    faults: dict[str, dict[str, Any]] = {}
    print_row("fault", "times", "problems", "hung", "seconds")
    for fault in (each for each in FAULTS if each.__name__ in arguments.faults):
        began, tries = time.monotonic(), math.ceil(arguments.times / FAULTS[fault])

        def work(first: int, fault: Fault = fault, tries: int = tries) -> None:
            numbers = range(first, tries, arguments.workers)
            print(json.dumps([attempt(folder, fault, n, arguments.seed, known) for n in numbers]))

        workers = [Start(partial(work, first)) for first in range(arguments.workers)]
        results = [each.end(0, patience=math.inf).splitlines()[-1] for each in workers]  # after warnings
        outcomes = [outcome for result in results for outcome in json.loads(result)]
        problems = [outcome for outcome in outcomes if outcome]
        row = {"times": tries * FAULTS[fault], "problems": len(problems), "seconds": time.monotonic() - began}
        row["hung"] = sum("Hung" in problem for problem in problems)
        faults[fault.__name__] = row | {"what": problems}
        cells = (str(row["times"]), str(row["problems"]), str(row["hung"]), f"{row['seconds']:.0f}")
        print_row(fault.__name__, *cells)
        print("\n".join(problems), end="", file=sys.stderr, flush=True)
    figures = {"date": time.strftime("%Y-%m-%d"), "seconds_of_an_unbroken_run": known["seconds"], "flags": FLAGS}
    finish(arguments, {"benchmark": "fault_injection", **figures, "faults": faults})
    return command.EXPLAINED if any(row["problems"] for row in faults.values()) else command.DONE


def main(argv: list[str] | None = None) -> int:
    names = [fault.__name__ for fault in FAULTS]
    parser = benchmark_parser(__doc__)
    parser.add_argument("--faults", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--times", type=int, default=20, help="of each fault (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="tries at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        return command.run(lambda: inject_faults(arguments, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
