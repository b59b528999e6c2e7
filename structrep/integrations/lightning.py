"""A callback for Lightning: `lightning.pytorch`, or `pytorch_lightning` where there is only that.

module.net = structrep.expand(module.net, "repvgg")
export = ReparameterizeOnExport("net")
Trainer(callbacks=[export]).fit(module)
plain = MyModule.load_from_checkpoint(export.deploy_path)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from structrep.errors import BadInput
from structrep.integrations.shared import merge, trained_copy
from structrep.train.expand import check_optimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    try:
        import lightning.pytorch as pl
        from lightning.pytorch.utilities.seed import isolate_rng
    except ModuleNotFoundError:
        import pytorch_lightning as pl
        from pytorch_lightning.utilities.seed import isolate_rng

log = logging.getLogger("structrep")


class ReparameterizeOnExport(pl.Callback):
    """At the end of `fit`, the deploy model of what was trained: validated beside it, and written as a checkpoint.

    It works on copies. The module that was trained stays as it is, with its mode and its random numbers; no other
    callback hears of the two validations, and `trainer.callback_metrics` stay those of the training. That there is
    something to merge is checked before the first step. Weights that another callback averages (`WeightAveraging`,
    `StochasticWeightAveraging`) are averaged first, wherever in the list it stands.

    With norms="keep" the deploy checkpoint is one of the module without blocks, for its `load_from_checkpoint`: it has
    the hyperparameters, epoch and step of the training, but no optimizer to go on with. A module that makes the blocks
    itself needs an argument to leave that out.

    Args:
        module: the name of what to merge in the LightningModule; all of it by default.
        norms: "keep" merges the blocks of `structrep.expand` alone, "fold" all that can be.
        weights: "last", as they are after the last step, or "best", those of the trainer's `ModelCheckpoint`.
        validate: run the trainer's validation with both, if it has one.
        dirpath: where to write; by default the trainer's `log_dir`. Files of these names there are replaced.
        options: as for `structrep.plan`.

    Attributes:
        training_time_path: the checkpoint to go on training from, `training-time.ckpt`, or the best.
        deploy_path: the deploy model's, `deploy.ckpt`. With `fast_dev_run` nothing is written, and both are None.
        metrics: what the validation logged with each, as "training-time" and "deploy". The trainer's loggers have it
            as "deploy/val_loss" and so on.

    Raises:
        BadInput: (when training starts) there is no module of that name, nothing in it to merge, or no best weights; or
            the optimizers do not train its blocks.
    """

    def __init__(
        self,
        module: str = "",
        *,
        norms: Literal["keep", "fold"] = "keep",
        weights: Literal["last", "best"] = "last",
        validate: bool = True,
        dirpath: str | Path | None = None,
        **options: Any,
    ) -> None:
        if weights not in ("last", "best"):
            raise BadInput(f"weights={weights!r}: give 'last' or 'best'")
        self.module, self.norms, self.weights, self.validate = module, norms, weights, validate
        self.dirpath, self.options = dirpath, options
        self.training_time_path: Path | None = None
        self.deploy_path: Path | None = None
        self.metrics: dict[str, dict[str, float]] = {}

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.callbacks = [*(one for one in trainer.callbacks if one is not self), self]  # behind those that average

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.weights == "best" and not hasattr(trainer.checkpoint_callback, "best_model_path"):
            raise BadInput("weights='best' are those of a ModelCheckpoint, and the trainer has none")
        with isolate_rng():
            self._merge(_copied(pl_module))
        # strategies that shard what is trained have parameters of their own
        sharded = isinstance(trainer.strategy, (pl.strategies.DeepSpeedStrategy, pl.strategies.FSDPStrategy))
        held = [group["params"] for one in trainer.optimizers for group in one.param_groups]
        if not sharded and any(parameter.requires_grad for group in held for parameter in group):  # else it has none
            check_optimizer(pl_module.get_submodule(self.module), trainer.optimizers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with isolate_rng():
            training_time = self._trained(trainer, pl_module)
            deploy = self._merge(_copied(training_time))
            if not trainer.fast_dev_run:
                self._write(trainer, deploy)
            if self.validate and trainer.enable_validation:
                self.metrics = {
                    "training-time": _validated(trainer, training_time),
                    "deploy": _validated(trainer, deploy),
                }
        logged = {f"{of}/{name}": value for of, metrics in self.metrics.items() for name, value in metrics.items()}
        for logger in trainer.loggers if logged else ():
            logger.log_metrics(logged, step=trainer.global_step)
        log.info("training-time model %s, deploy model %s: %s", self.training_time_path, self.deploy_path, logged)

    def _trained(self, trainer: Any, pl_module: Any) -> Any:
        """A copy of the module in eval mode, with the weights that were asked for.

        Raises:
            BadInput: the best are asked for, and no checkpoint was written.
        """
        trained = _copied(pl_module)
        if self.weights == "best" and not trainer.fast_dev_run:
            best = getattr(trainer.checkpoint_callback, "best_model_path", "")
            if not best:
                raise BadInput("weights='best', and the trainer's ModelCheckpoint has written none")
            trained.load_state_dict(trainer.strategy.load_checkpoint(best)["state_dict"])
        return trained

    def _merge(self, trained: Any) -> Any:
        """The module, what was asked for in it merged.

        Raises:
            BadInput: it has no module of that name, or nothing in that is merged.
        """
        try:
            part = trained.get_submodule(self.module)
        except AttributeError:
            raise BadInput(f"{type(trained).__name__} has no module named {self.module!r}") from None
        merge(part, self.norms, **self.options)
        return trained

    def _write(self, trainer: Any, deploy: Any) -> None:
        folder = Path(self.dirpath or trainer.log_dir or "")
        self.deploy_path = folder / "deploy.ckpt"
        if self.weights == "best":
            self.training_time_path = Path(trainer.checkpoint_callback.best_model_path)
        else:
            self.training_time_path = folder / "training-time.ckpt"
            trainer.save_checkpoint(self.training_time_path)
        with _in_place(trainer, deploy):
            trainer.save_checkpoint(self.deploy_path, weights_only=True)


def _copied(pl_module: Any) -> Any:
    """A copy in eval mode that runs its own steps, where `fit(torch.compile(module))` has put others on the module."""
    copied: Any = trained_copy(pl_module)
    for name, method in (copied._compiler_ctx or {}).items():
        if name.startswith("original_"):  # what the class has, or what had been put on the module before
            setattr(copied, name.removeprefix("original_"), method)
    copied._compiler_ctx = None
    return copied


@contextmanager
def _in_place(trainer: Any, module: Any) -> Iterator[None]:
    """The trainer with another module in the place of its own; no callback and no logger hears of what it does."""
    own, wrapped, stage = trainer.lightning_module, trainer.strategy.model, trainer.state.stage
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks, trainer.loggers = [], []
    module.trainer = trainer
    module._metric_attributes = None  # what it has is of the metrics that its own are copies of
    trainer.strategy.connect(module)
    try:
        yield
    finally:
        trainer.strategy.connect(own)
        trainer.strategy.model = wrapped
        trainer.callbacks, trainer.loggers, trainer.state.stage = callbacks, loggers, stage


def _validated(trainer: Any, module: Any) -> dict[str, float]:
    """What the trainer's own validation logs with another module."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    known = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
    before, progress = [dict(metrics) for metrics in known], copy.deepcopy(loop.batch_progress)
    with _in_place(trainer, module):
        trainer.validating = True
        logged = loop.run()
    loop.batch_progress = progress
    for metrics, old in zip(known, before, strict=True):
        metrics.clear()
        metrics.update(old)
    return {name: float(value) for metrics in logged for name, value in metrics.items()}
