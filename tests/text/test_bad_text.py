"""Bad input: one table. Each case names the place, the value and the remedy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxdp import text
from jaxdp.text import Fields, Record

LABELED = Fields(text="text", label="label")
PAIRED = Fields(prompt="q", completion="a")
WORDS = {"0": " bad", "1": " good"}
LONG = [Record("", "fine", line=1), Record("", "long " * 10, line=2)]


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` gets the bad file, if there is a `content` for it, and a byte tokenizer."""

    call: Callable[[Any, Any], Any]
    error: type[Exception]
    pattern: str
    name: str = "bad.jsonl"
    content: bytes | None = None


def reading(content, *patterns, name="bad.jsonl", error=ValueError, **options):
    content = content.encode() if isinstance(content, str) else content
    return Case(lambda path, _: text.read_records(path, **options), error, ".*".join(patterns), name, content)


def texts(*patterns, records=LONG, error=ValueError, **options):
    options = {"max_length": 16} | options
    return Case(lambda _, tokenizer: text.encode_texts(records, tokenizer, **options), error, ".*".join(patterns))


def pairs(prompt, completion, *patterns, **options):
    options = {"max_length": 16} | options
    records = [Record(prompt, completion, line=3)]
    return Case(
        lambda _, tokenizer: text.encode_completions(records, tokenizer, **options), ValueError, ".*".join(patterns)
    )


def choices(*patterns, record=None, error=ValueError, **options):
    options = {"max_length": 32, "verbalizers": WORDS} | options
    records = [record or Record("so so", "", label="1", line=4)]
    return Case(lambda _, tokenizer: text.encode_choices(records, tokenizer, **options), error, ".*".join(patterns))


