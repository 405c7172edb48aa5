"""Records are what the file says, wherever it says it; files that say nothing are in test_bad_text."""

import csv
import io
import json
import random
import zipfile

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxdp import text
from jaxdp.text import Fields

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
@hypothesis.example(texts=["a\u2028b\u2029c\x85d\x0ce"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_json_lines_give_back_any_text(tmp_path, texts, is_ascii):
    """U+2028, U+0085 and other line separators of Unicode do not end a JSON line."""
    lines = [json.dumps({"text": t}, ensure_ascii=is_ascii) for t in texts]
    records = text.read_records(write(tmp_path, "any.jsonl", "\n".join(lines)))
    assert [r.completion for r in records] == texts
    assert [r.line for r in records] == list(range(1, len(texts) + 1))


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(texts=st.lists(ANY_TEXT.filter(lambda t: "\0" not in t), min_size=1, max_size=5))
def test_csv_gives_back_any_text(tmp_path, texts):
    """Commas, quotes and line breaks inside quoted cells."""
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    records = text.read_records(write(tmp_path, "any.csv", out.getvalue()))
    assert [r.completion for r in records] == texts


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = write(tmp_path, "notes.csv", 'text,user\n"one\ntwo",a\n\nthree,b\n')
    assert [(r.line, r.completion) for r in text.read_records(path)] == [(2, "one\ntwo"), (5, "three")]
    path = write(tmp_path, "notes.jsonl", '\n{"text": "one"}\r\n\n{"text": "two"}\n')
    assert [(r.line, r.completion) for r in text.read_records(path)] == [(2, "one"), (4, "two")]
    assert text.read_records(path)[1].place == "notes.jsonl, line 4"


def test_tsv_has_no_quotes(tmp_path):
    """GLUE's files open quotes that they never close."""
    path = write(tmp_path, "glue.tsv", 'sentence\tlabel\n"half a quote\t1\nanother\t0\n')
    records = text.read_records(path, fields=Fields(text="sentence", label="label"))
    assert [(r.prompt, r.label) for r in records] == [('"half a quote', "1"), ("another", "0")]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("paragraph", [(1, "A wrapped paragraph."), (5, "Another one, indented.")]),
        ("line", [(1, "A wrapped"), (2, "paragraph."), (5, "Another one,"), (6, "indented.")]),
        ("file", [(1, "A wrapped\nparagraph.\n \t\n\nAnother one,\n  indented.")]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_text_by_paragraph_line_or_file(tmp_path, unit, expected, end):
    content = "A wrapped\nparagraph.\n \t\n\nAnother one,\n  indented."
    path = write(tmp_path, "tale.txt", content.replace("\n", end))
    assert [(r.line, r.completion) for r in text.read_records(path, record=unit)] == expected


def test_fields_say_what_is_what(tmp_path):
    rows = [{"q": "2+2?", "a": " 4", "user": 7, "good": 1}, {"q": "", "a": "hm", "user": "7", "good": "0"}]
    path = write(tmp_path, "qa.jsonl", "\n".join(map(json.dumps, rows)))
    pairs = text.read_records(path, fields=Fields(prompt="Q: {q}\nA:", completion="a", unit="user"))
    assert [(r.prompt, r.completion, r.label, r.unit) for r in pairs] == [
        ("Q: 2+2?\nA:", " 4", None, "7"),
        ("Q: \nA:", "hm", None, "7"),  # 7 and "7" are one user
    ]
    labeled = text.read_records(path, fields=Fields(text="a", label="good"))
    assert [(r.prompt, r.completion, r.label) for r in labeled] == [(" 4", "", "1"), ("hm", "", "0")]


def test_a_template_is_filled_once(tmp_path):
    """Braces in the text of a record are text."""
    path = write(tmp_path, "r.jsonl", '{"a": "{b}", "b": "{a}"}')
    assert text.read_records(path, fields=Fields(text="{a} then {b}"))[0].completion == "{b} then {a}"


def test_format_overrides_the_extension_and_columns_the_header(tmp_path):
    path = write(tmp_path, "trec.dat", '3,"Who, then ?"\n0,How\n')
    records = text.read_records(
        path, format="csv", columns=("label", "text"), fields=Fields(text="text", label="label")
    )
    assert [(r.line, r.prompt, r.label) for r in records] == [(1, "Who, then ?", "3"), (2, "How", "0")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path, "excel.csv", b"\xef\xbb\xbftext\nhello\n")
    assert text.read_records(path)[0].completion == "hello"


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path):
    csv.field_size_limit(131_072)  # as it is by default
    path = write(tmp_path, "long.csv", "text\n" + "x" * 200_000)
    assert len(text.read_records(path)[0].completion) == 200_000
    with pytest.raises(ValueError, match="no field 'label'"):
        text.read_records(path, fields=Fields(text="text", label="label"))
    assert csv.field_size_limit() == 131_072


def test_messages_do_not_quote_records(tmp_path):
    """They end up in logs."""
    secret = "the patient has a rare disease"
    for name, content, fields in (
        ("a.jsonl", f'{{"text": "{secret}}}', None),
        ("b.jsonl", f'["{secret}"]', None),
        ("c.jsonl", f'{{"text": ["{secret}"]}}', None),
        ("d.jsonl", f'{{"text": "{secret}\\ud800"}}', None),
        ("e.csv", f'text\n"{secret}', None),
        ("f.csv", f"text\n{secret},more\n", None),
        ("g.csv", f"text,unit\n{secret},\n", Fields(text="text", unit="unit")),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            text.read_records(write(tmp_path, name, content), fields=fields)
        assert secret not in str(caught.value)


def test_sst2(jaxdp_data):
    fields = Fields(text="sentence", label="label")
    sizes = {"train": 60_614, "dev": 6_735, "test": 872}
    read = {name: text.read_records(jaxdp_data / "sst2" / f"{name}.tsv", fields=fields) for name in sizes}
    assert {name: len(records) for name, records in read.items()} == sizes
    assert {r.label for r in read["train"]} == {"0", "1"}
    assert sum(r.label == "1" for r in read["test"]) == 444  # as published


def test_grimms_tales_are_969_paragraphs(jaxdp_data):
    path = jaxdp_data / "text" / "GrimmsFairyTales.txt"
    records = text.read_records(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    ends = [bool(a.strip()) and not b.strip() for a, b in zip(lines, [*lines[1:], ""], strict=True)]
    assert len(records) == sum(ends) == 969
    assert " ".join(r.completion for r in records).split() == path.read_text(encoding="utf-8").split()
    assert all(lines[r.line - 1].strip() == r.completion[: len(lines[r.line - 1].strip())] for r in records)


def test_e2e_pairs(jaxdp_data, tmp_path):
    with zipfile.ZipFile(jaxdp_data / "e2e" / "e2e-dataset.zip") as archive:
        archive.extract("e2e-dataset/trainset.csv", tmp_path)
    path = tmp_path / "e2e-dataset" / "trainset.csv"
    records = text.read_records(path, fields=Fields(prompt="{mr}\n", completion="ref", unit="mr"))
    assert len(records) == 42_061
    assert len({r.unit for r in records}) == 4_862  # as published: arXiv 1706.09254
    assert records[0].prompt.startswith("name[The Vaults]")
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for record in random.Random(0).sample(records, 100):
        assert record.completion.split("\n")[0].replace('"', "") in lines[record.line - 1].replace('"', "")


def test_few_shot_files(jaxdp_data):
    folder = jaxdp_data / "fewshot"
    for task, fields, columns, suffix, size in (
        ("SST-2", Fields(text="sentence", label="label"), None, "tsv", 32),
        ("RTE", Fields(text="{sentence1}\n{sentence2}", label="label"), None, "tsv", 32),
        ("trec", Fields(text="text", label="label"), ("label", "text"), "csv", 96),
    ):
        for seed in (13, 21, 42, 87, 100):
            path = folder / task / f"16-{seed}" / f"train.{suffix}"
            records = text.read_records(path, fields=fields, columns=columns)
            assert len(records) == size, path
            assert all(sum(r.label == label for r in records) == 16 for label in {r.label for r in records}), path


def test_the_few_shot_snli_is_damaged_and_says_so(jaxdp_data):
    """Its header has 11 names and its rows 15 cells: to guess which is which would train on the wrong column."""
    with pytest.raises(ValueError, match=r"train.tsv, line 2: 15 cells, and the header has 11 \('index', 'captionID'"):
        text.read_records(jaxdp_data / "fewshot" / "SNLI" / "16-13" / "train.tsv", fields=Fields(text="sentence1"))
