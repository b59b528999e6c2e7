"""The pictures of docs/index.md, a small RepVGG before and after: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d

PICTURES = Path(__file__).parent / "images"


def pictures() -> dict[str, str]:
    """SVGs by the names of their files."""
    blocks = (RepVGGBlock2d(3, 16, 3, padding=1), RepVGGBlock2d(16, 16, 3, padding=1))
    plan = structrep.plan(nn.Sequential(blocks[0], nn.ReLU(), blocks[1], nn.ReLU()).eval())
    return {"repvgg-training-time.svg": plan.draw(), "repvgg-deploy.svg": plan.draw(deploy=True)}


def main() -> None:
    for name, picture in pictures().items():
        (PICTURES / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
