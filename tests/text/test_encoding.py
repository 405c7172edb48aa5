"""Laws of encoding: one row is one unit's own, and every token is predicted once."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdp import text
from jaxdp.text import Fields, Record

BOS, EOS = 1, 2
LABELS = {"0": " bad", "1": " good"}


def ids(string):
    return [3 + byte for byte in string.encode()]


def texts(*strings, units=None):
    return [
        Record("", s, unit=u, line=i + 1) for i, (s, u) in enumerate(zip(strings, units or [None] * 99, strict=False))
    ]


def targets(data, unit=0):
    """The tokens that the loss of a unit counts, in order."""
    tokens, weights = data["tokens"][unit], data["weights"][unit]
    return tokens[weights > 0].tolist()


# Language modeling.


def test_a_text_begins_and_ends_as_the_tokenizer_has_it(tokenizer):
    data, report = text.encode_texts(texts("abc"), tokenizer, max_length=8)
    assert data["tokens"].tolist() == [[[BOS, *ids("abc"), EOS, 0, 0, 0]]]
    assert data["weights"].tolist() == [[[0, 1, 1, 1, 1, 0, 0, 0]]]
    assert (data["tokens"].dtype, data["weights"].dtype) == (np.int32, np.float32)
    assert (report.num_records, report.num_units, report.num_sequences, report.longest) == (1, 1, 1, 5)
    assert (report.num_tokens, report.num_targets) == (5, 4)


def test_gpt2s_convention_puts_no_bos(make_tokenizer):
    tokenizer = make_tokenizer(bos_id=2, pad_id=None, puts_bos=False)
    data, _ = text.encode_texts(texts("abc"), tokenizer, max_length=6)
    assert data["tokens"].tolist() == [[[*ids("abc"), EOS, 0, 0]]]
    assert targets(data) == [*ids("bc"), EOS]  # nothing comes before the a


def test_eos_is_added_once_and_only_if_asked(make_tokenizer):
    for puts_eos in (False, True):
        tokenizer = make_tokenizer(puts_eos=puts_eos)
        assert targets(text.encode_texts(texts("ab"), tokenizer, max_length=9)[0]) == [*ids("ab"), EOS]
        data, _ = text.encode_texts(texts("ab"), tokenizer, max_length=9, append_eos=False)
        assert targets(data) == ids("ab")


def test_padding_has_the_tokenizers_id_and_no_weight(make_tokenizer):
    data, _ = text.encode_texts(texts("ab"), make_tokenizer(pad_id=77), max_length=6, max_sequences=2)
    assert (data["tokens"][0, 0, 4:] == 77).all()
    assert (data["tokens"][0, 1] == 77).all()
    assert data["weights"][0, 1].sum() == data["weights"][0, 0, 4:].sum() == 0


@hypothesis.given(
    strings=st.lists(st.text("abcdefg", min_size=1, max_size=40), min_size=1, max_size=6),
    max_length=st.integers(2, 20),
    data=st.data(),
)
def test_every_token_is_predicted_once_from_the_one_before_it(make_tokenizer, strings, max_length, data):
    """Split into windows, the counted pairs (token before, token) are those of the joined stream, BOS apart."""
    units = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(strings), max_size=len(strings)))
    encoded, report = text.encode_texts(
        texts(*strings, units=units), make_tokenizer(), max_length=max_length, max_sequences=None, on_long="split"
    )
    for row, unit in enumerate(dict.fromkeys(units)):
        stream = [t for s, u in zip(strings, units, strict=True) if u == unit for t in (BOS, *ids(s), EOS)]
        expected = [(a, b) for a, b in itertools.pairwise(stream) if b != BOS]
        tokens, weights = encoded["tokens"][row], encoded["weights"][row]
        pairs = [(tokens[s, t - 1], tokens[s, t]) for s, t in zip(*np.nonzero(weights), strict=True)]
        assert pairs == expected
    assert report.num_targets == int(encoded["weights"].sum())
    assert report.num_dropped_tokens == 0


@hypothesis.given(
    strings=st.lists(st.text("abcdefg", min_size=1, max_size=30), min_size=2, max_size=6),
    other=st.text("hijk", min_size=1, max_size=30),
    kind=st.sampled_from(["texts", "completions", "choices"]),
)
def test_a_row_depends_on_its_own_unit_alone(make_tokenizer, strings, other, kind):
    """S3: change one unit's record and no other row moves."""
    encode = {
        "texts": lambda s: text.encode_texts(
            texts(*s, units="abcabc"), make_tokenizer(), max_length=9, max_sequences=2, on_long="split"
        ),
        "completions": lambda s: text.encode_completions(
            [dataclasses.replace(r, prompt="q:") for r in texts(*s, units="abcabc")],
            make_tokenizer(),
            max_length=9,
            max_sequences=2,
            on_long="truncate",
        ),
        "choices": lambda s: text.encode_choices(
            [Record(string, "", label="1", unit=u) for string, u in zip(s, "abcabc", strict=False)],
            make_tokenizer(),
            verbalizers=LABELS,
            max_length=19,
            max_sequences=2,
            on_long="truncate",
        ),
    }[kind]
    before, after = encode(strings)[0], encode([*strings[:-1], other])[0]
    changed = (len(strings) - 1) % 3
    for name, values in before.items():
        np.testing.assert_array_equal(np.delete(values, changed, 0), np.delete(after[name], changed, 0))


