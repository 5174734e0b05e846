"""What the command understands: its options, their defaults, and what a wrong one is told."""

import argparse
import math

from taylored._export import FORMATS
from taylored._oracle.measure import PRECISIONS, parse_memory
from taylored._planning import NORMS
from taylored.criteria import CRITERIA


def parser(version: str) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="taylored", description="Networks tailored by Taylor: prune a trained CNN's channels and retrain."
    )
    top.add_argument("--version", action="version", version=f"taylored {version}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, line, description in (
        (
            "prune",
            _prune_options,
            "prune an image classifier to a budget of FLOPs",
            "Fit a classifier to a folder of images, prune it to a budget while it trains, and report.",
        ),
        (
            "shrink",
            _shrink_options,
            "cut a pretrained image classifier without training it",
            "Remove what the rest of a classifier can replace, and let the rest replace it by least squares, on images without "
            "their labels. As for prune, a model without weights is trained first, and so is a new last layer; nothing is "
            "trained after a cut. Reports what mending restored, for one budget of FLOPs or several. --resume takes the fitted "
            "model from --out and cuts anew.",
        ),
        (
            "rank",
            _rank_options,
            "judge criteria of pruning by the oracle",
            "Measure what a classifier loses without each of its units, score the units by every criterion, and report which "
            "criteria agree with the measurement. Runs on several processes under torchrun.",
        ),
        (
            "export",
            _export_options,
            "write a pruned model for ONNX or torch.export",
            "Build the model that a file of taylored was pruned from, load the file into it, and write it for another runtime; "
            "the written model is run and compared.",
        ),
    ):
        add(commands.add_parser(name, help=line, description=description, formatter_class=_Help))
    return top


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default where there is one and the text does not."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == [] or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


def _prune_options(p) -> None:
    _what_and_images(p)
    group = _training(p)
    group.add_argument(
        "--lr",
        type=_number(float, 0),
        metavar="X",
        help="AdamW's learning rate while pruning; it falls to 0.01 of itself after the last cut (default: 1e-4 with weights, "
        "else 3e-4)",
    )
    group.add_argument(
        "--batch-norm",
        choices=("frozen", "train"),
        help="from the first round on: use the statistics there are, or each batch's (default: frozen with weights, else train)",
    )
    group.add_argument("--rounds", type=POSITIVE, default=10, metavar="N", help="cuts on the way to the budget")
    group.add_argument(
        "--round-epochs", type=_number(float, 1e-6), default=1.0, metavar="X", help="trained, and scored, before each cut"
    )
    group.add_argument("--final-epochs", type=NUMBER, default=10, metavar="N", help="after the last cut")
    group = p.add_argument_group("pruning")
    group.add_argument(
        "--target-flops", type=_fraction_above_0, default=0.5, metavar="F", help="share of the FLOPs that may remain, in (0, 1]"
    )
    group.add_argument(
        "--reduction",
        choices=("abs", "batch", "square"),
        default="abs",
        help="how contributions become scores: mean of |t|, |sum of a batch|, mean of t^2",
    )
    group.add_argument("--normalize", choices=tuple(NORMS), default="l2", help="norm by which each group's scores are divided")
    group.add_argument(
        "--flops-weight", type=_number(float, 0), default=1e-3, metavar="X", help="lambda in: score - lambda * FLOPs of the unit"
    )
    group.add_argument("--round-to", type=POSITIVE, default=1, metavar="N", help="keep a multiple of N channels per layer")
    group.add_argument("--min-units", type=POSITIVE, default=1, metavar="N", help="units that every group keeps")
    group.add_argument("--max-ratio", type=FRACTION, default=1.0, metavar="X", help="share of a group that may go")
    group.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules or groups that stay as they are")
    group = _machine(p)
    group.add_argument("--latency-batch", type=POSITIVE, default=8, metavar="N", help="images per batch when latency is measured")


def _shrink_options(p) -> None:
    _what_and_images(
        p,
        data="'digits', a folder with train/CLASS/* and test/CLASS/*, or one of images without classes: the model stays as it "
        "comes, and what is reported is how often it agrees with the uncut one on every fifth image, held out",
        resume="take the fitted model from --out; the cuts are made anew",
    )
    _training(p)
    p.set_defaults(lr=None)
    group = p.add_argument_group("shrinking")
    group.add_argument(
        "--target-flops", type=_fraction_above_0, default=0.65, metavar="F", help="share of the FLOPs that may remain, in (0, 1]"
    )
    group.add_argument(
        "--sweep", type=_fractions, default=[], metavar="F,F,...", help="further such shares, each a model of its own: 0.8,0.5"
    )
    group.add_argument("--rounds", type=POSITIVE, default=1, metavar="N", help="cuts on the way to the budget")
    group.add_argument("--round-to", type=POSITIVE, default=8, metavar="N", help="keep a multiple of N channels per layer")
    group.add_argument("--ignore", nargs="+", default=[], metavar="NAME", help="modules or groups that stay as they are")
    group.add_argument("--examples", type=_number(int, 2), default=1000, metavar="N", help="training images to cut and mend on")
    _machine(p)


