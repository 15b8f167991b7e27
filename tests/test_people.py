"""People as judges: the sheet in a real browser, and what their labels say."""

import json
import shutil

import pytest

import common
from benchmarks import people

HOSTILE = "</script><script>console.error('escaped')</script><img src=x onerror=console.error('escaped')> <!--"
KEYS = ["a", "b", "t", "a", "b", "b", "a", "t", "a", "b"]


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture()
def run(tmp_path):
    """A run folder: 12 pairs of 6 conversations, three arms, a judge of either order, and a sheet of ten."""
    names = [f"c{place // 2}/{place}" for place in range(12)]
    write_rows(tmp_path / "pairs.jsonl", [
        {"id": name, "user": "ann", "conversation": name[:2], "split": "test", "action": f"what was said {place}",
         "context": [{"speaker": "bo", "text": f"my garden {HOSTILE}"}, {"speaker": "ann", "text": "oh no"}]}
        for place, name in enumerate(names)])
    for arm in ("backward", "recon", "none"):
        write_rows(tmp_path / "predictions" / f"{arm}.jsonl", [
            {"id": name, "action_tokens": 3, "answers": [
                {"trace": None, "finished": True, "tokens": 9, "action_logprob": -3.0,
                 "action": f"message {len(arm)}{place} {HOSTILE}"}]}
            for place, name in enumerate(names)])
    write_rows(tmp_path / "judgements.jsonl", [
        {"what": "actions", "pair": name, "k": 0, "a": arm, "b": "backward", "order": order,
         "winner": "ab"[place % 2 if place % 5 else order == "ba"]}                  # each fifth pair is a tie
        for place, name in enumerate(names) for arm in ("recon", "none") for order in ("ab", "ba")])
    people.main(["--run", str(tmp_path), "--sheet", "10"])
    return tmp_path


def wait_for_sheet(browser):
    browser.value("new Promise(done => { const look = () => document.getElementById('place').textContent ? done() : "
                  "setTimeout(look, 20); look(); })")


def read_key(run):
    return common.read_rows(run / "human.key.jsonl", people.Item)


def write_labels(run, name, choices):
    path = run / f"{name}.json"
    labels = dict(enumerate(choices))
    path.write_text(json.dumps({"sheet": read_key(run)[0].sheet, "rater": name, "labels": labels}))
    return path


def compare(run, *files):
    return people.compare_people(run, files)


def test_the_sheet_takes_arms_by_turns_and_shows_neither_arms_nor_ids(run):
    key = read_key(run)
    assert sorted(item.a for item in key) == ["none"] * 5 + ["recon"] * 5 and {item.b for item in key} == {"backward"}
    assert len({item.pair for item in key}) == 10 and {item.first for item in key} == {"a", "b"}
    page = (run / "human.html").read_text()
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert shown.keys() == {"sheet", "items"}
    texts = people.read_texts(run)
    for item, on_page in zip(key, shown["items"]):
        assert on_page.keys() == {"context", "action", "first", "second"}
        assert on_page["first"] == texts[item.a if item.first == "a" else item.b][item.pair]
    assert not any(word in page for word in ("backward", "recon\"", "c1/", "ann"))


def test_equal_messages_are_not_shown(run, capsys):
    for arm in ("recon", "none"):
        shutil.copy(run / "predictions" / "backward.jsonl", run / "predictions" / f"{arm}.jsonl")
    with pytest.raises(SystemExit) as stop:
        people.main(["--run", str(run), "--sheet", "10"])
    assert stop.value.code == 2 and "nothing to judge" in capsys.readouterr().err


