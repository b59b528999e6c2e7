"""The catalogue of rules: a page a family, the papers first, the laws last."""

from structrep.rules import repvgg, acb, diracnet, doconv, expandnet, laws  # noqa: F401, I001  in the order they are tried
