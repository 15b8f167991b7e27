"""Another language: prompts in German, LEXICON emptied, and the stages find traces that pass and rewards that vary."""

import json

import pytest
from conftest import release

import common

CHATS = """
Hast du den Zug noch bekommen? | Nein, ich stand eine Stunde im Regen. | Und jetzt? | Jetzt trinke ich heißen Tee.
Kommst du am Freitag zum Grillen? | Ich muss leider bis acht arbeiten. | Komm doch danach! | Gut, ich bringe Salat mit.
Wie war die Prüfung heute? | Schwer, aber ich glaube, es reicht. | Das freut mich sehr! | Ich will nur noch schlafen.
Der Hund hat meinen Schuh gefressen. | Meiner frisst nur Socken. | Soll ich schimpfen? | Er versteht es doch nicht.
Fährst du im Sommer ans Meer? | Lieber in die Berge, da ist es kühl. | Allein? | Mit meiner Schwester und ihrem Zelt.
Die Nachbarn feiern schon wieder. | Ruf an, es ist Mitternacht. | Ich traue mich nicht. | Dann klingle ich bei ihnen.
Kennst du ein gutes Buch? | Ja, den neuen Krimi aus Wien. | Ist er blutig? | Ein wenig, aber er ist vor allem lustig.
Mein Rad wurde gestohlen. | Schon das dritte in diesem Jahr! | Ich gehe jetzt zu Fuß. | Nimm meins, ich brauche es kaum.
Was kochst du heute Abend? | Linsensuppe nach dem Rezept von Oma. | Darf ich kommen? | Natürlich, bring Brot mit.
Mein Chef hat heute gekündigt. | Dann wirst du endlich befördert. | Das glaube ich kaum. | Frag ihn, bevor er geht.
Es hat die ganze Nacht geschneit. | Hier liegt er bis zum Fenster. | Gehst du raus? | Erst wenn der Ofen warm ist.
Ich lerne jetzt Geige. | Deine Nachbarn tun mir leid. | Sie üben selbst Trompete! | Dann gründet doch eine Band.
"""
TASK = "Gespräch:\n{context}\n\nDann schrieb Sam:\n{action}\n\nWas fühlt und will Sam? Zwei Sätze, ohne Zitat."
EXAMPLES = [("Alex: Der Bus fällt heute aus.", "Dann laufe ich eben, es ist ja nicht weit.",
             "Sam nimmt die Sache leicht. Sam hat Lust auf frische Luft."),
            ("Alex: Meine Katze ist krank.", "Ach je, soll ich morgen bei euch vorbeikommen?",
             "Sam macht sich Sorgen um das Tier. Sam will Alex zur Seite stehen.")]
SYNTHESIS = [("system", "Du erklärst, was ein Mensch fühlt und will, bevor er eine Nachricht schreibt."),
             *(turn for context, action, trace in EXAMPLES for turn in (
                 ("user", TASK.replace("{context}", context).replace("{action}", action)), ("assistant", trace))),
             ("user", TASK)]


def test_stages_1_to_5_work_in_another_language_with_an_emptied_lexicon(stage, tmp_path):
    lines = [{"conversation": f"chat {number}", "speaker": ("jonas", "lena")[place % 2], "text": text.strip()}
             for number, chat in enumerate(CHATS.strip().splitlines()) for place, text in enumerate(chat.split("|"))]
    (source := tmp_path / "turns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.PROMPTS, "synthesis", SYNTHESIS)
        for name in common.LEXICON:
            patch.setitem(common.LEXICON, name, 0 if name == "min_action_words" else "")
        for command in (f"01_prepare --source turns:{source} --user lena --limit 6 --val-share 0.15 --test-share 0.15",
                        "02_sample_candidates --num-samples 2 --max-trace-tokens 16",
                        "03_reconstruct_score --scorers likelihood",
                        "04_select_sft --arms backward --epochs 1 --rank 4",
                        "05_rl_train --steps 1 --num-prompts 1 --num-generations 3 --negatives 1 --rank 4"):
            name, *arguments = command.split()
            stage(name).main([*arguments, "--run", str(tmp_path)])
            release()
        traces = [some.trace for row in common.read_rows(tmp_path / "candidates.jsonl", common.Candidates)
                  for some in row.candidates]
        passing = [trace for trace in traces if common.is_well_formed(trace)]
    repeats = lambda words: len(set(words)) < common.DISTINCT_SHARE * len(words)
    assert passing == [trace for trace in traces if "Sam" in trace and not repeats(common.words_of(trace))]
    assert len(passing) > len(traces) / 2 > 2 * sum(map(common.is_well_formed, traces))       # English refuses them
    step = common.read_rows(tmp_path / "rl.jsonl", stage("05_rl_train").Step)[0]
    assert step.measured["malformed"] < 1 and step.update["idle_groups"] == 0 and step.update["grad_norm"] > 0


CUT = common.Completion("One thing. And ano", finished=False, tokens=5, ids=[])


@pytest.mark.parametrize("entry, find, full, emptied", [
    ("function_words", lambda _: common.stem_overlap("where the sea is", "the sea is calm", ""), 0.0, 0.75),
    ("endings", lambda _: common.stem("hurting"), "hurt", "hurting"),
    ("speech_acts", lambda encoder: common.detect_leaks(encoder, ["Sam tells Alex about it."], "rain", "")[0].paraphrase
        - common.cosines(encoder, ["rain"], ["Sam tells Alex about it."])[0], 0.1, 0.0),
    ("mental_states", lambda _: common.is_well_formed("Sam has an exam tomorrow at noon."), False, True),
    ("not_in_a_trace", lambda _: common.is_well_formed('Sam feels "so tired".'), False, True),
    ("sentence_end", lambda _: common.is_well_formed("Sam is worried about the exam and"), False, True),
    ("sentence_end", lambda _: common.trace_of(CUT), "One thing.", "One thing. And ano")])
def test_an_empty_entry_switches_its_check_off(monkeypatch, encoder, entry, find, full, emptied):
    approximately = lambda value: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
    assert find(encoder) == approximately(full)
    monkeypatch.setitem(common.LEXICON, entry, "")
    assert find(encoder) == approximately(emptied)
