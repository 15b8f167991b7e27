"""Several processes do the work of one, memory that runs out costs no row, and the loop runs in 4 bits."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_pair

import common

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
STAGES = (("02_sample_candidates", "--n", "2", "--max-trace-tokens", "12", "--batch", "2"),
          ("03_reconstruct_score", "--max-action-tokens", "6", "--batch", "2", "--keep-token-logprobs"),
          ("04_select_sft", "--arms", "backward", "--epochs", "1", "--batch", "3", "--rank", "4"),
          ("05_rl_train", "--steps", "2", "--prompts", "3", "--group", "2", "--rank", "4", "--max-new-tokens", "12", "--epochs", "1", "--retries", "2", "--trace-batch", "2",
           "--reward", "likelihood", "--temperature", "1"),
          ("06_evaluate", "--max-trace-tokens", "8", "--max-action-tokens", "6", "--batch", "2"))


def write_pairs(run: Path, train: int) -> Path:
    """Pairs of different lengths: the order of batches is then the order of nothing else."""
    run.mkdir(parents=True, exist_ok=True)
    splits = ["train"] * train + ["val"] * 2 + ["test"] * 5
    pairs = [make_pair(f"c{i}/1", action=f"that sounds like {i} times a lot of work " * (1 + i % 3), split=split) for i, split in enumerate(splits)]
    for i, pair in enumerate(pairs):
        pair["context"][0]["text"] += " again" * i
    common.write_output(run / "pairs.jsonl", "".join(map(common.dump_row, pairs)), {"arguments": {}})
    return run


def launch(script: str, run: Path, model: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    return subprocess.Popen([*LAUNCH, str(ROOT / f"{script}.py"), "--run", str(run), "--model", str(model), "--no-4bit", *arguments], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """The same loop by one process (in this one) and by two, which accelerate starts; and what the two printed."""
    alone, together = (write_pairs(tmp_path_factory.mktemp(name), 7) for name in ("alone", "together"))
    printed = {}
    for script, *arguments in STAGES:
        importlib.import_module(script).main(["--run", str(alone), "--model", str(tiny_folder), "--no-4bit", *arguments])
        done = launch(script, together, tiny_folder, *arguments)
        printed[script], problem = done.communicate(timeout=300)
        assert done.returncode == 0, problem
    return alone, together, printed


def assert_close(one, other, where=""):
    """Equal but for the rounding of numbers."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-4), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other)):
            assert_close(a, b, f"{where}[{place}]")
    else:
        assert one == other, where


def test_two_processes_write_the_rows_of_one_in_the_same_order_and_leave_no_parts(runs):
    alone, together, _ = runs
    for name in ("candidates.jsonl", "scores.jsonl", "token_logprobs.jsonl", "traces/backward.jsonl", "predictions/backward.jsonl", "reconstructions/shuffled.jsonl", "judgements.jsonl"):
        assert_close(common.read_rows(alone / name), common.read_rows(together / name), name)
    assert not list(together.rglob("*.part*"))


def test_two_processes_print_and_count_as_one(runs):
    *_, printed = runs
    for script, *_ in STAGES:
        assert printed[script].count("rows in") == 1, printed[script]
    assert "of 28\n" in printed["02_sample_candidates"]                       # 14 pairs, 2 traces each, of both processes


def test_losses_of_fitting_and_of_grpo_agree_between_one_and_two_processes(runs, tiny_folder, stage):
    alone, together, _ = runs
    rl = [[row for row in common.read_rows(run / "rl.jsonl") if "loss" in row] for run in (alone, together)]
    assert len(rl[0]) == 2 and any(row["grad_norm"] > 0 for row in rl[0])
    for one, other in zip(*rl):
        for key in ("reward", "loss", "entropy", "grad_norm", "adapter_change", "zero_variance", "length", "reward_std"):
            assert one[key] == pytest.approx(other[key], abs=1e-3), key
    sft = stage("04_select_sft")
    pairs = [pair for pair in common.read_pairs(alone / "pairs.jsonl") if pair["split"] == "train"]
    for arm in ("backward", "recon-grpo"):
        losses = []
        for run in (alone, together):
            model, tokenizer = common.load_model(str(tiny_folder), False)
            examples = [sft.user_example(tokenizer, pair, "Sam feels tired.") for pair in pairs]
            losses.append(sft.completion_loss(common.load_adapter(model, run / "models" / arm, str(tiny_folder)), examples, 100).item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_two_processes_train_on_from_a_checkpoint_to_more_steps_as_one_does(runs, tmp_path, tiny_folder, stage):
    """Each must have seen what there is before the first one discards it."""
    lines = []
    for run, name in zip(runs, ("alone", "together")):
        shutil.copytree(run, tmp_path / name)
        arguments = ["4" if before == "--steps" else value for before, value in zip(("", *STAGES[3]), STAGES[3])][1:]
        if name == "alone":
            stage("05_rl_train").main(["--run", str(tmp_path / name), "--model", str(tiny_folder), "--no-4bit", *arguments])
        else:
            done = launch("05_rl_train", tmp_path / name, tiny_folder, *arguments)
            problem = done.communicate(timeout=300)[1]
            assert done.returncode == 0, problem
        lines.append([row for row in common.read_rows(tmp_path / name / "rl.jsonl") if "loss" in row])
    assert [row["step"] for row in lines[0]] == [row["step"] for row in lines[1]] == [0, 1, 2, 3]
    for one, other in zip(*lines):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3) and one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-3)


