import gzip
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pars_fast.data import CONSENSUS, label_prompts, log_lengths, read_length_file
from pars_fast.errors import DataError

WriteLengths = Callable[..., Path]
GOOD = {"id": "a", "split": "train", "prompt": "Why?", "output_tokens": {"m": 3}}


@pytest.mark.parametrize("name", ["lengths_toy.jsonl", "lengths_toy.jsonl.gz"])
def test_reads_plain_and_gzipped_files(write_lengths: WriteLengths, name: str) -> None:
    file = read_length_file(write_lengths([("train", "Why?", {"m": 3}), ("test", "é?", {"n": 1})], name))
    assert file.name == "toy"
    assert file.models == ["m", "n"]
    assert [row.prompt for row in file.select("test").rows] == ["é?"]
    assert len(file.select("all").rows) == 2


def test_a_blank_line_is_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n{\n")
    with pytest.raises(DataError, match=r"toy\.jsonl:3: not JSON"):
        read_length_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, '"prompt" must be a non-empty string of text'),
        ({"prompt": " \n"}, '"prompt" must be a non-empty string of text'),
        ({"prompt": "\ud800"}, '"prompt" must be a non-empty string of text'),
        ({"split": "dev"}, "\"split\" must be train, val or test, got 'dev'"),
        ({"split": ["train"]}, '"split" must be train, val or test'),
        ({"output_tokens": [3]}, '"output_tokens" must map model names to lengths'),
        ({"output_tokens": {"m": 0}}, "\"output_tokens\" of 'm' must be a whole number >= 1, got 0"),
        ({"output_tokens": {"m": 2.5}}, "must be a whole number >= 1, got 2.5"),
        ({"output_tokens": {"m": True}}, "must be a whole number >= 1, got True"),
        ({"output_tokens": {"m": math.nan}}, "must be a whole number >= 1, got nan"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_malformed_row_names_file_and_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(DataError) as error:
        read_length_file(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_a_row_that_is_no_object_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"toy\.jsonl:1: expected a JSON object"):
        read_length_file(path)


def _broken_in_the_middle(text: bytes) -> bytes:
    compressed = bytearray(gzip.compress(text))
    compressed[12:40] = bytes(28)
    return bytes(compressed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "the file has no rows"),
        ("blank.jsonl", b"\n \n", "the file has no rows"),
        ("binary.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("plain.jsonl.gz", b"{}\n", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be read"),
        ("broken.jsonl.gz", _broken_in_the_middle(json.dumps(GOOD).encode()), "cannot be read"),
    ],
    ids=["empty", "blank", "binary", "not gzip", "truncated gzip", "damaged gzip"],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_length_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_length_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read"):
        read_length_file(tmp_path)


@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)), st.sampled_from(["", ".gz"])
)
def test_no_content_raises_anything_but_a_data_error(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"any.jsonl{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"any\.jsonl"):
            read_length_file(path)


def test_an_unknown_model_column_lists_those_there_are(write_lengths: WriteLengths) -> None:
    file = read_length_file(write_lengths([("train", "a", {"gpt": 3}), ("train", "b", {"llama": 3})]))
    with pytest.raises(DataError, match="no model column 'opt'; it has: gpt, llama"):
        log_lengths(file, "opt")


def test_the_first_model_is_that_of_the_first_length(write_lengths: WriteLengths) -> None:
    rows = [("train", "a", {}), ("train", "b", {"llama": 3, "gpt": 3}), ("train", "c", {"gpt": 3})]
    assert read_length_file(write_lengths(rows)).first_model == "llama"


def test_a_file_without_lengths_has_no_consensus_and_no_first_model(write_lengths: WriteLengths) -> None:
    file = read_length_file(write_lengths([("train", "a", {})]))
    with pytest.raises(DataError, match="no row has an answer length"):
        log_lengths(file, CONSENSUS)
    with pytest.raises(DataError, match="no row has an answer length"):
        _ = file.first_model


@given(
    prompt_effect=st.lists(st.floats(0, 2), min_size=3, max_size=12),
    model_effect=st.lists(st.floats(0, 2), min_size=1, max_size=4),
)
def test_consensus_of_models_that_differ_by_a_factor_is_the_prompts_own_effect(
    prompt_effect: list[float], model_effect: list[float]
) -> None:
    effects = np.array(prompt_effect)[:, None] + np.array(model_effect) + 6
    rows = [
        ("train", f"prompt {i}", {f"m{j}": round(math.exp(value)) for j, value in enumerate(row)})
        for i, row in enumerate(effects)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.jsonl"
        path.write_text(
            "".join(json.dumps({"split": s, "prompt": p, "output_tokens": o}) + "\n" for s, p, o in rows)
        )
        label = log_lengths(read_length_file(path), CONSENSUS)
    np.testing.assert_allclose(label, effects.mean(axis=1), atol=5e-3)  # lengths are rounded


def test_consensus_of_one_model_is_its_log_length(write_lengths: WriteLengths) -> None:
    file = read_length_file(write_lengths([("train", f"p{n}", {"m": n}) for n in (1, 10, 500)]))
    np.testing.assert_allclose(log_lengths(file, CONSENSUS), np.log([1, 10, 500]))


def test_a_verbose_model_with_gaps_does_not_move_the_consensus(write_lengths: WriteLengths) -> None:
    """Prompt a was answered by the verbose model alone: its raw length says nothing about a."""
    file = read_length_file(
        write_lengths(
            [
                ("train", "a", {"verbose": 1000}),
                ("train", "b", {"verbose": 1000, "terse": 10}),
                ("train", "c", {"terse": 10}),
                ("train", "d", {}),
            ]
        )
    )
    label = log_lengths(file, CONSENSUS)
    np.testing.assert_allclose(label[:3], label[0])
    assert np.isnan(label[3])


def test_labels_leave_out_other_splits_missing_lengths_and_forbidden_prompts(
    write_lengths: WriteLengths,
) -> None:
    rows = [("train", "kept", {"m": 5}), ("train", "no length", {}), ("val", "held out", {"m": 5})]
    more = [("train", "Not  YOURS\n", {"m": 7}), ("train", "mine", {"m": 9})]
    files = [read_length_file(write_lengths(rows, "rows.jsonl")), read_length_file(write_lengths(more))]
    labelled = label_prompts(files, "train", "m", forbidden={"not yours"})
    assert labelled.prompts == ["kept", "mine"]
    np.testing.assert_allclose(labelled.log_length, np.log([5, 9]))
    assert labelled.group.tolist() == [0, 1]


def test_no_prompts_left_names_split_column_and_files(write_lengths: WriteLengths) -> None:
    file = read_length_file(write_lengths([("train", "a", {"m": 5})]))
    with pytest.raises(DataError, match=r"no val prompts with a length of 'm' in .*lengths_toy\.jsonl"):
        label_prompts([file], "val", "m")


def test_a_sample_is_seeded_and_at_most_so_many_of_each_file(write_lengths: WriteLengths) -> None:
    big = read_length_file(write_lengths([("train", f"big {n}", {"m": 5}) for n in range(50)], "big.jsonl"))
    small = read_length_file(write_lengths([("train", f"small {n}", {"m": 5}) for n in range(3)]))
    labelled = label_prompts([big, small], "train", "m")
    sample = labelled.at_most(10, seed=1)
    assert np.bincount(sample.group).tolist() == [10, 3]
    assert sample.prompts == labelled.at_most(10, seed=1).prompts
    assert sample.prompts != labelled.at_most(10, seed=2).prompts
    assert labelled.at_most(None, seed=1) is labelled
