"""Random programs: models as text, made of what structrep reads and what it does not.

A program is a class of its own, perhaps with a block that it calls once or more; its text is what runs, so a failure
prints as a model. Steps are drawn one by one, and tried on real values as they are: what torch refuses is no step.
Hypothesis draws everything, so a failure shrinks.
"""

from __future__ import annotations

import linecache
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.law.fuzz.forms import ASKED, BRANCHES, CALLED, CURVES, HELPERS, METHODS, MODES, PADS, PICKS, SHAPED
from tests.support.models import settled


@dataclass
class Text:
    """The text of one module class as it grows, and the values that its forward has so far."""

    name: str
    arguments: list[str]
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    held: dict[str, nn.Module | Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # attributes: what they are, and may be later
    flags: list[str] = field(default_factory=list)  # arguments that are False by default
    methods: list[str] = field(default_factory=list)  # their text
    result: str = ""

    def __str__(self) -> str:
        body = textwrap.indent("\n".join((*self.lines, f"return {self.result}")), " " * 8)
        set_ = (f"{name} = {now!r}" for name, (now, _) in self.settings.items())
        layers = "\n".join(f"        self.{line}" for line in (*set_, *self.layers))
        methods = "".join(textwrap.indent(method, " " * 4) + "\n\n" for method in self.methods)
        return (
            f"class {self.name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{layers}\n\n"
            f"{methods}    def forward(self, {self.given()}):\n{body}\n"
        )

    def given(self) -> str:
        return ", ".join((*self.arguments, *(f"{flag}=False" for flag in self.flags)))


@dataclass
class Program:
    """A model as text, and inputs for it."""

    text: str
    seed: int
    shapes: list[tuple[int, ...]]
    peak: float  # largest magnitude of any value on the way
    settings: list[tuple[str, str, Any]]  # of which class, by which name, and what else they may be
    flags: list[str]
    others: list[str]  # other forwards, by name

    def make(self) -> nn.Module:
        """The model, with weights as training leaves them."""
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "__name__": "fuzzed"}
        filename = f"<fuzzed {hash(self.text)}>"
        exec(compile(self.text, filename, "exec"), namespace)
        linecache.cache[filename] = (len(self.text), None, self.text.splitlines(keepends=True), filename)
        torch.manual_seed(self.seed)
        return settled(namespace["Net"]())

    def inputs(self, more: int = 0) -> list[Tensor]:
        """Random inputs, some pixels larger than those that the program was made with."""
        generator = torch.Generator().manual_seed(self.seed + more)
        return [
            torch.randn(*shape[:2], *(n + more for n in shape[2:]), dtype=torch.float64, generator=generator)
            for shape in self.shapes
        ]

    def __repr__(self) -> str:
        return f"seed {self.seed}, inputs {self.shapes}\n{self.text}"


