"""Several processes do the work of one, memory that runs out costs no row, and the loop runs in 4 bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_pair, make_run, run_stages

import common

# Two pairs a batch, here and in EVALUATING.
SAMPLING = "02_sample_candidates --num-samples 2 --max-trace-tokens 12 --batch-tokens 6600"
SCORING = "03_reconstruct_score --max-action-tokens 6 --batch-tokens 2200"
FITTING = "04_select_sft --arms backward,none --epochs 1 --batch-size 3 --rank 4"
GRPO = ("05_rl_train --num-prompts 3 --num-generations 2 --rank 4 --save-every 1 --val-every 2 --steps 2 "
        "--reward likelihood --paraphrase-weight 0")       # the naive reward: random text is no trace to the other one
E2E = "05_rl_train --objective e2e --num-generations 2 --max-new-tokens 12 --steps 1 --rank 4"
EVALUATING = "06_evaluate --max-trace-tokens 8 --max-action-tokens 6 --batch-tokens 400"
STAGES = """
import sys
import conftest
import importlib
conftest.run_stages(importlib.import_module, *sys.argv[1:])
"""


def launch(*words: str) -> subprocess.Popen:
    """Two processes of a script, as accelerate starts them."""
    several = ("-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
               "--dynamo_backend no --main_process_port 0").split()           # 0: any free port
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, *several, *map(str, words)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, stage):
    """The loop by one process and by two, and what the two printed: all stages in one launch, for the sake of time.

    Stage 5 goes on from 2 steps to 3, and from the beginning.
    """
    alone, together = (make_run(tmp_path_factory.mktemp(name), train=5, test=3) for name in ("alone", "together"))
    commands = SAMPLING, SCORING, FITTING, GRPO, f"{GRPO} --steps 3", E2E, f"{E2E} --overwrite", EVALUATING
    run_stages(stage, alone, tiny_folder, *commands)
    (together / "stages.py").write_text(STAGES)
    done = launch(together / "stages.py", together, tiny_folder, *commands)
    try:
        printed, problem = done.communicate(timeout=300)
    finally:
        done.terminate()
    assert done.returncode == 0, problem
    return alone, together, printed


def assert_close(one, other):
    """Equal but for the rounding of numbers."""
    number = re.compile(r"-?\d+(?:\.\d+)?e-\d+|-?\d+\.\d+")
    (text, values), (others, found) = ((number.sub("#", some), [float(value) for value in number.findall(some)])
                                       for some in (json.dumps(one), json.dumps(other)))
    assert text == others and values == pytest.approx(found, abs=1e-3)


def rows_of(path: Path) -> list[dict]:
    return [row.model_dump() for row in common.read_rows(path, common.Row)]


def test_two_processes_write_the_rows_of_one_in_the_same_order_and_print_as_one(runs):
    alone, together, printed = runs
    for name in ("candidates", "scores", "traces/backward", "predictions/backward", "predictions/none", "judgements"):
        assert_close(rows_of(alone / f"{name}.jsonl"), rows_of(together / f"{name}.jsonl"))
    assert printed.count("rows in") == len(rows_of(together / "costs.jsonl")) == 8
    assert "of 20\n" in printed                            # 10 pairs, 2 traces each, of both processes


def test_losses_of_fitting_and_of_grpo_agree_between_one_and_two_processes(runs, tiny_folder, stage):
    alone, together, _ = runs
    lines, others = ([row | {"seconds": 0} for row in rows_of(run / "rl.jsonl")] for run in (alone, together))
    assert_close(lines, others)
    steps = [row for row in lines if row["update"]]
    assert [f"{row['objective']} {row['step']}" for row in steps] == ["recon 0", "recon 1", "recon 2", "e2e 0"]
    assert any(row["update"]["grad_norm"] > 0 for row in steps)
    fit = stage("04_select_sft")
    for arm in ("backward", "none", "synthesizer", "e2e-grpo"):
        losses = []
        for run in (alone, together):
            local = common.load_model(str(tiny_folder), False, "float32")
            adapted = common.add_adapter(local.model, 0, 0, run / "models" / arm, trainable=False)
            example = fit.user_example(local.tokenizer, make_pair(), "Sam feels tired.")
            losses += [fit.completion_loss(adapted, [example], len(example[1])).item()]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def is_rank_1(folder: Path, launcher: int) -> bool:
    try:
        return b"\0RANK=1\0" in (folder / "environ").read_bytes() and \
            f"PPid:\t{launcher}\n" in (folder / "status").read_text()
    except OSError:
        return False


def test_a_process_that_is_killed_stops_all_and_another_number_of_them_goes_on(tmp_path, tiny_folder, stage, capsys):
    command = f"{SAMPLING} --max-trace-tokens 24 --batch-tokens 1"
    alone, together = (make_run(tmp_path / name, train=12) for name in ("alone", "together"))
    run_stages(stage, alone, tiny_folder, command)
    output, (name, *arguments) = together / "candidates.jsonl", command.split()
    started = launch(ROOT / f"{name}.py", *arguments, "--run", together, "--model", tiny_folder, "--dtype", "float32")
    while started.poll() is None and not (output.is_file() and output.stat().st_size):
        time.sleep(0.01)
    second = next(int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_rank_1(folder, started.pid))
    os.kill(second, signal.SIGKILL)
    started.communicate(timeout=60)
    kept = output.read_bytes().count(b"\n")
    assert started.returncode != 0 and 0 < kept < 20
    capsys.readouterr()
    run_stages(stage, together, tiny_folder, command)
    assert f", {kept} skipped" in capsys.readouterr().out  # not thrown away and made anew
    assert output.read_text() == (alone / "candidates.jsonl").read_text()


def test_only_the_first_process_writes_and_removes(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("RANK", "1")
    common.discard(tmp_path / "kept")
    common.write_file(tmp_path / "file", "text", {"arguments": {}})
    common.append_rows(tmp_path / "rows", [common.Row()])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_memory_that_runs_out_halves_the_work_and_the_rows_stay_the_same(tiny, stage, monkeypatch, capsys):
    """The allocator's limit is simulated: the model refuses more than 4 rows at once."""
    sampling, pairs = stage("02_sample_candidates"), [make_pair(f"c{i}/1", "so much work " * (i + 1)) for i in range(5)]
    args = sampling.parse_args(["--num-samples", "2", "--max-trace-tokens", "8"])
    draw = lambda some: sampling.sample_traces(tiny, some, args)
    whole, forward = draw(pairs), tiny.model.forward

    def small_memory(ids, *rest, **options):
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
        return forward(ids, *rest, **options)

    monkeypatch.setattr(tiny.model, "forward", small_memory)
    assert common.in_portions(draw, pairs) == whole
    assert capsys.readouterr().err.count("out of memory") == 2                # 5 pairs: 2 and 3, then 1 and 2
    for work in (lambda: common.in_portions(lambda some: small_memory(range(5)), pairs), lambda: draw(pairs)):
        with pytest.raises(SystemExit) as caught:
            common.run_stage(work)
        assert caught.value.code == 2 and "smaller model" in capsys.readouterr().err


