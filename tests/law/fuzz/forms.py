"""How steps of random programs are spelt."""

MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
PADS = ("constant", "constant", "reflect", "replicate", "circular")
# what code is given two values and one of its settings by, and gives one of them back
PICKS = ("{y} if {t} else {x}", "pick({x}, {y}, {t})", "({x}, {y})[int({t})]", "next(taps({x}, {y}, {t}))",
         "dict(a={x}, b={y})['b' if {t} else 'a']", "(lambda one, other: other if {t} else one)({x}, {y})")  # fmt: skip
HELPERS = """import functools


def pick(one, other, flag):
    return other if flag else one


def taps(one, other, flag):
    if flag:
        yield other
    yield one"""
# conditions that do not hold for the inputs here, beside those on settings and flags
ASKED = ("{x}.dtype == torch.float32", "{x}.is_cuda", "{x}.requires_grad", "self.training", "hasattr(self, 'never')",
         "torch.jit.is_tracing()", "not isinstance({x}, Tensor)", "len({x}.shape) > 5", "{x}.shape[0] == 7",
         "getattr(self, 'never', None) is not None", "{x}.shape[-1] % 16 == 15", "{x}.mean() > {mean}",
         "float({x}.abs().max()) > {most}", "({x} > {most}).any()")  # fmt: skip
# what sizes, dtypes and devices make of a value
SHAPED = ("{x}.reshape({x}.shape[0], -1, *{x}.shape[2:])", "{x}.flatten(2).reshape({x}.shape)", "{x} * {x}.shape[1]",
          "{x} + {x}.new_zeros({x}.shape)", "{x} * torch.ones_like({x})", "{x}.to({x}.dtype)", "{x}.to({x}.device)",
          "{x}[: {x}.shape[0]]", "{x}.expand({x}.shape[0], -1, *{x}.shape[2:])", "F.interpolate({x}, scale_factor=2)",
          "{x}.mean(-1, keepdim=True)", "{x}.mean([*range(2, {x}.ndim)], True)", "{x} * {x}.size(-1) / len({x}.shape)",
          "{x}.flatten(2).mean(-1).reshape(*{x}.shape[:2], *[1] * ({x}.ndim - 2))")  # fmt: skip
# layers of a list, all on one value
BRANCHES = ("{v} = sum(layer({x}) for layer in self.{l})",
            "{v} = torch.stack([layer({x}) for layer in self.{l}]).sum(0)",
            "{v} = 0\nfor layer in self.{l}:\n    {v} = {v} + layer({x})",
            "{v} = self.{l}[0]({x}) + self.{l}[-1]({x})",
            "{v} = functools.reduce(torch.add, [layer({x}) for layer in self.{l}])",
            "{v} = torch.zeros_like({x})\nfor i in range(len(self.{l})):\n    {v} += self.{l}[i]({x})",
            "{v} = {x}\nfor i, layer in enumerate(self.{l}):\n    {v} = {v} + layer({x}) if i else layer({v})",
            "{v} = [m({x}) for m in self.{l}]\n{v} = {v}[0] + {v}[1]",
            "{v} = sum(map(lambda m: m({x}), self.{l}))")  # fmt: skip
# ways to run a layer that stands in the class
CALLED = ("{v} = getattr(self, '{l}')({x})", "{v} = self._modules['{l}']({x})", "{v} = self.{l}.forward({x})",
          "with torch.no_grad():\n    {v} = self.{l}({x})",
          "try:\n    {v} = self.{l}({x})\nexcept TypeError:\n    {v} = {x}",
          "def inner(y):\n    return self.{l}(y)\n{v} = inner({x})", "{v} = (lambda y: self.{l}(y))({x})",
          "assert {x}.ndim == {d}\n{v} = self.{l}({x})", "{v} = y = self.{l}({x})", "{v} = self.{l}(input={x})",
          "layer = self.{l}\n{v} = layer({x})", "n, c, *rest = {x}.shape\n{v} = self.{l}({x}.view(n, c, *rest))",
          "{v} = self.{l}({x}) if self.{l} is not None else {x}",
          "if ({v} := self.{l}({x})) is None:\n    {v} = {x}")  # fmt: skip
METHODS = ("def {m}(self, y):\n    return self.{l}(y)", "def {m}(self, y):\n    y = self.{l}(y)\n    return y * 2",
           "def {m}(self, *args):\n    return self.{l}(*args)", "@property\ndef {m}(self):\n    return self.{l}",
           "@torch.no_grad()\ndef {m}(self, y):\n    return self.{l}(y) + 1",
           "@property\ndef {m}(self):\n    return lambda y: self.{l}(y)")  # fmt: skip
CURVES = ("torch.relu({})", "torch.tanh({})", "F.gelu({})", "{}.sigmoid()", "{}.abs()")
