"""Models by name, their weights, and their last layers."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from taylored._cli import zoo
from taylored._cli.zoo import ModelError


def renamed(state, counters=True):
    """A state dict as another implementation would name it: same order, same kinds."""
    kinds = [(n.rpartition(".")[2], t) for n, t in state.items() if counters or not n.endswith(zoo.COUNTER)]
    return {f"part{i}.{kind}": t for i, (kind, t) in enumerate(kinds)}


def small(classes=10, seed=0):
    torch.manual_seed(seed)
    return zoo.small_vgg(classes, 3)


def same(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if not n.endswith(zoo.COUNTER))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vgg11_bn", "classifier.6"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("googlenet", "fc"),
        ("timm:tf_efficientnet_lite0", "classifier"),
        ("timm:resnet18", "fc"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_the_last_layer_gets_the_number_of_classes(name, head):
    network = zoo.build(name, "none", 7, image_size=64)
    assert network.new_head == head and network.channels == 3
    output = network.model.train()(torch.zeros(2, 3, 64, 64))
    assert output.shape == (2, 7)


def test_preprocessing_is_the_models_own():
    assert zoo.build("timm:tf_efficientnet_lite0", "none", 10).mean == (0.5, 0.5, 0.5)
    network = zoo.build("resnet18", "none", 10)
    assert network.image_size == 224 and network.mean == (0.485, 0.456, 0.406)


def test_small_vgg_has_the_classes_and_channels_it_is_asked_for():
    network = zoo.build("small_vgg", "none", 4, channels=1, image_size=8)
    assert network.new_head is None and network.model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert 0.1e6 < sum(p.numel() for p in network.model.parameters()) < 0.3e6


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_weights_are_matched_by_name(tmp_path, suffix, wrap):
    state, path = small(seed=1).state_dict(), tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state} if wrap else {f"module.{n}": t for n, t in state.items()}, path)
    model = small()
    assert zoo.load_weights(model, "classifier", str(path)) is None and same(model, state)


@pytest.mark.parametrize("counters", [True, False])
def test_weights_under_other_names_are_matched_by_order(tmp_path, counters):
    state = small(seed=1).state_dict()
    torch.save(renamed(state, counters), tmp_path / "w.pth")
    model = small()
    assert "by order" in zoo.load_weights(model, "classifier", str(tmp_path / "w.pth")) and same(model, state)


@pytest.mark.parametrize("rename", [dict, renamed])
def test_a_file_with_other_classes_keeps_its_body(tmp_path, rename):
    state = small(classes=5, seed=1).state_dict()
    torch.save(rename(state), tmp_path / "w.pth")
    network = zoo.build("small_vgg", str(tmp_path / "w.pth"), 2, image_size=16)
    assert network.new_head == "classifier" and network.model.classifier.out_features == 2
    assert torch.equal(network.model.conv2_1.weight, state["conv2_1.weight"])
    again = zoo.build("small_vgg", str(tmp_path / "w.pth"), 5, image_size=16)
    assert again.new_head is None and same(again.model, state)


def swap_kinds(state):
    """Scale and shift of a norm exchanged: every shape agrees, and it is wrong."""
    items = list(renamed(state).items())
    items[1], items[2] = items[2], items[1]
    return dict(items)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "conv1_2.weight"}, "it lacks conv1_2.weight"),
        (lambda s: s | {"extra": torch.zeros(1)}, "the model lacks extra"),
        (lambda s: s | {"conv1_2.weight": torch.zeros(3, 3)}, "conv1_2.weight has shape"),
        (lambda s: dict(list(renamed(s).items())[:-1]), "no name agrees"),
        (swap_kinds, "no name agrees, and in order part2.bias"),
        (lambda s: s | {"plan:keep/0/conv1_1.weight": torch.zeros(1)}, "taylored.load"),
        (lambda s: {}, "no tensors by name"),
        (lambda s: [1, 2], "no tensors by name"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, file, said):
    torch.save(file(small().state_dict()), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=said):
        zoo.load_weights(small(), "classifier", str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be read"):
        zoo.read_weights(str(tmp_path / name))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="cannot be read"):
        zoo.read_weights(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def make(): return 3", "returned a int"),
        ("make = 3", "no function"),
        ("1 / 0", "ZeroDivisionError"),
        ("def make(): raise RuntimeError('no')", "RuntimeError: no"),
        ("from torch import nn\nmake = nn.Identity", "no convolution"),
        ("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 1)", r"expected a tensor of shape \[images, classes\]"),
        ("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())", "no linear layer"),
        ("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 99))", "cannot run on an image"),
    ],
)
def test_a_file_that_makes_no_classifier_is_told(tmp_path, source, said):
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(ModelError, match=said):
        zoo.build(f"{tmp_path / 'net.py'}:make", "none", 2, image_size=16)


def test_a_failed_download_is_told(monkeypatch):
    def fail(*_, **__):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ModelError, match=r"resnet18 could not be had .the network is unreachable"):
        zoo.build("resnet18", "DEFAULT", 2)


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 7\n")
    lines = "from neighbour_of_mine import WIDTH", "from torch import nn", "def make():", "    return nn.Sequential("
    layers = "nn.Conv2d(3, WIDTH, 3)", "nn.AdaptiveAvgPool2d(1)", "nn.Flatten()", "nn.Linear(WIDTH, 2))"
    (tmp_path / "mine.py").write_text("\n".join(lines) + ", ".join(layers))
    assert zoo.build(f"{tmp_path / 'mine.py'}:make", "none", 2).model[0].out_channels == 7