def kill_second(started: subprocess.Popen, ready) -> None:
    """Kill the second of two processes as soon as `ready()`, and wait for the launcher to end."""
    while started.poll() is None and not ready():
        time.sleep(0.01)
    second = next(int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_rank_1(folder, started.pid))
    os.kill(second, signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode != 0


def test_grpo_of_two_processes_of_which_one_is_killed_is_gone_on_with_by_one(tmp_path, tiny_folder, stage):
    arguments = [*STAGES[3][1:], "--steps", "8", "--save-every", "1", "--val-every", "20"]
    alone, together = write_pairs(tmp_path / "alone", 7), write_pairs(tmp_path / "together", 7)
    stage("05_rl_train").main(["--run", str(alone), "--model", str(tiny_folder), "--no-4bit", *arguments])
    checkpoint = together / "rl" / "recon"
    kill_second(launch("05_rl_train", together, tiny_folder, *arguments), lambda: (checkpoint / "made.json").is_file())
    assert (checkpoint / "made.json").is_file() and not (together / "models" / "synthesizer").exists()
    before = len(common.read_rows(together / "rl.jsonl"))
    stage("05_rl_train").main(["--run", str(together), "--model", str(tiny_folder), "--no-4bit", *arguments])
    lines = [[row for row in common.read_rows(run / "rl.jsonl") if "loss" in row] for run in (alone, together)]
    assert 0 < before < 9 and [row["step"] for row in lines[1]] == list(range(8))
    for one, other in zip(*lines):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3) and one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-3)


def test_a_process_that_is_killed_stops_all_and_another_number_of_processes_goes_on(tmp_path, tiny_folder, stage, capsys):
    arguments = ("--n", "4", "--max-trace-tokens", "24", "--batch", "1")
    alone, together = write_pairs(tmp_path / "alone", 30), write_pairs(tmp_path / "together", 30)
    stage("02_sample_candidates").main(["--run", str(alone), "--model", str(tiny_folder), "--no-4bit", *arguments])
    started = launch("02_sample_candidates", together, tiny_folder, *arguments)
    part = together / "candidates.jsonl.part1"
    kill_second(started, lambda: part.is_file() and part.stat().st_size)
    assert part.is_file()
    kept = sum(path.read_bytes().count(b"\n") for path in (together / "candidates.jsonl", *common.parts_of(together / "candidates.jsonl")))
    capsys.readouterr()
    stage("02_sample_candidates").main(["--run", str(together), "--model", str(tiny_folder), "--no-4bit", *arguments])
    assert kept > 0 and f", {kept} skipped" in capsys.readouterr().out       # not thrown away and made anew
    assert (together / "candidates.jsonl").read_text() == (alone / "candidates.jsonl").read_text()
    assert not list(together.glob("*.part*"))


def is_rank_1(folder: Path, launcher: int) -> bool:
    try:
        return b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes() and f"PPid:\t{launcher}\n" in (folder / "status").read_text()
    except OSError:
        return False


def test_parts_are_put_into_the_output_once_even_if_that_was_interrupted(tmp_path):
    output, record = tmp_path / "rows.jsonl", {"made": "so"}
    common.write_output(output, "", record)
    common.append_rows(output, [{"id": "b"}])
    common.append_rows(tmp_path / "rows.jsonl.part0", [{"id": "a"}, {"id": "b"}])
    (tmp_path / "rows.jsonl.part1").write_text('{"id": "c"}\n{"id": "d", "te')
    assert list(common.finished_rows(output, record, False, ("id",), "abcd")) == ["b", "a", "c"]
    assert not list(tmp_path.glob("*.part*"))
    common.end_output(output, ["a", "b", "c"])
    assert [row["id"] for row in common.read_rows(output)] == ["a", "b", "c"]


def test_overwriting_discards_the_parts_of_an_earlier_run(tmp_path):
    output = tmp_path / "rows.jsonl"
    common.append_rows(tmp_path / "rows.jsonl.part0", [{"id": "old"}])
    common.begin_output(output, {}, overwrite=True)
    common.end_output(output, ["old"])
    assert output.read_text() == ""


