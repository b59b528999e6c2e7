"""What tests share: models, the judge, a pretended device, and where the repository is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