def test_the_whole_loop_runs_in_4_bits_and_a_saved_adapter_gives_equal_outputs(tmp_path, tiny_folder, stage):
    from bitsandbytes.nn import Linear4bit

    run = make_run(tmp_path / "run", train=3, test=3)
    commands = SAMPLING, SCORING, FITTING, GRPO, E2E, EVALUATING
    run_stages(stage, run, tiny_folder, *(f"{command} --4bit" for command in commands))
    assert all(common.read_config(run / name)["arguments"]["four_bit"] for name in ("candidates.jsonl", "results.json"))
    load = lambda: common.load_model(str(tiny_folder), True, "float32")
    local = load()
    assert any(isinstance(module, Linear4bit) for module in local.model.modules())
    adapted = common.add_adapter(local.model, 4, 0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([local.tokenizer.encode("Sam feels tired and wants to know how the day went.")])
    with torch.no_grad():
        expected = adapted(ids).logits
        common.save_adapter(adapted, tmp_path / "adapter", {"arguments": {"model": "tiny"}})
        assert (adapted.unload()(ids).logits - expected).abs().max() > 1e-3   # the adapter did something
        again = common.add_adapter(load().model, 0, 0, tmp_path / "adapter", trainable=False)
        assert torch.equal(again(ids).logits, expected)
