"""Files on disk: clear errors, nothing finished is lost, an output knows what it was made with."""

import json
from argparse import Namespace

import pytest
from conftest import make_pair, make_run, release

import common
from common import Candidates

PAIR = make_pair()


def rows(*names: str) -> list[Candidates]:
    return [Candidates(id=name, candidates=[{"trace": "x", "finished": True, "tokens": 3}]) for name in names]


def failure(capsys, work, *arguments) -> str:
    """The one line with which the program ends."""
    with pytest.raises(SystemExit) as caught:
        work(*arguments)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("change, reason", [
    (b'{"id": "b"', "not a whole JSON object"), (b'{"id": "\xff"}', "not a whole JSON object in UTF-8"),
    (b"[1, 2]", "the row: "), ({"action": " "}, "action: "), ({"cut": True}, "cut: "),
    ({"context": [{"text": "x"}]}, "context.0.speaker: "), ({}, "id: 'c/1' stands there twice"),
    ({"mine": [float("nan")]}, "not a whole JSON object in UTF-8 (the number NaN is not finite)"),
    (b'{"mine": 1e999}', "not a whole JSON object in UTF-8 (the number 1e999 is not finite)")])
def test_a_bad_line_is_named_by_file_line_and_key(tmp_path, capsys, change, reason):
    path = tmp_path / "rows.jsonl"
    assert "run stage 1 first" in failure(capsys, common.read_rows, path, common.Pair, "stage 1")
    bad = change if isinstance(change, bytes) else json.dumps(PAIR.model_dump() | change).encode()
    path.write_bytes(common.dump_row(PAIR).encode() + bad + b"\n")
    assert f"{path}, line 2: {reason}" in failure(capsys, common.read_rows, path, common.Pair)


def test_rows_survive_a_round_trip_with_any_text_and_with_keys_of_their_own(tmp_path):
    path, text = tmp_path / "rows.jsonl", "line\u2028separator, 日本語, 😀, \x00 <script>"
    pair = make_pair(action=text, mine=[None, 1.5, {"x": text}])
    common.append_rows(path, [pair])
    assert common.read_rows(path, common.Pair) == [pair]
    path.write_text(json.dumps(PAIR.model_dump() | {"action": "a \ud800 lone surrogate, 😀", "mine": "\udfff"}) + "\n")
    (read,) = common.read_rows(path, common.Pair)
    assert (read.action, read.mine) == ("a ? lone surrogate, 😀", "?")


def test_a_torn_last_line_is_cut_off_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    output = common.Output(path, Candidates, {"seed": 0})
    output.append(rows("a", "b"))
    output.append(rows("b"))                                       # not a second time
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "c", "text": "ü'.encode()[:-1])
    output = common.Output(path, Candidates, {"seed": 0})
    assert path.read_bytes() == whole and output.has(rows("b", "a")) and not output.has(rows("b", "c"))
    output.append(rows("c"))
    assert common.read_rows(path, Candidates) == rows("a", "b", "c")


def test_other_settings_fail_with_the_difference_and_overwrite_takes_nothing_before_new_rows(tmp_path, capsys):
    path, new = tmp_path / "out.jsonl", {"arguments": {"seed": 1}}
    common.Output(path, Candidates, {"arguments": {"seed": 0}}).append(rows("a"))
    files = lambda: [file.read_bytes() for file in (path, common.config_path(path))]
    before, message = files(), failure(capsys, common.Output, path, Candidates, new)
    assert "arguments.seed was 0, is now 1" in message and "--overwrite" in message
    output = common.Output(path, Candidates, new, overwrite=True)
    assert not output.rows and files() == before
    output.append(rows("b"))
    assert list(common.Output(path, Candidates, new).rows) == ["b"] and common.is_made(path, new, False)


def test_a_config_changes_with_arguments_inputs_and_words_but_not_with_the_folder(tmp_path, monkeypatch, capsys):
    (source := tmp_path / "in.jsonl").write_text("{}\n")
    make = lambda **more: common.run_config(
        Namespace(run=tmp_path, **{"seed": 0} | more), [source], ["user_model"], ["arms"])
    first = make()
    assert make(overwrite=True, concurrency=3, arms="x") == first
    assert common.first_difference(first, make(seed=1)) == "arguments.seed was 0, is now 1"
    for words, entry in ((common.PROMPTS, "judge"), (common.PROMPTS, "user_model"), (common.LEXICON, "endings")):
        with monkeypatch.context() as patch:
            patch.setitem(words, entry, [("user", "{context}")])
            assert (make() == first) == (entry == "judge")         # which this output is not made with
    for name in ("PERSON", "OTHERS", "SETTING", "SCENE", "THINK", "END_THINK"):
        with monkeypatch.context() as patch:
            patch.setattr(common, name, "another")
            assert make() != first, name
    common.write_file(output := tmp_path / "out.jsonl", "", first)
    common.check_made_from(output, source, "02")
    source.write_text('{"id": 1}\n')
    assert make() != first and "another in.jsonl" in failure(capsys, common.check_made_from, output, source, "02")


def test_a_second_set_takes_the_settings_of_the_first_and_keeps_its_own_tag_and_folder(tmp_path):
    first = Namespace(run=tmp_path / "moved", tag=None, adapter=None, seed=3, limit=5, show_prompt=False)
    common.write_file(tmp_path / "x.jsonl", "", common.run_config(first))
    args = Namespace(run=tmp_path, tag="grpo", adapter="dir", seed=0, limit=None, show_prompt=True)
    assert vars(common.inherit_settings(args, tmp_path / "x.jsonl")) == vars(args) | {"seed": 3, "limit": 5}


def test_a_run_folder_that_cannot_serve_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    file, args = (Namespace(run=tmp_path / name, dtype="auto") for name in ("file", "new"))
    assert "cannot write to --run" in failure(capsys, common.open_run, file)
    common.open_run(args)
    assert "in use by another process" in failure(capsys, common.open_run, args)
    release()
    common.open_run(args)
    release()
    (make_run(args.run) / "pairs.jsonl.made.json").write_text("{}")
    assert "is of an earlier version" in failure(capsys, common.open_run, args)


@pytest.mark.parametrize("flags", [("--limit", "0"), ("--batch-tokens", "1.5"), ("--min-p", "2"), ("--min-p", "nan")])
def test_a_number_that_makes_no_sense_is_refused(stage, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        stage("02_sample_candidates").main(["--run", str(tmp_path), *flags])
    assert caught.value.code == 2 and f"{flags[0]}: {flags[1]!r} is not a" in " ".join(capsys.readouterr().err.split())


def test_seeds_depend_on_every_part_and_batches_hold_every_item_once_longest_first():
    assert len({common.stable_seed(seed, name, k) for seed in (0, 1) for name in ("a", "b") for k in (0, 1)}) == 8
    assert common.stable_seed(0, "a") == common.stable_seed(0, "a") < 2**63
    assert common.batch_by_length([3, 1, 4, 9, 1, 5], lambda item: item, 8) == [[9], [5], [4, 3], [1, 1]]