def test_ten_judgements_by_key_survive_a_reload_and_are_compared_with_the_judge(run, browser, capsys):
    place = lambda: browser.value("document.getElementById('place').textContent")
    browser.open(run / "human.html")
    wait_for_sheet(browser)
    for key in KEYS[:4]:
        browser.press(key)
    for key in ("ArrowLeft", "b", "ArrowLeft", "a"):                                 # the fourth, to B and back to A
        browser.press(key)
    browser.reload()
    wait_for_sheet(browser)
    assert place() == "5 of 10, 4 judged"
    for key in KEYS[4:]:
        browser.press(key)
    browser.value("document.getElementById('rater').focus()")
    for key in "tab":                                                                # typed into the name: no judgement
        browser.press(key)
    assert place() == "10 of 10, 10 judged"
    assert browser.value("document.getElementById('done').checkVisibility()")
    browser.value("document.getElementById('download').click()")
    for _ in range(100):
        if found := list(browser.folder.glob("recon-*-tab.json")):
            break
        browser.value("new Promise(done => setTimeout(done, 50))")
    labels = json.loads(found[0].read_text())["labels"]
    assert labels == {str(item): {"a": "A", "b": "B", "t": "tie"}[key] for item, key in enumerate(KEYS)}
    assert not browser.console

    people.main(["--run", str(run), "--labels", str(found[0])])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    same = 0
    for item, key in zip(read_key(run), KEYS):
        pair = int(item.pair.partition("/")[2])
        judge = "ab"[pair % 2] if pair % 5 else "tie"
        mine = "tie" if key == "t" else item.first if key == "a" else {"a": "b", "b": "a"}[item.first]
        same += mine == judge
    assert result["labels"] == result["with_judge"]["n"] == 10 and result["between_people"] is None
    assert result["with_judge"]["agreement"] == same / 10
    low, high = result["with_judge"]["kappa_ci95"]
    assert low < result["with_judge"]["kappa"] < high


@pytest.mark.parametrize("width", [400, 1100])
def test_hostile_text_stays_text_and_nothing_is_wider_than_the_screen(run, browser, width):
    browser.open(run / "human.html", width)
    wait_for_sheet(browser)
    for place in ("first", "second", "turns"):
        assert HOSTILE in browser.value(f"document.getElementById('{place}').textContent")
    assert browser.value("document.images.length") == 0
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert not browser.console


def test_people_are_compared_with_one_another_where_both_judged(run):
    """Of six labels in common three agree. One says A, B and tie 3, 2 and 1 times, the other 3, 2 and 1 times, so
    chance agrees in (9 + 4 + 1) / 36 = 7 / 18, and kappa is (1 / 2 - 7 / 18) / (1 - 7 / 18) = 2 / 11."""
    files = [write_labels(run, "ann", ["A", "B", "tie", "A", "B", "A"]),
             write_labels(run, "bo", ["A", "B", "A", "A", "tie", "B", "B"])]
    key = read_key(run)
    for item in key:
        item.first = "a"                                                             # A is then the verdict a
    write_rows(run / "human.key.jsonl", [item.model_dump() for item in key])
    found = compare(run, *files)
    assert found["raters"] == 2 and found["labels"] == 13
    assert found["between_people"]["n"] == 6 and found["between_people"]["agreement"] == 0.5
    assert found["between_people"]["kappa"] == pytest.approx(2 / 11)
    assert found["between_people_decided"]["n"] == 4 and found["between_people_decided"]["agreement"] == 0.75


def test_two_who_always_say_the_same_one_thing_have_no_kappa(run):
    found = compare(run, write_labels(run, "ann", ["tie"] * 10), write_labels(run, "bo", ["tie"] * 10))
    assert found["between_people"]["agreement"] == 1 and found["between_people"]["kappa"] is None
    json.dumps(found, allow_nan=False)


def test_labels_on_changed_messages_and_on_what_was_not_judged_count_nowhere(run, capsys):
    labels = write_labels(run, "ann", ["A"] * 10)
    people.main(["--run", str(run), "--sheet", "4"])                                 # an older sheet keeps its key
    judged = (run / "judgements.jsonl").read_text().splitlines(keepends=True)
    (run / "judgements.jsonl").write_text("".join(line for line in judged if '"recon"' in line))
    found = compare(run, labels)
    assert found["labels"] == 10 and found["not_judged"] == found["with_judge"]["n"] == 5
    changed = (run / "predictions" / "recon.jsonl").read_text().replace("message", "another")
    (run / "predictions" / "recon.jsonl").write_text(changed)
    found = compare(run, labels)
    assert found["outdated"] == 5 and found["not_judged"] == 5 and found["with_judge"] is None
    with pytest.raises(SystemExit):
        compare(run, labels, labels)
    assert "twice" in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [
    ("nonsense", "not a file that human.html downloads"),
    ("[]", "not a file that human.html downloads"),
    ('{"sheet": "x", "rater": "", "labels": {"one": "A"}}', "labels.one"),
    ('{"sheet": "x", "rater": "", "labels": {"0": "C"}}', "'A', 'B' or 'tie'"),
    ('{"sheet": "x", "rater": "", "labels": {"0": "A"}}', "not in human.key.jsonl"),
    (None, "cannot read --labels"),
])
def test_a_bad_file_of_labels_ends_with_one_message(run, capsys, text, words):
    path = run / "labels.json"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        people.main(["--run", str(run), "--labels", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and error.startswith("error: ")