class Writer:
    """Draws steps and writes them down."""

    def __init__(self, draw: Callable[..., Any], dims: int, text: Text, blocks: list[Text]) -> None:
        self.draw, self.dims, self.text, self.blocks = draw, dims, text, blocks
        self.peak = 0.0
        self.namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor}
        exec(HELPERS, self.namespace)

    # --- drawing ---

    def one(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def each(self, low: int, high: int) -> str:
        """A number for all dims, or one for each."""
        if self.draw(st.booleans()):
            return str(self.number(low, high))
        return str(tuple(self.number(low, high) for _ in range(self.dims)))

    def value(self) -> str:
        return str(self.one(*self.text.values))

    def channels(self, name: str) -> int:
        return self.text.values[name].shape[1]

    def methods(self) -> dict[str, Any]:
        """What the class has beside its forward."""
        scope: dict[str, Any] = {}
        for text in self.text.methods:
            exec(text, self.namespace, scope)
        return scope

    # --- writing ---

    def hold(self, code: str) -> str:
        """Declare a layer or tensor; gives its name."""
        name = f"l{len(self.text.layers)}"
        torch.manual_seed(len(self.text.layers))
        made = eval(code, self.namespace)
        self.text.layers.append(f"{name} = {code}")
        self.text.held[name] = settled(made) if isinstance(made, nn.Module) else made.double()
        return name

    def step(self, expression: str, *, writes: str = "") -> bool:
        """Write `name = expression`, if torch can compute it; or a statement that writes to a value."""
        name = writes or f"v{len(self.text.lines)}"
        line = expression if writes else f"{name} = {expression}"
        scope = {key: value.clone() for key, value in self.text.values.items()}
        itself = type("Self", (), self.methods())()
        vars(itself).update(self.text.held, **{key: now for key, (now, _) in self.text.settings.items()})
        vars(itself).update(training=False, _modules=self.text.held)
        names = self.namespace | {"self": itself} | dict.fromkeys(self.text.flags, False)
        try:
            with torch.no_grad():
                exec(line, names | scope, scope)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return False
        found = scope[name]
        size_ok = found.ndim == self.dims + 2 and 0 < found.numel() < 20_000
        if not size_ok or not bool(found.isfinite().all()):
            return False
        self.peak = max(self.peak, float(found.abs().max()))
        self.text.values[name] = found
        self.text.lines.append(line)
        return True

    def setting(self, now: Any, later: Any) -> str:
        """An attribute of the module; gives its name."""
        name = f"s{len(self.text.settings)}"
        self.text.settings[name] = (now, later)
        return f"self.{name}"

    def test(self) -> str:
        """A condition that does not hold now, and may later: for a setting, a flag, a shape."""
        kind = self.one("setting", "setting", "number", "entry", "flag", "shape", "dims", "asked", "asked")
        if kind == "flag":
            if not self.text.flags:
                self.text.flags.append("flag")
            return "flag"
        if kind == "setting":
            return self.setting(False, True)
        if kind == "number":
            return f"{self.setting(1, 3)} > 2"
        if kind == "entry":
            return f"{self.setting({'k': False}, {'k': True})}['k']"
        x = self.value()
        if kind == "asked":
            held = self.text.values[x]
            mean, most = float(held.mean()) + 0.05, float(held.abs().max()) * 1.01
            return str(self.one(*ASKED)).format(x=x, mean=f"{mean:.3f}", most=f"{most + 0.001:.3f}")
        if kind == "dims":
            return f"{x}.ndim == {self.dims + 3}"
        return f"{x}.shape[{self.number(1, self.dims + 1)}] > {max(self.text.values[x].shape) + self.number(0, 1)}"

    # --- steps ---

    def conv(self) -> bool:
        x, d = self.value(), self.dims
        inside = self.channels(x)
        groups = self.one(*[g for g in (1, 1, 2, inside) if inside % g == 0])
        out = groups * self.number(1, 3)
        kernel, stride, dilation = self.each(1, 3), self.each(1, 2), self.each(1, 2)
        padding = self.one(self.each(0, 2), repr("same"), repr("valid"))
        more = f"{stride}, {padding}, {dilation}, {groups}, {self.draw(st.booleans())}, {self.one(*MODES)!r}"
        try:
            name = self.hold(f"nn.Conv{d}d({inside}, {out}, {kernel}, {more})")
        except ValueError:  # "same" with a stride
            return False
        return self.step(f"self.{name}({x})")

    def plain_conv(self) -> bool:
        """One that keeps sizes: what branches are made of."""
        x, d = self.value(), self.dims
        inside, half = self.channels(x), self.number(0, 1)
        groups = self.one(*[g for g in (1, 1, inside) if inside % g == 0])
        name = self.hold(
            f"nn.Conv{d}d({inside}, {inside}, {2 * half + 1}, 1, {half}, 1, {groups}, {self.draw(st.booleans())})"
        )
        return self.step(f"self.{name}({x})")

    def transposed(self) -> bool:
        x, d = self.value(), self.dims
        inside = self.channels(x)
        groups = self.one(*[g for g in (1, 1, inside) if inside % g == 0])
        more = f"{self.each(1, 2)}, {self.each(0, 1)}, {self.number(0, 1)}, {groups}, {self.draw(st.booleans())}"
        name = self.hold(f"nn.ConvTranspose{d}d({inside}, {groups * self.number(1, 2)}, {self.each(1, 3)}, {more})")
        return self.step(f"self.{name}({x})")

    def functional_conv(self) -> bool:
        """A kernel held as a tensor, perhaps computed on every pass."""
        x, d = self.value(), self.dims
        inside, out, k = self.channels(x), self.number(1, 3), self.number(1, 3)
        taps = ", ".join([str(k)] * d)
        weight = self.hold(f"nn.Parameter(torch.randn({out}, {inside}, {taps}))")
        scale = self.hold(f"nn.Parameter(torch.rand({out}, {', '.join(['1'] * (d + 1))}))")
        kernel = self.one(
            f"self.{weight}", f"self.{weight} * self.{scale}", f"self.{weight}.flip(2) + 0.5 * self.{weight}"
        )
        return self.step(f"F.conv{d}d({x}, {kernel}, None, {self.number(1, 2)}, {self.number(0, 2)})")

    def norm(self, x: str = "") -> bool:
        x = x or self.value()
        name = self.hold(f"nn.BatchNorm{self.dims}d({self.channels(x)})")
        return self.step(f"self.{name}({x})")

    def norm_of_each(self) -> bool:
        """One that takes its statistics from each value, and ends with a weight and bias."""
        x, d = self.value(), self.dims
        channels, last = self.text.values[x].shape[1], self.text.values[x].shape[-1]
        form = self.one(f"nn.LayerNorm({last})", f"nn.RMSNorm({last})", f"nn.GroupNorm(1, {channels})",
                        f"nn.InstanceNorm{d}d({channels}, affine=True)")  # fmt: skip
        return self.step(f"self.{self.hold(form)}({x})")

    def linear(self) -> bool:
        """On the last dim, perhaps of channels that are moved there, and perhaps back."""
        x, d = self.value(), self.dims
        to_last, back = (0, *range(2, d + 2), 1), (0, d + 1, *range(1, d + 1))
        before, behind = self.one(
            ("{}", "{}"), ("{}.permute{to_last}", "{}"), ("{}.permute{to_last}", "{}.permute{back}")
        )
        width = self.text.values[x].shape[-1] if before == "{}" else self.channels(x)
        name = self.hold(f"nn.Linear({width}, {self.number(1, 4)}, {self.draw(st.booleans())})")
        moved = before.format(x, to_last=to_last)
        return self.step(behind.format(f"self.{name}({moved})", back=back))

    def moved(self) -> bool:
        x = self.value()
        form = self.one("{x}.transpose(1, -1)", "{x}.transpose(1, {d})", "{x}.flip({d})", "{x}.roll(1, {d})",
                        "{x}.reshape({x}.shape)", "{x}.contiguous()")  # fmt: skip
        return self.step(form.format(x=x, d=self.number(1, self.dims + 1)))

    def scale_of_last(self) -> bool:
        x = self.value()
        tensor = self.hold(f"nn.Parameter(torch.randn({self.text.values[x].shape[-1]}))")
        return self.step(self.one("{x} * self.{t}", "{x} + self.{t}").format(x=x, t=tensor))

    def scale(self) -> bool:
        x = self.value()
        shape = ", ".join([str(self.channels(x)), *["1"] * self.dims])
        made = self.one("torch.randn({})", "torch.rand({}) + 0.5").format(shape)
        tensor = "self." + self.hold(f"nn.Parameter({made})")
        if self.draw(st.booleans()):
            tensor = str(self.one(0.5, -2, 0, 3))
        form = self.one("{x} * {t}", "{t} * {x}", "{x} + {t}", "{x} - {t}", "{t} - {x}", "-{x}", "{x} / 4")
        return self.step(form.format(x=x, t=tensor))

    def pool(self) -> bool:
        x, d = self.value(), self.dims
        more = f"{self.each(1, 2)}, {self.number(0, 1)}, {self.draw(st.booleans())}, {self.draw(st.booleans())}"
        code = self.one(f"nn.AvgPool{d}d({self.each(1, 3)}, {more})", f"nn.AdaptiveAvgPool{d}d({self.number(1, 3)})",
                        f"nn.MaxPool{d}d({self.number(1, 3)})")  # fmt: skip
        return self.step(f"self.{self.hold(code)}({x})")

    def pad(self) -> bool:
        x = self.value()
        if self.draw(st.booleans()):
            crop = ", ".join([f"{self.number(0, 1)}:{self.one('', -1)}"] * self.number(1, self.dims))
            return self.step(f"{x}[..., {crop}]")
        sides = [self.number(-1, 2) for _ in range(2 * self.dims)]
        mode = self.one(*PADS)
        if mode == "circular":
            sides = list(map(abs, sides))  # torch gives memory that it has not written where one side crops
        value = f", value={self.one(0.0, 0.0, 1.5)}" if mode == "constant" else ""
        return self.step(f"F.pad({x}, {sides}, mode={mode!r}{value})")

    def nothing(self) -> bool:
        x = self.value()
        layer = self.one("nn.Identity()", "nn.Dropout(0.5)", f"nn.Dropout{self.dims}d(0.5)")
        return self.step(f"self.{self.hold(layer)}({x})")

    def curve(self) -> bool:
        return self.step(self.one(*CURVES).format(self.value()))

    def total(self) -> bool:
        x, y = self.value(), self.value()
        form = self.one("{x} + {y}", "{x} + {y}", "{x} - {y}", "torch.add({x}, {y}, alpha=2)", "sum([{x}, {y}, {x}])",
                        "torch.stack([{x}, {y}]).sum(0)", "torch.stack([{x}, {y}], 1).mean(1)")  # fmt: skip
        return self.text.values[x].shape == self.text.values[y].shape and self.step(form.format(x=x, y=y))

    def stacked(self) -> bool:
        names = [self.value() for _ in range(self.number(2, 3))]
        return self.step(f"torch.cat([{', '.join(names)}], {self.one(1, 1, -self.dims - 1)})")

    def part(self) -> bool:
        x = self.value()
        count = self.channels(x)
        form = self.one("{x}[:, :{n}]", "{x}[:, {n}:]", "{x}.chunk(2, 1)[{i}]", "torch.split({x}, {n}, 1)[{i}]")
        return self.step(form.format(x=x, n=self.number(1, max(1, count - 1)), i=self.number(0, 1)))

    def in_place(self) -> bool:
        x, y = self.value(), self.value()
        form = self.one("{x} += {y}", "{x}.add_({y})", "{x}.mul_(0.5)", "F.relu({x}, inplace=True)", "{x} *= 2")
        alike = self.text.values[x].shape == self.text.values[y].shape
        return alike and x not in self.text.arguments and self.step(form.format(x=x, y=y), writes=x)

    def again(self) -> bool:
        """A layer or block that is there already, called once more."""
        names = [name for name, held in self.text.held.items() if isinstance(held, nn.Module)]
        return bool(names) and self.step(f"self.{self.one(*names)}({self.value()})")

    def picked(self) -> bool:
        x, y = self.value(), self.value()
        alike = self.text.values[x].shape == self.text.values[y].shape
        return alike and self.step(self.one(*PICKS).format(x=x, y=y, t=self.test()))

    def perhaps(self) -> bool:
        """A layer that keeps shapes, run where a condition holds or does not."""
        x, d = self.value(), self.dims
        layer = self.one(
            f"nn.BatchNorm{d}d({self.channels(x)})", f"nn.Conv{d}d({self.channels(x)}, {self.channels(x)}, 1)"
        )
        name, test = self.hold(layer), self.one("not {}", "{}").format(self.test())
        return self.step(f"if {test}:\n    {x} = self.{name}({x})", writes=x)

    def early(self) -> bool:
        """A value given back where a condition holds, which does not."""
        self.text.lines.append(f"if {self.test()}:\n    return {self.value()}")
        return True

    def in_turn(self) -> bool:
        """Layers in a list, all of them or as many as a setting says."""
        x, d, name = self.value(), self.dims, f"v{len(self.text.lines)}"
        n = self.channels(x)
        held = self.hold(f"nn.ModuleList([nn.Conv{d}d({n}, {n}, 1), nn.BatchNorm{d}d({n}), nn.Conv{d}d({n}, {n}, 1)])")
        some = self.one("", "[: {}]", "[{} :]").format(self.setting(2, 1))
        loop = f"for layer in self.{held}{some}:\n    {name} = layer({name})"
        return self.step(f"{name} = {x}\n{loop}", writes=name)

    def sized(self) -> bool:
        return self.step(self.one(*SHAPED).format(x=self.value()))

    def branches(self) -> bool:
        """Layers in a list, all on one value."""
        x, d = self.value(), self.dims
        n, half = self.channels(x), self.number(0, 1)
        kinds = (f"nn.Conv{d}d({n}, {n}, 1)", f"nn.Conv{d}d({n}, {n}, {2 * half + 1}, 1, {half}, bias=False)",
                 f"nn.BatchNorm{d}d({n})",
                 f"nn.Sequential(nn.Conv{d}d({n}, {n}, 1), nn.BatchNorm{d}d({n}))")  # fmt: skip
        held = self.hold(f"nn.ModuleList([{', '.join(self.one(*kinds) for _ in range(self.number(2, 3)))}])")
        name = f"v{len(self.text.lines)}"
        return self.step(self.one(*BRANCHES).format(v=name, x=x, l=held), writes=name)

    def called(self) -> bool:
        """A layer that is run in another way than by its name, in brackets."""
        x, d, name = self.value(), self.dims, f"v{len(self.text.lines)}"
        n = self.channels(x)
        held = self.hold(self.one(f"nn.Conv{d}d({n}, {n + 1}, 1)", f"nn.BatchNorm{d}d({n})"))
        return self.step(self.one(*CALLED).format(v=name, x=x, l=held, d=d + 2), writes=name)

    def by_a_method(self) -> bool:
        """A layer that another method or property runs or gives."""
        x, d = self.value(), self.dims
        n, name = self.channels(x), f"m{len(self.text.methods)}"
        held = self.hold(self.one(f"nn.Conv{d}d({n}, {n + 1}, 1)", f"nn.BatchNorm{d}d({n})"))
        self.text.methods.append(self.one(*METHODS).format(m=name, l=held))
        return self.step(f"self.{name}({x})")

    def by_a_setting(self) -> bool:
        return self.step(f"{self.value()} * {self.setting(2.0, 3.0)}")

    def block(self) -> bool:
        """A module of its own, on a value with the channels that it takes."""
        if not self.blocks:
            return False
        block = self.one(*self.blocks)
        self.namespace.setdefault(block.name, _compiled(block, self.namespace))
        made = self.step(f"self.{self.hold(f'{block.name}()')}({self.value()})")
        return made and (self.draw(st.booleans()) or self.norm(list(self.text.values)[-1]))

    def run(self, steps: int) -> None:
        """That many steps, then what is given back."""
        kinds = [
            self.conv, self.conv, self.plain_conv, self.plain_conv, self.transposed, self.functional_conv, self.norm,
            self.norm, self.scale, self.pool, self.pad, self.nothing, self.curve, self.total, self.total, self.total,
            self.stacked, self.part, self.in_place, self.again, self.block, self.norm_of_each, self.linear, self.linear,
            self.moved, self.moved, self.scale_of_last, self.picked, self.perhaps, self.early, self.in_turn,
            self.by_a_setting, self.sized, self.sized, self.branches, self.branches, self.called, self.called,
            self.by_a_method,
        ]  # fmt: skip
        for _ in range(steps):
            self.one(*kinds)()


def _compiled(text: Text, namespace: dict[str, Any]) -> Any:
    scope = dict(namespace)
    exec(str(text), scope)
    return scope[text.name]


def _written(
    draw: Any, name: str, dims: int, inputs: list[Tensor], steps: int, blocks: list[Text]
) -> tuple[Text, float]:
    text = Text(name, [f"x{index}" for index in range(len(inputs))])
    text.values.update(zip(text.arguments, inputs, strict=True))
    writer = Writer(draw, dims, text, blocks)
    if name == "Block" and draw(st.booleans()):
        writer.early()
    writer.run(steps)
    if name == "Block" and draw(st.booleans()):
        writer.plain_conv()
    last = list(text.values)[-1]
    if name == "Net" and draw(st.booleans()):
        given = [last, *draw(st.lists(st.sampled_from(list(text.values)), max_size=2))]
        text.result = draw(st.sampled_from(["({},)", "{{'out': [{}]}}"])).format(", ".join(given))
    else:
        text.result = last
    if name == "Net" and draw(st.booleans()):
        text.methods.append(_cut_short(draw, text))
    return text, writer.peak


def _cut_short(draw: Any, text: Text) -> str:
    """Another forward: the first lines of the one that there is, and a value that there is by then."""
    count = draw(st.integers(1, max(1, len(text.lines))))
    lines = text.lines[:count]
    made = [name for name in text.values if name in text.arguments or any(_gives(line, name) for line in lines)]
    body = textwrap.indent("\n".join((*lines, f"return {draw(st.sampled_from(made))}")), " " * 4)
    return f"def forward_some(self, {text.given()}):\n{body}"


def _gives(line: str, name: str) -> bool:
    return bool(re.search(rf"^{name} =", line, re.MULTILINE))


@st.composite
def programs(draw: Any, steps: int = 12) -> Program:
    """A program of one to three dims with one or two inputs."""
    dims = draw(st.sampled_from([2, 2, 2, 1, 3]))
    seed = draw(st.integers(0, 2**16))
    channels = draw(st.integers(1, 4))
    sizes = [draw(st.integers(3, 7 if dims < 3 else 4)) for _ in range(dims)]
    shapes = [(draw(st.integers(1, 2)), channels, *sizes)]
    if draw(st.booleans()):
        shapes.append((shapes[0][0], draw(st.sampled_from([channels, draw(st.integers(1, 4))])), *sizes))
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    blocks = []
    if draw(st.booleans()):
        blocks.append(_written(draw, "Block", dims, inputs[:1], draw(st.integers(1, 5)), [])[0])
    text, peak = _written(draw, "Net", dims, inputs, draw(st.integers(1, steps)), blocks)
    whole = "\n\n\n".join((HELPERS, *map(str, (*blocks, text))))
    settings = [(one.name, name, later) for one in (*blocks, text) for name, (_, later) in one.settings.items()]
    others = ["forward_some"] if "forward_some" in whole else []
    return Program(whole, seed, shapes, peak, settings, text.flags, others)
