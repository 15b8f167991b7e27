"""The real scripts as programs: killed, interrupted, without room or rights, and two at once. Nothing that was finished may be lost."""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_pair
from test_prepare import write_turns

import common


@pytest.fixture(scope="module")
def prepared(stage, tiny_folder, tmp_path_factory):
    """A run folder behind stage 3, and the arguments that all stages were started with."""
    work = tmp_path_factory.mktemp("faults")
    write_turns(work / "turns.jsonl", conversations=12, turns=6)
    run, always = work / "run", ["--model", str(tiny_folder)]
    stage("01_prepare").main(["--run", str(run), *always, "--source", f"turns:{work / 'turns.jsonl'}", "--user", "ann", "--max-action-tokens", "200", "--limit", "20"])
    stage("02_sample_candidates").main(["--run", str(run), *always, *SAMPLING])
    stage("03_reconstruct_score").main(["--run", str(run), *always, "--max-action-tokens", "6", "--scorers", "likelihood"])
    return run, always


SAMPLING = ["--n", "2", "--max-trace-tokens", "12", "--batch", "2"]
FITTING = ["--arms", "none", "--epochs", "1", "--rank", "4"]


@pytest.fixture()
def sampled(prepared, tmp_path):
    """(run folder in which stage 2 has just begun, the command of stage 2, the candidates it must end with)"""
    run = tmp_path / "run"
    shutil.copytree(prepared[0], run)
    whole = (run / "candidates.jsonl").read_bytes()
    (run / "candidates.jsonl").write_bytes(b"")
    return run, command("02_sample_candidates.py", run, *prepared[1], *SAMPLING), whole


def command(script, run, *arguments):
    return [sys.executable, str(ROOT / script), "--run", str(run), *arguments]


def stopped_with(done, *words):
    """It ended with exit code 2 and one message, without a traceback."""
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def run_program(words, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def wait_for(condition, program):
    until = time.monotonic() + 100
    while not condition():
        assert program.poll() is None and time.monotonic() < until, program.communicate()
        time.sleep(0.005)


def test_stages_killed_at_random_moments_end_like_undisturbed_ones():
    """The benchmark itself, with few trials; stage 5 alone has another in test_training."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--trials", "1"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == 6 and found["kills"] >= 6 and found["lost"] == 0


def test_the_second_process_on_a_run_folder_stops_and_names_the_first_which_a_signal_ends_with_its_step_saved(prepared, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run" / "rl.jsonl"
    shutil.copytree(prepared[0], run)
    training = ["--max-new-tokens", "6", "--val-every", "100000", "--save-every", "100000", "--retries", "1", *FITTING[2:]]
    first = subprocess.Popen(command("05_rl_train.py", run, *prepared[1], *training, "--steps", "100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: log.is_file() and len(log.read_bytes().splitlines()) >= 2, first)
    stopped_with(run_program(command("02_sample_candidates.py", run, *prepared[1], *SAMPLING)), f"process {first.pid}: ", "05_rl_train.py", "--run")
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 143 and "start the same command again" in said and "Traceback" not in said
    steps, before = json.loads((run / "rl" / "recon" / "step.json").read_text()), log.read_bytes()
    assert len(before.splitlines()) == steps >= 2
    done = run_program(command("05_rl_train.py", run, *prepared[1], *training, "--steps", str(steps + 1)))
    assert done.returncode == 0, done.stderr
    assert log.read_bytes().startswith(before) and len(log.read_bytes().splitlines()) == steps + 2          # a step, and the last look at held-out pairs


def test_an_interrupt_ends_after_the_batch_at_hand_and_the_same_command_goes_on(sampled):
    run, words, whole = sampled
    output = run / "candidates.jsonl"
    slow = [*words[:1], "-c", f"import runpy, sys, time, common; made = common.append_rows; common.append_rows = lambda *some: (made(*some), time.sleep(0.3)); "
            f"sys.argv = {words[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"]
    program = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: output.is_file() and output.stat().st_size, program)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130 and "ending after the work at hand (sampling traces)" in said and "Traceback" not in said
    rows = output.read_bytes()
    assert rows and len(rows) < len(whole) and whole.startswith(rows) and rows.endswith(b"\n")
    done = run_program(words)
    assert done.returncode == 0 and output.read_bytes() == whole, done.stderr


def test_a_second_signal_ends_a_program_at_once():
    code = "import common, time; common.run_stage(lambda: [time.sleep(100) for _ in common.progress([1], 'waiting')])"
    program = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=ROOT)
    time.sleep(0.5)
    read = lambda: program.stderr.readline().decode()
    while not os.path.exists(f"/proc/{program.pid}/wchan") or "SigCgt" not in (status := open(f"/proc/{program.pid}/status").read()) or not int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert program.poll() is None
        time.sleep(0.05)                                     # until the program has its handlers
    time.sleep(0.5)
    program.send_signal(signal.SIGTERM)
    said = ""
    while "once more" not in said:
        said = read()
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=20) == -signal.SIGINT
    program.stderr.close()


@contextlib.contextmanager
def handlers():
    """The stages' signal handlers in this process, for as long as a test wants them."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, common.on_signal) for number in numbers]
    try:
        yield
    finally:
        common.ASKED.clear()
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_fit_that_broke_off_goes_on_from_its_checkpoint_and_ends_with_the_same_bytes(stage, tiny_folder, tmp_path, monkeypatch, how):
    sft = stage("04_select_sft")
    args = argparse.Namespace(rank=4, seed=0, fit_lr=1e-2, epochs=2, batch=2, overwrite=False, recompute=False)
    read, calls = sft.completion_loss, []

    def fit(folder, record):
        model, tokenizer = common.load_model(str(tiny_folder), False)
        examples = [sft.user_example(tokenizer, make_pair(f"c{i}/1", f"reply number {i}"), f"Sam feels {i}.") for i in range(6)]
        return sft.fit_user_model(model, examples, args, folder, record)

    def disturbed(*some):
        calls.append(1)
        if len(calls) == 5 and not (tmp_path / "disturbed").exists():      # in the third of six steps
            (tmp_path / "disturbed").touch()
            if how == "crash":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*some)

    record = {"arguments": {"model": "tiny"}}
    losses, _ = fit(tmp_path / "whole", record)
    monkeypatch.setattr(sft, "completion_loss", disturbed)
    monkeypatch.setattr(sft, "SAVE_SECONDS", -1 if how == "crash" else 10**9)
    with handlers(), pytest.raises(RuntimeError if how == "crash" else SystemExit):
        fit(tmp_path / "arm", record)
    assert not (tmp_path / "arm").exists() and len(json.loads((tmp_path / "arm.part" / "last" / "step.json").read_text())) == (2 if how == "crash" else 3)
    calls.clear()
    assert fit(tmp_path / "arm", record)[0] == losses and len(calls) == (8 if how == "crash" else 6)        # of 12 examples read
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "arm"))
    assert one == other and not (tmp_path / "arm.part").exists()


