"""Stages as programs: killed, interrupted, without room or rights, and two at once. Nothing finished may be lost."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from functools import partial

import pytest
from conftest import make_run, release, run_stages

import common
from benchmarks import faults

# Two pairs a batch.
SAMPLING = "02_sample_candidates", "--num-samples", "2", "--max-trace-tokens", "12", "--batch-tokens", "6600"
FITTING = "04_select_sft", "--arms", "none", "--epochs", "1", "--rank", "4"


@pytest.fixture(scope="module")
def undisturbed(stage, tiny_folder, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    run_stages(stage, run, tiny_folder, " ".join(SAMPLING), "03_reconstruct_score --scorers likelihood")
    return run


@pytest.fixture()
def program(tiny_folder):
    """program(run, SAMPLING, before) starts a stage; `before` is called in its process first."""
    always = "--model", str(tiny_folder), "--dtype", "float32"
    return lambda run, words, before=None: faults.start(f"{words[0]}.py", run, [*words[1:], *always], before)


def end(process, run) -> tuple[int, str]:
    """(exit code, what was printed)"""
    process.join(120)
    said = (log := faults.beside(run, "log")).read_text()
    log.unlink()
    return process.exitcode, said


def stopped_with(ended, *words):
    """It ended with exit code 2 and one message, without a traceback."""
    code, said = ended
    assert code == 2 and "Traceback" not in said and said.count("error: ") == 1, said
    assert all(word in said for word in words), said


def test_stages_killed_at_random_moments_end_like_undisturbed_ones():
    """The benchmark itself, with few trials."""
    found = faults.main(["--trials", "1", "--stages", "02", "04", "05"])
    assert found["trials"] == 3 and found["kills"] >= 3 and found["lost"] == 0


def test_the_second_process_on_a_run_folder_stops(program, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    common.open_run(Namespace(run=run, dtype="float32"))
    stopped_with(end(program(run, SAMPLING), run), "in use by another process", "--run")
    release()
    assert end(program(run, SAMPLING), run)[0] == 0


def append_slowly():
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a job in a shell's background ignores it
    append = common.append_rows
    common.append_rows = lambda *given: (append(*given), time.sleep(0.5))


def test_an_interrupt_ends_with_one_line_and_the_same_command_goes_on(program, undisturbed, tmp_path):
    run, whole = make_run(tmp_path / "run"), (undisturbed / "candidates.jsonl").read_bytes()
    process, output = program(run, SAMPLING, append_slowly), run / "candidates.jsonl"
    while process.is_alive() and not (output.is_file() and output.stat().st_size):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    code, said = end(process, run)
    rows = output.read_bytes()
    assert code == 130 and said == "stopped; finished rows are saved: start the same command again to go on\n"
    assert 0 < len(rows) < len(whole) and whole.startswith(rows) and rows.endswith(b"\n")
    code, said = end(program(run, SAMPLING), run)
    skipped = len(rows.splitlines())
    assert code == 0 and f", {skipped} skipped" in said and output.read_bytes() == whole


def as_anybody():
    """Take from root what lets it write anywhere (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH); others never had it."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~0b110
    libc.capset(header, sets)


def at_most(size):
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def fill(folder):
    """Leave room for the config, the empty output and one page of rows."""
    space = os.statvfs(folder)
    (folder / "filler").write_bytes(b"x" * (space.f_bavail - 2) * space.f_frsize)


@pytest.fixture()
def small_disk(tmp_path):
    (folder := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here; the limit on the size of a file does the same")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("fault, words", [
    ("size", "File too large"), ("disk", "No space left on device"), ("file", "candidates.jsonl: Permission denied"),
    ("folder", "cannot write to --run")])
def test_rows_that_cannot_be_written_stop_the_stage_which_goes_on_once_they_can(
        fault, words, program, undisturbed, tmp_path, request):
    run = make_run(request.getfixturevalue("small_disk") if fault == "disk" else tmp_path / "run")
    whole, output, kept = (undisturbed / "candidates.jsonl").read_bytes(), run / "candidates.jsonl", b""
    if fault == "file":
        assert end(program(run, SAMPLING), run)[0] == 0
        output.write_bytes(kept := b"".join(whole.splitlines(keepends=True)[:5]))
        output.chmod(0o444)
    elif fault == "folder":
        run.chmod(0o555)
    elif fault == "disk":
        fill(run)
    stopped_with(end(program(run, SAMPLING, at_most(len(whole) // 2) if fault == "size" else as_anybody), run), words)
    rows = output.read_bytes() if output.is_file() else b""
    assert whole.startswith(rows) and rows.startswith(kept) and (rows or fault == "folder")
    run.chmod(0o755)
    for path in run.iterdir():
        path.unlink() if path.name == "filler" else path.chmod(0o644)
    assert end(program(run, SAMPLING), run)[0] == 0 and output.read_bytes() == whole


def test_a_model_that_finds_no_room_stops_the_stage_and_leaves_no_half_of_it(program, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    stopped_with(end(program(run, FITTING, at_most(10_000)), run), "File too large", "start again")
    assert not (run / "models" / "none").exists()
    assert end(program(run, FITTING), run)[0] == 0
    assert (run / "models" / "none" / "adapter_model.safetensors").stat().st_size > 10_000