CASES = {
    # Files.
    "missing file": reading(None, "no file", "bad.jsonl", error=FileNotFoundError),
    "folder": Case(lambda path, _: text.read_records(path.parent, format="text"), IsADirectoryError, "is a folder"),
    "empty file": reading("", "bad.jsonl holds no record"),
    "blank text": reading(" \n\n\t\n", "holds no record", name="bad.txt"),
    "table without rows": reading("text,label\n", "holds no record", name="bad.csv"),
    "unknown extension": reading("text\n", r"'\.parquet'", r"\.jsonl, \.json, \.csv", "format=", name="bad.parquet"),
    "no extension": reading("text\n", "format=", name="bad"),
    "unknown format": reading("text\n", "format must be one of", "'xml'", format="xml"),
    "not UTF-8": reading(b"first\n\nsch\xf6n\n", "line 3: byte 0xf6 at offset 10", "iconv", name="bad.txt"),
    "not UTF-8 behind a byte order mark": reading(
        b"\xef\xbb\xbfa\n\xff", "line 2: byte 0xff at offset 5", name="bad.txt"
    ),
    "UTF-16": reading("text\n".encode("utf-16"), "line 1: byte 0x", "iconv", name="bad.txt"),
    # JSON lines.
    "broken line": reading('{"text": "a"}\n\n{"text": "b"\n', "bad.jsonl, line 3: not JSON", "column 13"),
    "JSON array": reading('[\n{"text": "a"}\n]\n', "line 1: not JSON", "jq -c"),
    "line that is no object": reading('{"text": "a"}\n["b"]\n', "line 2: a JSON array", "expected an object"),
    "endless nesting": reading("[" * 100_000, "line 1: not JSON"),
    "number of too many digits": reading('{"text": ' + "1" * 5000 + "}", "line 1: not JSON"),
    "missing field": reading('{"text": "a"}\n{"body": "b"}\n', "line 2: no field 'text'", "it has 'body'"),
    "object without fields": reading("{}", "line 1: no field 'text'", "none"),
    "field of wrong type": reading('{"text": 5}', "line 1: field 'text' is a JSON integer", "expected a string"),
    "null": reading('{"text": null}', "line 1: field 'text' is a JSON null"),
    "empty text": reading('{"text": "a"}\n{"text": " \\n"}', "line 2: field 'text' is empty", "remove the record"),
    "empty completion": reading('{"q": "a", "a": ""}', "line 1: field 'a' is empty", fields=PAIRED),
    "half a surrogate pair": reading('{"text": "\\ud83d"}', "line 1: field 'text' holds half of a surrogate"),
    "fractional label": reading('{"text": "a", "label": 0.5}', "line 1: label field", "JSON number", fields=LABELED),
    "boolean label": reading('{"text": "a", "label": true}', "line 1: label", "JSON boolean", fields=LABELED),
    "unit field missing": reading(
        '{"text": "a", "user": 1}\n{"text": "b"}', "line 2: no field 'user'", fields=Fields(unit="user", text="text")
    ),
    "empty unit": reading(
        "text,user\na,\n", "line 2: unit field 'user' is empty", name="b.csv", fields=Fields("text", unit="user")
    ),
    "field of a template missing": reading('{"a": "x"}', "no field 'b'", fields=Fields(text="{a} {b}")),
    # Tables.
    "row with too many cells": reading(
        "text,n\na,1\nb,c,2\n", "line 3: 3 cells, and the header has 2", "quotes", name="b.csv"
    ),
    "row with too few cells": reading("text\tn\na\n", "line 2: 1 cells", "tab", name="b.tsv"),
    "table without header": reading(
        "good,1\nbad,0\n", "line 2: no field 'text'", "'good', '1'", "header", name="b.csv"
    ),
    "duplicate header": reading("text,n,text\n", "'text' more than once", name="b.csv"),
    "open quote": reading('text\nfine\n"open\n', "line 3: not CSV", name="b.csv"),
    "columns that do not fit": reading("a,b\n", "line 1: 2 cells", "1", name="b.csv", columns=("text",)),
    # Options of reading.
    "columns of JSON": reading("{}", "columns are for CSV", columns=("text",)),
    "record of JSON": reading("{}", "record='line' is for plain text", record="line"),
    "unknown record": reading("a", "record must be one of", "'sentence'", name="bad.txt", record="sentence"),
    "fields of plain text": reading("a", "plain text", "no fields", name="bad.txt", fields=LABELED),
    "prompt without completion": Case(lambda *_: Fields(prompt="q"), ValueError, "prompt and completion"),
    "text and prompt": Case(lambda *_: Fields(text="t", prompt="q", completion="a"), ValueError, "mixes kinds"),
    "label of a prompt": Case(lambda *_: Fields(prompt="q", completion="a", label="l"), ValueError, "has a label"),
    "field without a name": Case(lambda *_: Fields(text=""), ValueError, "text must name a field, got ''"),
    # Encoding.
    "text longer than the context": texts("line 2: 52 tokens, and max_length is 16", "truncate"),
    "no records": texts("no records", records=[]),
    "context of one token": texts("max_length must be at least 2", max_length=1),
    "context of half a token": texts("max_length must be an integer", max_length=1.5, error=TypeError),
    "no sequences": texts("max_sequences must be at least 1", max_sequences=0),
    "unknown answer to long texts": texts("on_long must be one of", "'cut'", on_long="cut"),
    "nowhere to split to": texts("max_sequences=1", "raise max_sequences", on_long="split"),
    "labels where none belong": texts("encode_choices", records=[Record("a", "", label="1")]),
    "prompt that fills the context": pairs("w" * 40, "a", "line 3: 41 tokens of prompt", "no room for the completion"),
    "completion beyond the context": pairs("q", "w" * 40, "line 3: 43 tokens, and max_length is 16", "'truncate'"),
    "split completion": pairs("q", "a", "part an answer from its prompt", on_long="split", max_sequences=2),
    "context of BOS alone": pairs("q", "a", "max_length=2 has no room", "at least 3", max_length=2),
    "text without completion": pairs("q", "", "line 3: no completion"),
    # Verbalizers.
    "label outside the verbalizers": choices(
        "reviews.tsv, line 9: label '5' has no verbalizer",
        "'0', '1'",
        record=Record("a", "", "5", line=9, file="reviews.tsv"),
    ),
    "no label": choices("line 7: no label", record=Record("a", "", line=7)),
    "template without text": choices("no {text}", template="It was"),
    "one verbalizer": choices("at least two", verbalizers={"1": " good"}),
    "one label twice": choices("at least two different labels", verbalizers={1: " good", "1": " bad"}),
    "empty verbalizer": choices("verbalizer of label '0' is ''", verbalizers={"0": "", "1": " good"}),
    "verbalizer of spaces": choices("verbalizer of label '0' is ' '", verbalizers={"0": " ", "1": " good"}),
    "verbalizer that is no word": choices("verbalizer of label '0' is 3", verbalizers={"0": 3, "1": " good"}),
    "same verbalizers": choices("'0' and '1' have the same tokens", verbalizers={"0": " good", "1": " good"}),
    "text too long for its template": choices("line 4: 3 tokens too many", "truncate", max_length=15),
    "verbalizer longer than the context": choices("verbalizer has 5 tokens", max_length=6, on_long="truncate"),
    "choices that go on": choices("part an answer", on_long="split", max_sequences=2),
    # Evaluation.
    "evaluation of other data": Case(
        lambda *_: text.evaluate_choices(None, {}, {"tokens": np.zeros((1, 1, 4)), "weights": np.zeros((1, 1, 4))}),
        ValueError,
        "'tokens', 'weights'; expected the output of encode_choices",
    ),
    "evaluation of nothing": Case(
        lambda *_: text.evaluate_language_model(None, {}, dict.fromkeys(("tokens", "weights"), np.zeros((1, 1, 4)))),
        ValueError,
        "no token of the evaluation set is counted",
    ),
    "evaluation of no rows at once": Case(
        lambda *_: text.evaluate_language_model(
            None, {}, dict.fromkeys(("tokens", "weights"), np.ones((1, 1, 4))), batch_rows=0
        ),
        ValueError,
        "batch_rows must be at least 1",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_text_is_refused_by_name(case, tmp_path, tokenizer):
    path = tmp_path / case.name
    if case.content is not None:
        path.write_bytes(case.content)
    with pytest.raises(case.error, match=f"(?s){case.pattern}"):
        case.call(path, tokenizer)


def test_texts_of_a_unit_need_something_between_them(make_tokenizer):
    tokenizer = make_tokenizer(puts_bos=False, eos_id=None)
    records = [Record("", "a", unit="u"), Record("", "b", unit="u", line=2)]
    with pytest.raises(ValueError, match="line 2: unit 'u' has several texts, and nothing separates them"):
        text.encode_texts(records, tokenizer, max_length=8)


def test_verbalizers_that_a_tokenizer_cannot_tell_apart(tokenizer):
    class Lowercase:
        bos_id, eos_id, pad_id = 1, 2, 0

        def encode(self, string, *, add_special_tokens=True):
            return tokenizer.encode(string.lower().replace("~", ""), add_special_tokens=add_special_tokens)

        def decode(self, ids):
            return tokenizer.decode(ids)

    encode = lambda words: text.encode_choices(  # noqa: E731
        [Record("a", "", label="x")], Lowercase(), verbalizers=words, max_length=20
    )
    with pytest.raises(ValueError, match="'x' and 'y' have the same tokens"):
        encode({"x": " good", "y": " GOOD"})
    with pytest.raises(ValueError, match="'~~' has no token of its own"):
        encode({"x": " good", "y": "~~"})
