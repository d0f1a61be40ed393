import json
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from pars_fast import Ranker
from pars_fast.batch.lengths import ranker_lengths
from pars_fast.calibration import TokenMap
from pars_fast.demo.run import expected_tokens
from pars_fast.demo.sample import SamplePrompt
from pars_fast.errors import CheckpointError, PromptError
from pars_fast.tokenization import PackedBatch, pack

EditConfig = Callable[..., None]
PROMPTS = ["write a story", "no", "yes or no: is it so?", " ".join("abcdefghijklmnopqrstuvwxyz")]


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


class TestScoring:
    def test_scores_are_float32_in_the_order_given(self, tiny_ranker: Ranker) -> None:
        scores = tiny_ranker.score(PROMPTS)
        assert scores.dtype == torch.float32
        assert scores.shape == (len(PROMPTS),)
        torch.testing.assert_close(tiny_ranker.score(PROMPTS[::-1]), scores.flip(0))

    def test_the_split_into_forwards_does_not_show(self, tiny_ranker: Ranker) -> None:
        in_one = tiny_ranker.score(PROMPTS * 5)
        in_many = tiny_ranker.score(PROMPTS * 5, batch_tokens=1)
        torch.testing.assert_close(in_many, in_one, atol=1e-5, rtol=1e-5)

    def test_a_long_prompt_scores_as_its_head_in_bounded_time(self, tiny_ranker: Ranker) -> None:
        head = "a " * tiny_ranker.max_tokens
        started = time.perf_counter()
        long = tiny_ranker.score([head + "write a story " * 33_000])
        assert time.perf_counter() - started < 1
        torch.testing.assert_close(long, tiny_ranker.score([head]))

    def test_one_string_is_not_taken_for_many_prompts(self, tiny_ranker: Ranker) -> None:
        with pytest.raises(PromptError, match="wrap it in a list"):
            tiny_ranker.score("write")

    def test_bytes_are_no_prompts(self, tiny_ranker: Ranker) -> None:
        with pytest.raises(PromptError, match="prompt 0 must be a string, got int"):
            tiny_ranker.score(b"write")  # type: ignore[arg-type]

    def test_an_empty_batch_and_an_empty_prompt_are_refused(self, tiny_ranker: Ranker) -> None:
        with pytest.raises(PromptError, match="no prompts"):
            tiny_ranker.score([])
        with pytest.raises(PromptError, match="prompt 2 is empty"):
            tiny_ranker.score(["yes", "no", ""])

    @pytest.mark.parametrize(
        "bad", [-1, None, 2**31 - 1], ids=["negative", "one past the end", "largest int32"]
    )
    def test_ids_outside_the_vocabulary_are_refused(self, tiny_ranker: Ranker, bad: int | None) -> None:
        vocab_size = tiny_ranker.config.vocab_size
        bad = vocab_size if bad is None else bad
        with pytest.raises(PromptError, match=rf"token ids must be in 0\.\.{vocab_size - 1}, got .*{bad}"):
            tiny_ranker.score_ids(pack([[2, 3], [bad]]))

    def test_more_tokens_than_positions_are_refused(self, tiny_ranker: Ranker) -> None:
        with pytest.raises(PromptError, match="a prompt has 65 tokens, the encoder takes at most 64"):
            tiny_ranker.score_ids(pack([[2], [2] * 65]))

    @pytest.mark.parametrize("offsets", [[0], [0, 2], [1, 3], [0, 2, 2, 3], [0, 4], [0, 2, 1, 3]], ids=str)
    def test_offsets_that_do_not_fit_the_ids_are_refused(
        self, tiny_ranker: Ranker, offsets: list[int]
    ) -> None:
        batch = PackedBatch(
            torch.tensor([2, 4, 3], dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
        )
        with pytest.raises(PromptError, match="cu_seqlens must rise from 0 to 3, the number of ids"):
            tiny_ranker.score_ids(batch)


class TestExpectedTokens:
    def test_they_are_the_scores_through_the_map(self, tiny_ranker: Ranker) -> None:
        tiny_ranker.token_map = TokenMap((-1.0, 2.5), (3.0, 400.0))
        expected = tiny_ranker.expected_tokens(PROMPTS)
        assert expected.dtype == np.float64
        assert expected.shape == (len(PROMPTS),)
        np.testing.assert_array_equal(expected, tiny_ranker.token_map(tiny_ranker.score(PROMPTS).numpy()))

    def test_without_a_map_there_are_none(self, tiny_ranker: Ranker, checkpoint: Path) -> None:
        sample = [SamplePrompt("source", "model", prompt, 1) for prompt in PROMPTS]
        asked: list[Callable[[], Any]] = [
            lambda: tiny_ranker.expected_tokens(PROMPTS),
            lambda: ranker_lengths(str(checkpoint), PROMPTS),
            lambda: expected_tokens(str(checkpoint), sample),
        ]
        for ask in asked:
            with pytest.raises(CheckpointError, match="no map from scores to tokens; train it with"):
                ask()


class TestSaving:
    def test_a_round_trip_in_float16_keeps_scores_and_order(
        self, tiny_ranker: Ranker, tmp_path: Path
    ) -> None:
        tiny_ranker.token_map = TokenMap((-1.0, 2.5), (3.0, 400.0))
        tiny_ranker.save_pretrained(tmp_path / "a" / "ranker")
        loaded = Ranker.from_pretrained(tmp_path / "a" / "ranker", device="cpu")
        before, after = tiny_ranker.score(PROMPTS), loaded.score(PROMPTS)
        torch.testing.assert_close(after, before, atol=5e-3, rtol=1e-2)
        assert after.argsort().tolist() == before.argsort().tolist()
        assert (loaded.max_tokens, loaded.model.pooling) == (32, "mean")
        assert loaded.token_map == tiny_ranker.token_map
        loaded.save_pretrained(tmp_path / "b")
        assert torch.equal(Ranker.from_pretrained(tmp_path / "b", device="cpu").score(PROMPTS), after)

    def test_the_window_is_kept(self, tiny_encoder: Path, tmp_path: Path) -> None:
        ranker = Ranker.from_encoder(tiny_encoder, pooling="mean", max_tokens=32, tail_tokens=8)
        ranker.save_pretrained(tmp_path)
        loaded = Ranker.from_pretrained(tmp_path, device="cpu")
        assert (loaded.max_tokens, loaded.tail_tokens) == (32, 8)
        long = "write a story " * 100
        ends = [long, long + "no", long + "list a story no", "no " + long + "no"]
        assert len({tuple(ids) for ids in loaded.encode(ends)}) == 4

    def test_a_saved_ranker_opens_in_transformers(self, checkpoint: Path) -> None:
        model, report = BertModel.from_pretrained(
            checkpoint, add_pooling_layer=False, output_loading_info=True, dtype=torch.float32
        )
        assert not report["missing_keys"]
        assert set(report["unexpected_keys"]) == {"score_head.weight", "score_head.bias"}
        ids = torch.tensor(BertTokenizerFast.from_pretrained(checkpoint)(PROMPTS[0]).input_ids)
        hidden = model.eval()(ids[None]).last_hidden_state[0]
        ranker = Ranker.from_pretrained(checkpoint, device="cpu")
        expected = ranker.model.score_head(hidden.mean(dim=0))
        score = ranker.model(ids.int(), torch.tensor([0, len(ids)], dtype=torch.int32))
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)

    def test_a_folder_that_cannot_be_made_is_an_os_error(self, tiny_ranker: Ranker, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            tiny_ranker.save_pretrained(tmp_path / "file" / "ranker")

    def test_weights_are_private_memory(self, checkpoint: Path) -> None:
        """A file truncated after loading would end a process that had mapped it."""
        ranker = Ranker.from_pretrained(checkpoint, device="cpu")
        expected = ranker.score(PROMPTS)
        (checkpoint / "model.safetensors").write_bytes(b"")
        assert torch.equal(ranker.score(PROMPTS), expected)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _garble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe garbage")


class TestDamagedCheckpoints:
    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("config.json", Path.unlink, "no config.json there; give a directory written by"),
            ("config.json", _empty, "config.json: cannot be read"),
            ("config.json", _cut, "config.json: cannot be read"),
            ("config.json", _garble, "config.json: cannot be read"),
            ("config.json", lambda path: path.write_text("[]"), "config.json: expected a JSON object"),
            ("model.safetensors", Path.unlink, "no model.safetensors there; other formats are not read"),
            ("model.safetensors", _empty, "model.safetensors: damaged or truncated"),
            ("model.safetensors", _cut, "model.safetensors: damaged or truncated"),
            ("model.safetensors", _garble, "model.safetensors: damaged or truncated"),
            ("tokenizer.json", Path.unlink, "the tokenizer files are missing or damaged"),
            ("tokenizer.json", _cut, "the tokenizer files are missing or damaged"),
            ("tokenizer.json", _garble, "the tokenizer files are missing or damaged"),
        ],
        ids=lambda value: (
            getattr(value, "__name__", value).strip("_<>") if not isinstance(value, Path) else ""
        ),
    )
    def test_each_file_missing_or_damaged(
        self, checkpoint: Path, name: str, damage: Callable[[Path], Any], message: str
    ) -> None:
        damage(checkpoint / name)
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            Ranker.from_pretrained(checkpoint)
        assert str(error.value).startswith(str(checkpoint))

    def test_a_folder_that_is_not_there_or_is_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere: no config\.json there"):
            Ranker.from_pretrained(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"file/config\.json: cannot be read"):
            Ranker.from_pretrained(tmp_path / "file")

    def test_an_encoder_without_a_head_says_how_to_get_one(self, tiny_encoder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"an encoder without a score head.*pars-fast train --init"):
            Ranker.from_pretrained(tiny_encoder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "roberta"}, "model_type is 'roberta', not 'bert'"),
            ({"model_type": None}, "model_type is None, not 'bert'"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
            ({"is_decoder": True}, "is_decoder is True, not False"),
            ({"hidden_size": 64}, r"is \(\d+, 32\), config.json says \(\d+, 64\)"),
            ({"num_hidden_layers": 3}, r"no tensor 'encoder\.layer\.2\..*of another architecture"),
            ({"num_attention_heads": 5}, "no encoder can be built from it .*5 heads do not divide 32"),
            ({"hidden_size": "wide"}, "no encoder can be built from it"),
            ({"hidden_size": -1}, "no encoder can be built from it"),
            ({"vocab_size": 10**14}, "no encoder can be built from it"),
            ({"vocab_size": 10**30}, "no encoder can be built from it"),
            ({"hidden_act": "nope"}, "no encoder can be built from it .*nope"),
            ({"section": {"pooling": "max"}}, "no pars_fast section with a pooling"),
            ({"section": {"max_tokens": "all"}}, "max_tokens must be a whole number, got 'all'"),
            ({"section": {"max_tokens": 65}}, r"max_tokens must be in 3\.\.64, got 65"),
            ({"section": {"max_tokens": 2}}, r"max_tokens must be in 3\.\.64, got 2"),
            ({"section": {"tail_tokens": 1.5}}, r"tail_tokens must be a whole number, got 1\.5"),
            ({"section": {"tail_tokens": 31}}, r"tail_tokens must be in 0\.\.30, got 31"),
            ({"section": {"tail_tokens": -1}}, r"tail_tokens must be in 0\.\.30, got -1"),
            ({"section": {"token_map": {"scores": [1]}}}, "damaged token_map"),
            ({"section": {"token_map": {"scores": ["a"], "tokens": ["b"]}}}, "damaged token_map"),
            ({"section": {"token_map": {"scores": [2, 1], "tokens": [1, 2]}}}, "damaged token_map"),
            ({"section": {"token_map": 7}}, "damaged token_map"),
        ],
        ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
    )
    def test_a_config_of_something_else(
        self, checkpoint: Path, edit_config: EditConfig, changes: dict[str, Any], message: str
    ) -> None:
        edit_config(checkpoint, **changes)
        with pytest.raises(CheckpointError, match=message):
            Ranker.from_pretrained(checkpoint)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    def test_weights_that_are_not_finite(self, checkpoint: Path, value: float) -> None:
        name = "encoder.layer.1.output.dense.weight"
        edit_weights(checkpoint, lambda weights: weights[name].view(-1)[-1:].fill_(value))
        with pytest.raises(CheckpointError, match=f"{name!r} holds NaN or infinity"):
            Ranker.from_pretrained(checkpoint)

    def test_a_missing_tensor(self, checkpoint: Path) -> None:
        edit_weights(checkpoint, lambda weights: weights.pop("score_head.weight"))
        with pytest.raises(CheckpointError, match=r"no tensor 'score_head\.weight'"):
            Ranker.from_pretrained(checkpoint)

    def test_a_tokenizer_of_another_model(self, checkpoint: Path, edit_config: EditConfig) -> None:
        def shrink(weights: dict[str, Tensor]) -> None:
            name = "embeddings.word_embeddings.weight"
            weights[name] = weights[name][:40].clone()

        edit_weights(checkpoint, shrink)
        edit_config(checkpoint, vocab_size=40)
        with pytest.raises(CheckpointError, match=r"the tokenizer has .* the encoder 40; .*different models"):
            Ranker.from_pretrained(checkpoint)


