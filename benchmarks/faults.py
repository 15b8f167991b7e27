"""Is anything lost when a stage is killed? SIGKILL to stages 02 to 06 at random moments, a new start, and a comparison with undisturbed runs.

    python benchmarks/faults.py                      20 trials a stage and objective, on a tiny random model made on the spot
    python benchmarks/faults.py --trials 2 --stages 02 04

A stage runs as `python STAGE.py` runs it, but forked from a process that has imported the libraries already, so that every
moment falls into the stage's own work. Moments are drawn evenly over the time an undisturbed run takes, with fixed seeds; the
new start is killed as well in every second trial. A trial is lost if any file of the run folder then differs from that of an
undisturbed run (apart from times: costs.jsonl, and `seconds` in rl.jsonl and the report), if a row that was whole on disk
at the kill is not in the end, or if a new start makes anew what was finished at the kill before it: a row that a stage
appends with its id, an adapter, or a step of GRPO that a checkpoint holds. (A row of token_logprobs.jsonl is finished with that
of scores.jsonl. A fit saves its own checkpoints by the minute, so none is made here.) Prints one JSON object last.
"""

import argparse
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.pyplot  # noqa: F401  stages import these three when they need them; here they are there before the fork
import peft  # noqa: F401
import scipy.stats  # noqa: F401
from conftest import make_tiny

import common

FIT = ["--epochs", "2", "--rank", "4"]
STAGES = {
    "02": ["02_sample_candidates.py", "--n", "2", "--max-trace-tokens", "24", "--batch", "3"],
    "03": ["03_reconstruct_score.py", "--max-action-tokens", "12", "--batch", "3", "--scorers", "likelihood,embedding,judge", "--keep-token-logprobs"],
    "04": ["04_select_sft.py", *FIT],
    "05": ["05_rl_train.py", "--steps", "6", "--max-new-tokens", "12", "--val-every", "4", "--retries", "2", "--trace-batch", "3", *FIT],
    "05 e2e": ["05_rl_train.py", "--objective", "e2e", "--steps", "4", "--max-new-tokens", "12", "--val-every", "4", *FIT],
    "06": ["06_evaluate.py", "--max-trace-tokens", "12", "--max-action-tokens", "12", "--batch", "3", "--traces", "1", "--judge", "MODEL"],
}


def note_what_is_made(notes: Path) -> None:
    """Have this process write down, a line each, the rows, adapters and checkpoints that it saves, in the words of finished()."""
    def noting(save: Callable, items: Callable[..., list[str]]) -> Callable:
        def noted(*given: Any) -> None:                       # before it is saved: what is torn by a kill has been worked on as well
            with notes.open("a") as file:
                file.writelines(f"{item}\n" for item in items(*given))
            save(*given)

        return noted

    name = lambda path: path.relative_to(notes.with_suffix("")).as_posix()
    common.append_rows = noting(common.append_rows, lambda path, rows: [f"{name(path)} {row['id']}" for row in rows if "id" in row])
    common.save_adapter = noting(common.save_adapter, lambda _, folder, __: [name(folder)])
    common.save_checkpoint = noting(common.save_checkpoint, lambda folder, _, __, done, ___: [f"{name(folder)} step {done}"])


def finished(folder: Path) -> set[str]:
    """The rows, adapters and steps of GRPO that a run folder holds whole."""
    rows = {f"{name} {row['id']}" for name, lines in whole_rows(folder).items() if name != "token_logprobs.jsonl" for row in map(json.loads, lines) if "id" in row}
    adapters = {path.parent.relative_to(folder).as_posix() for path in folder.glob("models/*/adapter_model.safetensors")}
    done = {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.glob("rl/*/step.json") if not path.parent.suffix}
    return rows | adapters | {f"{checkpoint} step {step}" for checkpoint, steps in done.items() for step in range(1, 1 + steps)}


def made_anew(notes: Path, there: set[str]) -> set[str]:
    """What of that which was `there` a process made again."""
    return there.intersection(notes.read_text().splitlines() if notes.is_file() else [])


