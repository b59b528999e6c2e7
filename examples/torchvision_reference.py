"""A script with the arguments and checkpoints of torchvision's references/classification/train.py, and with `--expand`.

The blocks are made before the optimizer, so that resuming, the moving average and the checkpoints are of the model with
blocks. At the end, deploy.pth holds what the model of torchvision itself takes:

    python examples/torchvision_reference.py --expand repvgg --model-ema --output-dir out
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(torch.load("out/deploy.pth"))
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from demo import digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import structrep

Loader = DataLoader[tuple[Tensor, ...]]


def load_data(size: int, batch_size: int) -> tuple[Loader, Loader]:
    """Digits as images (N, 3, size, size), to train on and to test on."""

    def images(gray: Tensor) -> Tensor:
        return F.interpolate(gray, (size, size), mode="bilinear").expand(-1, 3, -1, -1)

    x, y, x_test, y_test = digits()
    train = DataLoader(TensorDataset(images(x), y), batch_size, shuffle=True, drop_last=True)
    return train, DataLoader(TensorDataset(images(x_test), y_test), batch_size)


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: Loader,
    args: argparse.Namespace,
    model_ema: AveragedModel | None,
) -> None:
    model.train()
    for i, (image, target) in enumerate(data_loader):
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model_ema is not None and i % args.model_ema_steps == 0:
            model_ema.update_parameters(model)


@torch.inference_mode()
def evaluate(model: nn.Module, data_loader: Loader, log_suffix: str = "") -> float:
    model.eval()
    right = sum(int((model(image).argmax(1) == target).sum()) for image, target in data_loader)
    acc1 = 100 * right / sum(len(target) for _, target in data_loader)
    print(f"Test: {log_suffix} Acc@1 {acc1:.3f}")
    return acc1


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    data_loader, data_loader_test = load_data(args.train_crop_size, args.batch_size)

    model = torchvision.models.get_model(args.model, weights=args.weights, num_classes=10)
    if args.expand:
        model = structrep.expand(model, args.expand)  # 1. before the optimizer, the average and the resuming

    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=args.lr_step_size, gamma=args.lr_gamma)
    model_ema = None
    if args.model_ema:
        model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.model_ema_decay), use_buffers=True)

    start_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.resume, weights_only=False)  # args is no tensor
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        start_epoch = checkpoint["epoch"] + 1
        if model_ema is not None:
            model_ema.load_state_dict(checkpoint["model_ema"])

    for epoch in range(start_epoch, args.epochs):
        train_one_epoch(model, criterion, optimizer, data_loader, args, model_ema)
        lr_scheduler.step()
        evaluate(model, data_loader_test)
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "epoch": epoch,
            "args": args,
        }
        if model_ema is not None:
            evaluate(model_ema, data_loader_test, log_suffix="EMA")
            checkpoint["model_ema"] = model_ema.state_dict()
        torch.save(checkpoint, output_dir / f"model_{epoch}.pth")
        torch.save(checkpoint, output_dir / "checkpoint.pth")

    if args.expand:
        trained: Any = model if model_ema is None else model_ema.module
        deploy = structrep.reparameterize(trained.eval(), norms="keep")  # 2. after training
        torch.save(deploy.state_dict(), output_dir / "deploy.pth")
        evaluate(deploy, data_loader_test, log_suffix="deploy")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expand", default="", help="train with these blocks of structrep, for example repvgg")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("-b", "--batch-size", default=64, type=int)
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--lr", default=0.01, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    parser.add_argument("--label-smoothing", default=0.0, type=float)
    parser.add_argument("--lr-step-size", default=30, type=int)
    parser.add_argument("--lr-gamma", default=0.1, type=float)
    parser.add_argument("--output-dir", default=".")
    parser.add_argument("--resume", default="", help="path of a checkpoint")
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--model-ema-steps", default=1, type=int)
    parser.add_argument("--model-ema-decay", default=0.9, type=float)
    parser.add_argument("--train-crop-size", default=16, type=int)
    parser.add_argument("--weights", default=None)
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    main(get_args_parser().parse_args(argv))


if __name__ == "__main__":
    run()
