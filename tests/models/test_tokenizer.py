"""Tokenizers: text comes back, and a record cannot say what only the program may say."""

import dataclasses
import json
import shutil
import types

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxdp.models import check_matches, load_tokenizer

CONVENTIONS = {
    # name: (eos, bos, pad, size of the vocabulary, what stands before a text)
    "gpt2": (50256, 50256, None, 50257, []),
    "opt": (2, 2, 1, 50265, [2]),
    "stories260K": (2, 1, None, 512, [1]),
}


@pytest.fixture(scope="module")
def folders(jaxdp_data, tmp_path_factory):
    opt = tmp_path_factory.mktemp("opt")
    for file in (jaxdp_data / "tokenizers" / "opt").iterdir():
        shutil.copyfile(file, opt / file.name)
    (opt / "config.json").write_text('{"model_type": "opt"}')
    return {
        "gpt2": jaxdp_data / "tokenizers" / "gpt2",
        "opt": opt,
        "stories260K": jaxdp_data / "models" / "stories260K-hf",
    }


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_special_ids_are_those_of_the_model(name, loaded):
    tokenizer = loaded[name]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == CONVENTIONS[name][:4]
    plain = tokenizer.encode("One day", add_special_tokens=False)
    assert tokenizer.encode("One day") == CONVENTIONS[name][4] + plain
    assert tokenizer.encode("") == CONVENTIONS[name][4]


def test_known_ids(loaded):
    # "Hello world" of GPT-2's tokenizer, as everyone quotes it; OPT's has the same pieces under other numbers.
    assert loaded["gpt2"].encode("Hello world") == [15496, 995]
    assert loaded["opt"].encode("Hello world") == [2, 31414, 232]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_real_text_comes_back(name, loaded, jaxdp_data):
    text = (jaxdp_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    text += "\n" + (jaxdp_data / "text" / "GrimmsFairyTales.txt").read_text(encoding="utf-8")[:50_000]
    text = text.replace("<|endoftext|>", "")
    assert loaded[name].decode(loaded[name].encode(text)) == text


@pytest.mark.parametrize("name", CONVENTIONS)
@hypothesis.given(text=st.text(max_size=40))
def test_any_text_comes_back(name, loaded, text):
    hypothesis.assume("▁" not in text)  # stories260K writes a space so
    assert loaded[name].decode(loaded[name].encode(text)) == text


SPECIAL = st.sampled_from(["</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", " ", "a", "</", "s>", "\n"])


@pytest.mark.parametrize("name", CONVENTIONS)
@hypothesis.given(pieces=st.lists(SPECIAL, max_size=8))
def test_special_tokens_spelled_out_in_a_text_stay_text(name, loaded, pieces):
    tokenizer, text = loaded[name], "".join(pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_special_when_asked(loaded):
    options = {"add_special_tokens": False, "allow_special_tokens": True}
    assert loaded["gpt2"].encode("a<|endoftext|>b", **options) == [64, 50256, 65]
    assert loaded["stories260K"].encode("</s>", **options)[-1] == 2
    assert loaded["opt"].encode("</s>", **options) == [2]
    assert loaded["gpt2"].decode([64, 50256, 65]) == "ab"
    assert loaded["gpt2"].decode([64, 50256, 65], skip_special_tokens=False) == "a<|endoftext|>b"


def test_an_end_of_text_that_the_file_calls_an_ordinary_word_is_special_all_the_same(folders, tmp_path):
    shutil.copytree(folders["stories260K"], tmp_path / "model", copy_function=shutil.copyfile)
    (tmp_path / "model").chmod(0o755)
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert 2 not in tokenizer.encode("The end.</s>And more")
    assert tokenizer.decode([2]) == ""


def test_padding_and_cuts_that_the_file_asks_for_are_left_to_the_caller(folders, tmp_path):
    shutil.copytree(folders["stories260K"], tmp_path / "model", copy_function=shutil.copyfile)
    (tmp_path / "model").chmod(0o755)
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    expected = load_tokenizer(folders["stories260K"])
    tokenizer = load_tokenizer(tmp_path / "model")
    for text in ("Once upon a time there was a girl", "Hi"):
        assert tokenizer.encode(text) == expected.encode(text)


@pytest.mark.parametrize("pair", [("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt")])
def test_vocabulary_and_merges_have_several_names(pair, folders, tmp_path, loaded):
    for source, name in zip(("encoder.json", "vocab.bpe"), pair, strict=True):
        shutil.copyfile(folders["gpt2"] / source, tmp_path / name)
    assert load_tokenizer(tmp_path).encode("Hello world") == loaded["gpt2"].encode("Hello world")


def test_the_settings_of_the_folder_choose_the_special_tokens(folders, tmp_path):
    for source, name in (("gpt2-vocab.json", "vocab.json"), ("gpt2-merges.txt", "merges.txt")):
        shutil.copyfile(folders["opt"] / source, tmp_path / name)

    def loaded_with(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(tmp_path)
        for name in files:
            (tmp_path / f"{name}.json").unlink()
        return tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.encode("Hello")

    hello = 31414
    names = {"eos_token": "</s>", "bos_token": {"content": "</s>", "special": True}, "pad_token": "<pad>"}
    assert loaded_with(tokenizer_config={**names, "add_bos_token": True}) == (2, 2, 1, [2, hello])
    assert loaded_with(tokenizer_config={**names, "add_bos_token": False}) == (2, 2, 1, [hello])
    assert loaded_with() == (2, 2, 1, [2, hello])  # the vocabulary is OPT's
    assert loaded_with(special_tokens_map={"eos_token": "<s>"}, config={"eos_token_id": 2}) == (0, 2, 1, [2, hello])
    assert loaded_with(config={"eos_token_id": [2, 5], "bos_token_id": 0}) == (2, 0, 1, [0, hello])


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(loaded):
    def model(vocab_size):
        return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=vocab_size))

    check_matches(loaded["stories260K"], model(512))
    check_matches(loaded["stories260K"], model(640))  # rows that fill up to a round number
    with pytest.raises(ValueError, match=r"ids up to 511.*511 rows.*folder of the model"):
        check_matches(loaded["stories260K"], model(511))


def test_nothing_of_a_tokenizer_can_be_changed(loaded):
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded["gpt2"].eos_id = 0