def _rank_options(p) -> None:
    _what_and_images(p)
    _training(p)
    p.set_defaults(lr=None)  # what `prune` trains weights at, where epochs are asked for and the last layer is not new
    group = p.add_argument_group("ranking")
    group.add_argument(
        "--criteria",
        nargs="+",
        choices=("all", *CRITERIA),
        default=["all"],
        metavar="NAME",
        help="one or more of: %(choices)s",
    )
    group.add_argument("--examples", type=POSITIVE, default=1000, metavar="N", help="training images to judge on")
    group.add_argument(
        "--units", type=_number(int, 2), metavar="N", help="measure only so many of each group, drawn at random (default: all)"
    )
    group.add_argument("--memory", type=_memory, default="1GiB", metavar="SIZE", help="for the oracle's values: '512MiB', '4GiB'")
    group.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="float32", help="of the oracle; bfloat16 is faster and approximate"
    )
    _machine(p)


def _export_options(p) -> None:
    p.add_argument("--pruned", required=True, metavar="FILE", help="what `taylored prune`, `shrink` or `taylored.save` wrote")
    p.add_argument("--out", required=True, metavar="FILE", help=f"the file to write, ending in one of {', '.join(FORMATS)}")
    p.add_argument("--model", metavar="NAME", help="as for prune (default: the one that the file names)")
    p.add_argument(
        "--classes", type=POSITIVE, metavar="N", help="that the model tells apart (default: as in the file, or its own)"
    )
    p.add_argument(
        "--image-size", type=POSITIVE, metavar="N", help="side of the images (default: as in the file, or the model's)"
    )
    p.add_argument("--batch", type=POSITIVE, metavar="N", help="images per batch, fixed (default: any number)")


def _what_and_images(
    p, data="'digits', or a folder with train/CLASS/* and test/CLASS/*", resume="go on from what --out has"
) -> None:
    group = p.add_argument_group("what")
    group.add_argument("--data", default="digits", metavar="SRC", help=data)
    group.add_argument(
        "--model", default="small_vgg", metavar="NAME", help="a torchvision name, timm:NAME, small_vgg or file.py:function"
    )
    group.add_argument(
        "--weights", default="none", metavar="W", help="'none', 'DEFAULT' (download), or a .safetensors, .pth or .pt file"
    )
    group.add_argument("--out", required=True, metavar="DIR", help="where the model, the figures and the report go")
    group.add_argument("--resume", action="store_true", help=resume)
    group = p.add_argument_group("images")
    group.add_argument(
        "--image-size",
        type=POSITIVE,
        metavar="N",
        help="side of the square the model sees (default: the model's; digits: 8)",
    )
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)")
    group.add_argument(
        "--std", type=_number(float, 1e-6), nargs="+", metavar="X", help="of the pixels in 0..1 (default: the model's)"
    )
    group.add_argument("--batch-size", type=POSITIVE, default=32, metavar="N", help="images per batch")
    group.add_argument(
        "--workers",
        type=NUMBER,
        default=0,
        metavar="N",
        help="processes that decode images, where they are too many to be kept decoded in memory",
    )


def _training(p):
    group = p.add_argument_group("training")
    group.add_argument(
        "--train-epochs",
        type=NUMBER,
        metavar="N",
        help="at first (default: 20 without weights, all layers; 3 for a new last layer, that alone; else 0)",
    )
    group.add_argument(
        "--train-lr",
        "--head-lr",
        dest="train_lr",
        type=_number(float, 0),
        default=2e-3,
        metavar="X",
        help="AdamW's learning rate at first, falling to 0.01 of itself",
    )
    group.add_argument("--weight-decay", type=_number(float, 0), default=1e-4, metavar="X", help="AdamW's")
    return group


def _machine(p):
    group = p.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.add_argument("--threads", type=POSITIVE, metavar="N", help="of the CPU (default: torch's choice)")
    group.add_argument("--seed", type=NUMBER, default=0, metavar="N", help="of every random choice")
    return group


def _number(kind, least, most=math.inf):
    """An argparse type: a number of that kind within bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {'an integer' if kind is int else 'a number'} {bound}")
        return value

    return parse


NUMBER, POSITIVE, FRACTION = _number(int, 0), _number(int, 1), _number(float, 0, 1)


def _memory(text):
    try:
        parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected bytes, or text like '512MiB' or '2GiB'") from error
    return text


def _fraction_above_0(text):
    value = _number(float, 0, 1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return value


def _fractions(text):
    return [_fraction_above_0(part) for part in text.split(",")]
