"""Texts out of files: what a text is, and how many are taken together."""

import io

import pytest

from embedserve.bulk import source
from embedserve.bulk.source import Text, chunked, read_texts


def read(tmp_path, content, form="lines", **options):
    path = tmp_path / "in"
    path.write_bytes(content)
    given = {"field": "text", "id_field": None} | options
    return list(read_texts([str(path)], form, **given))


class TestLines:
    @pytest.mark.parametrize(
        ("content", "texts"),
        [
            (b"", []),
            (b"a", ["a"]),
            (b"a\n", ["a"]),
            (b"a\r\nb\r\n", ["a", "b"]),
            (b"a\n\nb\n", ["a", "", "b"]),
            ("ü\u2028x\n".encode(), ["ü\u2028x"]),
            (b" a \n", [" a "]),
        ],
    )
    def test_a_text_is_a_line_without_its_end(self, tmp_path, content, texts):
        assert [text.text for text in read(tmp_path, content)] == texts

    def test_a_line_that_is_not_utf8_has_a_problem_and_hides_no_other(self, tmp_path):
        texts = read(tmp_path, b"a\n\xff\nb\n")
        assert [text.problem for text in texts] == [None, "not UTF-8: invalid start byte at byte 0", None]
        assert texts[1].place.endswith("in:2")

    def test_a_line_that_is_too_long_is_not_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr(source, "LINE_BYTES_MAX", 5)  # its end included
        texts = read(tmp_path, b"abcd\nabcde\nb\n" + b"x" * 50)
        assert [text.problem is None for text in texts] == [True, False, True, False]
        assert [text.index for text in texts] == [0, 1, 2, 3]

    def test_several_files_are_one_input(self, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("1\n")
        (tmp_path / "b").write_text("3")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"2\n")))
        files = [str(tmp_path / "a"), "-", str(tmp_path / "b")]
        texts = list(read_texts(files, "lines", field="text", id_field=None))
        assert [(text.index, text.text) for text in texts] == [(0, "1"), (1, "2"), (2, "3")]
        assert texts[1].place == "<stdin>:1"


class TestJsonLines:
    def test_blank_lines_are_no_texts_but_count_as_lines(self, tmp_path):
        texts = read(tmp_path, b'{"text": "a"}\n\n  \n{"text": "b"}', "jsonl")
        assert [(text.index, text.text, text.place[-1]) for text in texts] == [(0, "a", "1"), (1, "b", "4")]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            (b"{", "not JSON: "),
            (b'"a"', "not a JSON object"),
            (b"{}", "its field 'text' is no text; fields: none"),
            (b'{"text": null}', "its field 'text' is no text; fields: 'text'"),
            (b'{"text": "\\ud800"}', "not JSON: "),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, line, problem):
        (text,) = read(tmp_path, line, "jsonl")
        assert text.problem.startswith(problem)


class TestChunks:
    def test_groups_of_at_most_so_many(self):
        texts = [Text(index, "", "a") for index in range(7)]
        assert [len(chunk) for chunk in chunked(texts, 3)] == [3, 3, 1]

    def test_long_texts_make_small_groups_and_a_longer_one_goes_alone(self, monkeypatch):
        monkeypatch.setattr(source, "CHUNK_BYTES_MAX", 10)
        texts = [
            Text(0, "", "aaaa"),
            Text(1, "", "aaaaaa"),
            Text(2, "", "a"),
            Text(3, "", "a" * 99),
            Text(4, "", "ü" * 2),
        ]
        assert [[text.index for text in chunk] for chunk in chunked(texts, 100)] == [[0, 1], [2], [3], [4]]
