"""The benchmark of private SST-2: what is private is in no public text, and the summary is its equation."""

import json

import pytest

from benchmarks import private_sst2, sst2_sentences
from jaxdp.models import causal_lm, load_tokenizer
from jaxdp.models.tokenizer import check_matches
from jaxdp.models.weights import read_config

SENTENCES = [
    ("the film is a warm and funny tale", "1"),
    ("a long and dull tale without an end", "0"),
    ("the acting is fine but the plot is thin", "0"),
    ("one of the best and most honest comedies", "1"),
]
PHRASES = [
    *SENTENCES, ("a warm and funny tale", "1"), ("dull tale", "0"), ("tale", "1"), ("the plot is thin", "0"), ("most honest", "1"),
]  # fmt: skip


def test_whole_sentences_lie_in_no_other_phrase():
    assert sorted(sst2_sentences.whole_sentences(PHRASES)) == sorted(SENTENCES)


@pytest.mark.parametrize("seed", range(4))
def test_no_public_phrase_lies_in_private_sentences_alone(seed):
    private, public = sst2_sentences.split(PHRASES, num_private=2, seed=seed)
    rest = [text for text, label in SENTENCES if (text, label) not in private]
    assert len(private) == len(rest) == 2
    assert not set(private) & set(public)
    assert all(any(f" {text} " in f" {sentence} " for sentence in rest) for text, _ in public)
    assert all(phrase in public for phrase in PHRASES if any(f" {phrase[0]} " in f" {sentence} " for sentence in rest))


def test_more_private_sentences_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_private=4"):
        sst2_sentences.split(PHRASES, num_private=4)


def test_the_untrained_folder_is_a_model_with_its_tokenizer(tmp_path):
    sizes = private_sst2.SIZES | {"vocabulary": 300}
    folder = sst2_sentences.write_untrained_model(
        tmp_path / "untrained", PHRASES, vocabulary=sizes.pop("vocabulary"), **sizes
    )
    model, tokenizer = causal_lm(read_config(folder)), load_tokenizer(folder)
    check_matches(tokenizer, model)
    text = PHRASES[0][0]
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    public = sst2_sentences.write_public_text(tmp_path / "public.jsonl", PHRASES)
    verdicts = [json.loads(line)["text"] for line in public.read_text().splitlines()]
    assert verdicts[0].endswith("tale it was good .")
    assert verdicts[1].endswith("end it was bad .")


def test_rows_have_a_goal_unless_they_are_not_private():
    found = private_sst2.rows(private_sst2.OPTIONS, (2.0, 6.0))
    assert len(found) == 2 + 2 * 4
    for name, options in found.items():
        assert ("--no-privacy" in options) == name.startswith("mezo")
        assert name.startswith("mezo") or options[-1] == name.rpartition(" ")[2]


def test_zeroth_order_rows_have_the_steps_or_the_passes_of_dp_aggzo():
    def steps(name):
        value = dict(zip(private_sst2.OPTIONS[name][::2], private_sst2.OPTIONS[name][1::2], strict=True))
        return int(value["--num-steps"]), int(value.get("--num-directions", 1))

    T, K = steps("dp-aggzo")
    assert K == 16
    for name in ("mezo", "dpzero"):
        assert steps(name) == (T, 1)
        assert steps(f"{name}, long") == (T * K, 1)


def test_the_recovered_part_is_that_of_the_gap_between_dpzero_and_mezo():
    accuracies = {
        "mezo": [0.7, 0.7],
        "mezo, long": [0.8, 0.9],
        "dpzero, epsilon 2": [0.5, 0.6],
        "dpzero, long, epsilon 2": [0.6, 0.7],
        "dp-aggzo, epsilon 2": [0.7, 0.75],
        "dpzero, long, epsilon 6": [0.9, 0.9],
        "dp-aggzo, epsilon 6": [0.8, 0.8],
    }
    rows = [
        {"row": name, "before": {"accuracy": 0.5}, "after": {"accuracy": value}}
        for name, values in accuracies.items()
        for value in values
    ]
    found = private_sst2.summary(rows)
    assert found["recovered"] == {
        "epsilon 2, of DPZero with as many steps": pytest.approx((0.725 - 0.55) / (0.85 - 0.55)),
        "epsilon 2, of DPZero with as many passes": pytest.approx((0.725 - 0.65) / (0.85 - 0.65)),
        "epsilon 6, of DPZero with as many passes": None,
    }
    assert found["zero_shot"] == 0.5
    assert private_sst2.summary([row for row in rows if row["row"] != "mezo, long"])["recovered"] == {}
    assert found["accuracy"]["mezo, long"]["all"] == [0.8, 0.9]
