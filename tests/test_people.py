"""The pages, driven in a real browser: the report, and the sheet on which people judge."""

import json

import pytest
from conftest import make_pair
from sklearn.metrics import cohen_kappa_score

import common


@pytest.fixture(scope="module")
def evaluate(stage):
    return stage("06_evaluate")


HOSTILE = "</script><script>console.error('escaped')</script><img src=x onerror=console.error('escaped')> <!--"


@pytest.fixture()
def sheet(evaluate, tmp_path):
    """A run folder with a sheet of ten items over 12 pairs, its pairs, texts and the encoder's kind of judgements."""
    pairs = [make_pair(f"c{i // 2}/{i}", action=f"what was really said {i}", split="test") for i in range(12)]
    texts = {arm: {pair["id"]: f"{arm} says {i} {HOSTILE}" for i, pair in enumerate(pairs)} for arm in ("backward", "recon", "none")}
    items = evaluate.choose_items(pairs, texts, [("recon", "backward"), ("none", "backward")], 10, 3)
    evaluate.write_sheet(tmp_path, pairs, texts, items)
    judgements = [{"what": "actions", "id": pair["id"], "a": arm, "b": "backward", "order": "both", "winner": "ab"[i % 2] if i % 5 else "tie"}
                  for i, pair in enumerate(pairs) for arm in ("recon", "none")]
    return tmp_path, pairs, texts, items, judgements


def test_the_sheet_takes_arms_by_turns_and_shows_neither_arms_nor_order(evaluate, sheet):
    run, pairs, texts, items, _ = sheet
    assert sorted(item["a"] for item in items) == ["none"] * 5 + ["recon"] * 5 and len({item["id"] for item in items}) == 10 and {item["first"] for item in items} == {"a", "b"}
    page = (run / "human.html").read_text(encoding="utf-8")
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert shown.keys() == {"sheet", "items"} and all(item.keys() == {"context", "action", "first", "second"} for item in shown["items"])
    for item, on_page in zip(items, shown["items"]):
        first = item["a"] if item["first"] == "a" else item["b"]
        assert on_page["first"] == texts[first][item["id"]]
    same = {arm: dict.fromkeys(rows, "the same") for arm, rows in texts.items()}
    assert evaluate.choose_items(pairs, same, [("recon", "backward")], 10, 3) == []


def test_ten_judgements_by_keyboard_survive_a_reload_and_give_the_right_kappa(evaluate, sheet, browser):
    run, pairs, texts, items, judgements = sheet
    keys = ["a", "b", "t", "a", "b", "b", "a", "t", "a", "b"]
    browser.open(run / "human.html")
    for key in keys[:4]:
        browser.press(key)
    browser.press("ArrowLeft")                                                     # back to the fourth, changed to B and back to A
    browser.press("b")
    browser.press("ArrowLeft")
    browser.press("a")
    browser.reload()
    assert "5 of 10, 4 judged" in browser.value("document.getElementById('place').textContent")
    for key in keys[4:]:
        browser.press(key)
    browser.call("Runtime.evaluate", expression="document.getElementById('rater').focus()")
    for key in "tab":                                                               # typed into the name, no judgement
        browser.press(key)
    assert "10 judged" in browser.value("document.getElementById('place').textContent") and browser.value("document.getElementById('rater').value") == "tab"
    browser.call("Runtime.evaluate", expression="document.getElementById('download').click()", userGesture=True)
    for _ in range(100):
        if found := list(run.glob("recon-*-tab.json")):
            break
        browser.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 50))", awaitPromise=True)
    labels = json.loads(found[0].read_text())
    assert [row["choice"] for row in sorted(labels["labels"], key=lambda row: row["item"])] == [{"a": "A", "b": "B", "t": "tie"}[key] for key in keys]
    assert not browser.console

    people = evaluate.compare_people(found, run, judgements, pairs, texts, 0)
    verdict = {(row["id"], row["a"]): row["winner"] for row in judgements}
    mine = ["tie" if key == "t" else item["first"] if key == "a" else {"a": "b", "b": "a"}[item["first"]] for key, item in zip(keys, items)]
    judge = [verdict[item["id"], item["a"]] for item in items]
    assert people["labels"] == 10 and people["between"] is None
    assert people["with_judge"]["kappa"] == pytest.approx(cohen_kappa_score(mine, judge))
    assert people["with_judge"]["agreement"] == pytest.approx(sum(a == b for a, b in zip(mine, judge)) / 10)
    both = [(a, b) for a, b in zip(mine, judge) if "tie" not in (a, b)]
    assert people["with_judge_decided"]["n"] == len(both)


