"""run.sh's presets, without a GPU: what each stage is told, and that it understands it."""

import importlib
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT

import common

# In place of Python: the version check and the installation pass, and a stage prints what it was told.
ECHO = '#!/bin/sh\ncase "$1" in -*) ;; *) echo "TOLD $@" ;; esac\n'


def commands(tmp_path, *arguments) -> list[list[str]]:
    """The words of every stage that `bash run.sh ARGUMENTS` starts."""
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(ECHO)
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "installed.txt")
    done = subprocess.run(["bash", str(tmp_path / "run.sh"), *arguments], capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("TOLD")]


@pytest.mark.parametrize("arguments, pairs_of_the_longest", [([], 0), (["--gpu"], 4), (["--gpu", "4b"], 2)])
def test_every_stage_understands_its_preset_and_its_batches_hold_many_chats_but_few_long_pairs(
        tmp_path, arguments, pairs_of_the_longest):
    told = {}
    for script, *settings in commands(tmp_path, *arguments):
        args = importlib.import_module(script.removesuffix(".py")).parse_args(settings)
        told.setdefault(script[:2], args)
    assert list(told) == ["01", "02", "03", "04", "05", "06"]
    if not arguments:
        return
    prepare, sample, score, fit, train, act = told.values()
    # Chats have to reach the limit of tokens, and six turns do not.
    assert prepare.max_context_turns >= 40 and prepare.max_context_tokens >= 1024
    assert {"backward", "guarded", "recon", "judged", "shuffled", "worst"} < set(fit.arms.split(","))
    assert score.judge == act.judge and "judge" in score.scorers and not score.judge.startswith("Qwen")
    words = 524                                            # of the prompt itself
    room = lambda context: 4 * (words + context + prepare.max_action_tokens + sample.max_trace_tokens)
    assert sample.batch_tokens // room(prepare.max_context_tokens) == pairs_of_the_longest
    assert sample.batch_tokens // room(150) >= 2 * pairs_of_the_longest
    assert fit.row_tokens >= prepare.max_context_tokens + sample.max_trace_tokens + prepare.max_action_tokens
    assert train.num_prompts * train.num_generations == 64 and train.steps == 100


@pytest.mark.parametrize("modern, dtype", [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_that_does_not_compute_in_bfloat16_gets_float16(monkeypatch, modern, dtype):
    """Cards before Ampere only emulate it, and torch says yes to that unless it is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: modern or including_emulation)
    assert common.resolve_dtype("auto") == dtype
