"""A plain training loop, and the two lines of structrep in it: before the optimizer is made, and after training.

The network that comes out is the one that was written down, with its keys and shapes.
"""

import torch
import torch.nn.functional as F
from demo import digits
from torch import Tensor, nn

import structrep


def make() -> nn.Sequential:
    """What is trained and deployed, as if there were no structrep."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def main(epochs: int = 5) -> tuple[nn.Module, nn.Module]:
    """Train on digits.

    Returns:
        the network as it was trained, and the deploy network.
    """
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    net: nn.Module = make()
    net = structrep.expand(net, "repvgg")  # 1. before the optimizer
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        net.train()
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        net.eval()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {accuracy(net, test_images, test_labels):.2%}")
    deploy = structrep.reparameterize(net, norms="keep")  # 2. after training, in eval mode

    plain = make().eval()
    plain.load_state_dict(deploy.state_dict())
    print(f"deploy: accuracy {accuracy(plain, test_images, test_labels):.2%}")
    return net, deploy


if __name__ == "__main__":
    main()