class TestNothingIsExecuted:
    def test_a_pickle_is_refused_unread(self, checkpoint: Path, tmp_path: Path) -> None:
        trap = tmp_path / "trap"

        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (trap,)

        for name in ("pytorch_model.bin", "model.bin", "model.pt"):
            (checkpoint / name).write_bytes(pickle.dumps(Trap()))
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no model\.safetensors there; other formats are not read"):
            Ranker.from_pretrained(checkpoint)
        shutil.copy(checkpoint / "pytorch_model.bin", checkpoint / "model.safetensors")
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            Ranker.from_pretrained(checkpoint)
        assert not trap.exists()

    def test_code_beside_the_weights_is_left_alone(self, checkpoint: Path, edit_config: EditConfig) -> None:
        (checkpoint / "trap.py").write_text("raise SystemExit('executed')\n")
        auto_map = {"AutoModel": "trap.Trap", "AutoTokenizer": ["trap.Trap", "trap.Trap"]}
        edit_config(checkpoint, auto_map=auto_map)
        tokenizer_config = checkpoint / "tokenizer_config.json"
        tokenizer_config.write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Trap"}))
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
        vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
        (checkpoint / "vocab.txt").write_text("\n".join(vocab) + "\n")
        (checkpoint / "tokenizer.json").unlink()  # the way that goes through transformers
        assert Ranker.from_pretrained(checkpoint, device="cpu").score(PROMPTS).isfinite().all()


def test_a_vocab_txt_alone_is_enough(tiny_encoder: Path, tiny_ranker: Ranker, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    vocab = tiny_ranker.tokenizer.get_vocab()
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    (tmp_path / "encoder" / "vocab.txt").write_text("\n".join(sorted(vocab, key=lambda t: vocab[t])) + "\n")
    torch.manual_seed(1)
    ranker = Ranker.from_encoder(tmp_path / "encoder", pooling="mean", max_tokens=32)
    torch.testing.assert_close(ranker.score(PROMPTS), tiny_ranker.score(PROMPTS))
