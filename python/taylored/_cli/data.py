"""Images for the command: scikit-learn's digits, a folder in torchvision's ImageFolder form, or one of images without classes.

`find` looks at what is there and complains early; `Source.load` decodes every image once into uint8 memory (or, above
MEMORY_LIMIT, on every visit) and returns loaders of normalised float batches. Random crops draw from torch's global
generator alone, so `torch.manual_seed` fixes them.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded images that are kept
RESIZE = 256 / 224  # shorter side kept : image size, as torchvision and timm evaluate
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS = ((0.3053,), (0.3760,))  # mean and standard deviation of the 1797 digits' pixels, in 0..1
HELD_OUT = 5  # of images without classes, in the order of their names, every fifth is the test split


class DataError(ValueError):
    """The data are missing, damaged, or not of the expected form."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What was found: the classes (none where images have no labels), and the files of each split with their class indices (no
    files for the digits; indices of 0 where there are no classes)."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int | None  # the images' own, where they have one
    files: dict[str, tuple[tuple[str, int], ...]]

    def load(self, image_size: int, channels: int, mean, std, batch_size: int, workers: int = 0) -> tuple["Batches", "Batches"]:
        """Loaders of the train and the test split. Raises DataError, naming the file, for an image that is damaged."""
        pictures = self._pictures(image_size, channels) if self.files else _digits(image_size, channels)
        mean, std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
        train, test = (
            Batches(split, batch_size, mean, std, train, workers if isinstance(split, Files) else 0)
            for split, train in zip(pictures, (True, False), strict=True)
        )
        return train, test

    def _pictures(self, image_size, channels):
        side = round(image_size * RESIZE)
        count = sum(map(len, self.files.values()))
        kind = InMemory if count * channels * side * side * 4 // 3 <= MEMORY_LIMIT else Files  # photographs are 4:3
        return tuple(kind(self.files[split], image_size, side, channels, split == "train") for split in ("train", "test"))


def find(name: str, unlabelled: bool = False) -> Source:
    """The data called `name`: "digits", or a folder with train/CLASS/* and test/CLASS/*. Decodes nothing.

    unlabelled: it may also be a folder with images and no train/ in it: a Source without classes."""
    if name == "digits":
        return Source("digits", tuple("0123456789"), 1, 8, {})
    root = Path(name)
    if not root.is_dir():
        flat = ", or a folder of images" if unlabelled else ""
        raise DataError(f"--data {name}: no such folder; expected 'digits', a folder with train/CLASS/* and test/CLASS/*{flat}")
    if unlabelled and not (root / "train").is_dir():
        return Source(name, (), 3, None, _flat(root))
    classes, files = {}, {}
    for split in ("train", "test"):
        classes[split], files[split] = _scan(root / split)
    if classes["train"] != classes["test"]:
        alone = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise DataError(f"--data {name}: train and test must have the same class folders; only one of them has {alone}")
    if len(classes["train"]) < 2:
        raise DataError(f"--data {name}: a classifier needs 2 classes or more, train has only {classes['train']}")
    return Source(name, tuple(classes["train"]), 3, None, files)


def _flat(root: Path) -> dict[str, tuple[tuple[str, int], ...]]:
    """The splits of a folder of images."""
    extensions = _folders().IMG_EXTENSIONS
    files = [(str(path), 0) for path in sorted(root.iterdir()) if path.suffix.lower() in extensions]
    if len(files) < HELD_OUT:
        raise DataError(
            f"--data: {root} has {len(files)} images and no train folder; expected train/CLASS/* and test/CLASS/*, or "
            f"{HELD_OUT} images or more ({', '.join(extensions)})"
        )
    held_out = tuple(files[HELD_OUT - 1 :: HELD_OUT])
    return {"train": tuple(f for i, f in enumerate(files, start=1) if i % HELD_OUT), "test": held_out}


def _folders():
    """torchvision's module that reads folders."""
    try:
        from torchvision.datasets import folder
    except ModuleNotFoundError as error:
        raise DataError("--data: reading folders needs torchvision: pip install 'taylored[cli]'") from error
    return folder


def _scan(folder: Path):
    """Classes and (file, class index) pairs of one split."""
    if not folder.is_dir():
        raise DataError(f"--data: {folder} is missing; expected a folder with one folder of images per class")
    reader = _folders()
    extensions = reader.IMG_EXTENSIONS
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"--data: {folder} has no class folders; expected {folder}/CLASS/*.jpg")
    index = {name: i for i, name in enumerate(classes)}
    files = reader.make_dataset(str(folder), index, extensions, allow_empty=True)
    if empty := [name for name in classes if index[name] not in {i for _, i in files}]:
        raise DataError(f"--data: {folder / empty[0]} has no images ({', '.join(extensions)})")
    return classes, tuple(files)


