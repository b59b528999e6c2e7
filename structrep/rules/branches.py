"""Branches that several families have."""

from structrep.pattern import Affine, Conv, Optional, Pad, Pool, Seq, pointwise, spatial

BORDER = Seq(Optional(Affine()), Optional(Pad()), Optional(Affine()))  # a norm, and a pad with what it makes of 0
AVERAGE = Seq(Optional(Conv(pointwise)), BORDER, Pool(), Affine())
CHAIN = Seq(Conv(pointwise), BORDER, Conv(spatial), Optional(Affine()))
