"""Is anything lost when a stage is killed? SIGKILL at random moments, a new start, a comparison with undisturbed runs.

    python benchmarks/faults.py                      20 trials a stage, on a tiny random model made on the spot
    python benchmarks/faults.py --trials 2 --stages 02 "04 grpo"

A stage runs as a program, but forked from a process that has imported the libraries, so that every moment falls into
the stage's own work. Moments are drawn evenly over the time of an undisturbed run, with fixed seeds; the new start is
killed as well in every second trial. A trial is lost if

- a file of the run folder then differs from that of an undisturbed run (apart from times),
- a row that was whole on disk at a kill is not in the end, or
- a new start makes anew what was finished at a kill before it: a row, an adapter, a step of GRPO behind a checkpoint.

Prints one JSON object last.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["peft", "scipy.stats", "filelock", "pydantic", "safetensors.torch", "pytest",
                              *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert"))])
STAGES = {                                                 # with three pairs a batch
    "02": ["02_sample_candidates.py", "--num-samples", "2", "--max-trace-tokens", "24", "--batch-tokens", "9800"],
    "03": ["03_reconstruct_score.py", "--max-action-tokens", "12", "--batch-tokens", "3300", "--scorers",
           "likelihood,embedding,judge"],
    "04": ["04_select_sft.py", "--epochs", "2", "--rank", "4"],
    "05": ["05_rl_train.py", "--steps", "6", "--save-every", "2", "--val-every", "6", "--rank", "4", "--num-prompts",
           "1", "--reward", "likelihood"],                 # by the other reward random text earns nothing
    "02 grpo": ["02_sample_candidates.py", "--tag", "grpo"],
    "03 grpo": ["03_reconstruct_score.py", "--tag", "grpo"],
    "04 grpo": ["04_select_sft.py", "--tag", "grpo"],
    "05 e2e": ["05_rl_train.py", "--objective", "e2e", "--steps", "4", "--save-every", "2", "--rank", "4",
               "--max-new-tokens", "12"],
    "06": ["06_evaluate.py", "--max-trace-tokens", "12", "--max-action-tokens", "12", "--batch-tokens", "600",
           "--num-actions", "1", "--judge", "MODEL"],
}


def beside(run: Path, ending: str) -> Path:
    return run.with_name(f"{run.name}.{ending}")


def note_what_is_made(run: Path) -> None:
    """Have this process write down, a line each, the rows and adapters that it saves, in the words of finished()."""
    def noting(save: Callable, items: Callable[..., list[str]]) -> Callable:
        def noted(*given: Any) -> None:                    # before saving: what a kill tears has been worked on too
            with beside(run, "made").open("a") as file:
                file.writelines(f"{item}\n" for item in items(*given))
            save(*given)

        return noted

    name = lambda path: path.relative_to(run).as_posix()
    common.append_rows = noting(
        common.append_rows, lambda path, rows: [f"{name(path)} {getattr(row, 'id', '')}" for row in rows])
    common.save_adapter = noting(common.save_adapter, lambda _, folder, *__: [name(folder)])


def program(script: str, run: Path, arguments: Sequence[str], before: Callable[[], Any] | None) -> None:
    """Be a stage's program, which prints into RUN.log and notes what it makes in RUN.made."""
    handle = os.open(beside(run, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    note_what_is_made(run)
    if before:
        before()
    sys.argv = [script, "--run", str(run), *arguments]
    beside(run, "made").touch()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(script: str, run: Path, arguments: Sequence[str], before: Callable[[], Any] | None = None) -> Any:
    """Start a stage in a process of its own and wait until it is under way; `before` is called in there first."""
    beside(run, "made").unlink(missing_ok=True)
    process = FORKS.Process(target=program, args=(script, run, arguments, before))
    process.start()
    while not beside(run, "made").exists() and process.is_alive():
        time.sleep(0.001)
    return process


def run_or_kill(script: str, run: Path, arguments: Sequence[str], kill_after: float | None = None) -> bool:
    """Run a stage to its end, or kill it after so many seconds; was it killed? An error stops the benchmark."""
    process = start(script, run, arguments)
    process.join(kill_after)
    process.kill()
    process.join()
    if process.exitcode > 0:
        sys.exit(f"{script} ended with {process.exitcode}:\n{beside(run, 'log').read_text()}")
    return process.exitcode < 0


def whole_rows(folder: Path) -> dict[str, list[bytes]]:
    """The rows of each file that a stage appends to, without a torn last one."""
    return {path.relative_to(folder).as_posix(): path.read_bytes().split(b"\n")[:-1] for path in folder.rglob("*.jsonl")
            if path.name not in ("rl.jsonl", "costs.jsonl", "judgements.jsonl")}


def finished(folder: Path) -> set[str]:
    """The rows, adapters and steps of GRPO that a run folder holds whole."""
    rows = {f"{name} {json.loads(line)['id']}" for name, lines in whole_rows(folder).items() for line in lines}
    adapters = {path.parent.relative_to(folder).as_posix() for path in folder.glob("models/*/adapter_model.safetensors")
                if not path.parent.suffix}
    last = {path.parent.relative_to(folder).as_posix(): int(path.name.partition("-")[2])
            for path in sorted(folder.glob("rl/*/step-*")) if path.is_dir() and not path.suffix}
    return rows | adapters | {f"{name}/step-{step:06}" for name, steps in last.items() for step in range(1, 1 + steps)}


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run folder by its path, without the times in it."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if name in ("costs.jsonl", ".lock"):
            continue
        if name == "rl.jsonl":
            data = without_times([json.loads(line) for line in data.splitlines()])
        if name == "report.html":
            page = re.search(rb'(.*id="data">)(.*?)(</script>.*)', data, re.DOTALL)
            shown = json.loads(page.group(2))
            data = {"page": (page.group(1), page.group(3)), **shown, "costs": None, "rl": without_times(shown["rl"])}
        found[name] = data
    return found


def try_stage(stage: str, script: str, settings: Sequence[str], before: Path, after: Path, trial: Path, trials: int,
              seconds: float) -> dict[str, float]:
    """Kill the stage that leads from run folder `before` to `after` in so many trials; returns what was counted."""
    old, wanted, rows_wanted = contents(before), contents(after), whole_rows(after)
    numbers = random.Random(f"kills {stage}")
    found = {"seconds": round(seconds, 1), "trials": 0, "kills": 0, "halfway": 0, "moments_drawn_again": 0, "lost": 0}
    while found["trials"] < trials:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(before, trial)
        killed, kept, there, anew = 0, True, finished(trial), set()
        for moment in [*(numbers.uniform(0, seconds) for _ in range(1 + found["trials"] % 2)), None]:
            if moment is None and not killed:
                break
            ended = not run_or_kill(script, trial, settings, moment)
            anew |= there.intersection(beside(trial, "made").read_text().splitlines())
            if ended:
                break                                      # what remains to be done decides where a second kill falls
            killed, there = killed + 1, there | finished(trial)
            found["halfway"] += contents(trial) not in (old, wanted)
            kept = kept and all(rows == rows_wanted[name][:len(rows)] for name, rows in whole_rows(trial).items())
        if not killed:
            found["moments_drawn_again"] += 1
            continue
        got = contents(trial)
        different = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        found["trials"], found["kills"] = found["trials"] + 1, found["kills"] + killed
        if different or anew or not kept:
            found["lost"] += 1
            why = different or (f"made anew: {sorted(anew)}" if anew else "a row that was whole at the kill")
            print(f"stage {stage}, trial {found['trials']}: {why}")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=common.positive_int, default=20, help="a stage (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=tuple(STAGES),
                        help="which are killed; those before them run once (default: all)")
    args = parser.parse_args(argv)
    from conftest import make_run, make_tiny               # here: a process that runs a stage need not pay for it

    report, first = {}, FORKS.Process(target=time.time)
    first.start()                                          # imports the libraries: no part of the first stage's time
    first.join()
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        model = str(make_tiny(Path(work, "model")))
        before = make_run(Path(work, "prepared"), train=8)
        for stage in list(STAGES)[:1 + max(map(list(STAGES).index, args.stages))]:
            script, *settings = [model if word == "MODEL" else word for word in STAGES[stage]]
            settings += ["--model", model, "--dtype", "float32", "--no-4bit"]
            after = shutil.copytree(before, Path(work, f"after {stage}"))
            began = time.monotonic()
            run_or_kill(script, after, settings)
            seconds = time.monotonic() - began
            if stage in args.stages:
                trial = Path(work, "trial")
                report[stage] = try_stage(stage, script, settings, before, after, trial, args.trials, seconds)
                print(f"stage {stage}: {report[stage]}", flush=True)
            before = after
    total = {key: sum(found[key] for found in report.values()) for key in ("trials", "kills", "halfway", "lost")}
    print(json.dumps({"stages": report, **total}))
    return total


if __name__ == "__main__":
    sys.exit(main()["lost"] > 0)
