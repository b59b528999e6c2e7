"""structrep in a training with the `Trainer` of transformers: one line before it is made, and a callback.

`from_pretrained` takes the deploy model. The model is a small ResNet with random weights; nothing is downloaded.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from demo import digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import structrep
from structrep.integrations.transformers import ReparameterizeOnExport

SMALL: dict[str, Any] = dict(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_channels=1, num_labels=10
)


class Digits(Dataset[dict[str, Tensor]]):
    """Images (N, 1, 8, 8), which are made 32x32, and labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = F.interpolate(images, (32, 32), mode="bilinear"), labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def main(folder: Path, epochs: int = 3) -> tuple[nn.Module, ReparameterizeOnExport]:
    """Train on digits; models go to the folder.

    Returns:
        the model as it was trained, and the callback, which knows what was written and measured.
    """
    set_seed(0)
    images, labels, test_images, test_labels = digits()
    model: nn.Module = ResNetForImageClassification(ResNetConfig(**SMALL))
    model = structrep.expand(model, "repvgg")  # 1. before the Trainer, which makes the optimizer
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=450,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Digits(images, labels),
        eval_dataset=Digits(test_images, test_labels),
        compute_metrics=accuracy,
    )
    export = ReparameterizeOnExport(trainer)  # 2. at the end of `train`
    trainer.add_callback(export)
    trainer.train()

    plain = ResNetForImageClassification.from_pretrained(str(export.deploy_path))
    print(f"{export.deploy_path}: a {type(plain).__name__}; the evaluation measured {export.metrics}")
    return model, export


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
