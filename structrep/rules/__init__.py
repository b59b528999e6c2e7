"""The catalogue of rules: a page a family, the papers first, the laws last, in the order in which they are tried: what
says more of a block before what says less."""

from structrep.rules import repmlp, acb, replknet, qarepvgg, repghost, repvgg, dbb, mobileone  # noqa: F401, I001
from structrep.rules import repmixer, diracnet, ecbsr, span, dyrep, doconv, orepa, expandnet, lora, laws  # noqa: F401
