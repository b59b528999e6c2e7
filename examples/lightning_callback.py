"""structrep in a Lightning training: one line before `fit`, and a callback.

The LightningModule knows nothing of it, and its own `load_from_checkpoint` takes the deploy checkpoint.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from demo import digits
from loop import make
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import structrep
from structrep.integrations.lightning import ReparameterizeOnExport


class Classifier(pl.LightningModule):
    """Digits, by the network of the plain loop."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module = make()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)


def main(folder: Path, epochs: int = 5) -> tuple[Classifier, ReparameterizeOnExport]:
    """Train on digits; checkpoints go to the folder.

    Returns:
        the module as it was trained, and the callback, which knows what was written and measured.
    """
    pl.seed_everything(0)
    images, labels, test_images, test_labels = digits()
    train = DataLoader(TensorDataset(images, labels), 64, shuffle=True)
    test = DataLoader(TensorDataset(test_images, test_labels), 450)

    module = Classifier()
    module.net = structrep.expand(module.net, "repvgg")  # 1. before `fit` makes the optimizer
    export = ReparameterizeOnExport("net", dirpath=folder)  # 2. at its end
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[export],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, train, test)

    assert export.deploy_path is not None
    plain = Classifier.load_from_checkpoint(export.deploy_path).eval()
    with torch.no_grad():
        accuracy = (plain(test_images).argmax(1) == test_labels).float().mean()
    print(f"{export.deploy_path}: accuracy {accuracy:.2%}; the validation logged {export.metrics}")
    return module, export


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