@pytest.mark.parametrize("width", [420, 1100])
def test_hostile_text_stays_text_on_the_sheet_and_nothing_is_wider_than_the_screen(sheet, browser, width):
    run, *_ = sheet
    browser.open(run / "human.html", width)
    assert "<script>console.error" in browser.value("document.getElementById('first').textContent") and browser.value("document.images.length") == 0
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert not browser.console


def test_people_are_compared_with_one_another_where_they_judged_the_same(evaluate, sheet, tmp_path):
    run, pairs, texts, items, judgements = sheet
    name = common.read_rows(run / "human.key.jsonl")[0]["sheet"]
    files = []
    for rater, choices in enumerate((["A", "B", "tie", "A", "B", "A"], ["A", "B", "A", "A", "tie", "B", "B"])):
        files.append(tmp_path / f"{rater}.json")
        files[-1].write_text(json.dumps({"sheet": name, "rater": f"rater {rater}", "labels": [{"item": i, "choice": choice} for i, choice in enumerate(choices)]}))
    people = evaluate.compare_people(files, run, judgements, pairs, texts, 0)
    assert people["raters"] == 2 and people["labels"] == 13 and people["between"]["n"] == 6 and people["between"]["agreement"] == 0.5
    assert people["between_decided"]["n"] == 4 and people["between_decided"]["agreement"] == 0.75


def test_labels_on_messages_that_have_changed_since_count_nowhere_and_an_older_sheet_keeps_its_key(evaluate, sheet, tmp_path, capsys):
    run, pairs, texts, items, judgements = sheet
    name = common.read_rows(run / "human.key.jsonl")[0]["sheet"]
    labels = tmp_path / "ann.json"
    labels.write_text(json.dumps({"sheet": name, "rater": "ann", "labels": [{"item": i, "choice": "A"} for i in range(10)]}))
    evaluate.write_sheet(run, pairs, texts, items[:4])
    changed = {**texts, "recon": {name: text + " more" for name, text in texts["recon"].items()}}
    people = evaluate.compare_people([labels], run, judgements, pairs, changed, 0)
    assert people["labels"] == 10 and people["outdated"] == 5 and people["with_judge"]["n"] == 5
    assert evaluate.compare_people([labels], run, [row for row in judgements if row["a"] == "recon"], pairs, texts, 0)["not_judged"] == 5
    with pytest.raises(SystemExit):
        evaluate.compare_people([labels, labels], run, judgements, pairs, texts, 0)
    assert "handed in sheet" in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [("nonsense", "not a file that human.html downloads"), ('{"sheet": "x", "rater": "", "labels": [{"item": 0, "choice": "A"}]}', "not in human.key.jsonl"),
                                         ('{"sheet": "x", "rater": "", "labels": [{"item": 0, "choice": "C"}]}', "A, B or tie"), ("[]", "not a file"),
                                         ('{"sheet": "x", "rater": "", "labels": [{"item": [], "choice": "A"}]}', "not a file")])
def test_a_file_that_holds_no_labels_of_this_sheet_is_named(evaluate, sheet, tmp_path, capsys, text, words):
    run, pairs, texts, _, judgements = sheet
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        evaluate.compare_people([path], run, judgements, pairs, texts, 0)
    assert words in capsys.readouterr().err