def test_a_checkpoint_of_another_fit_is_not_continued(stage, tiny_folder, tmp_path):
    sft = stage("04_select_sft")
    model, tokenizer = common.load_model(str(tiny_folder), False)
    args = argparse.Namespace(rank=4, seed=0, fit_lr=1e-2, epochs=1, batch=1, overwrite=False, recompute=False)
    (tmp_path / "arm.part" / "last").mkdir(parents=True)
    (tmp_path / "arm.part" / "last" / "made.json").write_text('{"arguments": {"model": "another"}}')
    losses, _ = sft.fit_user_model(model, [sft.user_example(tokenizer, make_pair(), None)], args, tmp_path / "arm", {"arguments": {"model": "tiny"}})
    assert len(losses) == 1 and not (tmp_path / "arm.part").exists()


# ------------------------------------------------------------------------------------------------
# No room, no rights


def at_most(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_rows_that_find_no_room_stop_the_stage_and_lose_nothing(sampled):
    run, words, whole = sampled
    stopped_with(run_program(words, preexec_fn=at_most(len(whole) // 2)), "File too large", "start the same command again")
    torn = (run / "candidates.jsonl").read_bytes()
    assert whole.startswith(torn) and torn.count(b"\n") > 2
    assert run_program(words).returncode == 0 and (run / "candidates.jsonl").read_bytes() == whole


def test_a_model_that_finds_no_room_stops_the_stage_and_leaves_no_half_of_it(prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(prepared[0], run)
    words = command("04_select_sft.py", run, *prepared[1], *FITTING)
    stopped_with(run_program(words, preexec_fn=at_most(10_000)), "File too large", "start the same command again")
    assert not (run / "models" / "none").exists()
    assert run_program(words).returncode == 0 and (run / "models" / "none" / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here; the tests with a limit on the size of a file do the same without a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_stage_and_it_goes_on_once_there_is_room(sampled, small_disk):
    run, words, whole = sampled
    for name in ("pairs.jsonl", "pairs.jsonl.made.json"):
        shutil.copy(run / name, small_disk)
    words[words.index(str(run))] = str(small_disk)
    space = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (space.f_bavail * space.f_frsize - 3 * space.f_frsize))       # room for the record, the lock, one page of rows
    stopped_with(run_program(words), "No space left on device", "start the same command again")
    assert whole.startswith((small_disk / "candidates.jsonl").read_bytes())
    (small_disk / "filler").unlink()
    assert run_program(words).returncode == 0 and (small_disk / "candidates.jsonl").read_bytes() == whole


def as_anybody():
    """Take from root what lets it write where it may not (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH); others never had it."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)                  # PR_CAPBSET_DROP, in force from the next exec on


def test_a_right_to_write_that_was_taken_away_stops_the_stage_and_it_goes_on_once_it_is_back(sampled):
    run, words, whole = sampled
    output = run / "candidates.jsonl"
    kept = b"".join(whole.splitlines(keepends=True)[:5])
    output.write_bytes(kept)
    output.chmod(0o444)
    stopped_with(run_program(words, preexec_fn=as_anybody), str(output), "Permission denied")
    run.chmod(0o555)
    stopped_with(run_program(words, preexec_fn=as_anybody), f"cannot write to --run {run}: Permission denied")
    assert output.read_bytes() == kept
    run.chmod(0o755)
    output.chmod(0o644)
    assert run_program(words).returncode == 0 and output.read_bytes() == whole
