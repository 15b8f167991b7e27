"""What comes from outside is data: no pickle is opened, no code of a model's folder runs, nothing that data names is followed."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import common


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("load", ["model", "encoder"])
def test_a_model_with_pickled_weights_alone_is_refused_unopened(tiny_folder, tmp_path, capsys, load):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(SystemExit) as caught:
        common.load_model(str(folder), False) if load == "model" else common.load_encoder(str(folder))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and str(folder) in message and "safetensors" in message and message.count("\n") == 1 and not marker.exists()


def test_an_adapter_with_pickled_weights_alone_is_refused_unopened(tiny, tmp_path, capsys):
    folder, marker = tmp_path / "adapter", tmp_path / "marker"
    common.save_adapter(common.add_adapter(tiny[0], 4, 0), folder, {"arguments": {"model": "tiny"}})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Planted(marker)))
    for load in (lambda: common.add_adapter(tiny[0], 4, 0, folder), lambda: common.load_adapter(tiny[0], folder, "tiny")):
        with pytest.raises(SystemExit):
            load()
        assert "holds no adapter" in capsys.readouterr().err and not marker.exists()


@pytest.mark.parametrize("part", ["model", "tokenizer", "encoder"])
def test_code_in_a_models_folder_is_not_run_and_not_asked_about(tiny_folder, tmp_path, capsys, monkeypatch, part):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_folder, folder)
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    changed = {"tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]}, "tokenizer_class": "PlantedTokenizer"})}.get(
        part, ("config.json", {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model", "AutoModel": "planted.Model"}}))
    path = folder / changed[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | changed[1]))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    try:
        {"model": lambda: common.load_model(str(folder), False), "tokenizer": lambda: common.load_tokenizer(str(folder)), "encoder": lambda: common.load_encoder(str(folder))}[part]()
        assert part == "tokenizer"                           # tokenizer.json is data: it may be read without the class that is named
    except SystemExit as stopped:
        assert stopped.code == 2 and capsys.readouterr().err.count("error: ") == 1
    assert not marker.exists()


WATCHED = '''
import importlib, json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
stages = [importlib.import_module(name) for name in ("01_prepare", "02_sample_candidates", "03_reconstruct_score", "04_select_sft", "05_rl_train", "06_evaluate")]
import matplotlib.pyplot, peft, scipy.stats
seen = dict(network=[], programs=[], pickles=[], opened=[], written=[])
def watch(event, values):
    if event.startswith("socket.") and event != "socket.gethostname":
        seen["network"].append(event)
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"):
        seen["programs"].append(f"{{event}} {{values[0]!r}}")
    elif event == "pickle.find_class":
        seen["pickles"].append(".".join(values))
    elif event == "open":
        writes = isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        seen["written" if writes else "opened"].append(os.fsdecode(values[0]) if not isinstance(values[0], int) else "")
sys.addaudithook(watch)
for stage, arguments in zip(stages, {arguments!r}):
    stage.main(arguments)
print()
print(json.dumps(seen))
'''


def test_no_stage_follows_what_data_names_or_opens_a_port_a_program_or_a_pickle(tiny_folder, tmp_path):
    """All six stages in one program that writes down what it does, on data full of paths, addresses and commands."""
    run, canary, marker = tmp_path / "run", tmp_path / "canary.txt", tmp_path / "marker"
    canary.write_text("nobody reads this")
    bait = f"{canary} file://{canary} http://127.0.0.1:9/x $(touch {marker}) `touch {marker}` {{{{open('{marker}','w')}}}} __import__('os').system('touch {marker}') ![]({canary})"
    rows = [{"conversation": f"../../../{c}/{canary}", "speaker": (str(canary), "ann")[t % 2], "text": f"turn {t} of {c} {bait}"} for c in range(9) for t in range(4)]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    always = ["--run", str(run), "--model", str(tiny_folder)]
    arguments = [[*always, "--source", f"turns:{tmp_path / 'turns.jsonl'}", "--user", "ann", "--max-action-tokens", "900", "--max-context-tokens", "900", "--max-context-turns", "1", "--limit", "8"],
                 [*always, "--n", "2", "--max-trace-tokens", "6"], [*always, "--max-action-tokens", "6", "--scorers", "likelihood,embedding,judge"], [*always, "--epochs", "1", "--rank", "4"],
                 [*always, "--steps", "1", "--max-new-tokens", "6", "--epochs", "1", "--rank", "4"], [*always, "--max-trace-tokens", "6", "--max-action-tokens", "6", "--judge", str(tiny_folder)]]
    done = subprocess.run([sys.executable, "-c", WATCHED.format(root=str(ROOT), arguments=arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not seen["network"] and not seen["programs"] and not seen["pickles"], {key: seen[key][:3] for key in ("network", "programs", "pickles")}
    assert not [path for path in seen["opened"] + seen["written"] if path.endswith(canary.name)] and not marker.exists()
    outside = {path for path in seen["written"] if path and not path.startswith((str(run), "/dev/null"))}
    assert not outside and any(path.endswith("report.html.tmp") for path in seen["written"])