def test_units_are_grouped_in_order_of_first_appearance(tokenizer):
    records = texts("a", "b", "c", "d", units=["u", "v", "u", None])
    data, report = text.encode_texts(records, tokenizer, max_length=6)
    assert data["tokens"].tolist() == [
        [[BOS, *ids("a"), EOS, BOS, *ids("c"), EOS]],
        [[BOS, *ids("b"), EOS, 0, 0, 0]],
        [[BOS, *ids("d"), EOS, 0, 0, 0]],
    ]
    assert (report.num_records, report.num_units) == (4, 3)
    assert BOS not in targets(data)


def test_the_shape_is_public(tokenizer):
    """S and L are what was asked for, whatever the records are."""
    for strings in (("a",), ("a" * 30, "b" * 30, "c")):
        data, _ = text.encode_texts(
            texts(*strings, units="uuu"), tokenizer, max_length=7, max_sequences=4, on_long="split"
        )
        assert data["tokens"].shape == (1, 4, 7)


def test_what_is_left_out_is_reported(tokenizer):
    long = texts("a" * 10)  # 12 tokens
    data, report = text.encode_texts(long, tokenizer, max_length=5, on_long="truncate")
    assert data["tokens"].tolist() == [[[BOS, *ids("aaaa")]]]
    assert (report.num_truncated, report.num_dropped_tokens, report.longest) == (1, 7, 12)
    _, report = text.encode_texts(long, tokenizer, max_length=5, max_sequences=2, on_long="split")
    assert (report.num_split, report.num_truncated, report.num_capped_units) == (1, 0, 1)
    assert (report.num_sequences, report.num_dropped_sequences) == (2, 1)
    assert report.num_targets + report.num_dropped_tokens == 11
    assert "3 tokens left out" in str(report)
    assert "not private" in str(report)


def test_a_text_that_was_cut_does_not_run_into_the_next(make_tokenizer):
    """EOS stands between them, and the loss does not count it: the text went on."""
    tokenizer = make_tokenizer(puts_bos=False)
    records = texts("abcdef", "x", units="uu")
    data, _ = text.encode_texts(records, tokenizer, max_length=4, max_sequences=3, on_long="truncate")
    assert data["tokens"].tolist() == [[ids("abcd"), [*ids("d"), EOS, *ids("x"), EOS], [0] * 4]]
    assert targets(data) == [*ids("bcd"), *ids("x"), EOS]


def test_nothing_to_predict_is_reported(make_tokenizer):
    tokenizer = make_tokenizer(puts_bos=False)
    data, report = text.encode_texts(texts("a", "ab"), tokenizer, max_length=4, append_eos=False)
    assert data["weights"].sum((1, 2)).tolist() == [0, 1]
    assert report.num_units_without_targets == 1


# Prompts and completions.


def test_the_completion_is_counted_and_the_prompt_is_not(tokenizer):
    data, report = text.encode_completions([Record("what?", " that")], tokenizer, max_length=16)
    assert targets(data) == [*ids(" that"), EOS]
    assert data["tokens"][0, 0, :12].tolist() == [BOS, *ids("what? that"), EOS]
    assert report.num_merged == 0


def test_prompt_and_completion_are_tokenized_as_one_text(make_tokenizer):
    """What merges across the border belongs to the completion, and is reported."""
    tokenizer = make_tokenizer(words=("was", "washing"))
    data, report = text.encode_completions([Record("it was", "hing")], tokenizer, max_length=9)
    assert data["tokens"][0, 0].tolist() == [BOS, *ids("it "), 260, EOS, 0, 0, 0]
    assert targets(data) == [260, EOS]
    assert report.num_merged == 1


