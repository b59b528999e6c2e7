"""The catalogue of rules: a page a family, the papers first, the laws last, in the order in which they are tried."""

from structrep.rules import repvgg, acb, diracnet, doconv, expandnet, laws  # noqa: F401, I001