def start(script: str, arguments: list[str], log: Path) -> int:
    """Run a script in a fork of this process, as a program; returns its process id. What it makes is noted beside the run folder."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        note_what_is_made(Path(f"{arguments[1]}.made"))
        sys.argv = [script, *arguments]
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as problem:
        code = problem.code if isinstance(problem.code, int) else int(problem.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(script: str, arguments: list[str], log: Path, kill_after: float | None = None) -> bool:
    """Run a stage to its end, or kill it after so many seconds; was it killed? Any other end than 0 stops the benchmark."""
    pid, began = start(script, arguments, log), time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"{script} ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()}")
            return False
        if kill_after is not None and time.monotonic() - began >= kill_after:
            os.kill(pid, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def contents(folder: Path) -> dict[str, bytes | list | dict]:
    """Every file of a run folder by its path, without the times in it."""
    found: dict[str, bytes | list | dict] = {}
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


def whole_rows(folder: Path) -> dict[str, list[bytes]]:
    """The rows of each file that a stage appends to, without a torn last one."""
    return {path.relative_to(folder).as_posix(): path.read_bytes().split(b"\n")[:-1] for path in folder.rglob("*.jsonl") if path.name not in ("rl.jsonl", "costs.jsonl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=common.positive_int, default=20, help="a stage and objective (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=tuple(STAGES), help="which of them are killed; the others run once (default: all)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    before, log, trial = work / "undisturbed", work / "log", work / "trial"
    model = ["--model", str(make_tiny(work / "model"))]
    turns = work / "turns.jsonl"
    turns.write_text("".join(json.dumps({"conversation": f"c{c}", "speaker": ("bo", "ann")[t % 2], "text": f"words of turn {t} in chat number {c}"}) + "\n" for c in range(16) for t in range(6)))
    run("01_prepare.py", ["--run", str(before), *model, "--source", f"turns:{turns}", "--user", "ann", "--max-action-tokens", "200", "--max-context-tokens", "900", "--limit", "16"], log)
    report = {}
    for stage, (script, *settings) in STAGES.items():
        settings = [*model, *(model[1] if each == "MODEL" else each for each in settings)]
        after = work / f"after {stage}"
        shutil.copytree(before, after)
        began = time.monotonic()
        run(script, ["--run", str(after), *settings], log)
        seconds = time.monotonic() - began
        wanted, rows_wanted = contents(after), whole_rows(after)
        found = {"seconds": round(seconds, 1), "trials": 0, "kills": 0, "halfway": 0, "moments_drawn_again": 0, "lost": 0}
        numbers = random.Random(f"faults {stage}")
        while stage in args.stages and found["trials"] < args.trials:
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(before, trial)
            notes = trial.with_suffix(".made")
            arguments, killed, kept, there, anew = ["--run", str(trial), *settings], 0, True, set(), set()
            for moment in [numbers.uniform(0, seconds) for _ in range(1 + found["trials"] % 2)]:
                notes.unlink(missing_ok=True)
                ended = not run(script, arguments, log, moment)
                anew |= made_anew(notes, there)
                if ended:
                    break                                     # what remains to be done decides where a second kill falls
                killed, there = killed + 1, there | finished(trial)
                found["halfway"] += contents(trial) not in (contents(before), wanted)
                at_kill = whole_rows(trial)
                kept = kept and all(rows == rows_wanted[name][:len(rows)] for name, rows in at_kill.items())
            if not killed:
                found["moments_drawn_again"] += 1
                continue
            notes.unlink(missing_ok=True)
            run(script, arguments, log)
            anew |= made_anew(notes, there)
            got = contents(trial)
            different = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            found["trials"], found["kills"] = found["trials"] + 1, found["kills"] + killed
            if different or anew or not kept:
                found["lost"] += 1
                print(f"stage {stage}, trial {found['trials']}: {different or (f'made anew: {sorted(anew)}' if anew else 'a row that was whole at the kill')}")
        before = after
        if stage in args.stages:
            report[stage] = found
            print(f"stage {stage}: {found}", flush=True)
    shutil.rmtree(work)
    total = {key: sum(found[key] for found in report.values()) for key in ("trials", "kills", "halfway", "lost")}
    print(json.dumps({"stages": report, **total}))
    sys.exit(total["lost"] > 0)


if __name__ == "__main__":
    main()