def test_an_empty_prompt_is_a_text(tokenizer):
    pair, _ = text.encode_completions([Record("", "abc")], tokenizer, max_length=8)
    whole, _ = text.encode_texts(texts("abc"), tokenizer, max_length=8)
    np.testing.assert_array_equal(pair["tokens"], whole["tokens"])
    np.testing.assert_array_equal(pair["weights"], whole["weights"])


def test_records_of_a_unit_do_not_see_each_other(tokenizer):
    records = [Record("p", "q", unit="u"), Record("r", "s", unit="u"), Record("t", "u", unit="u")]
    data, report = text.encode_completions(records, tokenizer, max_length=5, max_sequences=2)
    assert data["tokens"].tolist() == [[[BOS, *ids("pq"), EOS, 0], [BOS, *ids("rs"), EOS, 0]]]
    assert (report.num_sequences, report.num_dropped_sequences, report.num_dropped_tokens) == (2, 1, 4)


@hypothesis.given(
    prompt=st.text("abc", max_size=20),
    completion=st.text("xyz", min_size=1, max_size=20),
    max_length=st.integers(3, 12),
    puts_bos=st.booleans(),
)
def test_truncation_keeps_the_completion_and_the_end_of_the_prompt(
    make_tokenizer, prompt, completion, max_length, puts_bos
):
    tokenizer = make_tokenizer(puts_bos=puts_bos)
    data, report = text.encode_completions(
        [Record(prompt, completion)], tokenizer, max_length=max_length, on_long="truncate"
    )
    length = puts_bos + len(prompt) + len(completion) + 1
    tokens = data["tokens"][0, 0].tolist()
    assert report.num_truncated == (length > max_length)
    assert report.num_dropped_tokens == max(length - max_length, 0)
    assert report.num_tokens == min(length, max_length)
    assert tokens[0] == BOS if puts_bos else tokens[0] != BOS
    kept = tokenizer.decode(t for t in tokens if t > 2)
    assert completion.startswith(kept.lstrip("abc"))
    assert prompt.endswith(kept.rstrip("xyz"))
    if puts_bos + bool(prompt) + len(completion) + 1 <= max_length:
        assert targets(data)[-len(completion) - 1 :] == [*ids(completion), EOS][not (puts_bos or prompt) :]


# Classification.


def labeled(*strings, labels="1" * 9, units=None):
    return [
        Record(s, "", label=label, unit=u, line=i + 1)
        for i, (s, label, u) in enumerate(zip(strings, labels, units or [None] * 9, strict=False))
    ]


def test_candidates_stand_behind_the_template(tokenizer):
    data, report = text.encode_choices(labeled(" nice "), tokenizer, verbalizers=LABELS, max_length=20)
    for c, word in enumerate((" bad", " good")):
        sequence = [BOS, *ids("nice It was" + word)]
        assert data["tokens"][0, 0, c, : len(sequence)].tolist() == sequence
        assert data["tokens"][0, 0, c][data["weights"][0, 0, c] > 0].tolist() == ids(word)
    assert data["tokens"].shape == data["weights"].shape == (1, 1, 2, 20)
    assert data["label"].tolist() == [[1]]
    assert data["is_example"].tolist() == [[True]]
    assert (report.num_sequences, report.num_targets, report.longest) == (1, 9, 17)


def test_single_token_candidates_share_one_sequence(make_tokenizer):
    tokenizer = make_tokenizer(words=(" bad", " good"))
    data, report = text.encode_choices(labeled("nice"), tokenizer, verbalizers={1: " good", 0: " bad"}, max_length=13)
    assert data["tokens"].tolist() == [[[BOS, *ids("nice It was"), 0]]]
    assert data["position"].tolist() == [[11]]
    assert data["choices"].tolist() == [[[260, 259]]]
    assert data["label"].tolist() == [[0]]
    assert (report.num_tokens, report.num_targets, report.longest) == (12, 2, 13)


def test_all_candidates_have_the_same_context(make_tokenizer):
    """One candidate that merges with the prompt moves the border for all of them."""
    tokenizer = make_tokenizer(words=("was", "washing"))
    data, report = text.encode_choices(
        labeled("it"), tokenizer, template="{text} was", verbalizers={"1": "hing", "0": "p"}, max_length=8
    )
    scored = [data["tokens"][0, 0, c][data["weights"][0, 0, c] > 0].tolist() for c in range(2)]
    assert scored == [[260], [259, *ids("p")]]
    assert report.num_merged == 1


