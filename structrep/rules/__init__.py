"""The catalogue of rules, a page a family, and the laws. Of two that match one block, the narrower says so itself."""

from structrep.rules import repmlp, acb, replknet, qarepvgg, repoptimizer, repghost, repvgg, dbb, mobileone  # noqa: F401, I001
from structrep.rules import repmixer, repnext, diracnet, ecbsr, fmen, span, dyrep, doconv, orepa, deanet  # noqa: F401
from structrep.rules import expandnet, resrep, vanillanet, yolor, lora, repadapter, laws  # noqa: F401
