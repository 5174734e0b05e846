"""VGG16-BN at half its width, for 32x32 images, and its training on CIFAR-10: the network whose units the criteria are
compared on. FOLDER has train/CLASS/* and test/CLASS/*.

    python benchmarks/cifar10_vgg.py FOLDER weights.pth [--epochs 30]
    taylored rank --data FOLDER --model benchmarks/cifar10_vgg.py:vgg16_bn_half --weights weights.pth --image-size 32 --out DIR
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

WIDTHS = [32, 32, "M", 64, 64, "M", 128, 128, 128, "M", 256, 256, 256, "M", 256, 256, 256, "M"]


def vgg16_bn_half(num_classes: int = 10) -> nn.Module:
    """Thirteen convolutions with batch norm, five poolings (32x32 -> 1x1), one linear layer."""
    layers, channels = [], 3
    for width in WIDTHS:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))


def augmented(images):
    """Each image moved by its own shift of up to four pixels, mirrored or not."""
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # [N, 3, 9, 9, 32, 32]
    dy, dx = torch.randint(9, (2, len(images)))
    images = windows[torch.arange(len(images)), :, dy, dx]
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))


def load(folder, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images, labels = zip(*ImageFolder(folder, transform), strict=True)
    return torch.stack(images), torch.tensor(labels)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("weights")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args()
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = load(f"{options.folder}/train"), load(f"{options.folder}/test")
    model = vgg16_bn_half().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = options.epochs * (len(x) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(options.epochs):
        model.train()
        for rows in torch.randperm(len(x))[: len(x) // options.batch * options.batch].split(options.batch):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(augmented(x[rows]).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(output.float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(test_x.split(500), test_y.split(500), strict=True))
        torch.save(model.state_dict(), options.weights)
        print(f"epoch {epoch + 1}: test accuracy {right / len(test_y):.2%}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