def test_memory_that_runs_out_halves_the_portions_once_and_the_rows_stay_the_same(tiny, stage, monkeypatch, capsys):
    """The allocator's limit is simulated: the model refuses more than 4 rows at once."""
    model, tokenizer = tiny
    sampling, pairs = stage("02_sample_candidates"), [make_pair(f"c{i}/1", action="so much work " * (i + 1)) for i in range(5)]
    draw = lambda some: sampling.sample_traces(model, tokenizer, some, 2, 8, 1.0, 0.1, "seed")
    whole, forward = draw(pairs), model.forward

    def small_memory(ids, *args, **kwargs):
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "forward", small_memory)
    portions = common.Portions()
    assert portions.run(draw, pairs) == whole and portions.run(draw, pairs) == whole
    assert capsys.readouterr().err.count("out of memory") == 2               # 5 pairs -> 3 -> 2, and that is kept
    with pytest.raises(SystemExit):
        common.Portions().run(lambda some: small_memory(range(5)), pairs)
    assert "smaller model" in capsys.readouterr().err


def test_validation_says_once_that_memory_runs_out_and_goes_on_in_portions(tiny, stage, monkeypatch, capsys):
    model, tokenizer = tiny
    rl, pairs, asked = stage("05_rl_train"), [make_pair(f"c{i}/1", split="val") for i in range(4)], []

    def rollout(model, tokenizer, prompts, seeds, group, args):
        asked.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[common.Completion([5])] for _ in prompts]

    monkeypatch.setattr(rl, "rollout", rollout)
    rate = lambda model, tokenizer, encoder, some, *rest: [[dict.fromkeys(rl.MEASURED, 0.0) | {"fault": 0.0}] for _ in some]
    args, portions = rl.parse_arguments([]), common.Portions()
    for _ in range(3):
        rl.validate(model, tokenizer, None, lambda pair: [1, 2], rate, pairs, args, portions)
    assert asked == [4, *[2] * 12] and capsys.readouterr().err.count("out of memory") == 1


def test_memory_that_runs_out_where_nothing_can_be_halved_ends_the_stage_with_a_message(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as caught:
        common.run_stage(main)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "Tried to allocate 20 GiB" in error and "--group" in error and "start the same command again to go on" in error


def test_a_limit_on_memory_is_a_share_of_the_gpus_and_needs_a_gpu(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        common.begin_run(tmp_path / "none", 2.0)
    assert "--max-memory is for a GPU" in capsys.readouterr().err
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    for number, limit in enumerate((2.0, 100.0)):
        common.begin_run(tmp_path / str(number), limit)
    assert told == [0.25, 1.0]


def test_the_whole_loop_runs_in_4_bits_and_a_saved_adapter_gives_equal_outputs(tmp_path, tiny_folder, stage):
    from bitsandbytes.nn import Linear4bit

    run = write_pairs(tmp_path / "run", 3)
    for script, *arguments in STAGES:
        stage(script).main(["--run", str(run), "--model", str(tiny_folder), "--4bit", *arguments])
    assert all(json.loads((run / f"{name}.made.json").read_text())["arguments"]["four_bit"] for name in ("candidates.jsonl", "scores.jsonl", "results.json"))
    model, tokenizer = common.load_model(str(tiny_folder), True)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    adapted = common.add_adapter(model, 4, 0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([tokenizer.encode("Sam feels tired and wants to know how the day went.")])
    with torch.no_grad():
        expected = adapted(ids).logits
        common.save_adapter(adapted, tmp_path / "adapter", {"arguments": {"model": "tiny"}})
        bare = adapted.unload()
        assert (bare(ids).logits - expected).abs().max() > 1e-3               # the adapter did something
        again = common.load_adapter(common.load_model(str(tiny_folder), True)[0], tmp_path / "adapter", "tiny")
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("size", [(), ("4b",)])
def test_every_stage_takes_what_the_gpu_presets_of_run_sh_tell_it(tmp_path, stage, monkeypatch, size):
    """run.sh runs in a folder whose python writes down what it is told; then each stage reads that."""
    for name in ("run.sh", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "installed.txt").write_text((ROOT / "requirements.txt").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@" >> told.txt\n')
    python.chmod(0o755)
    subprocess.run(["bash", str(tmp_path / "run.sh"), "--gpu", *size], check=True, capture_output=True)
    told = (tmp_path / "told.txt").read_text().splitlines()
    assert [line.split()[0] for line in told] == ["01_prepare.py", "02_sample_candidates.py", "03_reconstruct_score.py", "04_select_sft.py", "05_rl_train.py", "05_rl_train.py", "06_evaluate.py"]
    assert len({line.partition("--run ")[2].split()[0] for line in told}) == 1

    class Understood(Exception):
        pass

    def understood(*args):
        raise Understood

    for line in told:
        script, *arguments = line.split()
        module = stage(script.removesuffix(".py"))
        monkeypatch.setattr(module, "begin_run", understood)
        with pytest.raises(Understood):
            module.main(arguments)
