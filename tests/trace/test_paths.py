"""Other paths than that of the example: the deploy model does what the model does, or says what it was made for."""

import functools
import itertools

import pytest
import torch.nn.functional as F

from tests.trace.asking import LARGE, SMALL, X, converted, judged, made

# --- what does not --------------------------------------------------------------------------------------------------

TRAPS = []


def trap(forward):
    """A forward whose norm may not be merged into the convolution before it, or whose layers may not be one."""
    TRAPS.append(pytest.param(forward, id=forward.__name__))
    return forward


@trap
def gives_back_what_is_between(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        return y
    return self.n(y)


@trap
def gives_back_what_is_between_by_value(self, x):
    y = self.a(x)
    if x.abs().max() > 1e6:
        return y
    return self.n(y)


@trap
def gives_back_what_is_between_if_one_asks_there(self, x):
    if (y := self.a(x)).shape[2] > 9:
        return y
    return self.n(y)


@trap
def convolution_without_its_norm(self, x):
    if x.shape[2] > 9:
        return self.a(x)
    return self.n(self.a(x))


@trap
def convolution_twice(self, x):
    if x.shape[2] > 9:
        x = self.a(x).relu()
    return self.n(self.a(x))


@trap
def convolution_by_its_weight(self, x):
    if x.shape[2] > 9:
        return F.conv2d(x, self.a.weight)
    return self.n(self.a(x))


@trap
def norm_without_its_convolution(self, x):
    if x.numel() == 0 or x.shape[2] > 9:
        return self.n(x)
    return self.n(self.a(x))


@trap
def norm_twice(self, x):
    y = self.n(self.a(x))
    if x.shape[2] > 9:
        y = self.n(y)
    return y


@trap
def another_norm(self, x):
    y = self.a(x)
    return self.m(y) if x.shape[2] > 9 else self.n(y)


@trap
def another_norm_for_gradients(self, x):
    y = self.a(x)
    return self.m(y) if x.requires_grad else self.n(y)


@trap
def channels_in_another_order(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y = y[:, [1, 0, 3, 2]]
    return self.n(y)


@trap
def written_to(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y[:, 0] = 1
    return self.n(y)


@trap
def written_to_in_place(self, x):
    y = self.a(x)
    if x.shape[2] > 9:
        y += 1
    return self.n(y)


@trap
def input_written_to_meanwhile(self, x):
    x = x.clone()
    y = self.n(x)
    if x.shape[2] > 9:
        x += 1
    return self.b(y)


@trap
def as_many_layers_as_the_input_says(self, x):
    for index in range(x.shape[2] // 4):
        x = self.rows[index](x)
    return x


@trap
def as_many_layers_as_a_name_says(self, x):
    _, _, h, _ = x.shape
    for index in range(h // 4):
        x = self.rows[index](x)
    return x


@trap
def as_many_layers_as_a_slice_says(self, x):
    for layer in self.rows[: x.shape[2] // 4]:
        x = layer(x)
    return x


@trap
def as_many_layers_as_zip_says(self, x):
    for layer, _ in zip(self.rows, range(x.shape[2] // 4), strict=False):
        x = layer(x)
    return x


@trap
def as_many_layers_as_islice_says(self, x):
    for layer in itertools.islice(self.rows, int(x.shape[2] // 4)):
        x = layer(x)
    return x


@trap
def as_many_layers_as_reduce_is_given(self, x):
    return functools.reduce(lambda y, layer: layer(y), list(self.rows)[: int(x.shape[2] // 4)], x)


@trap
def as_many_layers_as_images(self, x):
    for layer, _ in zip(self.rows, x, strict=False):
        x = layer(x)
    return x


@trap
def layers_until_a_break(self, x):
    for index, layer in enumerate(self.rows):
        if index >= x.shape[2] // 4:
            break
        x = layer(x)
    return x


@trap
def layers_while(self, x):
    index = 0
    while index < x.shape[2] // 4:
        x = self.rows[index](x)
        index += 1
    return x


@trap
def one_layer_and_then_some(self, x):
    y = self.rows[0](x)
    for _ in range(x.shape[2] // 8):
        y = self.rows[1](y)
    return y


@trap
def one_round_of_several_before_a_norm(self, x):
    y = x
    for _ in range(x.shape[2] // 6):
        y = self.a(y)
    return self.n(y)


@trap
def one_round_of_several_of_a_norm(self, x):
    y = self.a(x)
    for _ in range(x.shape[2] // 6):
        y = self.n(y)
    return y


@trap
def no_round_between(self, x):
    y = self.a(x)
    for _ in range(x.shape[2] // 12):
        y = y * 2
    return self.n(y)


@trap
def norm_of_an_index(self, x):
    return self.norms[x.shape[2] // 8](self.a(x))


@trap
def norm_of_a_condition(self, x):
    return self.norms[int(x.shape[2] > 9)](self.a(x))


@trap
def norm_of_a_value(self, x):
    return self.norms[int((x.abs().max() > 1e6).item())](self.a(x))


@trap
def norm_of_a_bound(self, x):
    return self.norms[max(0, x.shape[2] // 4 - 2)](self.a(x))


@trap
def norm_of_a_name(self, x):
    return getattr(self, "m" if x.shape[2] > 9 else "n")(self.a(x))


@trap
def norm_of_a_dict(self, x):
    return {8: self.n, 12: self.m}.get(int(x.shape[2]), self.n)(self.a(x))


@trap
def norm_that_sorting_puts_first(self, x):
    return sorted([self.n, self.m], key=lambda one: (x.shape[2] > 9) == (one is self.n))[0](self.a(x))


@trap
def norm_in_a_function(self, x):
    def ends(y):
        if x.shape[2] > 9:
            return y
        return self.n(y)

    return ends(self.a(x))


@trap
def matched(self, x):
    match int(x.shape[2]):
        case 12:
            return self.a(x)
        case _:
            return self.n(self.a(x))


@trap
def caught(self, x):
    y = self.a(x)
    try:
        y = self.n(y) if x.shape[2] < 9 else y.undefined
    except AttributeError:
        y = y * 2
    return y


@trap
def asserted_in_vain(self, x):
    try:
        assert x.shape[2] < 9
    except AssertionError:
        return self.a(x)
    return self.n(self.a(x))


@trap
def factor_of_the_batch(self, x):
    return self.n(self.a(x) * int(x.shape[0]))


@trap
def factor_of_one_for_the_example(self, x):
    return self.n(self.a(x) * (int(x.shape[2]) // 8))


@trap
def factor_of_a_condition(self, x):
    return self.n(self.a(x) * (not x.shape[2] > 9))


@trap
def sum_behind_a_condition(self, x):
    if x.shape[2] > 9:
        x = x * 2
    return self.a(x) + self.b(x)


@trap
def sum_of_as_many_as_the_input_says(self, x):
    return sum(self.rows[index](x) for index in range(x.shape[2] // 4))


@trap
def weights_of_a_size(self, x):
    some = int(x.shape[2]) // 4
    return F.conv2d(F.conv2d(x, self.rows[0].weight[:some]), self.rows[1].weight[:, :some])


@pytest.mark.parametrize("forward", TRAPS)
def test_no_other_path_is_lost(forward):
    for example in (X, LARGE, SMALL, None):
        if forward is weights_of_a_size and example is SMALL:
            continue  # which it does not take
        model = made(forward)
        edited = forward is sum_behind_a_condition and example is not LARGE
        plan, deploy = converted(model, example, int(edited))
        assert not judged(model, deploy)
        assert all(merge.edit == "edit" for merge in plan.merges)
