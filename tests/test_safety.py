"""What comes from outside is data: no pickle is opened, no code of a model's folder runs, no name is followed."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run_stages

import common

PICKLE = b"cbuiltins\nopen\n(S'marker'\nS'w'\ntR."       # writes the file `marker` when it is opened


@pytest.fixture()
def folder(tiny_folder, tmp_path, monkeypatch):
    """A model's folder to spoil; the file `marker` beside it must never come to be."""
    monkeypatch.chdir(tmp_path)
    yield shutil.copytree(tiny_folder, tmp_path / "folder")
    assert not (tmp_path / "marker").exists()


LOADERS = {"model": lambda folder: common.load_model(str(folder), False, "float32"), "encoder": common.load_encoder,
           "tokenizer": lambda folder: common.load_tokenizer(str(folder)),
           "adapter": lambda folder: common.check_adapter(folder, "tiny")}


@pytest.mark.parametrize("role", ["model", "encoder", "adapter"])
def test_pickled_weights_are_refused_unopened(folder, capsys, role):
    (folder / "model.safetensors").unlink()
    common.config_path(folder).write_text('{"arguments": {"model": "tiny"}}')        # only an adapter has one
    (folder / ("adapter_model.bin" if role == "adapter" else "pytorch_model.bin")).write_bytes(PICKLE)
    with pytest.raises(SystemExit) as caught:
        LOADERS[role](folder)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and str(folder) in message and message.count("\n") == 1


@pytest.mark.parametrize("role", ["model", "tokenizer", "encoder"])
def test_code_in_a_models_folder_is_not_run_and_nobody_is_asked_about_it(folder, capsys, monkeypatch, role):
    (folder / "planted.py").write_text("open('marker', 'w')\n")
    path, auto = folder / "config.json", ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    change = {"model_type": "planted", "auto_map": dict.fromkeys(auto, "planted.X")}
    if role == "tokenizer":
        path = folder / "tokenizer_config.json"
        change = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["planted.X", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    try:
        LOADERS[role](folder)
        assert role == "tokenizer"                         # tokenizer.json is data, which needs no such class
    except SystemExit:
        assert capsys.readouterr().err.count("error: ") == 1


WATCHED, BROKEN = [], []                                   # the one folder that may be written to, what broke a rule


@sys.addaudithook
def watch(event: str, values: tuple) -> None:
    if not WATCHED or event == "socket.gethostname":
        return
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "pty.")) or event in (
            "os.system", "pickle.find_class"):
        BROKEN.append((event, str(values)))
    elif event == "open" and isinstance(values[0], str | bytes | Path):
        path, flags = os.path.realpath(os.fsdecode(values[0])), values[2] if isinstance(values[2], int) else 0
        writes = flags & (os.O_WRONLY | os.O_RDWR) and "__pycache__" not in path
        if path.endswith("canary") or (writes and not path.startswith((WATCHED[0], "/dev/null"))):
            BROKEN.append((event, path))


def test_no_stage_follows_what_data_names_or_opens_a_port_a_program_or_a_pickle(
        stage, tiny_folder, tmp_path, monkeypatch):
    """Data full of paths, addresses and commands."""
    (tmp_path / "canary").write_text("nobody reads this")
    bait = "file:canary http://127.0.0.1:9/x $(touch marker) `touch marker` ![](canary) {{open('marker','w')}}"
    rows = [{"conversation": f"../{c}/canary", "speaker": ("canary", "ann")[t % 2], "text": f"{t} of {c} {bait}"}
            for c in range(9) for t in range(4)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    importlib.import_module("scipy.stats"), importlib.import_module("peft")      # what an import does is not the point
    monkeypatch.setattr(sys.modules[__name__], "WATCHED", [str(tmp_path / "run")])
    run_stages(
        stage, Path("run"), tiny_folder, "01_prepare --source turns:turns.jsonl --user ann --limit 6 --val-share 0.2 "
        "--test-share 0.3 --max-action-tokens 900 --max-context-tokens 900 --max-context-turns 1",
        "02_sample_candidates --num-samples 2 --max-trace-tokens 6",
        "03_reconstruct_score --max-action-tokens 6 --scorers likelihood,embedding,judge",
        "04_select_sft --epochs 1 --rank 4 --arms backward,recon --score likelihood",
        "05_rl_train --steps 1 --num-prompts 1 --rank 4",
        f"06_evaluate --max-trace-tokens 6 --max-action-tokens 6 --judge {tiny_folder}")
    assert not BROKEN and not (tmp_path / "marker").exists() and (tmp_path / "run" / "report.html").is_file()
