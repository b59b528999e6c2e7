"""Training as timm's train.py does it, with `--expand`: create_model, ModelEmaV3, CheckpointSaver, schedules by name.

timm_train.patch puts the same lines into timm's own script (`git apply timm_train.patch` in a copy of its repository).
Its context is what the script of timm 0.9 and that of 1.0 have in common. What it writes, timm takes:

    python examples/timm_train.py --expand repvgg --model-ema --output out
    timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path="out/deploy.pth.tar")
"""

# mypy: disable-error-code="attr-defined, no-untyped-call"
# timm has types in part

import argparse
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from demo import digits
from timm import utils
from timm.models import create_model, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import structrep

Loader = DataLoader[tuple[Tensor, ...]]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--expand", default="", help="train with these blocks of structrep, for example repvgg")
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("-b", "--batch-size", default=64, type=int)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--momentum", default=0.9, type=float)
parser.add_argument("--weight-decay", default=2e-5, type=float)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--lr", default=0.05, type=float)
parser.add_argument("--epochs", default=4, type=int)
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--model-ema-decay", default=0.9, type=float)
parser.add_argument("--output", default=".")


def loaders(batch_size: int) -> tuple[Loader, Loader]:
    """Digits as images (N, 1, 32, 32), to train on and to validate on."""
    x, y, x_test, y_test = digits()
    large = [F.interpolate(images, (32, 32), mode="bilinear") for images in (x, x_test)]
    train = DataLoader(TensorDataset(large[0], y), batch_size, shuffle=True, drop_last=True)
    return train, DataLoader(TensorDataset(large[1], y_test), batch_size)


@torch.no_grad()
def validate(model: nn.Module, loader: Loader) -> float:
    model.eval()
    top1 = utils.AverageMeter()
    for images, target in loader:
        top1.update(utils.accuracy(model(images), target)[0].item(), len(target))
    return float(top1.avg)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser.parse_args(argv)
    utils.random_seed(0)
    loader_train, loader_eval = loaders(args.batch_size)

    model = create_model(args.model, num_classes=10, in_chans=1, checkpoint_path=args.initial_checkpoint)

    # 1. before the optimizer and the average
    if args.expand:
        model = structrep.expand(model, args.expand)

    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    model_ema = utils.ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    output_dir = utils.get_outdir(args.output)
    saver = utils.CheckpointSaver(
        model, optimizer, args=args, model_ema=model_ema, checkpoint_dir=output_dir, recovery_dir=output_dir
    )
    lr_scheduler, num_epochs = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=args.epochs)

    best_metric = None
    for epoch in range(num_epochs):
        model.train()
        for images, target in loader_train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
            if model_ema is not None:
                model_ema.update(model)
        top1 = validate(model if model_ema is None else model_ema.module, loader_eval)
        print(f"Test: {epoch} Acc@1 {top1:.3f}")
        best_metric, _ = saver.save_checkpoint(epoch, metric=top1)
        lr_scheduler.step(epoch + 1)

    # 2. after training, from the best epoch and its average
    if args.expand and best_metric is not None:
        trained = utils.unwrap_model(model).eval()
        load_checkpoint(trained, os.path.join(output_dir, "model_best.pth.tar"), use_ema=True)
        deploy = structrep.reparameterize(trained, norms="keep")
        torch.save(deploy.state_dict(), os.path.join(output_dir, "deploy.pth.tar"))
        print(f"Test: deploy Acc@1 {validate(deploy, loader_eval):.3f}")


if __name__ == "__main__":
    main()