def test_truncation_drops_the_oldest_tokens_of_the_text_for_all_candidates_alike(tokenizer):
    data, report = text.encode_choices(
        labeled("abcdefgh"), tokenizer, verbalizers=LABELS, max_length=16, on_long="truncate"
    )
    decoded = [tokenizer.decode(tokens) for tokens in data["tokens"][0, 0]]
    assert decoded == ["fgh It was bad", "fgh It was good"]
    assert (data["tokens"][0, 0, :, 0] == BOS).all()
    assert (report.num_truncated, report.num_dropped_tokens, report.longest) == (1, 5, 21)


def test_a_units_texts_are_scored_apart(tokenizer):
    records = labeled("a", "b", "c", "d", labels="0110", units=["u", "v", "u", "u"])
    data, report = text.encode_choices(records, tokenizer, verbalizers=LABELS, max_length=20, max_sequences=2)
    assert data["tokens"].shape == (2, 2, 2, 20)
    assert data["is_example"].tolist() == [[True, True], [True, False]]
    assert data["label"].tolist() == [[0, 1], [1, 0]]
    assert (report.num_capped_units, report.num_dropped_sequences, report.num_units) == (1, 1, 2)


def test_a_resumed_run_recognizes_its_data(tokenizer):
    """S8."""
    encode = lambda *strings: text.encode_texts(texts(*strings), tokenizer, max_length=8)[0]  # noqa: E731
    assert text.fingerprint(encode("a", "b")) == text.fingerprint(encode("a", "b"))
    assert text.fingerprint(encode("a", "b")) != text.fingerprint(encode("b", "a"))


# Real files.


def real_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    real = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    class Real:
        bos_id, eos_id, pad_id = 1, 2, None

        def encode(self, string, *, add_special_tokens=True):
            return real.encode(string, add_special_tokens=add_special_tokens).ids

        def decode(self, tokens):
            return real.decode(list(tokens))

    return Real()


def test_grimms_tales_with_the_tokenizer_of_stories260k(jaxdp_data):
    """A SentencePiece-like tokenizer: BOS by convention, a space put before every text."""
    tokenizer = real_tokenizer(jaxdp_data / "models" / "stories260K-hf")
    records = text.read_records(jaxdp_data / "text" / "GrimmsFairyTales.txt")
    data, report = text.encode_texts(records, tokenizer, max_length=256, max_sequences=None, on_long="split")
    assert report.num_units == len(records)
    assert report.num_dropped_tokens == report.num_merged == 0
    assert (data["tokens"][:, 0, 0] == 1).all()
    for row in (0, 100, len(records) - 1):
        assert tokenizer.decode([t for t in targets(data, row) if t > 2]) == records[row].completion
    assert report.num_targets == sum(len(tokenizer.encode(r.completion)) for r in records)  # EOS for BOS


def test_sst2_with_real_tokenizers(jaxdp_data):
    tokenizers = pytest.importorskip("tokenizers")
    path = jaxdp_data / "sst2" / "test.tsv"
    records = text.read_records(path, fields=Fields(text="sentence", label="label"))
    verbalizers = {"0": " terrible", "1": " great"}
    stories = real_tokenizer(jaxdp_data / "models" / "stories260K-hf")
    data, report = text.encode_choices(records, stories, verbalizers=verbalizers, max_length=256)
    assert data["tokens"].shape == (872, 1, 2, 256)
    assert report.num_merged == 0
    for c, word in enumerate(verbalizers.values()):
        rows = zip(data["tokens"][:, 0, c], data["weights"][:, 0, c], strict=True)
        assert {stories.decode(tokens[weights > 0]).strip() for tokens, weights in rows} == {word.strip()}

    folder = jaxdp_data / "tokenizers" / "gpt2"
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    class GPT2:
        bos_id = eos_id = 50256
        pad_id = None

        def encode(self, string, *, add_special_tokens=True):
            return bpe.encode(string, add_special_tokens=add_special_tokens).ids

        def decode(self, tokens):
            raise NotImplementedError

    data, report = text.encode_choices(records, GPT2(), verbalizers=verbalizers, max_length=96)
    assert data["tokens"].shape == (872, 1, 96)  # " terrible" and " great" are single tokens of GPT-2
    assert np.unique(data["choices"][:, 0], axis=0).tolist() == [[7818, 1049]]
    assert set(data["tokens"][np.arange(872), 0, data["position"][:, 0]]) == {373}  # " was"
    assert report.num_merged == 0
