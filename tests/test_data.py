"""Images: splits, crops and normalisation are what they are said to be, and damage is found early."""

import pytest
import torch
from PIL import Image

from taylored._cli import data
from taylored._cli.data import DataError


def picture(path, size=(40, 30), colour=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def photos(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        for i, name in enumerate(("ant", "bee")):
            for n in range(count):
                picture(tmp_path / split / name / f"{n}.png", (40 + 7 * n, 30), (90 * i, 0, 250))
    return tmp_path


def test_digits_are_split_the_same_way_whatever_the_seed():
    source = data.find("digits")
    labels = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        train, test = source.load(8, 1, *data.DIGITS, batch_size=360)
        labels.append(torch.cat([y for _, y in test]))
    assert torch.equal(*labels) and len(labels[0]) == 360 and len(train.images) == 1437
    assert torch.bincount(labels[0]).min() >= 34  # every class in proportion


def test_digits_are_normalised():
    train, test = data.find("digits").load(8, 1, *data.DIGITS, batch_size=64)
    pixels = torch.cat([x for x, _ in test])
    assert pixels.shape[1:] == (1, 8, 8) and abs(pixels.mean()) < 0.05 and abs(pixels.std() - 1) < 0.05
    assert len(train) == 1437 // 64 == len(list(train))


def test_digits_can_be_shown_larger_and_in_three_channels():
    _, test = data.find("digits").load(32, 3, *data.DIGITS, batch_size=10)
    x, _ = next(iter(test))
    assert x.shape == (10, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2])


def test_shifting_moves_whole_images():
    batch = torch.randint(1, 255, (64, 1, 8, 8), dtype=torch.uint8)
    moved = data._shifted(batch, 1)
    assert moved.shape == batch.shape
    shifts = torch.stack(
        [torch.nn.functional.pad(batch, (1 + x, 1 - x, 1 + y, 1 - y))[:, :, 1:9, 1:9] for x in (-1, 0, 1) for y in (-1, 0, 1)]
    )
    assert (shifts == moved).flatten(2).all(2).any(0).all()


@pytest.mark.parametrize("limit", [2**30, 0])
def test_the_test_split_is_the_middle_of_every_image_in_order(photos, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    source = data.find(str(photos))
    _, test = source.load(16, 3, (0.0,), (1.0,), batch_size=4)
    assert type(test.images) is (data.InMemory if limit else data.Files)
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    assert source.classes == ("ant", "bee") and y.tolist() == [0, 0, 0, 1, 1, 1]
    assert x.shape == (6, 3, 16, 16) and torch.allclose(x[3:, 0], torch.tensor(90 / 255), atol=0.01)


def test_mean_and_std_are_per_channel(photos):
    _, test = data.find(str(photos)).load(16, 3, (0.0, 0.5, 1.0), (1.0, 0.5, 0.1), batch_size=6)
    x, _ = next(iter(test))
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([0.0, -1.0, (250 / 255 - 1) / 0.1]), atol=1e-3)


def test_a_training_epoch_has_the_seeds_order_and_crops(photos):
    train, _ = data.find(str(photos)).load(16, 3, *data.IMAGENET, batch_size=4)
    epochs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        epochs.append([y for _, y in train])
    assert all(map(torch.equal, epochs[0], epochs[1]))
    assert len(train) == 2  # the 2 images that are left over are left out


def test_workers_decode_the_same(photos, monkeypatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    loaders = [data.find(str(photos)).load(16, 3, *data.IMAGENET, 4, workers)[1] for workers in (0, 1)]
    for (a, _), (b, _) in zip(*loaders, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(7, 300), (300, 7), (1, 1), (256, 256)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_any_shape_and_mode_decodes(tmp_path, size, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, size).save(path)
    pixels = data.decode(str(path), 18, 3)
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and min(pixels.shape[1:]) == 18


def remove(path):
    for file in sorted(path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: remove(root), "no such folder"),
        (lambda root: remove(root / "test"), "test is missing"),
        (lambda root: (root / "train" / "cow").mkdir(), "cow has no images"),
        (lambda root: picture(root / "train" / "cow" / "0.png"), r"only one of them has \['cow'\]"),
        (lambda root: [remove(root / split / "bee") for split in ("train", "test")], "2 classes or more"),
        (lambda root: [remove(root / "train" / name) for name in ("ant", "bee")], "no class folders"),
    ],
)
def test_wrong_folders_are_told(photos, damage, said):
    damage(photos)
    with pytest.raises(DataError, match=said):
        data.find(str(photos))


def test_a_damaged_image_is_named(photos):
    (photos / "train" / "bee" / "0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"bee.0\.png cannot be read"):
        data.find(str(photos)).load(16, 3, *data.IMAGENET, batch_size=4)
