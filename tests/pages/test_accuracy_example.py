"""examples/accuracy: the merged network decides as the trained one does, and the page says what the results do."""

import pytest
import torch

import structrep
from examples.accuracy import run as study

TINY = study.Regime("digits", share=0.2, shift=1, epochs=1, seeds=1)


@pytest.fixture(scope="module")
def found():
    return study.Study.read(study.HERE / "results.json")


def shapes(net):
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


@pytest.mark.parametrize("family", ["repvgg", "dbb", "ecbsr", "expandnet"])
def test_the_merged_network_is_the_plain_one_and_decides_the_same(family):
    torch.manual_seed(0)
    net = structrep.expand(study.plain_net(), family, init="paper")
    shown, labels = study.training_set(TINY, 0)
    study.train(net, shown, labels, TINY, 0)
    deploy = study.merged(net.eval())
    assert shapes(deploy) == shapes(study.plain_net())
    assert not structrep.expand_layers(deploy)
    images = study.images("digits")[2]
    before, after = net(images), deploy(images)
    assert torch.equal(before.argmax(1), after.argmax(1))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_a_run_is_the_same_twice_and_another_with_another_seed():
    first, again, other = (study.run("tiny", "repvgg", "preserve", seed, TINY, tested=100) for seed in (0, 0, 1))
    assert first == again
    assert (first.loss, first.correct) != (other.loss, other.correct)
    assert (first.blocks, first.differing, first.trained, first.tested) == (5, 0, 179, 100)


def test_all_networks_start_alike_and_see_the_same_images():
    seen, started = {}, {}
    for family in ("plain", "acb", "doconv"):
        torch.manual_seed(0)
        net = study.plain_net()
        if family != "plain":
            net = structrep.expand(net, family)
        started[family] = net.eval()(study.images("digits")[2][:50])
        seen[family] = []
        net.register_forward_pre_hook(lambda module, args, to=seen[family]: to.append(args[0]))
        study.train(net, *study.training_set(TINY, 0), TINY, 0)
    for family in ("acb", "doconv"):
        torch.testing.assert_close(started[family], started["plain"])
        assert len(seen[family]) == 179 // study.BATCH
        assert all(torch.equal(one, plain) for one, plain in zip(seen[family], seen["plain"], strict=True))


def test_halves_and_shares():
    x, _, x_test, _ = study.images("digits")
    assert len(x) + len(x_test) == 1797
    assert x.max() == 1
    assert not {image.numpy().tobytes() for image in x} & {image.numpy().tobytes() for image in x_test}
    (few, _), (same, _), (other, _) = (study.training_set(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(few, same)
    assert not torch.equal(few, other)


def test_the_results_are_whole_and_every_merge_decided_the_same(found):
    kinds = [study.PLAIN, *((family, init) for family in study.FAMILIES for init in study.INITS)]
    assert found.kinds == kinds
    for name, regime in found.regimes.items():
        assert all([one.seed for one in found.of(name, *kind)] == list(range(regime.seeds)) for kind in kinds)
    wide = [one for one in found.runs if one.family != "plain"]
    assert {(one.blocks, one.differing) for one in wide} == {(5, 0)}


def test_the_page_says_what_the_results_do(found, tmp_path):
    page = (study.HERE / "README.md").read_text(encoding="utf-8")
    assert page.split(study.START)[1].split(study.END)[0].strip() == study.tables(found)
    found.write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (study.HERE / "results.json").read_bytes()
    study.write_page(found, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count(study.tables(found)) == 1
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
