"""Files on disk: clear errors, nothing finished is lost, outputs know what they were made with."""

import argparse
import json

import pytest
from conftest import make_pair

import common


def stopped(capsys, function, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_missing_file_names_the_stage_to_run(tmp_path, capsys):
    message = stopped(capsys, common.read_rows, tmp_path / "pairs.jsonl", ["id"], "01_prepare.py")
    assert "pairs.jsonl" in message and "01_prepare.py" in message


@pytest.mark.parametrize("line, reason", [
    (b'{"id": "b"', "not a whole JSON object"),
    (b"[1, 2]", "expected a JSON object, found list"),
    (b'{"name": "b"}', "key 'id' is missing"),
    (b'{"id": "\xff"}', "not UTF-8"),
    (b"<html>", "not a whole JSON object"),
    (b"[" * 100_000, "not a whole JSON object"),
])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, capsys, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b"\n")
    message = stopped(capsys, common.read_rows, path, ["id"])
    assert f"{path}, line 2" in message and reason in message


def test_rows_survive_a_round_trip_with_any_text(tmp_path):
    rows = [{"id": "1", "text": "line\u2028separator, \ud800 lone surrogate, 日本語, <script>"}, {"id": "2", "extra": [None, 1.5]}]
    path = tmp_path / "rows.jsonl"
    common.append_rows(path, rows[:1])
    common.append_rows(path, rows[1:])
    read = common.read_rows(path, ["id"])
    assert read[0]["text"] == rows[0]["text"].replace("\ud800", "?") and read[1] == rows[1]


def test_a_torn_last_line_is_cut_off_and_the_rest_is_kept(tmp_path):
    path, record = tmp_path / "out.jsonl", {"seed": 0}
    assert common.finished_rows(path, record, False, ["id"], []) == {}
    common.begin_output(path, record, False)
    common.append_rows(path, [{"id": "a"}, {"id": "b"}])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "c", "text": "ü'.encode()[:-1])
    assert list(common.finished_rows(path, record, False, ["id"], ["a", "b", "c"])) == ["a", "b"]
    assert path.read_bytes() == whole


def test_a_foreign_line_in_an_output_stops_and_keeps_the_file(tmp_path, capsys):
    path, record = tmp_path / "out.jsonl", {"seed": 0}
    common.begin_output(path, record, False)
    path.write_text('{"id": "a"}\nhello\n{"id": "b"}\n')
    assert "line 2" in stopped(capsys, common.finished_rows, path, record, False, ["id"], ["a", "b"])
    assert path.read_text() == '{"id": "a"}\nhello\n{"id": "b"}\n'


@pytest.mark.parametrize("line", ['{"id": "z"}', '{"id": "a"}'])
def test_a_row_that_does_not_belong_is_never_counted_as_finished(tmp_path, capsys, line):
    path = tmp_path / "out.jsonl"
    common.begin_output(path, {}, False)
    path.write_text('{"id": "a"}\n' + line + "\n")
    assert "line 2" in stopped(capsys, common.finished_rows, path, {}, False, ["id"], ["a", "b"])


@pytest.mark.parametrize("change, word", [({"action": 5}, "'action'"), ({"action": " "}, "'action'"), ({"context": []}, "'context'"), ({"context": [{}]}, "'context'"),
                                          ({"context": "x"}, "'context'"), ({"split": "dev"}, "'split'"), ({"id": []}, "'id'"), ({}, "twice")])
def test_a_pair_that_no_stage_could_use_is_named_by_line(tmp_path, capsys, change, word):
    pair = make_pair()
    path = tmp_path / "pairs.jsonl"
    common.append_rows(path, [pair, pair | change])
    assert "line 2: " in (message := stopped(capsys, common.read_pairs, path)) and word in message


@pytest.mark.parametrize("row", [{"candidates": []}, {"candidates": "x"}, {"candidates": [{"trace": None, "tokens": 1}]}, {"candidates": [{"trace": "x"}]}])
def test_a_candidate_row_that_no_stage_could_use_is_named_by_line(tmp_path, capsys, row):
    path = tmp_path / "candidates.jsonl"
    common.append_rows(path, [{"id": "a"} | row])
    assert "line 1: " in stopped(capsys, common.read_candidates, path, "02", ["trace", "tokens"])


def test_an_output_of_an_earlier_input_is_refused_even_if_its_ids_fit(tmp_path, capsys):
    source, output = tmp_path / "pairs.jsonl", tmp_path / "candidates.jsonl"
    source.write_text('{"id": "a"}\n')
    common.write_output(output, "", common.made_with(argparse.Namespace(run=tmp_path), [source]))
    common.check_made_from(output, source, "02")
    source.write_text('{"id": "a", "split": "test"}\n')
    assert "another pairs.jsonl" in stopped(capsys, common.check_made_from, output, source, "02")


def test_a_run_folder_that_cannot_be_made_stops_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "cannot write to --run" in stopped(capsys, common.begin_run, tmp_path / "file")


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--limit", "-5"], ["--batch", "0"], ["--n", "none"], ["--min-p", "2"], ["--temperature", "-1"]])
def test_a_number_that_makes_no_sense_is_refused(stage, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        stage("02_sample_candidates").main(["--run", str(tmp_path), *flags])
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


def test_another_record_stops_and_names_the_difference(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    common.begin_output(path, {"arguments": {"seed": 0}}, False)
    common.append_rows(path, [{"id": "a"}])
    message = stopped(capsys, common.finished_rows, path, {"arguments": {"seed": 1}}, False, ["id"], ["a"])
    assert "arguments.seed was 0, is now 1" in message and "--overwrite" in message
    assert common.read_rows(path) == [{"id": "a"}]
    assert common.finished_rows(path, {"arguments": {"seed": 1}}, True, ["id"], ["a"]) == {}
    assert common.read_rows(path) == [{"id": "a"}]                       # --overwrite takes nothing until the work begins
    common.begin_output(path, {"arguments": {"seed": 1}}, True)
    assert common.read_rows(path) == [] and common.finished_rows(path, {"arguments": {"seed": 1}}, False, ["id"], ["a"]) == {}


def test_the_record_changes_with_arguments_inputs_and_prompts_but_not_with_the_folder(tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    make = lambda **change: common.made_with(argparse.Namespace(**({"run": tmp_path, "overwrite": False, "seed": 0} | change)), [source], ["user_model"])
    first = make()
    assert make(run=tmp_path / "other", overwrite=True) == first
    assert make(seed=1) != first
    source.write_text('{"id": 1}\n')
    assert make()["inputs"] != first["inputs"]
    monkeypatch.setitem(common.PROMPTS, "user_model", [("user", "{context}")])
    assert make()["prompts"] != first["prompts"]
    json.dumps(first)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = {common.seed_of(seed, stage, name) for seed in (0, 1) for stage in ("02", "05") for name in ("a", "b")}
    assert len(seeds) == 8 and common.seed_of(0, "02", "a") == common.seed_of(0, "02", "a")


def test_batches_hold_every_item_once_longest_first():
    batches = common.batches_by_length([3, 1, 4, 1, 5], lambda item: item, 2)
    assert batches == [[5, 4], [3, 1], [1]]