class Batches:
    """Iterates over (float images [N, C, H, W], labels [N]); the length is in batches.

    A training epoch is shuffled and leaves out an incomplete last batch: batch norm cannot train on a single image."""

    def __init__(self, images: "Digits | Files", batch_size: int, mean, std, train: bool, workers: int = 0):
        self.images = images
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        drop = train and len(images) > batch_size
        self.batch_size = batch_size
        self.loader: DataLoader = DataLoader(
            images,
            batch_size,
            shuffle=train,
            drop_last=drop,
            num_workers=workers,
            collate_fn=_as_they_are,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pixels, labels in self.loader:
            yield pixels.float().div_(255).sub_(self.mean).div_(self.std), labels

    def sample(self, examples: int) -> "Batches":
        """So many of the images (or all there are), drawn at random once, crops and all: the same at every iteration."""
        return self._of(*self.images.__getitems__(torch.randperm(len(self.images))[:examples].tolist()))

    def calibration(self, examples: int) -> "Batches":
        """So many of the images (or all there are) as a test split shows them: always the same ones, in the same order, in which
        classes are mixed."""
        generator = torch.Generator().manual_seed(0)
        return self._of(*self.images.still(torch.randperm(len(self.images), generator=generator)[:examples].tolist()))

    def _of(self, pixels, labels) -> "Batches":
        """These images, in the same batches."""
        return Batches(Digits(pixels, labels, shift=0), self.batch_size, self.mean.flatten(), self.std.flatten(), train=False)


def _as_they_are(batch):
    return batch


class Digits(Dataset):
    """uint8 images in one tensor; training shifts each by up to an eighth of its side."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, shift: int):
        self.pixels, self.labels, self.shift = pixels, labels, shift

    def __len__(self):
        return len(self.labels)

    def still(self, indices):
        """Images and labels, not shifted."""
        return self.pixels[indices], self.labels[indices]

    def __getitems__(self, indices):
        batch = self.pixels[indices]  # [N, C, H, W]
        if self.shift:
            batch = _shifted(batch, self.shift)
        return batch, self.labels[indices]


def _shifted(batch, most: int):
    """Every image moved by its own (dy, dx), each in -most..most; zeros move in."""
    n, _, h, w = batch.shape
    windows = F.pad(batch, (most, most, most, most)).unfold(2, h, 1).unfold(3, w, 1)  # [N, C, dy, dx, H, W]
    dy, dx = torch.randint(2 * most + 1, (2, n))
    return windows[torch.arange(n), :, dy, dx]


def _digits(image_size, channels):
    """scikit-learn's handwritten digits: 1437 to train on, 360 to test on, every class in proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DataError("--data digits needs scikit-learn: pip install 'taylored[cli]'") from error
    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] * (255 / 16)  # [1797, 1, 8, 8]
    if image_size != 8:
        pixels = F.interpolate(pixels, (image_size, image_size), mode="bilinear").clamp_(0, 255)
    pixels = pixels.round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(found.target).long()
    # A fixed split, whatever the seed: accuracies of different runs must be comparable.
    splits = train_test_split(range(len(labels)), test_size=0.2, stratify=found.target, random_state=0)
    return tuple(Digits(pixels[s], labels[s], shift) for s, shift in zip(splits, (max(1, image_size // 8), 0), strict=True))


class Files(Dataset):
    """Image files, decoded on every visit; training takes a random crop and mirrors half of them, testing the middle."""

    def __init__(self, files, image_size: int, side: int, channels: int, train: bool):
        from torchvision.transforms import v2

        self.files, self.side, self.channels = files, side, channels
        self.labels = torch.tensor([label for _, label in files])
        random = [v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        self.middle = v2.CenterCrop(image_size)
        self.crop = v2.Compose(random) if train else self.middle

    def __len__(self):
        return len(self.files)

    def decoded(self, index) -> torch.Tensor:
        return decode(self.files[index][0], self.side, self.channels)

    def still(self, indices):
        """The middles of images, and labels."""
        return torch.stack([self.middle(self.decoded(i)) for i in indices]), self.labels[indices]

    def __getitems__(self, indices):
        return torch.stack([self.crop(self.decoded(i)) for i in indices]), self.labels[indices]


class InMemory(Files):
    """The same, decoded once."""

    def __init__(self, files, image_size, side, channels, train):
        super().__init__(files, image_size, side, channels, train)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow decodes outside of the interpreter's lock
            self.pixels = list(pool.map(super().decoded, range(len(files))))

    def decoded(self, index):
        return self.pixels[index]


def decode(path: str, side: int, channels: int) -> torch.Tensor:
    """An image file as uint8 [channels, H, W] with a shorter side of `side` pixels."""
    import numpy as np
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            image.draft(mode, (side, side))  # JPEG: decode at the nearest larger eighth, several times faster
            image = image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"--data: {path} cannot be read as an image: {error}") from error
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).reshape(size[1], size[0], channels).permute(2, 0, 1).contiguous()


def _per_channel(argument, values, channels) -> torch.Tensor:
    values = tuple(values)
    if len(values) not in (1, channels):
        raise DataError(f"--{argument} has {len(values)} numbers; expected 1 or {channels}, one per channel of the model's input")
    return torch.tensor(values * (channels if len(values) == 1 else 1))
