"""A callback for the `Trainer` of transformers.

model = structrep.expand(model, "repvgg")
trainer = Trainer(model, args, ...)
trainer.add_callback(ReparameterizeOnExport(trainer))
trainer.train()
plain = MyModel.from_pretrained(f"{args.output_dir}/deploy")
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from structrep import process
from structrep.errors import BadInput
from structrep.files import as_safetensors, plain
from structrep.integrations.shared import merge, trained_copy
from structrep.train.expand import check_optimizer

log = logging.getLogger("structrep")


class ReparameterizeOnExport(TrainerCallback):
    """At the end of `train`, the deploy model of what was trained: evaluated beside it, saved for `from_pretrained`,
    or as the trainer saves what is no model of transformers: its state dict, as `model.safetensors`.

    The model must come from `structrep.expand`; the deploy model has the class, keys and shapes that it had before.
    The callback works on copies, so that the model goes on training as it would without. That there is something to
    merge is checked before the first step. With `load_best_model_at_end` the best model is exported.

    Args:
        trainer: whose callback this is; it evaluates both models if it has an `eval_dataset`.
        each_save: write a deploy model into the folder of each checkpoint too.

    Attributes:
        training_time_path: the folder `training-time` in the trainer's `output_dir`.
        deploy_path: the folder `deploy` there, or the last one that was written into a checkpoint's.
        metrics: those of the evaluation of each, logged as "eval_training_time_loss", "eval_deploy_loss" and so on.

    Raises:
        BadInput: it is given no Trainer; (when training starts) there is no block to merge in the model, or the
            optimizer does not train its blocks.
    """

    def __init__(self, trainer: Trainer, *, each_save: bool = False) -> None:
        if not isinstance(trainer, Trainer):
            raise BadInput(
                f"{type(trainer).__name__} is no Trainer: trainer.add_callback(ReparameterizeOnExport(trainer))"
            )
        self.trainer: Any = trainer
        self.each_save = each_save
        self.training_time_path: Path | None = None
        self.deploy_path: Path | None = None
        self.metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._copies()
        trainer = self.trainer
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # which have parameters of their own
            check_optimizer(trainer.model, trainer.optimizer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.each_save:
            folder = Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.deploy_path = self._write(self._copies()[1], folder / "deploy")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        training_time, deploy = self._copies()
        folder = Path(args.output_dir or "")
        self.training_time_path = self._write(training_time, folder / "training-time")
        self.deploy_path = self._write(deploy, folder / "deploy")
        if self.trainer.eval_dataset is not None:
            self.metrics = self._evaluated(training_time, "eval_training_time")
            self.metrics |= self._evaluated(deploy, "eval_deploy")
            self.trainer.log(dict(self.metrics))
        log.info("training-time model %s, deploy model %s", self.training_time_path, self.deploy_path)

    def _copies(self) -> tuple[Any, Any]:
        """What was trained, and its deploy model.

        Raises:
            BadInput: nothing is merged.
        """
        with process.same_chance():
            # mixed precision is of the training alone
            training_time = extract_model_from_parallel(trained_copy(self.trainer.model), keep_fp32_wrapper=False)
            deploy = trained_copy(training_time)
            merge(deploy)
        return training_time, deploy

    def _write(self, model: Any, folder: Path) -> Path:
        if self.trainer.args.should_save:
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder)
            else:  # as the trainer itself writes what is no model of transformers
                folder.mkdir(parents=True, exist_ok=True)
                (folder / SAFE_WEIGHTS_NAME).write_bytes(as_safetensors(plain(model.state_dict())))
            if self.trainer.processing_class is not None:
                self.trainer.processing_class.save_pretrained(folder)
        return folder

    def _evaluated(self, model: Any, prefix: str) -> dict[str, float]:
        """The metrics of the trainer's own evaluation, with another model."""
        trainer, sets = self.trainer, self.trainer.eval_dataset
        loss_only = True if trainer.compute_metrics is None else None
        found: dict[str, float] = {}
        for name in sets if isinstance(sets, dict) else (None,):
            with torch.random.fork_rng(devices=[]), _in_place(trainer, model):
                found |= trainer.evaluation_loop(
                    trainer.get_eval_dataloader(name),
                    "Evaluation",
                    prediction_loss_only=loss_only,
                    metric_key_prefix=prefix if name is None else f"{prefix}_{name}",
                ).metrics
        return found


@contextmanager
def _in_place(trainer: Any, model: nn.Module) -> Iterator[None]:
    """The trainer with another model in the place of its own; no callback and no optimizer hears of what it does."""
    own = trainer.model, trainer.model_wrapped, trainer.optimizer
    callbacks = trainer.callback_handler.callbacks
    trainer.model, trainer.model_wrapped, trainer.optimizer = model, model, None
    trainer.callback_handler.callbacks = []
    try:
        yield
    finally:
        trainer.model, trainer.model_wrapped, trainer.optimizer = own
        trainer.callback_handler.callbacks = callbacks
