"""The catalogue of rules: a page a family, the papers first, the laws last. They are tried in the order of this import."""

from structrep.rules import repvgg, acb, diracnet, doconv, expandnet, laws  # noqa: F401, I001
